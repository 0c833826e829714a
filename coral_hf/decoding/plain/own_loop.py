"""transformers' own decoding loop: for calls that never draft, and for the rest of a call.

In: what `generate` has prepared, or where our loop stands when drafting does not pay. Out: the
output of plain `generate`, and its `Passes`. So what is not drafted costs what plain `generate`
costs, whatever watches the tokens.
"""

import time
from copy import copy
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteriaList
from transformers.generation.utils import GenerateDecoderOnlyOutput

from ..caches.continuation import CACHE, whole_length
from ..caches.ragged_cache import RaggedCache
from ..sequences import Sequences
from .whole_batch import WholeBatch

OUTPUTS = ("output_scores", "output_logits", "output_hidden_states", "output_attentions")


class Passes(StoppingCriteriaList):
    """Stopping criteria that note each pass of the target."""

    def __init__(self, criteria: StoppingCriteriaList):
        super().__init__(criteria)
        self.start = time.perf_counter()
        self.times: list[float] = []  # when the tokens of each pass had come
        self._done: list[Tensor] = []  # (batch,) each, whether a row has ended

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs) -> Tensor:
        """See `StoppingCriteriaList`."""
        done = super().__call__(input_ids, scores, **kwargs)
        if not self.times:
            bool(done.all())  # waits for the device, as `generate` does next
        self.times.append(time.perf_counter())
        self._done.append(done)
        return done

    @property
    def counts(self) -> list[int]:
        """New tokens of each row, those behind its end left out."""
        done = torch.stack(self._done).cummax(0).values  # (passes, batch)
        return (len(done) - done.sum(0) + 1).clamp(max=len(done)).tolist()


def decode_all(
    model: PreTrainedModel,
    sequences: Sequences,
    config: GenerationConfig,
    model_kwargs: dict[str, Any],
) -> tuple[Tensor | GenerateDecoderOnlyOutput, Passes]:
    """Decode a whole call plainly: what plain `generate` would do next.

    Args:
        sequences: of the prompts.
        config, model_kwargs: what `generate` has prepared.
    """
    passes = Passes(sequences.criteria)
    output = model._sample(
        sequences.ids,
        sequences.processors,
        passes,
        config,
        streamer=sequences.streamer,
        **model_kwargs,
    )
    return output, passes


def decode_rest(
    model: PreTrainedModel,
    sequences: Sequences,
    cache: RaggedCache,
    config: GenerationConfig,
    model_kwargs: dict[str, Any],
    scores: tuple[Tensor, ...] | None = None,
) -> tuple[GenerateDecoderOnlyOutput, Passes]:
    """Decode the rest of the rows of the last pass, which are equally long.

    Args:
        cache: of all their tokens but the last one.
        config, model_kwargs: what `generate` has prepared for the prompts.
        scores: of the tokens so far, if criteria are to see them.

    Returns:
        the output, with `sequences` (rows, all tokens) and other fields of the new tokens alone;
            and its passes.
    """
    cache.use_plain_append()
    ids, config, kwargs = resumed(model, sequences, cache, config, model_kwargs)
    ahead = ids.shape[1] - sequences.longest
    if not config.return_dict_in_generate:
        vars(config).update(dict.fromkeys(OUTPUTS, False))
    config.return_dict_in_generate = True
    around = WholeBatch(sequences, sequences.active, ahead, scores)
    passes = Passes(around.criteria)
    output = model._sample(
        ids, around.processors, passes, config, streamer=around.streamer, **kwargs
    )
    output.sequences = output.sequences[:, ahead:]
    return output, passes


def resumed(
    model: PreTrainedModel,
    sequences: Sequences,
    cache: RaggedCache,
    config: GenerationConfig,
    model_kwargs: dict[str, Any],
) -> tuple[Tensor, GenerationConfig, dict[str, Any]]:
    """What transformers' own loop needs to go on with the active rows; see [`decode_rest`].

    Returns:
        their ids (rows, all tokens), those before `input_ids` included, which only the cache has; a
            copy of the config; the inputs of a pass over their last token.
    """
    rows, batch = sequences.active, len(sequences.lengths)
    prompts = sequences.ids[:, : sequences.prompt_length]
    ahead = whole_length(prompts, model_kwargs) - sequences.prompt_length
    kwargs = {**model_kwargs, CACHE: cache}
    for _ in range(sequences.longest - sequences.prompt_length):
        kwargs = model._update_model_kwargs_for_generation({}, kwargs, is_encoder_decoder=False)
    if len(rows) < batch:
        kwargs = {name: _of_rows(value, rows, batch) for name, value in kwargs.items()}
    ids, config = F.pad(sequences.ids[rows], (ahead, 0)), copy(config)
    config.is_assistant = True  # or the prompt's images would be read again
    config._mask_length = ids.shape[1]
    return ids, config, kwargs


def _of_rows(value: Any, rows: list[int], batch: int) -> Any:
    """Keep some rows of an input whose first axis, or second with three in all, is the batch."""
    if not isinstance(value, Tensor):
        return value
    if value.dim() == 3 and value.shape[1] == batch and value.shape[0] != batch:
        return value[:, rows]  # positions in time, height and width
    return value[rows] if value.dim() and value.shape[0] == batch else value
