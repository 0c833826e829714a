"""Forward passes of the target: over the prompts, and over each draft tree.

In: prompts, then trees. Out: `TargetOutput`: the target's logits and features of each node. A tree
reaches the target as a 4-D float mask and position ids; a chain is plain causal text.

    slots of the cache       committed 0 … n-1              tree n … n+nodes-1
    a node attends to        those of its row's sequence    its ancestors and itself
    its position             that of the root + depth
"""

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.utils import GenerateDecoderOnlyOutput
from transformers.utils import ModelOutput

from ..target import (
    CONVOLUTION,
    Target,
    counts_layers,
    position_limit,
    sliding_windows,
    takes_positions,
    text_config,
)
from .continuation import CACHE, join, part_of, whole_length, whole_positions
from .drafting import DraftTree
from .preparation.switches import rotary_switches
from .ragged_cache import HIDDEN, RaggedCache


class TargetOutput(NamedTuple):
    """What one pass of the target gives."""

    logits: Tensor  # (batch, nodes, vocab)
    features: Tensor  # (batch, nodes, layers · hidden), of the layers that the drafter reads
    lengths: Sequence[int] = ()  # committed slots of each row before the pass
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
        self._target, self._takes_tree, self._layers = target, takes_tree, layers
        self._takes_positions = takes_positions(target.model)
        self._limit = position_limit(target.model)
        self._windows = sliding_windows(target.model)
        self._switches = rotary_switches(target.model)
        self.is_limited = bool(self._switches)  # whether `room` has anything to say
        self.is_checked = False  # whether `checked` has
        # whether a layer may be left out, which shifts the indices of hidden states
        self._skips = 0 in self._windows or not counts_layers(target.model)
        self._extras, self._keeps_rows = extras, keeps_rows
        self._ahead = 0  # of the longest row, how far its positions are ahead of its slots
        self._rows: list[int] = []  # of the call, that are in the cache
        self._ended: list[tuple[list[int], RaggedCache]] = []  # rows that have left it
        self.cache = cache or RaggedCache(self._windows)

    @property
    def model(self) -> PreTrainedModel:
        """The target itself."""
        return self._target.model

    def prefill(
        self,
        input_ids: Tensor,
        model_kwargs: dict,
        chunk_size: int | None = None,
    ) -> TargetOutput:
        """Read what the cache does not hold of the prompts (batch, length).

        Returns:
            logits of the last token only, (batch, 1, vocab); features of all tokens read.
        """
        cache, read, (batch, length) = self.cache, self.cache.get_seq_length(), input_ids.shape
        whole = whole_length(input_ids, model_kwargs)
        mask = model_kwargs.get("attention_mask")
        mask = input_ids.new_ones(batch, whole) if mask is None else mask
        # a continued sequence comes whole, or as its new tokens
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
            if chunk_size is None and whole == length:  # as plain `generate` hands them over
                chunk, kwargs["next_sequence_length"] = input_ids, chunk.shape[1]
            inputs = self._target.model.prepare_inputs_for_generation(
                chunk, is_first_iteration=True, **kwargs
            )
            if inputs.get(CACHE) is None:  # the target reads the whole text again
                self.cache = cache = RaggedCache(self._windows)
                inputs |= {CACHE: cache, "use_cache": True}
            parts.append(self._forward(**inputs))
        cache.set_recording(True)
        cache.begin(batch, self._target.device)
        given = model_kwargs.get("position_ids")
        if given is None and self._takes_positions:  # plain `generate` does not know that
            given = torch.arange(whole, device=mask.device)[None]
        positions = whole_positions(mask.bool(), given)
        cache.append(positions.to(self._target.device))
        _check_slots(cache)
        if self.is_limited:
            self._ahead = int(cache.next_positions.max()) - cache.width
        features = torch.cat([part.features for part in parts], dim=1)[:, -new_ids.shape[1] :]
        return parts[-1]._replace(logits=parts[-1].logits[:, -1:], features=features)

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
            is_plain = tree.tokens.shape[1] == 1 and self.cache.sees_all()
            inputs["attention_mask"] = None if is_plain else self._masks(tree, positions)
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
        if not self._ended:
            return self.cache
        return join([*self._ended, (self._rows, self.cache)])

    def _forward(self, **inputs) -> TargetOutput:
        """Run the target over `input_ids` (batch, new)."""
        if CACHE not in inputs:
            inputs |= {CACHE: self.cache, "use_cache": True}
        names = [name.removeprefix("output_") for name in self._extras]
        layers = self._layers
        inputs["output_hidden_states"] = bool(layers) if self._skips else _named_states(layers)
        inputs |= dict.fromkeys(self._extras, True)
        outputs = self._run(inputs)
        tokens = inputs["input_ids"]
        states = [outputs.hidden_states[layer] for layer in self._layers]
        states = states or [tokens.new_empty(*tokens.shape, 0, dtype=outputs.logits.dtype)]
        return TargetOutput(
            outputs.logits,
            states[0] if len(states) == 1 else torch.cat(states, dim=-1),
            list(self.cache.lengths),
            **{name: getattr(outputs, name) for name in names},
        )

    def _run(self, inputs: dict[str, Any]) -> ModelOutput:
        """One pass of the target."""
        return self._target.model(**inputs, return_dict=True)

    def _masks(self, tree: DraftTree, positions: Tensor) -> Tensor | dict[str, Tensor]:
        """The additive mask (batch, 1, nodes, slots + nodes), by layer type where layers differ.

        `positions`: (batch, nodes).
        """
        ancestry, dtype = tree.ancestry(), self._target.model.dtype
        masks = {
            window: additive_mask(self.cache.mask(positions, ancestry, window), dtype)[:, None]
            for window in set(self._windows) - {0}
        }
        if len(masks) == 1:
            return next(iter(masks.values()))
        names = dict(zip(text_config(self._target.model).layer_types, self._windows, strict=False))
        return {name: masks[window] for name, window in names.items()}


