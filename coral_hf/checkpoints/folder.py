"""A folder that is whole or not there.

In: where it shall be, and what may be in it. Out: a folder aside to be filled, whose files take
their place when all are written.
"""

import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from uuid import uuid4

from .source import CONFIG


@contextmanager
def whole_folder(
    output: str | Path,
    overwrite: bool = False,
    files: Iterable[str] = (),
    sources: Iterable[str | Path | None] = (),
) -> Iterator[Path]:
    """Fill a folder aside, and give its files their place when nothing went wrong.

    Args:
        output: a folder that is new or empty.
        overwrite: replace an earlier checkpoint, a folder with a config.json of `files` alone.
        files: names, as patterns, of what is written each time.
        sources: folders that are read, none of which is `output`.

    Raises:
        ValueError: if something else is there, before anything is written.
    """
    output = check_output(output, overwrite, files, sources)
    aside = output.with_name(f".{output.name}-{uuid4().hex[:8]}")
    aside.mkdir(parents=True)
    try:
        yield aside
        _take_place(aside, output)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def check_output(
    output: str | Path,
    overwrite: bool = False,
    files: Iterable[str] = (),
    sources: Iterable[str | Path | None] = (),
) -> Path:
    """The absolute path of a folder that may be written; see [`whole_folder`]."""
    found = Path(output).resolve()
    above = next(parent for parent in found.parents if parent.exists())
    if not above.is_dir():
        raise ValueError(f"`output` {output} lies below {above}, which is a file.")
    if not found.exists():
        return found
    if not found.is_dir():
        raise ValueError(f"`output` {output} is a file; give a new or an empty folder.")
    for source in sources:
        if source and Path(source).is_dir() and found.samefile(source):
            raise ValueError(f"`output` {output} is the folder of what is read; give another one.")
    there = sorted(path.name for path in found.iterdir())
    if there and not overwrite:
        raise ValueError(
            f"`output` {output} holds {', '.join(there[:5])}; give a new or an empty folder, or"
            " `overwrite` to replace an earlier checkpoint."
        )
    _refuse_foreign(found, there, list(files))
    return found


def _refuse_foreign(output: Path, there: list[str], files: list[str]) -> None:
    """Raise a ValueError for what an earlier checkpoint has not."""
    foreign = [
        name
        for name in there
        if not (output / name).is_file() or not any(fnmatchcase(name, file) for file in files)
    ]
    if foreign:
        raise ValueError(
            f"`output` {output} holds {', '.join(foreign[:5])}, which no earlier checkpoint of this"
            " kind has, and `overwrite` would delete it; give another folder."
        )
    if there and CONFIG not in there:
        raise ValueError(
            f"`output` {output} holds {', '.join(there[:5])} without a {CONFIG}, so it is no"
            " checkpoint that `overwrite` could replace; give another folder."
        )


def _take_place(aside: Path, output: Path) -> None:
    """Move what was written to its place; what it replaces lies beside it until then."""
    if not output.exists():
        aside.rename(output)
        return
    # files, since the folder may be the user's current one, or a mounted disk
    replaced = aside.with_name(f"{aside.name}-replaced")
    replaced.mkdir()
    _move_files(output, replaced)
    _move_files(aside, output)
    shutil.rmtree(replaced)


def _move_files(source: Path, to: Path) -> None:
    """Move what is in a folder, its config last: without one it is no checkpoint."""
    for path in sorted(source.iterdir(), key=lambda path: (path.name == CONFIG, path.name)):
        shutil.move(path, to / path.name)
