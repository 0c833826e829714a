"""CORAL's side of a call: it reads the target's last feature, and draft heads of its choice."""

from collections.abc import Hashable

from ...target import FEATURE, Target
from ..feature_drafting import DrafterMemory, FeatureDrafting
from .modeling import CoralDrafter


class CoralDrafting(FeatureDrafting):
    """Drafts for one call of `generate` with a [`CoralDrafter`].

    Args:
        drafter, target, memory, draft_window: see [`FeatureDrafting`].
        draft_head: one of `DRAFT_HEADS`; the drafter's own choice by default.

    Example:

    ```python
    >>> drafting = CoralDrafting(drafter, read_target(target))
    >>> drafting.begin(tokens, features, positions)
    >>> tree = drafting.propose(tokens[:, -1], TreeShape(depth=6, top_k=10, nodes=60))
    ```
    """

    layers: tuple[int, ...] = (FEATURE,)

    def __init__(
        self,
        drafter: CoralDrafter,
        target: Target,
        memory: DrafterMemory | None = None,
        draft_head: str | None = None,
        draft_window: int | None = None,
    ):
        super().__init__(drafter, target, memory, draft_window)
        self.head = drafter.heads.bind(target.head, draft_head)
        self._head_name = draft_head or drafter.config.draft_head

    @property
    def kind(self) -> Hashable:
        """See [`FixedDrafting`]."""
        return super().kind, self._head_name
