"""Training rows and held-out prompts, of the standard library's source or of a dataset.

In: DemoSettings. Out: rows that `CoralTrainer` takes and prompts of the benchmark, the same each
time; no prompt is cut from what is trained on.
"""

import re
import sysconfig
from itertools import chain
from pathlib import Path

from datasets import Dataset, DatasetDict
from transformers import PreTrainedTokenizerBase

from ..measure.prompts import Prompt, asked_messages
from ..training.data import load_conversations, to_messages
from . import DemoSettings

# tests repeat themselves, tables of characters are not code, and the rest is not in every Python
SKIPPED_FOLDERS = {
    *("site-packages", "dist-packages", "test", "tests", "__pycache__", "__phello__"),
    *("encodings", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "turtledemo"),
}
HELD_OUT = ("csv.py", "fractions.py", "heapq.py", "queue.py", "shelve.py")
PROMPT_CHARACTERS = 300  # about 100 tokens
DRAFTER_BATCH_SIZE = 2  # rows of a step: more steps in the same time


def read_library() -> dict[str, str]:
    """Read the source of the running interpreter's standard library, by file in a fixed order.

    Raises:
        ValueError: for a Python that comes without its source.
    """
    folder = Path(sysconfig.get_paths()["stdlib"])
    names = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*.py"))
    names = [name for name in names if not SKIPPED_FOLDERS & set(name.split("/"))]
    if not names:
        raise ValueError(f"{folder} has no source files; give --target and --dataset.")
    # a few modules show off other encodings
    return {name: (folder / name).read_text("utf-8", "replace") for name in names}


def documents(num_files: int | None = None) -> list[str]:
    """Return the first files to train on, all by default."""
    return [text for name, text in read_library().items() if name not in HELD_OUT][:num_files]


def long_parts(source: str) -> list[str]:
    """Return the top-level functions and classes that are long enough to be cut in two."""
    parts = re.split(r"\n(?=(?:def|class) )", source)
    return [part for part in parts[1:] if len(part) > 2 * PROMPT_CHARACTERS]


def first_lines(text: str) -> str:
    """Return the start of a text, up to the end of a line."""
    start = text[:PROMPT_CHARACTERS]
    return start[: start.rfind("\n") + 1] or start


def pack(texts: list[str], tokenizer: PreTrainedTokenizerBase, length: int) -> Dataset:
    """Cut texts, an EOS after each, into rows of `input_ids` (length,); no short last row.

    A row starts with BOS wherever it was cut, as a prompt does.
    """
    ended = [text + (tokenizer.eos_token or "") for text in texts]
    encoded = tokenizer(ended, add_special_tokens=False, verbose=False)["input_ids"]
    ids = list(chain.from_iterable(encoded))
    bos = [] if tokenizer.bos_token is None else [tokenizer.bos_token_id]
    size = length - len(bos)
    starts = range(0, len(ids) - size + 1, size)
    return Dataset.from_dict({"input_ids": [[*bos, *ids[i : i + size]] for i in starts]})


def training_rows(settings: DemoSettings, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Return as many rows as the drafter's training can use up, shuffled."""
    if settings.dataset is None:
        rows = pack(documents(settings.num_files), tokenizer, settings.row_length)
    else:
        rows = split(settings.dataset, settings)["train"]
    most = settings.drafter_budget.max_steps * DRAFTER_BATCH_SIZE
    return rows.shuffle(seed=settings.seed).select(range(min(most, len(rows))))


def held_out_prompts(settings: DemoSettings, part: int = 0) -> list[Prompt]:
    """Return prompts from text that is in no training row; other parts of a file are others."""
    if settings.dataset is not None:
        rows = split(settings.dataset, settings)["test"]
        return [prompt_of_row(dict(row), str(index)) for index, row in enumerate(rows)]
    sources, prompts = read_library(), []
    for name in HELD_OUT:
        for text in long_parts(sources.get(name, ""))[part : part + 1]:
            prompts.append(Prompt("stdlib", Path(name).stem, text=first_lines(text)))
    return prompts[: settings.num_prompts]


def split(dataset: str, settings: DemoSettings) -> DatasetDict:
    """Return a dataset's rows to train on and to hold out."""
    rows = load_conversations(dataset)
    return rows.train_test_split(test_size=settings.num_prompts, seed=settings.seed)


def prompt_of_row(row: dict, name: str) -> Prompt:
    """Return a conversation up to its last answered user turn, or the start of a text."""
    if row.get("text") is not None:
        return Prompt("held-out", name, text=first_lines(row["text"]))
    return Prompt("held-out", name, tuple(asked_messages(to_messages(row))))
