"""What the drafter is trained on, and the prompts that are held out from it.

In: settings. Out: rows that `CoralTrainer` takes, and prompts of the benchmark: of the standard
library's source, or of a dataset, some of whose rows, the same every time, become the prompts.
"""

from typing import Any

from datasets import Dataset, DatasetDict
from transformers import PreTrainedTokenizerBase

from ..measure import Prompt
from ..measure.prompts import asked_messages
from ..training.data import load_conversations, to_messages
from .corpus import first_lines, prompt_texts, read_corpus
from .settings import DemoSettings


def pack(documents: list[str], tokenizer: PreTrainedTokenizerBase, length: int) -> Dataset:
    """All documents, an EOS after each, cut into rows of `input_ids` (length,); no short last row.

    A row starts with BOS wherever it was cut, as a prompt does.
    """
    start, end = special_ids(tokenizer.bos_token_id), special_ids(tokenizer.eos_token_id)
    ids: list[int] = []
    for document in tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"]:
        ids += [*document, *end]
    size = length - len(start)
    cuts = range(0, len(ids) - size + 1, size)
    return Dataset.from_dict({"input_ids": [[*start, *ids[cut : cut + size]] for cut in cuts]})


def special_ids(token_id: object) -> list[int]:
    """A special token as a list, empty for a tokenizer without it."""
    return [token_id] if isinstance(token_id, int) else []


def training_rows(settings: DemoSettings, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """As many rows as the drafter's training can use up, shuffled."""
    if settings.dataset is None:
        corpus = read_corpus(settings.own_target.num_files)
        rows = pack(corpus.documents, tokenizer, settings.row_length)
    else:
        rows = split_dataset(settings)["train"]
    most = settings.drafter_budget.max_steps * settings.drafter_batch_size
    return rows.shuffle(seed=settings.seed).select(range(min(most, len(rows))))


def held_out_prompts(settings: DemoSettings) -> list[Prompt]:
    """Prompts from text that is in no training row."""
    if settings.dataset is None:
        texts = prompt_texts(read_corpus(settings.own_target.num_files), settings.num_prompts)
        return [Prompt("stdlib", f"{name}-{i}", text=text) for i, (name, text) in enumerate(texts)]
    rows = split_dataset(settings)["test"]
    return [prompt_of_row(dict(row), index) for index, row in enumerate(rows)]


def split_dataset(settings: DemoSettings) -> DatasetDict:
    """A dataset's rows to train on and to hold out."""
    rows = load_conversations(str(settings.dataset))
    if len(rows) <= settings.num_prompts:
        raise ValueError(
            f"`dataset` has {len(rows)} rows, of which `num_prompts` = {settings.num_prompts} are "
            "held out; give more rows or ask for fewer prompts."
        )
    return rows.train_test_split(test_size=settings.num_prompts, seed=settings.seed)


def prompt_of_row(row: dict[str, Any], index: int) -> Prompt:
    """A conversation up to its last answered question, or the start of a text."""
    if row.get("text") is not None:
        return Prompt("held-out", str(index), text=first_lines(row["text"]))
    return Prompt("held-out", str(index), tuple(asked_messages(to_messages(row))))
