"""One call of `generate` of drafters that keep the last feature of each text, and no cache.

tokens          x0   x1   x2   x3        x3 is the root, which the target has not read
features        f0   f1   f2             a round starts from f2, and from nothing before it
"""

import weakref
from collections.abc import Hashable

import torch
from torch import Tensor

from ..decoding.guard import accept_features
from ..target import FEATURE, Target, check_target, text_config
from .model import Drafter
from .tree_drafting import last_kept


class LastFeatureDrafting:
    """Keeps the feature before each root; a family says how it drafts. See [`FixedDrafting`]."""

    layers: tuple[int, ...] = (FEATURE,)
    _feature: Tensor  # (batch, hidden), in one buffer unless rows leave

    def __init__(self, drafter: Drafter, target: Target):
        accept_features(target.model)
        check_target(drafter.config, target.model, takes_other_vocabulary=True)
        self.drafter, self.target = drafter, target
        self._num_tokens = text_config(target.model).vocab_size

    @property
    def device(self) -> torch.device:
        """See [`FixedDrafting`]."""
        return self.drafter.device

    @property
    def kind(self) -> Hashable:
        """See [`FixedDrafting`]."""
        return weakref.ref(self.drafter), self.drafter.dtype

    def begin(self, tokens: Tensor, features: Tensor, positions: Tensor) -> None:
        """Take the last feature of prompts, (batch, length, hidden); see [`Drafting`]."""
        self._feature = features[:, -1].to(self.device, copy=True)

    extend = begin  # the last part of a prompt holds the last feature

    def commit(self, tokens: Tensor, features: Tensor, counts: Tensor) -> None:
        """Take the feature before each row's newest token; see [`Drafting`].

        Of (batch, new, hidden) features, that of the last of `counts`, (batch,).
        """
        new, counts = last_kept(features.to(self.device), counts)[:, 0], counts.to(self.device)
        self._feature.copy_(torch.where(counts[:, None] > 0, new, self._feature))

    def select(self, rows: Tensor) -> None:
        """Keep rows of the batch, of shape (kept,); see [`Drafting`]."""
        self._feature = self._feature[rows]

    def memory(self) -> None:
        """Return None: there is nothing that a continued call does not read anew."""

    def unfix(self, lengths: list[int]) -> None:
        """See [`FixedDrafting`]."""

    def forget_pass(self) -> None:
        """See [`FixedDrafting`]."""
