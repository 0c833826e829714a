"""One call of `generate` on a batch, plain or with the drafter: the record that a sweep collects.

In: a left-padded batch. Out: a Call for each method, timed in turn, plain's tokens compared with.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from torch import Tensor
from transformers import PreTrainedModel, StoppingCriteriaList

from .methods import Arguments, FirstTokenClock
from .timing import timed

METHODS = ("plain", "coral")


@dataclass(frozen=True)
class Call:
    """What a call gave and cost."""

    size: int  # what is swept: rows of the batch, or tokens of the context
    item: int  # the same for both methods and all repeats on one batch
    method: str
    repeat: int
    num_rows: int
    num_tokens: int  # new ones of all rows, each up to its own end
    num_rounds: int  # passes of the target after the first
    num_row_rounds: int  # of these, counted once for each row that had not ended
    seconds: float  # of the whole call, the prompt's pass included
    stage_seconds: dict[str, float]  # "prefill", and of the drafter "draft", "verify", "other"
    peak_bytes: int | None  # of GPU memory; None on a CPU
    num_equal_rows: int  # whose tokens are all those of the plain call

    @property
    def decoding_seconds(self) -> float:
        """Without the prompts' pass."""
        return self.seconds - self.stage_seconds["prefill"]


class Answer(NamedTuple):
    """What `generate` returned."""

    texts: list[list[int]]  # new tokens of each row, up to its own end
    num_rounds: int
    num_row_rounds: int
    stage_seconds: dict[str, float]


class Caller(NamedTuple):
    """A target, its drafter, and what every call is told."""

    target: PreTrainedModel
    drafter: PreTrainedModel
    arguments: Arguments  # of both methods
    tree: Arguments  # of the drafter's calls
    stops: Sequence[int]  # tokens that end a row

    def compare(self, batch: dict[str, Tensor], size: int, item: int, repeat: int) -> list[Call]:
        """Both methods on ids and mask (batch, length); which comes first alternates."""
        names = METHODS if (item + repeat) % 2 == 0 else METHODS[::-1]
        timings = {
            name: timed(partial(self.answer, name, batch), self.target.device) for name in names
        }
        expected = timings["plain"].result.texts
        return [
            Call(
                size=size,
                item=item,
                method=name,
                repeat=repeat,
                num_rows=len(expected),
                num_tokens=sum(map(len, answer.texts)),
                num_rounds=answer.num_rounds,
                num_row_rounds=answer.num_row_rounds,
                seconds=seconds,
                stage_seconds=answer.stage_seconds,
                peak_bytes=peak_bytes,
                num_equal_rows=sum(a == b for a, b in zip(expected, answer.texts, strict=True)),
            )
            for name, (answer, seconds, peak_bytes) in timings.items()
        ]

    def answer(self, method: str, batch: dict[str, Tensor]) -> Answer:
        """One method on ids and mask (batch, length)."""
        return self.plain(batch) if method == "plain" else self.coral(batch)

    def plain(self, batch: dict[str, Tensor]) -> Answer:
        """The target alone: one token of every row a pass."""
        clock = FirstTokenClock()
        sequences = self.target.generate(
            **batch, stopping_criteria=StoppingCriteriaList([clock]), **self.arguments
        )
        texts = [*self.texts(sequences, batch)]
        longest = max(map(len, texts))
        row_rounds = sum(len(text) - 1 for text in texts)
        return Answer(texts, longest - 1, row_rounds, {"prefill": clock.seconds or 0.0})

    def coral(self, batch: dict[str, Tensor]) -> Answer:
        """The target with its drafter."""
        out = self.target.generate(
            **batch,
            assistant_model=self.drafter,
            return_dict_in_generate=True,
            **self.arguments,
            **self.tree,
        )
        stages = ("prefill", "draft", "verify", "other")
        seconds = {name: getattr(out.stats, f"{name}_seconds") for name in stages}
        texts = [*self.texts(out.sequences, batch)]
        return Answer(texts, out.stats.num_rounds, len(out.stats.round_lengths), seconds)

    def texts(self, sequences: Tensor, batch: dict[str, Tensor]) -> Iterator[list[int]]:
        """The new tokens of each row up to its own end; what lies behind is padding."""
        for row in sequences[:, batch["input_ids"].shape[1] :].tolist():
            ends = (index + 1 for index, token in enumerate(row) if token in self.stops)
            yield row[: next(ends, len(row))]
