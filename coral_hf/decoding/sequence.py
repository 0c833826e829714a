"""The text of a call so far, and all that watches it: processors, stopping criteria, streamer.

In: tokens, one by one. Out: whether to stop, and the processed scores of a position. Every token
passes here in order, so no token comes out after the first stop, and a processor sees each
position once, with its own prefix.
"""

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer


class Sequence:
    """One row of tokens in a buffer; `ids` is the part that is certain."""

    def __init__(
        self,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        streamer: BaseStreamer | None = None,
    ):
        """Start at a prompt, (1, length)."""
        self.prompt_length = self.length = input_ids.shape[1]
        self.is_stopped = False
        self._buffer = input_ids.clone()
        self._processors = logits_processor
        self._criteria = stopping_criteria
        self._streamer = streamer

    @property
    def ids(self) -> Tensor:
        """(1, length)"""
        return self._buffer[:, : self.length]

    @property
    def has_processors(self) -> bool:
        """Whether scores can differ from logits."""
        return len(self._processors) > 0

    def scores(self, logits: Tensor, drafted: list[int]) -> Tensor:
        """Processed scores of the token after the certain ones and `drafted`.

        (1, vocab) → (1, vocab), as in plain `generate` in fp32 whatever the target's dtype.
        """
        stop = self.length + len(drafted)
        self._reserve(stop)
        self._buffer[0, self.length : stop] = torch.tensor(drafted, dtype=torch.long)
        prefix = self._buffer[:, :stop].clone() if self.has_processors else self._buffer[:, :stop]
        return self._processors(prefix, logits.to(torch.float32, copy=True))

    def append(self, token: int, scores: tuple[Tensor, ...] | None = None) -> None:
        """Make a token certain, stream it, and ask the criteria whether it is the last one."""
        self._reserve(self.length + 1)
        self._buffer[0, self.length] = token
        self.length += 1
        if self._streamer is not None:
            self._streamer.put(torch.tensor([token]))
        self.is_stopped = bool(self._criteria(self.ids, scores).all())

    def end(self) -> None:
        """Tell the streamer that the text is complete."""
        if self._streamer is not None:
            self._streamer.end()

    def _reserve(self, length: int) -> None:
        if length > self._buffer.shape[1]:
            room = self._buffer.new_zeros(1, max(length, 2 * self._buffer.shape[1]))
            room[:, : self._buffer.shape[1]] = self._buffer
            self._buffer = room
