"""The sequences of a call so far, and all that watches them: processors, criteria, the streamer.

In: new tokens. Out: whether a row has ended, and the processed scores of its next token. Every
token passes here in order, so none comes out after the first stop, and a processor sees each
position once, with its own prefix.

Rows of a batch grow by numbers of tokens of their own as long as whatever watches them looks at one
row at a time. Where it may look at the whole batch, they grow in lockstep, as in plain `generate`.
Where something outside counts rows, none leaves the batch before all have ended.
"""

import copy
import sys
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteriaList
from transformers import generation as hf
from transformers.generation.stopping_criteria import MaxLengthCriteria
from transformers.generation.streamers import BaseStreamer

from . import watchers
from .drafting import DraftTree, host_tensor
from .watchers import DraftStreamer, processed

GROWTH = 128  # tokens of a row that a buffer has room for, each time that it grows


class Sequences:
    """Rows of tokens in a buffer; what lies behind a row's end is padding."""

    def __init__(
        self,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        streamer: BaseStreamer | None = None,
        pad_token: int = 0,
        is_lockstep: bool = False,
        keeps_rows: bool = False,
    ):
        """Start at prompts, (batch, length).

        `is_lockstep`: grow all rows alike, even where each could accept tokens on its own;
        `keeps_rows`: keep rows that have ended until all have.
        """
        batch, self.prompt_length = input_ids.shape
        self.lengths = [self.prompt_length] * batch
        self.is_stopped = [False] * batch  # rows that have left the batch
        self.is_ended = [False] * batch  # rows that have come to their end
        self._newest = [0] * batch  # the last token of each row, on the host
        self._buffer = input_ids.clone()
        self.pad_token, self.streamer = pad_token, streamer
        self.processors, self.criteria = logits_processor, stopping_criteria
        self._end_tokens = _end_tokens(stopping_criteria)
        self._limit = stopping_criteria.max_length or sys.maxsize  # tokens of a row
        sees_batch = any(type(one) not in watchers.ROW_WISE_CRITERIA for one in stopping_criteria)
        sees_batch |= any(type(one) not in watchers.ROW_WISE for one in logits_processor)
        sees_batch |= streamer is not None
        # plain `generate` pads where a criterion knows end tokens; else a row goes on until all end
        self._pads = any(hasattr(one, "eos_token_id") for one in stopping_criteria)
        # what is not known may look at rows that have ended
        known = watchers.ROW_WISE_CRITERIA if self._pads else watchers.BATCH_CRITERIA
        known = (*watchers.STATELESS, *watchers.STATEFUL, *known)
        keeps_rows |= any(type(one) not in known for one in (*logits_processor, *stopping_criteria))
        self.keeps_rows = batch > 1 and keeps_rows
        self.is_lockstep = batch > 1 and (is_lockstep or sees_batch or self.keeps_rows)
        # whether scores depend on logits alone
        self.is_prefix_free = all(type(one) in watchers.PREFIX_FREE for one in logits_processor)
        # whether nothing asks for one token after another: all of a round can come at once
        is_ordered = self._end_tokens is None or self.is_lockstep
        self.is_free = self.is_prefix_free and not is_ordered

    @property
    def active(self) -> list[int]:
        """The rows of the next pass: those that have not ended, or all until the last one has."""
        return [row for row, is_stopped in enumerate(self.is_stopped) if not is_stopped]

    @property
    def padded(self) -> list[int]:
        """The rows that have ended and stay, which go on with padding."""
        is_padded = self.keeps_rows and self._pads
        return [row for row in self.active if self.is_ended[row]] if is_padded else []

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(self.lengths)

    @property
    def ids(self) -> Tensor:
        """(batch, longest), padded on the right where a row ended earlier."""
        return self._buffer[:, : self.longest]

    def last(self, rows: list[int]) -> Tensor:
        """The newest token of some rows after the prompt's, of shape (len(rows),), in int64."""
        return host_tensor([self._newest[row] for row in rows]).to(self._buffer.device)

    def scores(self, rows: list[int], logits: Tensor) -> Tensor:
        """Processed scores of the next token of some rows: (rows, vocab) → (rows, vocab)."""
        if self.is_prefix_free:
            return processed(self.processors, logits)
        logits = logits.to(torch.float32, copy=True)
        if self.is_lockstep:
            every = logits.new_zeros(len(self.lengths), logits.shape[1])
            every[rows] = logits
            return self.processors(self.ids.clone(), every)[rows]
        lengths = [self.lengths[row] for row in rows]
        scores: dict[int, Tensor] = {}
        for length in set(lengths):  # rows of one length are a batch
            found = [index for index, own in enumerate(lengths) if own == length]
            own = [rows[index] for index in found]
            processors = LogitsProcessorList(_of_rows(one, own) for one in self.processors)
            alike = processors(self._buffer[own, :length], logits[found])
            scores.update(zip(found, alike, strict=True))
        return torch.stack([scores[index] for index in range(len(rows))])

    def warp(self, logits: Tensor) -> Tensor:
        """A drafter's logits (rows, vocab) after the processors that look at nothing else."""
        warpers = [one for one in self.processors if type(one) in watchers.PREFIX_FREE]
        return processed(warpers, logits)

    def _row(self, row: int) -> Tensor:
        """(1, length)"""
        return self._buffer[row : row + 1, : self.lengths[row]]

    def show(self, tree: DraftTree) -> None:
        """Show a streamer that wants to see it the tree of the next round, (batch, nodes)."""
        if isinstance(self.streamer, DraftStreamer):
            self.streamer.take_tree(tree)

    def append(
        self, rows: list[int], tokens: list[int], scores: Callable[[], tuple | None], depth: int = 0
    ) -> None:
        """Make one more token of some rows certain, stream it, and ask whether it is their last.

        `scores`: what criteria see of all tokens so far, each (batch, vocab); `depth`: see
        [`DraftStreamer`].
        """
        self._reserve(self.longest + 1)
        for row, token in zip(rows, tokens, strict=True):
            self._buffer[row, self.lengths[row]] = self._newest[row] = token
            self.lengths[row] += 1
        if self.streamer is not None:
            _stream(self.streamer, self.ids[:, -1].cpu(), depth)
        if self._end_tokens is not None:
            for row, token in zip(rows, tokens, strict=True):
                self._end(row, self.lengths[row] >= self._limit or token in self._end_tokens)
            return
        is_done = self.criteria(self.ids, scores()).tolist() if self.is_lockstep else None
        for row in rows:
            done = is_done[row] if is_done else self.criteria(self._row(row), scores()).all()
            self._end(row, bool(done))

    def _end(self, row: int, is_ended: bool) -> None:
        """Note whether a row ends; where rows stay, they leave together."""
        self.is_ended[row] |= is_ended
        if not self.keeps_rows:
            self.is_stopped[row] = self.is_ended[row]
        elif all(self.is_ended):
            self.is_stopped = [True] * len(self.is_ended)

    def emit(self, tokens: list[list[int]]) -> list[list[int]]:
        """Append tokens of each active row, and return those up to its end; where `is_free`.

        On the device they are one block (rows, new), padded on the right.
        """
        ends, rows = self._end_tokens or (), self.active
        drafted = len(tokens[0]) - 1  # the last token is the target's own
        starts = [self.lengths[row] for row in rows]
        for index, (row, start) in enumerate(zip(rows, starts, strict=True)):
            stops = [place for place, token in enumerate(tokens[index]) if token in ends]
            count = stops[0] + 1 if stops else len(tokens[index])
            own = tokens[index] = tokens[index][: min(count, self._limit - start)]
            self.lengths[row], self._newest[row] = start + len(own), own[-1]
            self.is_stopped[row] = self.lengths[row] >= self._limit or bool(stops)
        new, device = max(map(len, tokens)), self._buffer.device
        self._reserve(max(starts) + new)
        padded = [row + [self.pad_token] * (new - len(row)) for row in tokens]
        places = host_tensor(starts)[:, None] + torch.arange(new, device="cpu")
        where = host_tensor(rows)[:, None], places
        # without waiting for what the device has still to do
        values = host_tensor(padded).to(self._buffer, non_blocking=True)
        self._buffer[tuple(one.to(device, non_blocking=True) for one in where)] = values
        if self.streamer is not None:  # of a single row
            for depth, token in enumerate(tokens[0], start=1):
                _stream(self.streamer, host_tensor([token]), depth if depth <= drafted else 0)
        return tokens

    @property
    def behind(self) -> list[int]:
        """The active rows that are shorter than the longest of them."""
        active = self.active
        longest = max(self.lengths[row] for row in active)
        return [row for row in active if self.lengths[row] < longest]

    def take(self, rows: list[int], ids: Tensor) -> None:
        """Take the rest of some rows from a loop that has decoded them: (rows, all tokens)."""
        length = ids.shape[1]
        self._reserve(length)
        self._buffer[rows, :length] = ids
        for row in rows:
            self.lengths[row], self.is_stopped[row] = length, True

    def end(self) -> None:
        """Tell the streamer that the sequences are complete."""
        if self.streamer is not None:
            self.streamer.end()

    def _reserve(self, length: int) -> None:
        batch, room = self._buffer.shape
        if length > room:
            buffer = self._buffer.new_full((batch, length + GROWTH), self.pad_token)
            buffer[:, :room] = self._buffer
            self._buffer = buffer


