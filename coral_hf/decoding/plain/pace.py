"""What a step of transformers' own loop costs now: the step that stepping back would run.

In: where a call stands behind its prompts. Out: seconds, from a few steps of which nothing is kept:

    layer       keys that are held, shared   + those of the trial's own steps
    a step      joins the two, as transformers' layers do, and keeps the new ones alone

so that a trial holds no second cache, and leaves tokens, cache, watchers and chance as they were.
"""

import statistics
from copy import copy
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteriaList

from ..caches.layers import RaggedLayer
from ..caches.ragged_cache import RaggedCache
from ..sequences import Sequences
from ..watchers import ROW_WISE_CRITERIA, STATELESS
from .own_loop import Passes, resumed

PASSES = 4  # of a trial; the first one's seconds, in which the loop is set up, do not count


class _Layer(RaggedLayer):
    """A layer that shares the keys of another one, and keeps its own new ones apart."""

    def __init__(self, layer: RaggedLayer):
        super().__init__(layer.window)
        for name, value in vars(layer).items():
            setattr(self, name, value)
        self._buffers = []
        self._shared = layer.keys, layer.values  # (batch, kv_heads, held, head_dim) each
        self._new: list[tuple[Tensor, Tensor]] = []
        self._forget()

    @property
    def held(self) -> int:
        """See [`RaggedLayer`]."""
        return self._shared[0].shape[-2] + len(self._new)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        """See [`RaggedLayer`]: of one token, (batch, kv_heads, 1, head_dim)."""
        self._new.append((key_states, value_states))
        keys, values = (
            torch.cat([shared, *new], dim=-2)
            for shared, new in zip(self._shared, zip(*self._new, strict=True), strict=True)
        )
        self._forget()
        return keys, values

    def _forget(self) -> None:
        """Drop what has left the window, of what is shared."""
        past = 0 if self.window is None else self.held - self.window + 1
        if 0 < past <= self._shared[0].shape[-2]:
            kept = self._shared[0].shape[-2] - past
            keys, values = (states.narrow(-2, past, kept) for states in self._shared)
            self._shared, self.start = (keys, values), self.start + past


class _Trial(Passes):
    """Criteria that are asked, and end the loop after `PASSES` whatever they say."""

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs) -> Tensor:
        """See [`Passes`]."""
        done = super().__call__(input_ids, scores, **kwargs)
        return torch.full_like(done, len(self.times) == PASSES)


def step_seconds(
    model: PreTrainedModel,
    sequences: Sequences,
    cache: RaggedCache,
    config: GenerationConfig,
    model_kwargs: dict[str, Any],
) -> float | None:
    """Measure a step of transformers' own loop, for greedy calls; see [`decode_rest`] for `Args`.

    Returns:
        seconds; None where a trial would leave traces, or cannot run.
    """
    layers = [layer for layer in cache.layers if type(layer) is RaggedLayer]
    is_traced = (
        any(type(one) not in STATELESS for one in sequences.processors)
        or any(type(one) not in ROW_WISE_CRITERIA for one in sequences.criteria)
        or len(sequences.active) < len(sequences.lengths)
        or len(layers) < len(cache.layers)
        or not all(layer.is_initialized for layer in layers)
    )
    room = (sequences.criteria.max_length or 0) - sequences.longest
    if is_traced or room < PASSES:
        return None
    shared = copy(cache)
    shared.layers = [_Layer(layer) for layer in layers]
    ids, config, kwargs = resumed(model, sequences, shared, config, model_kwargs)
    vars(config).update(return_dict_in_generate=False)
    passes = _Trial(StoppingCriteriaList(sequences.criteria))
    model._sample(ids, sequences.processors, passes, config, **kwargs)
    return statistics.median(after - before for before, after in pairwise(passes.times))
