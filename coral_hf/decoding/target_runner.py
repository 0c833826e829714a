"""Forward passes of the target: over the prompts, and over each draft tree.

In: prompts, then trees. Out: `TargetOutput`: the target's logits and features of each node. A tree
reaches the target as a 4-D float mask and position ids; a chain is plain causal text.

    slots of the cache       committed 0 … n-1              tree n … n+nodes-1
    a node attends to        those of its row's sequence    its ancestors and itself
    its position             that of the root + depth
"""

import sys
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ..target import Target, named_states, position_limit, sliding_windows, takes_positions
from .caches.continuation import CACHE, join, part_of, whole_length
from .caches.ragged_cache import HIDDEN, RaggedCache
from .drafting import DraftTree
from .outputs import TargetOutput
from .preparation.needs import rotary_switches


class TargetRunner:
    """Runs a target over a batch of sequences, whose committed tokens its cache holds.

    Args:
        target: the target.
        takes_tree: whether it verifies trees, or chains only.
        layers: which hidden states the drafter reads; see [`coral_hf.decoding.Drafting`].
        cache: what it has read before the call.
        keeps_rows: whether somebody will ask for the slots of rows that ended early.
    """

    def __init__(
        self,
        target: Target,
        takes_tree: bool,
        layers: tuple[int, ...],
        cache: RaggedCache | None = None,
        keeps_rows: bool = False,
    ):
        self._target, self._takes_tree, self._layers = target, takes_tree, layers
        self._takes_positions = takes_positions(target.model)
        self._limit = position_limit(target.model)
        self._windows = sliding_windows(target.model)
        self._switches = rotary_switches(target.model)
        self._states = named_states(target.model, layers)
        self._ahead = 0  # of the longest row, how far its positions are ahead of its slots
        self._keeps_rows = keeps_rows
        self._rows: list[int] = []  # of the call, that are in the cache
        self._ended: list[tuple[list[int], RaggedCache]] = []  # rows that have left it
        self.cache = cache or RaggedCache(self._windows)

    @property
    def model(self) -> PreTrainedModel:
        """The target itself."""
        return self._target.model

    @property
    def is_at_switch(self) -> bool:
        """Whether the target would read its text anew, as it may where it prepares its passes."""
        return False

    def prefill(
        self, input_ids: Tensor, model_kwargs: dict, chunk_size: int | None = None
    ) -> TargetOutput:
        """Read what the cache does not hold of the prompts (batch, length).

        Args:
            chunk_size: tokens of a pass; all at once by default.

        Returns:
            logits of the last token only, (batch, 1, vocab); features of the tokens that were read.
        """
        cache, held, (batch, length) = self.cache, self.cache.get_seq_length(), input_ids.shape
        is_whole = length == whole_length(input_ids, model_kwargs)
        # a continued sequence comes whole, or as its new tokens
        new_ids = input_ids[:, held:] if is_whole else input_ids
        positions = self._prompt_positions(input_ids, model_kwargs)
        cache.set_recording(False)
        self._rows, width = list(range(batch)), new_ids.shape[1]
        features, stop = [], 0
        for chunk in new_ids.split(chunk_size or width, dim=1):
            start, stop = stop, stop + chunk.shape[1]
            kwargs = {**model_kwargs, CACHE: cache}
            for name in ("attention_mask", "position_ids"):
                if kwargs.get(name) is not None:
                    kwargs[name] = kwargs[name][..., : held + stop]
            if chunk_size is None and is_whole:  # as plain `generate` hands them over
                chunk, kwargs["next_sequence_length"] = input_ids, width
            inputs = self._target.model.prepare_inputs_for_generation(
                chunk, is_first_iteration=True, **kwargs
            )
            if inputs.get(CACHE) is None:  # the target reads the whole text again
                self.cache = cache = RaggedCache(self._windows)
                inputs |= {CACHE: cache, "use_cache": True}
            output = self._forward(**inputs)
            features.append(output.features[:, start - stop :])
        cache.set_recording(True)
        cache.begin(batch, self._target.device)
        cache.append(positions)
        _check_slots(cache)
        if self._switches:
            self._ahead = int(cache.next_positions.max()) - cache.width
        joined = features[0] if len(features) == 1 else torch.cat(features, dim=1)
        return output._replace(logits=output.logits[:, -1:], features=joined)

    def _prompt_positions(self, input_ids: Tensor, model_kwargs: dict) -> Tensor:
        """Positions of all tokens of prompts (batch, length), `HIDDEN` where padded."""
        whole, mask = whole_length(input_ids, model_kwargs), model_kwargs.get("attention_mask")
        seen = input_ids.new_ones(len(input_ids), whole).bool() if mask is None else mask.bool()
        given = model_kwargs.get("position_ids")
        if given is None and self._takes_positions:  # plain `generate` does not know that
            given = torch.arange(whole, device=seen.device)[None]
        if given is not None and given.dim() == 3:  # time, height and width, which agree for text
            given = given[-1]
        if given is None or given.shape[1] != whole:
            given = seen.long().cumsum(1) - 1
        return given.to(seen.device).masked_fill(~seen, HIDDEN).to(self._target.device)

    def room(self) -> int:
        """Nodes, and so levels, that the next tree may have below its root."""
        length = self.cache.width + self._ahead + 1  # that the root's position tells
        return min((one.room(length) for one in self._switches), default=sys.maxsize)

    def checked(self, tree: DraftTree) -> DraftTree:
        """What the target can read of a tree in one pass."""
        return tree

    def score(self, tree: DraftTree) -> TargetOutput:
        """Read all nodes of a tree at once."""
        tree = tree.to(self._target.device)
        positions = self.cache.position_ids(tree.depths)  # (batch, nodes)
        if self._limit is not None:  # nodes beyond it are never emitted
            positions = positions.clamp(max=self._limit - 1)
        inputs = {"input_ids": tree.tokens}
        if self._takes_tree or self._takes_positions:
            inputs["position_ids"] = positions
        if self._takes_tree:
            if tree.tokens.shape[1] > 1 or not self.cache.sees_all():
                masks = masks_by_layer(self.model, self.cache, positions, tree.ancestry())
                inputs["attention_mask"] = masks
        elif not self.cache.is_dense:  # the 2-D mask of padded prompts, grown to the chain's end
            seen = self.cache.positions != HIDDEN
            own = torch.ones_like(tree.tokens, dtype=torch.bool)
            inputs["attention_mask"] = torch.cat([seen, own], 1).long()
        return self._forward(**inputs)

    def commit(self, counts: list[int], path: Tensor | None) -> None:
        """Keep the first nodes on a path (batch, longest), so many of each row; None: the root."""
        self.cache.commit(counts, path)

    def select(self, kept: list[int]) -> None:
        """Go on with some rows of the last pass only, by their index in it."""
        if self._keeps_rows:
            ended = [index for index in range(len(self._rows)) if index not in kept]
            self._ended += [([self._rows[index]], part_of(self.cache, index)) for index in ended]
        self._rows = [self._rows[index] for index in kept]
        self.cache.select(kept)

    def whole_cache(self) -> RaggedCache:
        """The cache of all rows of the call, those that ended early included."""
        return join([*self._ended, (self._rows, self.cache)]) if self._ended else self.cache

    def _forward(self, **inputs) -> TargetOutput:
        """Run the target over `input_ids` (batch, new)."""
        if CACHE not in inputs:
            inputs |= {CACHE: self.cache, "use_cache": True}
        outputs = self._run({**inputs, "output_hidden_states": self._states})
        tokens = inputs["input_ids"]
        states = [outputs.hidden_states[layer] for layer in self._layers]
        states = states or [tokens.new_empty(*tokens.shape, 0, dtype=outputs.logits.dtype)]
        features = states[0] if len(states) == 1 else torch.cat(states, dim=-1)
        return TargetOutput(outputs.logits, features)

    def _run(self, inputs: dict[str, Any]) -> ModelOutput:
        """One pass of the target."""
        return self._target.model(**inputs, return_dict=True)


