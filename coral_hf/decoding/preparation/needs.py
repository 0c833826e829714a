"""Which calls need the target's own preparation of inputs in every round, and how far one reaches.

In: a target, and what `generate` has prepared for it. Out: a `Preparation`. Which targets and
inputs may come is the guard's to say. Where rotary embeddings change with the length of a text, a
tree has only so many levels that all its nodes are read as plain `generate` would read them, one
after the other:

    LongRoPE       positions 0 … length-1 by one set of frequencies, longer texts by another: a pass
                   ends before the switch or begins behind it
    dynamic NTK    texts longer than `length` by frequencies of their own length: one token a pass
"""

import sys
from collections.abc import Iterator
from enum import IntEnum
from numbers import Number
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.generation.utils import MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL

from ...target import text_config
from ..caches.continuation import CACHE
from ..guard.entries import TABLES, TREE, Entry, Findings

PREPARE, UPDATE = "prepare_inputs_for_generation", "_update_model_kwargs_for_generation"
# classes of transformers that override one of them, and of these, those whose method does nothing
# more than to drop a cache at the switch of LongRoPE
CLASSES = TABLES["Targets that prepare the inputs of each step"]
AT_A_SWITCH = {name for name, entry in CLASSES.items() if entry is CLASSES["Phi3ForCausalLM"]}
# what a round needs, or none does: with nothing else, rounds are made without the target's methods
DIRECT_INPUTS = {"attention_mask", "position_ids", "use_cache", "logits_to_keep", CACHE}
DIRECT_INPUTS.update(MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL)
# further inputs, of which a new token gets what the one before it had
INPUTS = TABLES["Inputs that reach the target at each step"]


class Switch(NamedTuple):
    """Where a rotary embedding changes."""

    length: int  # tokens of the longest text that is read as short ones are
    is_growing: bool  # whether each further token changes it again

    def room(self, length: int) -> int:
        """Levels of a tree below a root that is the last of `length` tokens."""
        if length <= self.length:
            return self.length - length
        return 0 if self.is_growing else sys.maxsize


def rotary_switches(model: PreTrainedModel) -> tuple[Switch, ...]:
    """Where the rotary embeddings of a target change, those of each layer type."""
    text, found = text_config(model), set()
    for kind in _rope_parameters(model):
        name = kind.get("rope_type", "default")
        if name == "longrope":
            own = getattr(text, "original_max_position_embeddings", None)
            length = kind.get("original_max_position_embeddings") or own
            found.add(Switch(int(length or text.max_position_embeddings), False))
        elif "dynamic" in name:  # as transformers asks
            found.add(Switch(int(text.max_position_embeddings), True))
    return tuple(sorted(found))


def rotary_types(model: PreTrainedModel) -> set[str]:
    """Names of a target's rotary embeddings, those of each layer type."""
    return {kind.get("rope_type", "default") for kind in _rope_parameters(model)}


def _rope_parameters(model: PreTrainedModel) -> list[dict]:
    """The settings of rotary embeddings, those of each layer type where they differ."""
    given = getattr(text_config(model), "rope_parameters", None) or {}
    return [one for one in given.values() if isinstance(one, dict)] or [given]


class Preparation(IntEnum):
    """How the inputs of rounds are made; a higher way is the more careful one."""

    DIRECT = 0  # token ids, mask and positions alone: the target uses transformers' own methods
    OWN = 1  # the target prepares each round itself
    CHECKED = 2  # it does so by a method that is not known: rounds are compared with single steps


def choose_preparation(
    model: PreTrainedModel, model_kwargs: dict[str, Any], batch: int, max_length: int
) -> Preparation:
    """How the inputs of a call's rounds are made: in the most careful way that anything asks for.

    Args:
        model_kwargs: what `generate` has prepared for the target.
        batch: rows of the call.
        max_length: tokens that a row may have at its end.
    """
    switches, owners = rotary_switches(model), set(overridden(model).values())
    if owners - CLASSES.keys():
        return Preparation.CHECKED
    if not switches:
        owners -= AT_A_SWITCH
    # with several rows, the rotary embedding looks at the longest
    is_switching = batch > 1 and any(max_length > switch.length for switch in switches)
    needs_own = owners or is_switching or any(further_inputs(model_kwargs))
    return Preparation.OWN if needs_own else Preparation.DIRECT


def overridden(model: PreTrainedModel) -> dict[str, str]:
    """The two methods that a target has of its own: name → the class that defines it.

    A class outside of transformers is "".
    """
    found = {}
    for name in (PREPARE, UPDATE):
        own = vars(model).get(name) or getattr(type(model), name)
        if own is not getattr(GenerationMixin, name):
            is_known = getattr(own, "__module__", "").startswith("transformers.models.")
            found[name] = own.__qualname__.split(".")[0] if is_known else ""
    return found


def preparation_findings(model: PreTrainedModel) -> Findings:
    """What is known of the methods by which a target prepares the inputs of each pass."""
    verbs = {PREPARE: "prepares", UPDATE: "updates"}
    for name, owner in overridden(model).items():
        yield owner, CLASSES.get(owner) or CLASSES[f"any other that {verbs[name]} them"]


def further_inputs(model_kwargs: dict[str, Any]) -> Iterator[tuple[str, Entry]]:
    """The inputs of a call beside those that any round makes, and what is known of each."""
    for name, value in model_kwargs.items():
        if value is not None and name not in DIRECT_INPUTS:
            other = "numbers and words" if _is_plain(value) else "any other"
            yield name, INPUTS.get(name) or INPUTS[other]


def register_input(name: str) -> None:
    """Let drafters follow calls with a keyword of the target's own that holds tensors.

    Args:
        name: of the keyword. Of what it holds, the target must give each token the same, however
            many a pass reads; or its own methods make what each pass gets, by the tokens in it.
    """
    INPUTS[name] = Entry(TREE, "registered by the user", test=INPUTS["any other"].test)


def _is_plain(value: Any) -> bool:
    """Whether a value is a number, a word, or a sequence of them."""
    if isinstance(value, (list, tuple)):
        return all(_is_plain(part) for part in value)
    return value is None or isinstance(value, (Number, str))


def agree(whole: dict[str, Any], steps: list[dict[str, Any]]) -> bool:
    """Whether the inputs of a pass over several tokens are those of single ones, put together.

    Each input must be the same in all steps, grow with the text, or have a part for each token.
    """
    names = (whole.keys() | steps[0].keys()) - {CACHE, "logits_to_keep"}
    return all(_agrees(whole.get(name), [step.get(name) for step in steps]) for name in names)


def _agrees(whole: Any, steps: list[Any]) -> bool:
    if isinstance(whole, Tensor) and all(isinstance(step, Tensor) for step in steps):
        is_same = all(step.equal(whole) for step in steps)
        return is_same or any(_joins(whole, steps, axis) for axis in range(whole.dim()))
    return all(one is whole or (_is_plain(one) and one == whole) for one in steps)


def _joins(whole: Tensor, steps: list[Tensor], axis: int) -> bool:
    """Whether steps are parts of a whole along an axis: one each, or all up to their own."""
    length, count = whole.shape[axis], len(steps)
    prefixes = [whole.narrow(axis, 0, max(length - end, 0)) for end in reversed(range(count))]
    ways = [parts for parts in (whole.split(1, axis), prefixes) if len(parts) == count]
    return any(all(map(torch.equal, steps, parts)) for parts in ways)
