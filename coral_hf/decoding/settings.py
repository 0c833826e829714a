"""How a call drafts and verifies: the drafter's settings, those of the call, what a target allows.

In: settings by name, a target, what `generate` has prepared. Out: a `TreeShape` and a `Rule`, or a
ValueError that says what does not fit; nothing is silently done another way.
"""

from copy import copy
from typing import Any, NamedTuple

from transformers import GenerationConfig, PreTrainedModel, StoppingCriteriaList, StopStringCriteria
from transformers.utils import logging

from ..target import position_limit
from .drafting import TreeShape

logger = logging.get_logger(__name__)

TREE_DEFAULTS = {"tree_depth": 6, "tree_top_k": 10, "tree_nodes": 60}
RULES = ("greedy", "token", "traversal", "block")
TREE_KEYWORDS = tuple(TREE_DEFAULTS)
RULE_KEYWORDS = ("verification", "drawn_tree")
DECODING_KEYWORDS = (*TREE_KEYWORDS, *RULE_KEYWORDS, "speculation")

Settings = dict[str, Any]  # by keyword of `generate`


class Rule(NamedTuple):
    """How trees are drafted and verified."""

    name: str  # of `RULES`
    is_drawn: bool  # whether a tree's tokens are drawn from the drafter's distribution


def choose_shape(
    obstacle: str | None, defaults: Settings, settings: Settings, rule: Rule
) -> tuple[TreeShape, bool]:
    """The largest tree of a call, and whether the target verifies trees.

    Args:
        obstacle: why the target cannot verify a tree in this call, if it cannot.
        defaults: the drafter's own settings.
        settings: those of the call, which win; asking for a tree where only a chain is safe raises.
        rule: of which `"block"` takes chains only.
    """
    wanted = {name: int((defaults | settings)[name]) for name in TREE_KEYWORDS}
    for name, value in wanted.items():
        if value < 1:
            raise ValueError(f"`{name}` is {value}; use a value of at least 1.")
    shape = TreeShape(*wanted.values())
    if obstacle is None and rule.name != "block":
        return shape, True
    reason = "verification='block' takes chains"
    if obstacle is not None:
        reason = f"this target cannot verify a tree: {obstacle}"
    if settings.get("tree_top_k", 1) > 1:
        raise ValueError(
            f"`tree_top_k` is {settings['tree_top_k']}, but {reason}. Leave it out, or pass"
            " tree_top_k=1 for a chain."
        )
    logger.info(f"The target drafts in chains: {reason}.")
    return TreeShape(shape.depth, 1, shape.depth + 1), obstacle is None


def choose_rule(do_sample: bool, defaults: Settings, settings: Settings) -> Rule:
    """The rule of a call.

    Args:
        defaults: the drafter's own settings; those for sampling have no say in a greedy call.
        settings: those of the call, which must fit it.
    """
    if not do_sample:
        for name in RULE_KEYWORDS:
            if settings.get(name) not in (None, "greedy", False):
                raise ValueError(
                    f"`{name}` is {settings[name]!r}, but the call is greedy; pass do_sample=True,"
                    " or leave it out."
                )
        return Rule("greedy", False)
    chosen = defaults | settings
    name = chosen.get("verification") or "token"
    if name not in RULES[1:]:
        raise ValueError(f"`verification` is {name!r}; use one of {RULES[1:]} when sampling.")
    is_drawn = chosen.get("drawn_tree")
    return Rule(name, name != "token" if is_drawn is None else bool(is_drawn))


def max_length_of(model: PreTrainedModel, criteria: StoppingCriteriaList) -> int:
    """Tokens that a sequence may have: a tree never reaches beyond them.

    With a table of P positions, it ends at P + 1 tokens: the last one is never read.
    """
    limit = position_limit(model)
    lengths = [criteria.max_length, None if limit is None else limit + 1]
    return min(length for length in lengths if length is not None)


def with_stop_strings(call: dict, own: GenerationConfig) -> StoppingCriteriaList | None:
    """Add the criterion of `stop_strings`, of the call or of its target's `own` settings.

    `generate` cannot build it: it passes no tokenizer on when a callable decodes.
    """
    criteria, config = call.get("stopping_criteria"), call.get("generation_config") or own
    given = call.get("stop_strings"), config.stop_strings, own.stop_strings
    strings = next((strings for strings in given if strings is not None), None)
    if strings is None:
        return criteria
    if config is not own:
        call["generation_config"] = copy(config)
        call["generation_config"].stop_strings = None
    call["stop_strings"] = None  # nothing else keeps `generate` from taking the target's own
    if call.get("tokenizer") is None:
        raise ValueError("`stop_strings` came without `tokenizer`; pass the target's own too.")
    return StoppingCriteriaList([*(criteria or []), StopStringCriteria(call["tokenizer"], strings)])
