"""What watches a call, for a loop over some rows of it.

In: token ids and scores of the rows that go on. Out: processors, criteria and a streamer that see
the whole batch, as in plain `generate`.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from ..sequences import Sequences


class WholeBatch(StoppingCriteria, BaseStreamer):
    """Processors, criteria and streamer of a call; as they are where nothing is missing.

    Args:
        sequences: of the call; rows that have ended are padded.
        rows: of the call, that go on.
        ahead: columns of ids to leave out, which only a cache has.
        scores: of the tokens so far, (batch, vocab) each, where criteria are to see them.
    """

    def __init__(
        self,
        sequences: Sequences,
        rows: list[int],
        ahead: int = 0,
        scores: tuple[Tensor, ...] | None = None,
    ):
        self.processors, self.criteria = sequences.processors, sequences.criteria
        self.streamer = sequences.streamer
        self._sequences, self._rows, self._ahead = sequences, rows, ahead
        self._scores = scores or ()
        batch, is_ended = len(sequences.lengths), [sequences.is_ended[row] for row in rows]
        if len(rows) == batch and not ahead and not scores and not any(is_ended):
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
