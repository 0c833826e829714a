"""The target's side of a call: its cache, the pass over the prompt, and one pass over each tree.

In: a prompt, then trees. Out: `Scores`: the target's logits and features of each row. A tree is
told to the target by a 4-D float mask and position ids; a chain is plain causal text.

    rows of the cache        committed 0 … n-1          tree n … n+nodes-1
    a node may look at       those inside its window    its ancestors and itself
    its position             n + depth                  (less the padding on the left)
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..target import FEATURE, Target, sliding_windows, text_config
from .cache import GrowingCache, visible
from .tree import DraftTree


class Scores(NamedTuple):
    """What one pass of the target gives."""

    logits: Tensor  # (batch, nodes, vocab)
    features: Tensor  # (batch, nodes, hidden)


class TargetScorer:
    """Runs a target over one sequence, whose committed tokens its cache holds."""

    def __init__(self, target: Target, takes_tree: bool):
        self._target = target
        self._takes_tree = takes_tree
        self._windows = sliding_windows(target.model)
        self.cache = GrowingCache(len(self._windows))
        self._padding: Tensor | None = None  # (batch, length) of the prompt, False where padded
        self._padded = 0  # padded positions of the prompt

    def prefill(self, input_ids: Tensor, model_kwargs: dict) -> Scores:
        """Read a prompt (batch, length); logits of its last token only, (batch, 1, vocab)."""
        mask = model_kwargs.get("attention_mask")
        if mask is not None:
            self._padding = mask.bool()
            self._padded = int((~self._padding).sum(1).max())
        inputs = self._target.model.prepare_inputs_for_generation(
            input_ids, is_first_iteration=True, **{**model_kwargs, "past_key_values": self.cache}
        )
        scores = self._forward(**inputs)
        return Scores(scores.logits[:, -1:], scores.features)

    def score(self, tree: DraftTree) -> Scores:
        """Read all nodes of a tree at once."""
        tree = tree.to(self._target.model.device)
        if not self._takes_tree:
            return self._forward(input_ids=tree.tokens, **self._chain_mask(tree.tokens))
        positions = self.length - self._padded + tree.depths
        return self._forward(
            input_ids=tree.tokens,
            position_ids=positions,
            attention_mask=self._masks(tree, positions),
        )

    def commit(self, path: list[int], length: int) -> None:
        """Keep the rows of an accepted path's nodes; `length` rows were committed before."""
        self.cache.keep(length, torch.tensor(path))

    @property
    def length(self) -> int:
        """Committed rows."""
        return self.cache.get_seq_length()

    def _forward(self, **inputs) -> Scores:
        if "past_key_values" not in inputs:
            inputs |= {"past_key_values": self.cache, "use_cache": True}
        outputs = self._target.model(**inputs, output_hidden_states=FEATURE, return_dict=True)
        return Scores(outputs.logits, outputs.hidden_states[FEATURE])

    def _chain_mask(self, tokens: Tensor) -> dict:
        """The 2-D mask of a padded prompt, grown to the chain's end; none without padding."""
        if self._padding is None:
            return {}
        batch, prompt = self._padding.shape
        new = self._padding.new_ones(batch, self.length + tokens.shape[1] - prompt)
        return {"attention_mask": torch.cat([self._padding, new], dim=1).long()}

    def _masks(self, tree: DraftTree, positions: Tensor) -> Tensor | dict[str, Tensor]:
        """The additive mask (batch, 1, nodes, rows), by layer type where layers differ."""
        windows = set(self._windows)
        masks = {window: self._mask(tree, positions, window) for window in windows}
        if len(windows) == 1:
            return masks[windows.pop()]
        names = dict(zip(text_config(self._target.model).layer_types, self._windows, strict=True))
        return {name: masks[window] for name, window in names.items()}

    def _mask(self, tree: DraftTree, positions: Tensor, window: int | None) -> Tensor:
        batch, nodes = tree.tokens.shape
        committed = self.length
        looks = tree.tokens.new_ones(batch, nodes, committed + nodes, dtype=torch.bool)
        looks[:, :, committed:] = tree.ancestry()
        if self._padding is not None:
            looks[:, :, : self._padding.shape[1]] &= self._padding[:, None]
        if window is not None:
            rows = torch.arange(committed, device=positions.device) - self._padded
            # (batch, rows), positions of all rows
            rows = torch.cat([rows.expand(batch, -1), positions], dim=1)
            looks &= positions[..., None] - rows[:, None] < window
        return visible(looks, self._target.model.dtype)[:, None]
