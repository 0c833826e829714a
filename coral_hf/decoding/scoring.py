"""The target's side of a call: its cache, the pass over the prompts, and one pass over each tree.

In: prompts, then trees. Out: `Scores`: the target's logits and features of each node. A tree is
told to the target by a 4-D float mask and position ids; a chain is plain causal text.

    columns of the cache     committed 0 … n-1          tree n … n+nodes-1
    a node may look at       those of its row's text    its ancestors and itself
    its position             that of the root + depth
"""

from inspect import signature
from typing import NamedTuple

import torch
from torch import Tensor

from ..target import Target, sliding_windows, text_config
from .cache import CACHE, GrowingCache, visible
from .columns import HIDDEN, Columns, count_positions
from .tree import DraftTree


class Scores(NamedTuple):
    """What one pass of the target gives."""

    logits: Tensor  # (batch, nodes, vocab)
    features: Tensor  # (batch, nodes, hidden)
    hidden_states: tuple[Tensor, ...] = ()  # where asked for: by layer, (batch, nodes, hidden)
    attentions: tuple[Tensor, ...] = ()  # where asked for: (batch, heads, nodes, columns + nodes)


class TargetScorer:
    """Runs a target over a batch of texts, whose committed tokens its cache holds."""

    def __init__(
        self,
        target: Target,
        takes_tree: bool,
        layers: tuple[int, ...],
        cache: GrowingCache | None = None,
        position_limit: int | None = None,
        wants: tuple[str, ...] = (),
        keeps_rows: bool = False,
    ):
        """Start at an empty cache, or go on with one.

        Args:
            takes_tree: whether the target verifies trees, or chains only.
            layers: which hidden states the drafter reads; see [`coral_hf.decoding.Drafting`].
            position_limit: positions of a target that has a table of them.
            wants: of `"output_hidden_states"` and `"output_attentions"`.
            keeps_rows: whether somebody will ask for the columns of rows that ended early.
        """
        self._target = target
        self._takes_tree = takes_tree
        self._layers = layers
        self._takes_positions = "position_ids" in signature(target.model.forward).parameters
        self._windows = sliding_windows(target.model)
        self._limit = position_limit
        self._wants = wants
        self._keeps_rows = keeps_rows
        self._left: list[tuple[list[int], GrowingCache]] = []  # rows that ended, and their columns
        self.cache = cache or GrowingCache(len(self._windows))

    def prefill(
        self, input_ids: Tensor, model_kwargs: dict, chunk_size: int | None = None
    ) -> Scores:
        """Read what the cache does not hold of the prompts (batch, length).

        Returns:
            logits of the last token only, (batch, 1, vocab); features of all tokens read.
        """
        read = self.cache.get_seq_length()
        batch, length = input_ids.shape
        mask = model_kwargs.get("attention_mask")
        whole = whole_length(input_ids, model_kwargs)
        if mask is None:
            mask = input_ids.new_ones(batch, whole)
        # a text that goes on comes whole, or as what is new in it
        new_ids = input_ids[:, read:] if whole == length else input_ids
        positions = _positions(mask.bool(), model_kwargs.get("position_ids"))
        self.columns, self._rows = Columns(batch, input_ids.device), list(range(batch))
        parts = []
        for chunk in new_ids.split(chunk_size or new_ids.shape[1], dim=1):
            read += chunk.shape[1]
            kwargs = {**model_kwargs, CACHE: self.cache}
            for name in ("attention_mask", "position_ids"):
                if kwargs.get(name) is not None:
                    kwargs[name] = kwargs[name][..., :read]
            inputs = self._target.model.prepare_inputs_for_generation(
                chunk, is_first_iteration=True, **kwargs
            )
            parts.append(self._forward(**inputs))
        self.columns.append(positions)
        features = torch.cat([part.features for part in parts], dim=1)
        last = parts[-1]
        return Scores(last.logits[:, -1:], features, last.hidden_states, last.attentions)

    def score(self, tree: DraftTree, with_features: bool = True) -> Scores:
        """Read all nodes of a tree at once; without features it is as cheap as a plain pass."""
        tree = tree.to(self._target.device)
        # (batch, nodes)
        positions = self.columns.next_positions.to(tree.tokens.device)[:, None] + tree.depths
        if self._limit is not None:  # nodes beyond it are never emitted
            positions = positions.clamp(max=self._limit - 1)
        if not self._takes_tree:
            told = {"position_ids": positions} if self._takes_positions else {}
            told |= self._chain_mask(tree.tokens)
            return self._forward(with_features, input_ids=tree.tokens, **told)
        return self._forward(
            with_features,
            input_ids=tree.tokens,
            position_ids=positions,
            attention_mask=None if self._sees_all(tree) else self._masks(tree, positions),
        )

    def _sees_all(self, tree: DraftTree) -> bool:
        """Whether a pass needs no mask: a lone node after columns that it may all look at."""
        if tree.tokens.shape[1] > 1 or not self.columns.is_dense:
            return False
        return all(window is None or self.columns.width < window for window in self._windows)

    def commit(self, nodes: Tensor, counts: Tensor) -> None:
        """Keep the columns of accepted nodes: (batch, kept), of which (batch,) count."""
        if nodes.shape[1] == 1 and self.columns.is_even:
            self.columns.step()  # the root lies where it belongs
            if self.cache.get_seq_length() > self.columns.width:
                self.cache.truncate(self.columns.width)
            return
        source = self.columns.width + nodes
        destination = self.columns.destinations(nodes.shape[1])
        self.columns.commit(counts)
        self.cache.keep(source, destination, self.columns.width)

    def select(self, kept: Tensor) -> None:
        """Go on with some rows of the last pass only, (kept,) indices."""
        if self._keeps_rows:
            self._set_aside(kept)
        self._rows = [self._rows[index] for index in kept.tolist()]
        self.columns.select(kept)
        self.cache.batch_select_indices(kept)
        self.cache.truncate(self.columns.width)

    def _set_aside(self, kept: Tensor) -> None:
        """Keep the columns of the rows that leave, for `whole_cache`."""
        for index in sorted(set(range(len(self._rows))) - set(kept.tolist())):
            part = self.cache.rows(torch.tensor([index]))
            part.truncate(int(self.columns.lengths[index]))
            self._left.append(([self._rows[index]], part))

    def whole_cache(self) -> GrowingCache:
        """The cache of all rows of the call, those that ended early included."""
        if not self._left:
            return self.cache
        return GrowingCache.join([*self._left, (self._rows, self.cache)])

    def _forward(self, with_features: bool = True, **inputs) -> Scores:
        if CACHE not in inputs:
            inputs |= {CACHE: self.cache, "use_cache": True}
        wants_all = "output_hidden_states" in self._wants
        layers = self._layers if with_features else ()
        # newer versions of transformers keep the named states alone, older ones keep them all
        inputs["output_hidden_states"] = wants_all or (list(layers) if layers else False)
        if "output_attentions" in self._wants:
            inputs["output_attentions"] = True
        outputs = self._target.model(**inputs, return_dict=True)
        return Scores(
            outputs.logits,
            _beside([outputs.hidden_states[layer] for layer in layers], inputs["input_ids"]),
            outputs.hidden_states if wants_all else (),
            outputs.attentions if "output_attentions" in self._wants else (),
        )

    def _chain_mask(self, tokens: Tensor) -> dict:
        """The 2-D mask of padded prompts, grown to the chain's end; none without padding."""
        if self.columns.is_dense:
            return {}
        seen = self.columns.positions != HIDDEN
        return {"attention_mask": torch.cat([seen, torch.ones_like(tokens, dtype=bool)], 1).long()}

    def _masks(self, tree: DraftTree, positions: Tensor) -> Tensor | dict[str, Tensor]:
        """The additive mask (batch, 1, nodes, columns), by layer type where layers differ."""
        windows = set(self._windows)
        masks = {window: self._mask(tree, positions, window) for window in windows}
        if len(windows) == 1:
            return masks[windows.pop()]
        names = dict(zip(text_config(self._target.model).layer_types, self._windows, strict=True))
        return {name: masks[window] for name, window in names.items()}

    def _mask(self, tree: DraftTree, positions: Tensor, window: int | None) -> Tensor:
        """The additive mask (batch, 1, nodes, columns + nodes) of layers with one window.

        `positions`: (batch, nodes).
        """
        device = positions.device
        committed = self.columns.looks(positions.to(self.columns.lengths.device), window)
        nodes = tree.ancestry()  # (batch, nodes, nodes)
        if window is not None:
            nodes = nodes & (positions[..., None] - positions[:, None] < window)
        looks = torch.cat([committed.to(device), nodes], dim=2)
        return visible(looks, self._target.model.dtype)[:, None]


