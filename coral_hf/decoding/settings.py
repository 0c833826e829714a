"""How a call drafts and verifies: the drafter's settings, those of the call, what a target allows.

In: settings by name, a target, what `generate` has prepared. Out: a `TreeShape` and a `Rule`, or a
ValueError that says what does not fit; nothing is silently done another way.
"""

from collections.abc import Iterator
from itertools import chain
from typing import Any, NamedTuple

from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteriaList
from transformers.generation import GenerationMode
from transformers.utils import logging

from ..target import (
    adapter_obstacle,
    cache_obstacle,
    position_limit,
    sharding_obstacle,
    tree_obstacle,
)
from .drafting import TreeShape
from .sequences import Sequences

logger = logging.get_logger(__name__)

TREE_DEFAULTS = {"tree_depth": 6, "tree_top_k": 10, "tree_nodes": 60}
RULES = ("greedy", "token", "traversal", "block")
TREE_KEYWORDS = tuple(TREE_DEFAULTS)
RULE_KEYWORDS = ("verification", "drawn_tree")
DECODING_KEYWORDS = (*TREE_KEYWORDS, *RULE_KEYWORDS, "speculation")

DECODING_MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
# "static" asks for fixed shapes, which is about speed: the tokens are the same with ours
KNOWN_CACHES = (None, "dynamic", "dynamic_full", "static")

Settings = dict[str, Any]  # by keyword of `generate`


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
    wanted = {name: int((defaults | settings)[name]) for name in TREE_KEYWORDS}
    for name, value in wanted.items():
        if value < 1:
            raise ValueError(f"`{name}` is {value}; use a value of at least 1.")
    shape, obstacle = TreeShape(*wanted.values()), tree_obstacle(model)
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


def check_rule(rule: Rule, sequences: Sequences) -> None:
    """Raise a ValueError if a rule reads scores in an order that a processor cannot follow."""
    reads_all = rule.name in ("traversal", "block")  # every node, accepted or not
    names = sequences.unknown if reads_all else sequences.stateful if rule.is_drawn else []
    if names:
        raise ValueError(
            f"{names[0]} may remember what it has seen, and this call reads nodes that are never"
            " emitted; pass verification='token' and drawn_tree=False."
        )
    if reads_all and sequences.is_lockstep and not sequences.is_row_wise:
        raise ValueError(
            f"`verification` is {rule.name!r}, but a logits processor looks at the whole batch;"
            " pass verification='token', or one row at a time."
        )


def check_call(
    model: PreTrainedModel, input_ids: Tensor, config: GenerationConfig, model_kwargs: dict
) -> None:
    """Refuse what a drafter cannot do.

    Args:
        input_ids: (batch, length).
        model_kwargs: what `generate` has prepared for the target.

    Raises:
        ValueError: with the setting, its value and what to do.
    """
    inputs = _input_problems(model, input_ids, model_kwargs)
    problem = next(chain(_mode_problems(model, config), inputs), None)
    if problem is not None:
        raise ValueError(problem)


def _mode_problems(model: PreTrainedModel, config: GenerationConfig) -> Iterator[str]:
    """Yield what of a call's mode, target or cache does not go with a drafter."""
    name, mode = type(model).__name__, config.get_generation_mode()
    if config.prompt_lookup_num_tokens is not None:
        yield "`prompt_lookup_num_tokens` and a CORAL drafter both draft; pass one of them."
    if mode not in DECODING_MODES:
        yield (
            "A CORAL drafter works with greedy search and sampling; the call asks for"
            f" {mode.value}. Set num_beams=1 and leave out penalty_alpha, dola_layers and"
            " constraints, or drop `assistant_model`."
        )
    if not config.use_cache:
        yield "`use_cache` is False, but a drafter needs the target's cache; pass use_cache=True."
    if (cache := config.cache_implementation) not in KNOWN_CACHES:
        yield f"`cache_implementation` is {cache!r}; leave it out: a drafter has the default cache."
    if model.config.is_encoder_decoder:
        yield f"The target {name} is an encoder-decoder; a CORAL drafter needs a decoder."
    elif obstacle := cache_obstacle(model) or adapter_obstacle(model) or sharding_obstacle(model):
        yield f"The target {name} cannot take a drafter: {obstacle}."


def _input_problems(model: PreTrainedModel, input_ids: Tensor, model_kwargs: dict) -> Iterator[str]:
    """Yield what of a call's prompts, (batch, length), a drafter cannot continue."""
    length, limit = input_ids.shape[1], position_limit(model)
    mask = model_kwargs.get("attention_mask")
    if model_kwargs.get("inputs_embeds") is not None:
        yield (
            "`inputs_embeds` was passed, but a drafter reads tokens; pass `input_ids` alone, or"
            " drop `assistant_model`."
        )
    elif length == 0:
        yield "The prompt is empty; pass at least one token, such as the BOS token."
    elif mask is not None and not mask[:, -1].all():
        yield (
            "`attention_mask` ends with 0 in some row, but tokens are appended on the right; pad on"
            " the left: tokenizer.padding_side = 'left'."
        )
    elif limit is not None and length > limit:
        yield f"The prompt has {length} tokens, but the target has {limit} positions; shorten it."


def max_length_of(model: PreTrainedModel, criteria: StoppingCriteriaList) -> int:
    """Tokens that a sequence may have: a tree never reaches beyond them.

    With a table of P positions, it ends at P + 1 tokens: the last one is never read.
    """
    limit = position_limit(model)
    lengths = [criteria.max_length, None if limit is None else limit + 1]
    return min(length for length in lengths if length is not None)