def _stream(streamer: BaseStreamer, tokens: Tensor, depth: int) -> None:
    """Hand a streamer the newest tokens, (batch,); `depth`: see [`DraftStreamer`]."""
    if isinstance(streamer, DraftStreamer):
        streamer.depth = depth
    streamer.put(tokens)
    if isinstance(streamer, DraftStreamer):
        streamer.depth = 0  # what follows may come from transformers' own loop


def _end_tokens(criteria: StoppingCriteriaList) -> set[int] | None:
    """The tokens that end a row, where nothing but them and the length ends it.

    Numbers are compared faster than tensors, which a small target would notice.
    """
    if any(type(one) not in (MaxLengthCriteria, hf.EosTokenCriteria) for one in criteria):
        return None
    ends = [one.eos_token_id.tolist() for one in criteria if type(one) is hf.EosTokenCriteria]
    return {token for tokens in ends for token in tokens}


def _of_rows(processor: LogitsProcessor, rows: list[int]) -> LogitsProcessor:
    """Return a row-wise processor without what it knows of other rows."""
    # of shape (batch,) in newer versions
    ignored = getattr(processor, "prompt_ignore_length", None)
    if not isinstance(ignored, Tensor):
        return processor
    processor = copy.copy(processor)
    vars(processor)["prompt_ignore_length"] = ignored[rows]
    return processor
