"""Regeneration of a dataset: the target answers its prompts itself.

In: a target, rows of any layout. Out: a JSONL file of `messages` or `text` rows, which
`coral-hf train` reads.

    out.jsonl                   a row a line, each with its number in the dataset
    out.jsonl.settings.json     what the answers depend on; a resumed run must have the same
    out.jsonl.left_out.jsonl    rows without an answer, with the reason
"""

import math
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ...atomic import JsonLines, keep_settings, sole_writer
from ...identity import seed_of
from ..data.dataset import warn_of_other_ends
from . import RegenerationSettings
from .answers import AnswerGenerator
from .dialogue import Dialogue
from .endpoint import Endpoint
from .served import ServedTarget

logger = logging.get_logger(__name__)

WINDOW = 64  # batches whose rows are sorted together, so that those of a batch are alike


class Regenerated(NamedTuple):
    """What a file of answers holds, after all runs that wrote it."""

    num_rows: int
    num_unfinished: int  # of them, rows whose last answer was cut off
    num_left_out: int  # rows of the dataset that have no answer


def regenerate(
    target: PreTrainedModel | Endpoint,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Any,
    output: str | Path,
    settings: RegenerationSettings | None = None,
    drafter: PreTrainedModel | None = None,
) -> Regenerated:
    """Let a target answer the prompts of a dataset; an interrupted run resumes.

    Every assistant's turn is answered in turn, and the answer becomes part of the prompt of the
    next. All other turns stay, and so do tool calls. Of a `text` row the target continues the first
    `prompt_tokens`.

    Args:
        target: the target, on its device, or a server that holds it.
        tokenizer: the target's.
        dataset: a `datasets.Dataset` of any layout but `input_ids`.
        output: a JSONL file. Rows are appended as their batch is done.
        settings: how the target answers.
        drafter: a drafter of the target, to be faster. A server has its own.

    Raises:
        ValueError: for rows that cannot be read, naming the first, for an `output` that was
            written with other settings, of another dataset or by another target, and for a server
            that does not return the target's tokens.
        ConnectionError: if a server does not answer; what it has answered is written.
    """
    settings, output = settings or RegenerationSettings(), Path(output)
    sidecar = Path(f"{output}.settings.json")
    sizes, digest = _survey(dataset, tokenizer, settings)
    generator = _generator(target, tokenizer, settings, drafter)
    warn_of_other_ends(tokenizer, generator.target)
    with sole_writer(output.parent, output.name):
        if output.exists() and not sidecar.exists():
            raise ValueError(
                f"`output` {output} exists and was not written by `regenerate`; choose another."
            )
        keep_settings(sidecar, {"dataset": digest, **generator.identity()}, output)
        answers = JsonLines(output).mend()
        left_out = JsonLines(f"{output}.left_out.jsonl").mend()
        done = {row["row"] for file in (answers, left_out) for row in file.read()}

        def row_of(number: int) -> Dialogue:
            return Dialogue(number, dataset[number], tokenizer, settings)

        if isinstance(generator, ServedTarget):
            parts = generator.answered(row_of(n) for n in range(len(sizes)) if n not in done)
        else:
            parts = _answered(_batches(sizes, done, settings.batch_size), row_of, generator)
        with (
            closing(parts),
            tqdm(total=len(sizes), initial=len(done), unit="row", desc="Answering") as bar,
        ):
            for rows in parts:
                new = [row.result() for row in rows if row.number not in done]
                answers.append([row for row in new if "reason" not in row])
                left_out.append([row for row in new if "reason" in row])
                bar.update(len(new))
        return _summary(answers, left_out)


def _generator(
    target: PreTrainedModel | Endpoint,
    tokenizer: PreTrainedTokenizerBase,
    settings: RegenerationSettings,
    drafter: PreTrainedModel | None,
) -> AnswerGenerator | ServedTarget:
    if not isinstance(target, Endpoint):
        return AnswerGenerator(target, tokenizer, settings, drafter)
    if drafter is not None:
        raise ValueError("A server drafts itself (docs/use/serve.md); leave out `drafter`.")
    return ServedTarget(target, tokenizer, settings)


def _survey(
    dataset: Any, tokenizer: PreTrainedTokenizerBase, settings: RegenerationSettings
) -> tuple[list[tuple[int, int]], str]:
    """Read all rows before the first answer: turns and characters of each, and their digest."""
    sizes, digest = [], sha256()
    for number, given in enumerate(dataset):
        try:
            row = Dialogue(number, given, tokenizer, settings)
            if not number and not row.next_prompt(math.inf) and row.stopped:
                raise ValueError(row.stopped)  # as every row would stop
        except ValueError as error:
            raise ValueError(
                f"Row {number}: {error} Repair or drop such rows with `dataset.filter`"
                " (docs/use/data.md)."
            ) from error
        digest.update(row.content.encode())
        sizes.append((row.num_turns, len(row.content)))
    return sizes, digest.hexdigest()


def _batches(
    sizes: Sequence[tuple[int, int]], done: set[int], batch_size: int
) -> Iterator[list[int]]:
    """Yield the numbers of rows in batches of similar rows, those batches that are not done.

    A batch of which some rows are done is answered as a whole: rounding depends on the batch.
    """
    window = batch_size * WINDOW
    for start in range(0, len(sizes), window):
        alike = sorted(range(len(sizes))[start : start + window], key=lambda row: sizes[row])
        batches = (alike[at : at + batch_size] for at in range(0, len(alike), batch_size))
        yield from (batch for batch in batches if not done.issuperset(batch))


def _answered(
    batches: Iterator[list[int]], row_of: Callable[[int], Dialogue], generator: AnswerGenerator
) -> Generator[list[Dialogue], None, None]:
    """Answer all turns of rows, a batch at a time."""
    longest, seed = generator.max_prompt_length, generator.settings.seed
    for numbers in batches:
        rows = [row_of(number) for number in numbers]
        while asked := [(row, ids) for row in rows if (ids := row.next_prompt(longest))]:
            seeds = [seed_of(seed, row.number, row.num_kept) for row, _ in asked]
            answers = generator.generate([ids for _, ids in asked], seeds)
            for (row, _), answer in zip(asked, answers, strict=True):
                row.take(answer)
        yield rows


def _summary(answers: JsonLines, left_out: JsonLines) -> Regenerated:
    complete = [row["is_complete"] for row in answers.read()]
    reasons = [row["reason"] for row in left_out.read()]
    if reasons:
        logger.warning(
            f"{len(reasons)} rows have no answer and are left out, such as for {reasons[0]};"
            f" {left_out.path} names them."
        )
    return Regenerated(len(complete), complete.count(False), len(reasons))
