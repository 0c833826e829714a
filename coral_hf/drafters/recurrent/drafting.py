"""The Recurrent Drafter's side of a call: beams or trees below one feature."""

from collections.abc import Hashable

import torch
from torch import Tensor

from ...decoding.drafting import DraftTree, Level, TreeShape
from ...heads.draft_heads import OtherVocabulary
from ...target import Target
from ..last_feature import LastFeatureDrafting
from ..tree_builders import Beam, BeamBuilder, TreeBuilder, plan_levels
from ..tree_drafting import Grown, TreeDrafting
from .modeling import RecurrentDrafter

TREES = ("confident", "beams")


class RecurrentDrafting(LastFeatureDrafting, TreeDrafting):
    """Drafts for one call of `generate` with a [`RecurrentDrafter`].

    Args:
        drafter, target: of the call.
        memory: none is kept.
        draft_tree: which nodes of a beam search a chosen tree has: the most `"confident"` children
            of all beams (EAGLE-2), or the `"beams"` alone, merged by what they begin with, as
            published; `draft_tree` of the drafter's `generation_config` by default, else the first.

    Raises:
        ValueError: for another target, or another `draft_tree`.
    """

    drafter: RecurrentDrafter

    def __init__(
        self,
        drafter: RecurrentDrafter,
        target: Target,
        memory: None = None,
        draft_tree: str | None = None,
    ):
        super().__init__(drafter, target)
        own = getattr(drafter.generation_config, "draft_tree", None)
        self.draft_tree = draft_tree or own or TREES[0]
        if self.draft_tree not in TREES:
            raise ValueError(f"`draft_tree` is {self.draft_tree!r}; use one of {TREES}.")
        self.head = OtherVocabulary(drafter.draft_logits, self._num_tokens)
        self._is_fixed = False

    @property
    def kind(self) -> Hashable:
        """See [`FixedDrafting`]."""
        return super().kind, self.draft_tree

    def fix(self, capacity: int, shape: TreeShape, is_drawn: bool) -> tuple[Level, ...]:
        """See [`FixedDrafting`]: the feature is in one buffer anyway."""
        self._is_fixed = True
        return tuple(plan_levels(shape)) if is_drawn else ()

    def unfix(self, lengths: list[int]) -> None:
        """See [`FixedDrafting`]."""
        self._is_fixed = False

    def propose(self, root: Tensor, shape: TreeShape, *args, **kwargs) -> DraftTree:
        """Draft below `root` (batch,); see [`TreeDrafting`].

        Raises:
            ValueError: for more beams than there are tokens.
        """
        if shape.top_k > self._num_tokens:
            raise ValueError(
                f"`tree_top_k` is {shape.top_k}, a beam wider than the vocabulary of"
                f" {self._num_tokens} tokens; use {self._num_tokens} or less."
            )
        return super().propose(root, shape, *args, **kwargs)

    def _builder(self, root: Tensor, shape: TreeShape) -> TreeBuilder:
        if self.draft_tree == "beams":
            return BeamBuilder(root, shape, self._is_fixed)
        return super()._builder(root, shape)

    def _start(self, root: Tensor) -> Grown:
        feature = self._feature[:, None]
        states = torch.cat([feature, torch.zeros_like(feature)], dim=-1)
        return self._read(root[:, None], states)

    def _grow(self, grown: Grown, beam: Beam, depth: int) -> Grown:
        return self._read(beam.tokens, beam.of_parents(grown.features))

    def _read(self, tokens: Tensor, states: Tensor) -> Grown:
        """Let states (batch, beam, 2 · hidden) read tokens (batch, beam)."""
        embeddings = self.target.embed(tokens).to(self.device)
        return Grown(self.drafter(embeddings, states))
