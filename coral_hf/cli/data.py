"""The command that shows and checks what a drafter would be trained on."""

import json
import os
import sys
from dataclasses import dataclass
from typing import Any, Literal

from ..measure.settings import option
from .options import ChatOptions, DatasetOptions

ROWS_OF_A_PROCESS = 2000  # fewer are read sooner by one


@dataclass(kw_only=True)
class DataOptions(ChatOptions):
    """Rows of a dataset to be shown, or a dataset to be checked."""

    action: Literal["show", "check"] = option("What to do.", positional=True)
    files: list[str] = option("Files, folders or Hub ids.", [], positional=True)
    dataset: list[str] = option("The same, by name.", [])
    target: str = option("The target or its tokenizer alone: a folder or a Hub id.")
    ignore_columns: list[str] = option("Leave out this column.", [], flag="ignore-column")
    split: str = option("The split of a dataset that has several.", "train")
    config: str | None = option("The configuration of a Hub dataset.", None)
    revision: str | None = option("The branch, tag or commit of a Hub dataset.", None)
    row: int = option("The first row shown, from 0; -1 is the last.", 0)
    limit: int = option("Rows shown.", 1, least=1)
    max_length: int | None = option(
        "Cut rows as training would; 2048 is checked by default.", None, least=1
    )
    num_proc: int | None = option("Processes that check; by default one a core.", None, least=1)
    json: bool = option("Print JSON: a line a training row, or the whole check.", False)

    def rows(self) -> Any:
        """Return the rows of all datasets."""
        names = [*self.files, *self.dataset]
        if not names:
            raise ValueError(f"Name what to read: coral-hf data {self.action} FILE --target T.")
        given = {name: vars(self)[name] for name in ("split", "config", "revision")}
        own = DatasetOptions(dataset=names, ignore_columns=self.ignore_columns, **given)
        return own.conversations()


def data(own: DataOptions) -> None:
    """Show what is read and trained of rows, or count what training would read of a dataset.

    `show` prints tokens in colour or, through a pipe, with marks. `check` prints numbers, how the
    chat template behaves, and the ten strangest rows; it exits with 1 if a row cannot be read.
    """
    (show_rows if own.action == "show" else check)(own, own.rows())


def show_rows(own: DataOptions, rows: Any) -> None:
    """Print some rows, token by token."""
    from ..training.data import describe, show

    chosen = range(len(rows))[own.row :][: own.limit]
    if not chosen:
        raise ValueError(f"--row is {own.row}, but the dataset has {len(rows)} rows, from 0.")
    tokenizer = own.load_tokenizer()
    numbered = ((index, rows[index]) for index in chosen)
    if not own.json:
        show(numbered, tokenizer, own.max_length)
        return
    for one in describe(numbered, tokenizer, own.max_length):
        print(json.dumps(one, ensure_ascii=False))


def check(own: DataOptions, rows: Any) -> None:
    """Print the numbers of a dataset."""
    from ..training.data import check_dataset

    most = min(os.cpu_count() or 1, len(rows) // ROWS_OF_A_PROCESS)
    num_proc = own.num_proc or (most if most > 1 else None)
    sizes = (own.max_length or 2048, num_proc, own.vocab_size())
    found = check_dataset(rows, own.load_tokenizer(), *sizes)
    print(json.dumps(found.to_dict(), ensure_ascii=False) if own.json else found)
    if found.unread:
        sys.exit(1)
