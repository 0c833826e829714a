"""How a call drafts and verifies: the drafter's own settings, those of the call, what both allow.

In: settings by name. Out: a `TreeShape` and a `Rule`, or a ValueError that says what does not fit.
"""

from typing import Any, NamedTuple

from transformers import PreTrainedModel
from transformers.utils import logging

from ..target import tree_obstacle
from .texts import Texts
from .tree import TreeShape

logger = logging.get_logger(__name__)

TREE_DEFAULTS = {"tree_depth": 6, "tree_top_k": 10, "tree_nodes": 60}
RULES = ("greedy", "token", "traversal", "block")
TREE_KEYWORDS = tuple(TREE_DEFAULTS)
RULE_KEYWORDS = ("verification", "drawn_tree")
DECODING_KEYWORDS = (*TREE_KEYWORDS, *RULE_KEYWORDS, "speculation")

Settings = dict[str, Any]  # by keyword of `generate`; None where it is left open


class Rule(NamedTuple):
    """How trees are drafted and verified."""

    name: str  # of `RULES`
    is_drawn: bool  # whether a tree's tokens are drawn from the drafter's distribution


def choose_shape(
    model: PreTrainedModel, defaults: Settings, settings: Settings, rule: Rule
) -> tuple[TreeShape, bool]:
    """The largest tree of a call, and whether the target verifies trees.

    Args:
        defaults: the drafter's own settings.
        settings: those of the call, which win; asking for a tree where only a chain is safe raises.
        rule: of which `"block"` takes chains only.
    """
    given: Settings = {name: value for name, value in settings.items() if value is not None}
    wanted = {name: int((given if name in given else defaults)[name]) for name in TREE_KEYWORDS}
    for name, value in wanted.items():
        if value < 1:
            raise ValueError(f"`{name}` is {value}; use a value of at least 1.")
    shape, obstacle = TreeShape(*wanted.values()), chain_reason(model, rule)
    if obstacle is None:
        return shape, True
    if given.get("tree_top_k", 1) > 1:
        raise ValueError(
            f"`tree_top_k` is {given['tree_top_k']}, but {obstacle}. Leave it out, or pass"
            " tree_top_k=1 for a chain."
        )
    logger.info(f"The target drafts in chains: {obstacle}.")
    return TreeShape(shape.depth, 1, shape.depth + 1), tree_obstacle(model) is None


def chain_reason(model: PreTrainedModel, rule: Rule) -> str | None:
    """Why a call is held to chains, if it is."""
    obstacle = tree_obstacle(model)
    if obstacle is not None:
        return f"this target cannot verify a tree: {obstacle}"
    return "verification='block' takes chains" if rule.name == "block" else None


def choose_rule(do_sample: bool, defaults: Settings, settings: Settings) -> Rule:
    """The rule of a call.

    Args:
        defaults: the drafter's own settings; those for sampling have no say in a greedy call.
        settings: those of the call, which must fit it.
    """
    given = {name: settings.get(name) for name in RULE_KEYWORDS}
    if not do_sample:
        for name, value in given.items():
            if value not in (None, "greedy", False):
                raise ValueError(
                    f"`{name}` is {value!r}, but the call is greedy; pass do_sample=True, or leave"
                    " it out."
                )
        return Rule("greedy", False)
    name = given["verification"] or defaults.get("verification") or "token"
    if name not in RULES[1:]:
        raise ValueError(f"`verification` is {name!r}; use one of {RULES[1:]} when sampling.")
    is_drawn = given["drawn_tree"]
    if is_drawn is None:
        is_drawn = defaults.get("drawn_tree")
    return Rule(name, name != "token" if is_drawn is None else bool(is_drawn))


def check_rule(rule: Rule, texts: Texts) -> None:
    """Raise a ValueError if a rule reads scores in an order that a processor cannot follow."""
    reads_all = rule.name in ("traversal", "block")  # every node, accepted or not
    names = texts.unknown if reads_all else texts.stateful if rule.is_drawn else []
    if names:
        raise ValueError(
            f"{names[0]} may remember what it has seen, and this call reads nodes that are never"
            " emitted; pass verification='token' and drawn_tree=False."
        )
    if reads_all and texts.is_lockstep and not texts.is_row_wise:
        raise ValueError(
            f"`verification` is {rule.name!r}, but a logits processor looks at the whole batch;"
            " pass verification='token', or one row at a time."
        )