def _beside(states: list[Tensor], tokens: Tensor) -> Tensor:
    """Hidden states (batch, nodes, hidden) of `tokens` side by side; or none, (batch, nodes, 0)."""
    if not states:
        return torch.empty(*tokens.shape, 0, device=tokens.device)
    return states[0] if len(states) == 1 else torch.cat(states, dim=-1)


def _positions(seen: Tensor, given: Tensor | None) -> Tensor:
    """Positions of all tokens, `HIDDEN` where padded: (batch, read + new) bool → the same shape.

    `given`: what the target is told, (batch or 1, read + new), where there is one for each token;
        with a leading axis for time, height and width, which agree for text.
    """
    given = given[-1] if given is not None and given.dim() == 3 else given
    if given is None or given.shape[1:] != seen.shape[1:]:
        return count_positions(seen)
    return given.to(seen.device).masked_fill(~seen, HIDDEN)


def whole_length(input_ids: Tensor, model_kwargs: dict) -> int:
    """Tokens of the texts, of which `input_ids` (batch, length) may be only the new ones.

    The mask or the positions, where `generate` has prepared them, are always those of all tokens.
    """
    for name in ("attention_mask", "position_ids"):
        if model_kwargs.get(name) is not None:
            return model_kwargs[name].shape[-1]
    return input_ids.shape[1]
