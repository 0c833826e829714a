"""Regeneration of a dataset: the target answers its prompts itself.

In: a target, rows of any layout. Out: a JSONL file of `messages` or `text` rows, which
`coral-hf train` reads.

    out.jsonl                   a row a line, each with its number in the dataset
    out.jsonl.settings.json     what the answers depend on; a resumed run must have the same
    out.jsonl.left_out.jsonl    rows without an answer, with the reason

With a temperature, the answers of a batch are drawn from the seed of its first row.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils import logging

from ...atomic import JsonLines, keep_settings, sole_writer
from ...identity import identify, seed_of, weights_digest
from ...measure.calls import seeded
from ...measure.prompts import left_padded
from ...target import max_positions, text_config
from ..data.dataset import warn_of_other_ends
from . import RegenerationSettings
from .dialogue import Dialogue, asked_for, end_tokens, longest_prompt
from .endpoint import Endpoint
from .served import ServedTarget

logger = logging.get_logger(__name__)

WINDOW = 64  # batches whose rows are sorted together, so that those of a batch are alike
# override the target's own generation config, which would change its distribution
SAMPLED = {"num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "do_sample": True}
GREEDY = {**SAMPLED, "do_sample": False, "temperature": 1.0, "top_p": 1.0}
SAMPLED |= {"top_k": 0, "min_p": 0.0, "typical_p": 1.0}


class Regenerated(NamedTuple):
    """What a file of answers holds, after all runs that wrote it."""

    num_rows: int
    num_unfinished: int  # of them, rows whose last answer was cut off
    num_left_out: int  # rows of the dataset that have no answer


def regenerate(
    target: PreTrainedModel | Endpoint,
    tokenizer: Tokenizer,
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
    if not isinstance(target, Endpoint):
        generator: Any = AnswerGenerator(target, tokenizer, settings, drafter)
    elif drafter is None:
        generator = ServedTarget(target, tokenizer, settings)
    else:
        raise ValueError("A server drafts itself (docs/use/serve.md); leave out `drafter`.")
    warn_of_other_ends(tokenizer, generator.target)
    with sole_writer(output.parent, output.name):
        if output.exists() and not sidecar.exists():
            raise ValueError(f"`output` {output} exists and was not written by `regenerate`.")
        keep_settings(sidecar, {"dataset": digest, **generator.identity()}, output)
        answers = JsonLines(output).mend()
        left_out = JsonLines(f"{output}.left_out.jsonl").mend()
        done = {row["row"] for file in (answers, left_out) for row in file.read()}
        batches = _batches(sizes, done, generator.batch_size)
        given = ([Dialogue(i, dataset[i], tokenizer, settings) for i in part] for part in batches)
        parts = generator.answered(given)
        counts = {"total": len(sizes), "initial": len(done)}
        with closing(parts), tqdm(unit="row", desc="Answering", **counts) as bar:
            for rows in parts:
                new = [row.result() for row in rows if row.number not in done]
                answers.append([row for row in new if "reason" not in row])
                left_out.append([row for row in new if "reason" in row])
                bar.update(len(new))
        complete = [row["is_complete"] for row in answers.read()]
        reasons = [row["reason"] for row in left_out.read()]
    if reasons:
        what = f"{len(reasons)} rows have no answer and are left out, such as for {reasons[0]}"
        logger.warning(f"{what}; {left_out.path} names them.")
    return Regenerated(len(complete), complete.count(False), len(reasons))


def _survey(
    dataset: Any, tokenizer: Tokenizer, settings: RegenerationSettings
) -> tuple[list[tuple[int, int]], str]:
    """Read all rows before the first answer: turns and characters of each, and their digest."""
    sizes, digest = [], sha256()
    for number, given in enumerate(dataset):
        try:
            row = Dialogue(number, given, tokenizer, settings)
            if not number and not row.next_prompt(math.inf) and row.stopped:
                raise ValueError(row.stopped)  # as every row would stop
        except ValueError as error:
            remedy = "Repair or drop such rows with `dataset.filter` (docs/use/data.md)."
            raise ValueError(f"Row {number}: {error} {remedy}") from error
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


@dataclass
class AnswerGenerator:
    """A target that answers batches of prompts.

    Raises:
        ValueError: if answers of `max_new_tokens` leave prompts no room in the target's positions.
    """

    target: PreTrainedModel  # on its device
    tokenizer: Tokenizer
    settings: RegenerationSettings
    drafter: PreTrainedModel | None = None  # to be faster

    def __post_init__(self) -> None:
        positions = max_positions(text_config(self.target)) or math.inf
        self._room = longest_prompt(positions, self.settings)
        self.batch_size = self.settings.batch_size
        self._ends = end_tokens(self.target.generation_config, self.tokenizer)
        self.target.eval()

    def identity(self) -> dict[str, Any]:
        """Collect what the answers depend on beside their prompts, as plain values by name."""
        digest, dtype, quantization = identify(self.target)
        # a drafter changes no greedy answer
        is_drafted = self.drafter is not None and self.settings.temperature > 0
        return {
            **asked_for(self.settings, self.tokenizer),
            "target": digest,
            "dtype": dtype,
            "quantization": quantization,
            "drafter": weights_digest(self.drafter) if is_drafted else None,
        }

    def answered(self, batches: Iterator[list[Dialogue]]) -> Iterator[list[Dialogue]]:
        """Answer all turns of rows, a batch at a time."""
        for rows in batches:
            while asked := [(r, ids) for r in rows if (ids := r.next_prompt(self._room))]:
                seed = seed_of(self.settings.seed, asked[0][0].number, asked[0][0].num_kept)
                answers = self.generate([ids for _, ids in asked], seed)
                for (row, _), answer in zip(asked, answers, strict=True):
                    row.take(answer, self._ends)
            yield rows

    def generate(self, prompts: Sequence[list[int]], seed: int) -> list[list[int]]:
        """Answer some prompts, (batch, length), of different lengths: (batch, new)."""
        settings, choice = self.settings, GREEDY
        if settings.temperature > 0:
            choice = {"temperature": settings.temperature, "top_p": settings.top_p, **SAMPLED}
        pad = self.tokenizer.pad_token_id or 0
        ends = {"eos_token_id": self._ends or None, "pad_token_id": pad}
        config = GenerationConfig(**choice, **ends, max_new_tokens=settings.max_new_tokens)
        batch = left_padded(prompts, pad, self.target.device)
        with seeded(seed, self.target.device):
            output = self.target.generate(
                **batch, generation_config=config, assistant_model=self.drafter
            )
        return output[:, batch["input_ids"].shape[1] :].tolist()
