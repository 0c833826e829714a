"""A folder that is whole or not there.

In: where it shall be. Out: a folder aside to be filled, which takes its place when all is written.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from .source import CONFIG


@contextmanager
def whole_folder(output: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Fill a folder aside, and give it its name when nothing went wrong.

    Args:
        output: a folder that is new or empty.
        overwrite: replace an earlier checkpoint, a folder of plain files with a config.json.

    Raises:
        ValueError: if something else is there, before anything is written.
    """
    output = Path(output)
    _check_free(output, overwrite)
    aside = output.with_name(f".{output.name}-{uuid4().hex[:8]}")
    aside.mkdir(parents=True)
    try:
        yield aside
        _take_place(aside, output)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _check_free(output: Path, overwrite: bool) -> None:
    if not output.exists():
        return
    if not output.is_dir():
        raise ValueError(f"`output` {output} is a file; give a new or an empty folder.")
    there = sorted(path.name for path in output.iterdir())
    if there and not overwrite:
        raise ValueError(
            f"`output` {output} holds {', '.join(there[:5])}; give a new or an empty folder, or"
            " `overwrite` to replace an earlier checkpoint."
        )
    is_checkpoint = CONFIG in there and all(path.is_file() for path in output.iterdir())
    if there and not is_checkpoint:
        raise ValueError(
            f"`output` {output} holds more than the files of one checkpoint"
            f" ({', '.join(there[:5])}), and `overwrite` would delete them; give another folder."
        )


def _take_place(aside: Path, output: Path) -> None:
    """Rename a filled folder; what it replaces is deleted last."""
    if not output.exists():
        aside.rename(output)
        return
    replaced = aside.with_name(f"{aside.name}-replaced")
    output.rename(replaced)
    aside.rename(output)
    shutil.rmtree(replaced)
