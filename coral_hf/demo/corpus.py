"""Training rows and held-out prompts, of made-up stories or of a dataset.

In: DemoSettings. Out: rows that `CoralTrainer` takes and prompts of the benchmark, the same each
time; no prompt is the beginning of what is trained on.
"""

from datasets import Dataset, DatasetDict
from transformers import PreTrainedTokenizerBase

from ..atomic import write_text
from ..measure.prompts import Prompt, asked_messages
from ..training.data import load_conversations, to_messages
from . import DemoSettings
from .stories import opening, stories

PROMPT_CHARACTERS = 300  # of a text of one's own, about 100 tokens
DRAFTER_BATCH_SIZE = 2  # rows of a step: more steps in the same time
MORE_STORIES = 1000
PARTS = 2  # of the held-out prompts: what is measured, and what the head is chosen by


def told(settings: DemoSettings) -> tuple[list[str], list[str]]:
    """Return the stories to train on, and those that are held out."""
    return stories(settings.seed, settings.num_stories, PARTS * settings.num_prompts)


def write_stories(settings: DemoSettings) -> None:
    """Leave other stories for the reader's own next steps, blank lines between them."""
    others, _ = stories(settings.seed + 1, MORE_STORIES, 0)
    write_text(settings.output / "stories.txt", "\n\n".join(others))


def story_rows(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Return a row of `input_ids` (length,) for each text, between BOS and EOS."""
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return Dataset.from_dict({"input_ids": [[start, *row, end] for row in rows]})


def training_rows(settings: DemoSettings, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Return as many rows as the drafter's training can use up, shuffled."""
    if settings.dataset is None:
        rows = story_rows(told(settings)[0], tokenizer)
    else:
        rows = split(settings.dataset, settings)["train"]
    most = settings.drafter_budget.max_steps * DRAFTER_BATCH_SIZE
    return rows.shuffle(seed=settings.seed).select(range(min(most, len(rows))))


def held_out_prompts(settings: DemoSettings, part: int = 0) -> list[Prompt]:
    """Return prompts that begin no training row; those of another part of the stories are others.

    Raises:
        ValueError: for a dataset of too few rows.
    """
    if settings.dataset is not None:
        rows = split(settings.dataset, settings)["test"]
        return [prompt_of_row(dict(row), str(index)) for index, row in enumerate(rows)]
    prompts = [Prompt("stories", str(i), text=opening(x)) for i, x in enumerate(told(settings)[1])]
    return prompts[part::PARTS]


def split(dataset: str, settings: DemoSettings) -> DatasetDict:
    """Return a dataset's rows to train on and to hold out."""
    rows = load_conversations(dataset)
    return rows.train_test_split(test_size=settings.num_prompts, seed=settings.seed)


def prompt_of_row(row: dict, name: str) -> Prompt:
    """Return a conversation up to its last answered user turn, or the start of a text."""
    if row.get("text") is not None:
        start = row["text"][:PROMPT_CHARACTERS]
        return Prompt("held-out", name, text=start[: start.rfind("\n") + 1] or start)
    return Prompt("held-out", name, tuple(asked_messages(to_messages(row))))
