"""Rotary embeddings that change with the length of a text, and how far a pass may reach.

In: a target's config, and how long the text is. Out: how many levels a tree may have, so that all
its nodes are read as plain `generate` would read them, one after the other:

    LongRoPE       positions 0 … length-1 by one set of frequencies, longer texts by another: a pass
                   ends before the switch or begins behind it
    dynamic NTK    texts longer than `length` by frequencies of their own length: one token a pass
"""

import sys
from collections.abc import Iterable
from typing import NamedTuple

from transformers import PreTrainedModel

from ...target import text_config


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


def is_reached(switches: Iterable[Switch], length: int) -> bool:
    """Whether a text of `length` tokens comes to a switch."""
    return any(length > switch.length for switch in switches)
