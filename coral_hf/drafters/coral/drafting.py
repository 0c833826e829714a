"""CORAL's side of a call: it reads the target's last feature, and draft heads of its choice."""

from ...target import FEATURE, Target
from ..feature_drafting import DrafterMemory, FeatureDrafting
from .modeling import CoralDrafter


class CoralDrafting(FeatureDrafting):
    """Drafts for one call of `generate` with a [`CoralDrafter`].

    Args:
        drafter, target, memory, draft_head, draft_window: see [`FeatureDrafting`].

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
        super().__init__(drafter, target, memory, draft_head, draft_window)
        self.head = drafter.heads.bind(target.head, draft_head)
