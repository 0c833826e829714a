"""transformers' own decoding loop: for calls that never draft, and for the rest of a call.

In: what `generate` has prepared, or where our loop stands when drafting does not pay. Out: the
output of plain `generate`, and its `Passes`. So what is not drafted costs what plain `generate`
costs, whatever watches the tokens.
"""

import time
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput

from ..caches.continuation import CACHE, whole_length
from ..caches.ragged_cache import RaggedCache
from ..outputs import OUTPUTS
from ..sequences import Sequences


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


@dataclass
class OwnLoop:
    """transformers' own loop for a call.

    Args:
        model: the target.
        sequences: of the call.
        config, model_kwargs: what `generate` has prepared for the prompts.
    """

    model: PreTrainedModel
    sequences: Sequences
    config: GenerationConfig
    model_kwargs: dict[str, Any]

    def decode_all(self) -> tuple[Tensor | GenerateDecoderOnlyOutput, Passes]:
        """Decode a whole call plainly: what plain `generate` would do next."""
        sequences = self.sequences
        passes, streamer = Passes(sequences.criteria), sequences.streamer
        watched = sequences.ids, sequences.processors, passes, self.config
        return self.model._sample(*watched, streamer=streamer, **self.model_kwargs), passes

    def decode_rest(
        self, cache: RaggedCache, scores: tuple[Tensor, ...] | None
    ) -> tuple[GenerateDecoderOnlyOutput, Passes]:
        """Decode the rest of the rows of the last pass, which are equally long.

        Args:
            cache: of all their tokens but the last one.
            scores: of the tokens so far, if criteria are to see them.

        Returns:
            the output, with `sequences` (rows, all tokens) and other fields of the new tokens
                alone; and its passes.
        """
        cache.use_plain_append()
        ids, config, kwargs = self._resumed(cache)
        ahead = ids.shape[1] - self.sequences.longest
        if not config.return_dict_in_generate:
            vars(config).update(dict.fromkeys(OUTPUTS, False))
        config.return_dict_in_generate = True
        around = WholeBatch(self.sequences, ahead, scores)
        passes = Passes(around.criteria)
        watched = ids, around.processors, passes, config
        output = self.model._sample(*watched, streamer=around.streamer, **kwargs)
        output.sequences = output.sequences[:, ahead:]
        return output, passes

    def _resumed(self, cache: RaggedCache) -> tuple[Tensor, GenerationConfig, dict[str, Any]]:
        """What the loop needs to go on with the active rows; see `decode_rest`.

        Returns:
            their ids (rows, all tokens), those before `input_ids` included, which only the cache
                has; a copy of the config; the inputs of a pass over their last token.
        """
        sequences = self.sequences
        rows, batch, prompt = sequences.active, len(sequences.lengths), sequences.prompt_length
        ahead = whole_length(sequences.ids[:, :prompt], self.model_kwargs) - prompt
        kwargs = {**self.model_kwargs, CACHE: cache}
        update = self.model._update_model_kwargs_for_generation
        for _ in range(sequences.longest - prompt):
            kwargs = update({}, kwargs, is_encoder_decoder=False)
        if len(rows) < batch:
            kwargs = {name: _of_rows(value, rows, batch) for name, value in kwargs.items()}
        ids, config = F.pad(sequences.ids[rows], (ahead, 0)), copy(self.config)
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


class WholeBatch(StoppingCriteria, BaseStreamer):
    """Processors, criteria and streamer for a loop over the active rows of a call.

    They see the whole batch, as in plain `generate`; where nothing is missing, they are the call's.

    Args:
        sequences: of the call; rows that have ended are padded.
        ahead: columns of ids to leave out, which only a cache has.
        scores: of the tokens so far, (batch, vocab) each, where criteria are to see them.
    """

    def __init__(self, sequences: Sequences, ahead: int, scores: tuple[Tensor, ...] | None):
        self.processors, self.criteria = sequences.processors, sequences.criteria
        self.streamer = sequences.streamer
        self._sequences, self._rows, self._ahead = sequences, sequences.active, ahead
        self._scores = scores or ()
        is_ended = [sequences.is_ended[row] for row in self._rows]
        is_whole = len(self._rows) == len(sequences.lengths)
        if is_whole and not ahead and not scores and not any(is_ended):
            return
        self._ended = torch.tensor(is_ended, device=sequences.ids.device)
        self.processors = LogitsProcessorList([self.process])
        for one in sequences.criteria:  # which tells `generate` to pad
            if hasattr(one, "eos_token_id"):
                self.eos_token_id = one.eos_token_id
        self.criteria = StoppingCriteriaList([self])
        if self.streamer is not None:
            self.streamer = self

    def process(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (rows, vocab) of the rows that go on; one that stays beyond its end is padded."""
        every = scores.new_zeros(len(self._sequences.lengths), scores.shape[1])
        every[self._rows] = scores
        scores = self._sequences.processors(self._whole(input_ids), every)[self._rows]
        if padded := self._sequences.padded:
            scores[padded] = float("-inf")
            scores[padded, self._sequences.pad_token] = 0.0
        return scores

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs) -> Tensor:
        """Whether each of the rows that go on has ended, (rows,)."""
        if scores is not None and len(self._rows) == len(self._sequences.lengths):
            scores = (*self._scores, *scores)
        done = self._sequences.criteria(self._whole(input_ids), scores, **kwargs)
        return done[self._rows] | self._ended

    def put(self, tokens: Tensor) -> None:
        """Stream the newest tokens, of shape (rows,)."""
        assert self._sequences.streamer is not None, "there is one to wrap"
        self._sequences.streamer.put(self._with_padding(tokens))

    def end(self) -> None:
        """Tell the streamer that the sequences are complete."""
        self._sequences.end()

    def _whole(self, input_ids: Tensor) -> Tensor:
        """The ids of all rows, (rows, ahead + length) → (batch, length)."""
        whole, known = self._with_padding(input_ids[:, self._ahead :]), self._sequences.ids
        ended = [row for row in range(len(whole)) if row not in self._rows]
        whole[ended, : known.shape[1]] = known[ended]
        return whole

    def _with_padding(self, tokens: Tensor) -> Tensor:
        """(rows, ...) → (batch, ...)"""
        batch, pad = len(self._sequences.lengths), self._sequences.pad_token
        whole = tokens.new_full((batch, *tokens.shape[1:]), pad)
        whole[self._rows] = tokens
        return whole