def _check_slots(cache: RaggedCache) -> None:
    """Raise a ValueError if a layer has other slots than one for each token."""
    for index, layer in enumerate(cache.layers):
        found = layer.get_seq_length()
        if layer.window != 0 and found not in (0, cache.width):
            raise ValueError(
                f"Layer {index} of the target's cache has {found} slots for {cache.width} tokens,"
                " so that rejected tokens cannot be dropped; leave out `assistant_model`."
            )


def _named_states(layers: tuple[int, ...]) -> bool | int | list[int]:
    """The value of `output_hidden_states` that returns at least the states of some layers.

    Newer versions of transformers return the named states alone; older ones return all for -1, and
    know no -1 in a list.
    """
    if layers in ((), (-1,)):
        return layers[0] if layers else False
    return list(layers) if CACHE == "cache" else True


def additive_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Turn a bool mask of any shape, True where a query attends, into an additive float one.

    Eager attention adds the mask to the scores.
    """
    added = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return added.masked_fill_(~mask, torch.finfo(dtype).min)


ByLayer = tuple[Tensor, ...]


class OutputCollector:
    """Collects by row what the caller wants to see of each token.

    Its tuples have the shapes of plain `generate`: one entry a token, each over the whole batch. A
    row that ended earlier than others holds zeros from there on, where plain `generate` has those
    of its padding.

    Args:
        config: of the call.
        batch: rows of the call.
        windows: of the target's layers, where attentions may be asked for.
    """

    def __init__(self, config: GenerationConfig, batch: int, windows: Sequence[int | None] = ()):
        self.config, self.returns_dict = config, bool(config.return_dict_in_generate)
        names = ("output_scores", "output_logits", "output_hidden_states", "output_attentions")
        wanted = [name for name in names if self.returns_dict and getattr(config, name)]
        self.keeps_scores, self.keeps_logits = (name in wanted for name in names[:2])
        # what the target's passes must give
        self.extras = tuple(name for name in names[2:] if name in wanted)
        self._windows = [window for window in windows if window != CONVOLUTION]
        self._scores: list[list[Tensor]] = [[] for _ in range(batch)]  # (vocab,) a token
        self._logits: list[list[Tensor]] = [[] for _ in range(batch)]
        self._hidden: list[list[ByLayer]] = [[] for _ in range(batch)]  # (1, hidden) by layer
        self._attentions: list[list[ByLayer]] = [[] for _ in range(batch)]  # (heads, 1, slots)
        # the pass over the prompts, which counts as the first token's
        self.prompt = TargetOutput(*(torch.empty(0, dtype=torch.float32, device="cpu"),) * 2)

    def add(self, row: int, logits: Tensor, processed: Tensor) -> None:
        """Keep a token's logits and processed scores, each of shape (vocab,)."""
        if self.keeps_logits:
            self._logits[row].append(logits.to(torch.float32, copy=True))
        if self.keeps_scores:
            self._scores[row].append(processed)

    def add_all(
        self, rows: list[int], counts: list[int], output: GenerateDecoderOnlyOutput
    ) -> None:
        """Keep what transformers' own loop has of the next tokens of some rows, `counts` of them.

        Its tuples have one entry a token, or one by layer, over (rows, ...).
        """
        kept = self._logits, self._scores, self._hidden, self._attentions
        found = output.logits, output.scores, output.hidden_states, output.attentions
        for by_row, by_token in zip(kept, found, strict=True):
            for index, (row, count) in enumerate(zip(rows, counts, strict=True)):
                for one in (by_token or ())[:count]:
                    is_state = isinstance(one, tuple)
                    by_row[row].append(tuple(x[index] for x in one) if is_state else one[index])

    def add_nodes(self, row: int, index: int, path: list[int], output: TargetOutput) -> None:
        """Keep the states of the nodes before a row's new tokens.

        Args:
            row: of the call.
            index: of the row in the pass.
            path: node by node from the root.
        """
        for depth, node in enumerate(path, start=1):
            self._hidden[row].append(tuple(s[index, node, None] for s in output.hidden_states))
            windows = self._windows if output.attentions else ()  # which may not be asked for
            layers = zip(output.attentions, windows, strict=True)
            prefix = path[:depth], output.lengths, index
            self._attentions[row].append(tuple(_attended(w[index], *prefix, x) for w, x in layers))

    def scores(self) -> tuple[Tensor, ...] | None:
        """Each (batch, vocab), one a token; None if the caller does not want them."""
        return _by_token(self._scores) or None

    def outputs(self) -> dict[str, tuple | None]:
        """By the names of `GenerateDecoderOnlyOutput`."""
        return {
            "scores": self.scores(),
            "logits": _by_token(self._logits) or None,
            "hidden_states": self._states(self.prompt.hidden_states, self._hidden),
            "attentions": self._states(self.prompt.attentions, self._attentions),
        }

    @staticmethod
    def _states(prompt: ByLayer, rows: list[list[ByLayer]]) -> tuple[ByLayer, ...] | None:
        if not prompt:
            return None
        layers = [_by_token([[one[i] for one in row] for row in rows]) for i in range(len(prompt))]
        return (prompt, *zip(*layers, strict=True))


def _attended(
    weights: Tensor, path: list[int], lengths: Sequence[int], index: int, window: int | None
) -> Tensor:
    """What the last node of a path attends to, in the order of its sequence.

    (heads, nodes, slots held + nodes) → (heads, 1, slots of the sequence)

    Args:
        lengths: committed slots of each row; the tree begins behind the longest.
        index: of the row.
    """
    if window == 0:  # no text
        return weights[:, path[-1] : path[-1] + 1]
    held = weights.shape[-1] - weights.shape[-2]
    dropped = max(lengths) - held  # slots that left a sliding window
    slots = [*range(lengths[index] - dropped), *(held + node for node in path)]
    # plain `generate` has no more than the window's slots in the cache
    return weights[:, path[-1] : path[-1] + 1, slots[-window:] if window else slots]


def _by_token(rows: list[list[Tensor]]) -> tuple[Tensor, ...]:
    """Stack the rows' entries of each token along (batch, …); zeros where a row has none left."""
    longest = max(rows, key=len)
    return tuple(
        torch.stack([row[i] if i < len(row) else torch.zeros_like(longest[i]) for row in rows])
        for i in range(len(longest))
    )
