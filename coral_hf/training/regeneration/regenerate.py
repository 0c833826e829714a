"""Training data in the target's own words: it answers the prompts of a dataset itself.

In: a target, rows of any layout. Out: a JSONL file of `messages` or `text` rows, which
`coral-hf train` reads.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ...identity import identify, seed_of, tokenizer_hash, weights_digest
from ...target import max_positions, text_config
from ..data.vocabulary import warn_of_other_ends
from .answer_file import AnswerFile, open_answers
from .answers import Speaker
from .dialogue import Dialogue, Passage, open_row

logger = logging.get_logger(__name__)

BATCHES_OF_A_WINDOW = 64  # rows are sorted within it, so that those of a batch are alike


@dataclass(frozen=True)
class RegenerationSettings:
    """How a target answers.

    Raises:
        ValueError: for a value out of range.
    """

    max_new_tokens: int = 512  # of an answer
    temperature: float = 0.0  # 0 takes the likeliest token
    top_p: float = 1.0
    seed: int = 0
    unfinished: str = "keep"  # or "drop": what becomes of answers that `max_new_tokens` cuts off
    prompt_tokens: int = 16  # of a plain text
    batch_size: int = 16

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "prompt_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}; use at least 1.")
        if self.temperature < 0:
            raise ValueError(f"`temperature` is {self.temperature}; use 0 or more.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"`top_p` is {self.top_p}; use a value above 0, up to 1.")
        if self.unfinished not in ("keep", "drop"):
            raise ValueError(f"`unfinished` is {self.unfinished!r}; use 'keep' or 'drop'.")


class Regenerated(NamedTuple):
    """What a file of answers holds, of all runs together."""

    num_rows: int
    num_unfinished: int  # of them, rows whose last answer was cut off
    num_left_out: int  # rows of the dataset that have no answer


class Survey(NamedTuple):
    """What is known of a dataset before the first answer."""

    sizes: list[tuple[int, int]]  # (rows,) turns and characters of each row
    digest: str  # SHA-256 of all that the answers depend on


def regenerate(
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Any,
    output: str | Path,
    settings: RegenerationSettings | None = None,
    drafter: PreTrainedModel | None = None,
) -> Regenerated:
    """Let a target answer the prompts of a dataset; go on where an earlier run was broken off.

    Every assistant's turn is answered anew, in turn, and the answer becomes part of the prompt of
    the next. Turns of all others stay, and so do calls of tools. Of a `text` row the target
    continues the first `prompt_tokens`.

    Args:
        target: the target, on its device.
        tokenizer: the target's.
        dataset: a `datasets.Dataset` of any layout but `input_ids`.
        output: a JSONL file. Rows are appended as their batch is done.
        settings: how the target answers.
        drafter: a drafter of the target, to be faster.

    Raises:
        ValueError: for rows that cannot be read, naming the first and their number, and for an
            `output` that was written with other settings, of another dataset or by another target.
    """
    settings = RegenerationSettings() if settings is None else settings
    survey = _survey(dataset, settings)
    _try_first(dataset[0], tokenizer, settings)
    warn_of_other_ends(tokenizer, target)
    facts = _facts(target, tokenizer, survey, settings, drafter)
    speaker = _speaker(target, tokenizer, settings, drafter)
    with open_answers(Path(output), facts) as file:
        bar = tqdm(total=len(survey.sizes), initial=len(file.done), unit="row", desc="Answering")
        with bar:
            for rows in _batches(survey.sizes, file.done, settings.batch_size):
                talks = {row: open_row(dataset[row], settings.prompt_tokens) for row in rows}
                _answer(talks, speaker, tokenizer, settings)
                new = {row: talk for row, talk in talks.items() if row not in file.done}
                _write(file, new, dataset)
                bar.update(len(new))
        return _summary(file)


def _survey(dataset: Any, settings: RegenerationSettings) -> Survey:
    sizes, problems, digest = [], [], hashlib.sha256()
    for number, row in enumerate(dataset):
        try:
            talk = open_row(row, settings.prompt_tokens)
        except ValueError as error:
            problems.append((number, error))
            continue
        content = [talk.text] if isinstance(talk, Passage) else [talk.rest, talk.tools]
        words = json.dumps(content)
        digest.update(words.encode())
        sizes.append((1 if isinstance(talk, Passage) else len(talk.rest), len(words)))
    if problems:
        first, problem = problems[0]
        raise ValueError(
            f"Row {first}: {problem} Of {number + 1} rows, {len(problems)} cannot be read; mend"
            " them or drop them with `dataset.filter` (docs/data.md)."
        )
    if not sizes:
        raise ValueError("`dataset` has no rows; check its path, its split and its filters.")
    return Survey(sizes, digest.hexdigest())


def _try_first(row: Any, tokenizer: PreTrainedTokenizerBase, settings: RegenerationSettings):
    """Say at once what is wrong with all rows, such as a chat template that is not there."""
    talk = open_row(row, settings.prompt_tokens)
    try:
        if talk.advance():
            talk.prompt(tokenizer)
    except ValueError as error:
        raise ValueError(f"Row 0: {error}") from error


def _facts(
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    survey: Survey,
    settings: RegenerationSettings,
    drafter: PreTrainedModel | None,
) -> dict[str, Any]:
    """What the answers depend on."""
    own = identify(target)
    is_drafted = drafter is not None and settings.temperature > 0  # greedy, it changes no answer
    return {
        **{name: value for name, value in asdict(settings).items() if name != "batch_size"},
        "dataset": survey.digest,
        "target": own.digest,
        "dtype": own.dtype,
        "quantization": own.quantization,
        "drafter": weights_digest(drafter) if is_drafted else None,
        "tokenizer": tokenizer_hash(tokenizer),
        "chat_template": tokenizer.chat_template,
    }


def _speaker(
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: RegenerationSettings,
    drafter: PreTrainedModel | None,
) -> Speaker:
    limit = max_positions(text_config(target))
    if limit is not None and settings.max_new_tokens >= limit:
        raise ValueError(
            f"`max_new_tokens` is {settings.max_new_tokens}, but the target has {limit} positions;"
            " leave some to the prompts."
        )
    found = target.generation_config.eos_token_id
    found = tokenizer.eos_token_id if found is None else found
    ends = [] if found is None else [found] if isinstance(found, int) else list(found)
    pad = tokenizer.pad_token_id
    return Speaker(
        target=target.eval(),
        room=None if limit is None else limit - settings.max_new_tokens,
        ends=ends,
        pad_token_id=pad if pad is not None else (ends or [0])[0],
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        drafter=drafter,
    )


def _batches(
    sizes: Sequence[tuple[int, int]], done: set[int], batch_size: int
) -> Iterator[list[int]]:
    """Numbers of rows in batches of like rows, those batches that are not done.

    A batch of which some rows are done is answered as a whole: rounding depends on the batch.
    """
    window = batch_size * BATCHES_OF_A_WINDOW
    for start in range(0, len(sizes), window):
        rows = range(start, min(start + window, len(sizes)))
        alike = sorted(rows, key=lambda row: sizes[row])
        batches = (alike[at : at + batch_size] for at in range(0, len(alike), batch_size))
        yield from (batch for batch in batches if not done.issuperset(batch))


def _answer(
    talks: dict[int, Dialogue | Passage],
    speaker: Speaker,
    tokenizer: PreTrainedTokenizerBase,
    settings: RegenerationSettings,
) -> None:
    """Answer all turns of the rows of a batch."""
    while True:
        prompts = _prompts(talks, speaker, tokenizer)
        if not prompts:
            return
        seeds = [seed_of(settings.seed, row, talks[row].num_answers) for row in prompts]
        answers = speaker.answer([*prompts.values()], seeds)
        for row, answer in zip(prompts, answers, strict=True):
            if settings.unfinished == "drop" and not answer.is_complete:
                talks[row].stop("an answer that was cut off")
            else:
                talks[row].take(answer, tokenizer)


def _prompts(
    talks: dict[int, Dialogue | Passage], speaker: Speaker, tokenizer: PreTrainedTokenizerBase
) -> dict[int, list[int]]:
    """The next prompt, (length,), of each row that has one; other rows end here."""
    prompts = {}
    for row, talk in talks.items():
        if not talk.advance():
            continue
        try:
            prompt = talk.prompt(tokenizer)
        except ValueError as error:
            talk.stop(str(error))
            continue
        if speaker.room is not None and len(prompt) > speaker.room:
            most = f"at most {speaker.room} leave room for an answer"
            talk.stop(f"a prompt of {len(prompt)} tokens; {most}")
        elif prompt:
            prompts[row] = prompt
        else:
            talk.stop("an empty prompt")
    return prompts


def _write(file: AnswerFile, talks: dict[int, Dialogue | Passage], dataset: Any) -> None:
    rows, left_out = [], []
    for number, talk in talks.items():
        if talk.num_answers == 0:
            left_out.append({"row": number, "reason": talk.stopped or "no turn to answer"})
            continue
        name = dataset[number].get("id")
        rows.append({"row": number, **({} if name is None else {"id": name}), **talk.result()})
    file.append(rows, left_out)


def _summary(file: AnswerFile) -> Regenerated:
    complete = [row["is_complete"] for row in file.answers.read()]
    reasons = [row["reason"] for row in file.left_out.read()]
    if reasons:
        logger.warning(
            f"{len(reasons)} rows have no answer and are left out, such as for {reasons[0]};"
            f" {file.left_out.path} names them."
        )
    return Regenerated(len(complete), complete.count(False), len(reasons))