def masks_by_layer(
    model: PreTrainedModel, cache: RaggedCache, positions: Tensor, own: Tensor
) -> Tensor | dict[str, Tensor]:
    """What a pass over uncommitted tokens adds to scores, by layer type where layers differ.

    Args:
        model: that the pass is of.
        cache: what it has read; its layers have the windows of the model's.
        positions: (batch, new), of the tokens.
        own: (batch, new, new or more), which tokens attend to which; see [`RaggedCache.mask`].

    Returns:
        (batch, 1, new, slots + new or more)
    """
    windows = [layer.window for layer in cache.layers]
    masks = {one: cache.mask(positions, own, model.dtype, one)[:, None] for one in {*windows} - {0}}
    if len(masks) == 1:
        return next(iter(masks.values()))
    types = model.config.get_text_config(decoder=True).layer_types
    return {name: masks[window] for name, window in zip(types, windows, strict=False)}


def _check_slots(cache: RaggedCache) -> None:
    """Raise a ValueError if a layer has other slots than one for each token."""
    for index, layer in enumerate(cache.layers):
        found = layer.get_seq_length()
        if layer.window != 0 and found not in (0, cache.width):
            raise ValueError(
                f"Layer {index} of the target's cache has {found} slots for {cache.width} tokens,"
                " so that rejected tokens cannot be dropped; leave out `assistant_model`."
            )
