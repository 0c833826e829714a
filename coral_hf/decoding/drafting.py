"""All that the decoding loop knows of a drafter: the protocol `Drafting`.

In: tokens that are certain and the target's features of them. Out: a `DraftTree` a round. Whatever
else a drafter has (one layer or five, a table of counts) is behind it.
"""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from .tree import DraftTree, TreeShape

# (rows, vocab) logits → the same after the call's warpers
Warp = Callable[[Tensor], Tensor]


class Drafting(Protocol):
    """All that the decoding loop knows of a drafter."""

    def begin(self, tokens: Tensor, features: Tensor, positions: Tensor) -> None:
        """Start at prompts, or go on with texts that were read before.

        Args:
            tokens: (batch, length), the token after each feature; the last one was just emitted.
            features: (batch, length, hidden), the target's.
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
            features: (batch, new, hidden).
            counts: (batch,), how many are no padding.
        """
        ...

    def select(self, rows: Tensor) -> None:
        """Go on with some rows of the batch only, (rows,)."""
        ...

    def memory(self) -> object | None:
        """What to hand to a later call that goes on with the same texts, if anything."""
        ...
