"""Drafters as the decoding loop knows them: the protocol `Drafting`, and the registry of families.

In: tokens that are certain and the target's features of them. Out: a `DraftTree` a round. Whatever
else a drafter has (one layer or five, a table of counts) is behind it. A family of drafters joins
with `register_drafting(model_type, factory)`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from .tree import DraftTree, TreeShape

# (rows, vocab) logits → the same after the call's warpers
Warp = Callable[[Tensor], Tensor]


class Drafting(Protocol):
    """The drafting side of one call of `generate`, for all rows of its batch.

    `layers`: which of the target's hidden states its features are, as indices into
    `hidden_states`: `(-1,)` the one after the final norm, several side by side for a drafter that
    fuses layers, `()` for one that reads tokens alone; then none are computed.
    """

    layers: tuple[int, ...]

    def begin(self, tokens: Tensor, features: Tensor, positions: Tensor) -> None:
        """Start at prompts, or go on with texts that were read before.

            position     0     1     2     3
            token        x0    x1    x2    x3       x3 was just emitted, the target has not read it
            feature      f0    f1    f2             f_i has read x_0 … x_i

        Args:
            tokens: (batch, length + 1), all of them, or of texts that go on those from the first
                unread feature on.
            features: (batch, length, len(layers) · hidden), the target's.
            positions: (batch, length), of the features; negative where the prompt is padded.
        """
        ...

    def propose(self, shape: TreeShape, warp: Warp | None = None) -> DraftTree:
        """Draft a tree below each row's last certain token, no larger than `shape`.

        With `warp` its tokens are drawn from the drafter's distribution, which warpers such as the
        temperature change first; else they are the most probable ones.
        """
        ...

    def commit(self, tokens: Tensor, features: Tensor, counts: Tensor) -> None:
        """Read the tokens that a round made certain, each with the feature before it.

        Args:
            tokens: (batch, new), padded on the right.
            features: (batch, new, len(layers) · hidden).
            counts: (batch,), on the CPU, how many are no padding.
        """
        ...

    def select(self, rows: Tensor) -> None:
        """Go on with some rows of the batch only, (rows,), on the CPU."""
        ...

    def memory(self) -> object | None:
        """What to hand to a later call that goes on with the same texts, if anything."""
        ...


class Family(NamedTuple):
    """How a family of drafters joins `generate`."""

    # (drafter, target, memory, **options) → Drafting
    start: Callable[..., Drafting]
    options: tuple[str, ...]  # keywords of `generate` that go to `start`


_FAMILIES: dict[str, Family] = {}


def register_drafting(
    model_type: str, factory: Callable[..., Drafting], options: tuple[str, ...] = ()
) -> None:
    """Let `generate` take drafters of a family as `assistant_model`.

    Args:
        model_type: of their config.
        factory: called as `factory(drafter, target, memory=None, **options)` when a call begins.
            `target` is a [`coral_hf.target.Target`]; `memory` what `Drafting.memory` of an earlier
            call with the same texts returned.
        options: names of keywords of `generate` that `factory` takes.
    """
    _FAMILIES[model_type] = Family(factory, options)


def family_of(assistant: Any) -> Family | None:
    """The family of an assistant, None for one that is not ours, such as a small model."""
    config = getattr(assistant, "config", None)
    return _FAMILIES.get(getattr(config, "model_type", None) or "")


def family_options() -> set[str]:
    """The keywords of `generate` that some family takes."""
    return {name for family in _FAMILIES.values() for name in family.options}
