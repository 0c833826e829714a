"""The target's side of a call: the pass over the prompts, and one pass over each draft tree.

In: prompts, then trees. Out: `TargetOutput`: the target's logits and features of each node. A tree
reaches the target as a 4-D float mask and position ids; a chain is plain causal text.

    slots of the cache       committed 0 … n-1              tree n … n+nodes-1
    a node attends to        those of its row's sequence    its ancestors and itself
    its position             that of the root + depth
"""

from inspect import signature
from typing import NamedTuple

import torch
from torch import Tensor

from ..target import Target, position_limit, sliding_windows, text_config
from .continuation import CACHE
from .ragged_cache import HIDDEN, RaggedCache, additive_mask, count_positions
from .tree import DraftTree


class TargetOutput(NamedTuple):
    """What one pass of the target gives."""

    logits: Tensor  # (batch, nodes, vocab)
    features: Tensor  # (batch, nodes, layers · hidden), of the layers that the drafter reads
    hidden_states: tuple[Tensor, ...] = ()  # where asked for: by layer, (batch, nodes, hidden)
    attentions: tuple[Tensor, ...] = ()  # where asked for: (batch, heads, nodes, slots + nodes)


class TargetRunner:
    """Runs a target over a batch of sequences, whose committed tokens its cache holds.

    Args:
        target: the target.
        takes_tree: whether it verifies trees, or chains only.
        layers: which hidden states the drafter reads; see [`coral_hf.decoding.Drafting`].
        cache: what it has read before the call.
        extras: what its passes must return beside logits: `"output_hidden_states"` and
            `"output_attentions"`.
        keeps_rows: whether somebody will ask for the slots of rows that ended early.
    """

    def __init__(
        self,
        target: Target,
        takes_tree: bool,
        layers: tuple[int, ...],
        cache: RaggedCache | None = None,
        extras: tuple[str, ...] = (),
        keeps_rows: bool = False,
    ):
        self._target = target
        self._takes_tree = takes_tree
        self._layers = layers
        self._takes_positions = "position_ids" in signature(target.model.forward).parameters
        self._limit = position_limit(target.model)
        self._windows = sliding_windows(target.model)
        self._extras = extras
        self._keeps_rows = keeps_rows
        self._rows: list[int] = []  # of the call, that are in the cache
        self._ended: list[tuple[list[int], RaggedCache]] = []  # rows that have left it
        self.cache = cache or RaggedCache(self._windows)

    def prefill(
        self,
        input_ids: Tensor,
        model_kwargs: dict,
        chunk_size: int | None = None,
        with_features: bool = True,
    ) -> TargetOutput:
        """Read what the cache does not hold of the prompts (batch, length).

        Returns:
            logits of the last token only, (batch, 1, vocab); features of all tokens read.
        """
        cache, read, (batch, length) = self.cache, self.cache.get_seq_length(), input_ids.shape
        whole = whole_length(input_ids, model_kwargs)
        mask = model_kwargs.get("attention_mask")
        mask = input_ids.new_ones(batch, whole) if mask is None else mask
        # a sequence that goes on comes whole, or as what is new in it
        new_ids = input_ids[:, read:] if whole == length else input_ids
        self._rows = list(range(batch))
        cache.set_recording(False)
        parts = []
        for chunk in new_ids.split(chunk_size or new_ids.shape[1], dim=1):
            read += chunk.shape[1]
            kwargs = {**model_kwargs, CACHE: cache}
            for name in ("attention_mask", "position_ids"):
                if kwargs.get(name) is not None:
                    kwargs[name] = kwargs[name][..., :read]
            inputs = self._target.model.prepare_inputs_for_generation(
                chunk, is_first_iteration=True, **kwargs
            )
            parts.append(self._forward(with_features, **inputs))
        cache.set_recording(True)
        cache.begin(batch, self._target.device)
        positions = _positions(mask.bool(), model_kwargs.get("position_ids"))
        cache.append(positions.to(self._target.device))
        features = torch.cat([part.features for part in parts], dim=1)
        return parts[-1]._replace(logits=parts[-1].logits[:, -1:], features=features)

    def score(self, tree: DraftTree, with_features: bool = True) -> TargetOutput:
        """Read all nodes of a tree at once; without features it is as cheap as a plain pass."""
        tree = tree.to(self._target.device)
        positions = self.cache.position_ids(tree.depths)  # (batch, nodes)
        if self._limit is not None:  # nodes beyond it are never emitted
            positions = positions.clamp(max=self._limit - 1)
        inputs = {"input_ids": tree.tokens}
        if self._takes_tree or self._takes_positions:
            inputs["position_ids"] = positions
        if self._takes_tree:
            is_plain = tree.tokens.shape[1] == 1 and self.cache.sees_all()
            inputs["attention_mask"] = None if is_plain else self._masks(tree, positions)
        elif not self.cache.is_dense:  # the 2-D mask of padded prompts, grown to the chain's end
            seen = self.cache.positions != HIDDEN
            own = torch.ones_like(tree.tokens, dtype=torch.bool)
            inputs["attention_mask"] = torch.cat([seen, own], 1).long()
        return self._forward(with_features, **inputs)

    def select(self, kept: list[int]) -> None:
        """Go on with some rows of the last pass only, by their index in it."""
        if self._keeps_rows:
            for index in sorted(set(range(len(self._rows))) - set(kept)):
                self._ended.append(([self._rows[index]], self.cache.part(index)))
        self._rows = [self._rows[index] for index in kept]
        self.cache.select(kept)

    def whole_cache(self) -> RaggedCache:
        """The cache of all rows of the call, those that ended early included."""
        if not self._ended:
            return self.cache
        return RaggedCache.join([*self._ended, (self._rows, self.cache)])

    def _forward(self, with_features: bool, **inputs) -> TargetOutput:
        if CACHE not in inputs:
            inputs |= {CACHE: self.cache, "use_cache": True}
        wants_all = "output_hidden_states" in self._extras
        layers = self._layers if with_features else ()
        # newer versions of transformers keep the named states alone, older ones keep them all
        inputs["output_hidden_states"] = wants_all or (list(layers) if layers else False)
        if "output_attentions" in self._extras:
            inputs["output_attentions"] = True
        outputs = self._target.model(**inputs, return_dict=True)
        tokens = inputs["input_ids"]
        states = [outputs.hidden_states[layer] for layer in layers]
        states = states or [torch.empty(*tokens.shape, 0, device=tokens.device)]
        return TargetOutput(
            outputs.logits,
            states[0] if len(states) == 1 else torch.cat(states, dim=-1),
            outputs.hidden_states if wants_all else (),
            outputs.attentions if "output_attentions" in self._extras else (),
        )

    def _masks(self, tree: DraftTree, positions: Tensor) -> Tensor | dict[str, Tensor]:
        """The additive mask (batch, 1, nodes, slots + nodes), by layer type where layers differ.

        `positions`: (batch, nodes).
        """
        ancestry, dtype = tree.ancestry(), self._target.model.dtype
        masks = {
            window: additive_mask(self.cache.mask(positions, ancestry, window), dtype)[:, None]
            for window in set(self._windows)
        }
        if len(masks) == 1:
            return next(iter(masks.values()))
        names = dict(zip(text_config(self._target.model).layer_types, self._windows, strict=True))
        return {name: masks[window] for name, window in names.items()}


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
    """Tokens of the whole sequences, of which `input_ids` (batch, length) may be only the new ones.

    The mask or the positions, where `generate` has prepared them, are always those of all tokens.
    """
    for name in ("attention_mask", "position_ids"):
        if model_kwargs.get(name) is not None:
            return model_kwargs[name].shape[-1]
    return input_ids.shape[1]
