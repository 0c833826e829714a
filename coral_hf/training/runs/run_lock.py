"""One run a folder: two that write the same checkpoints would spoil both.

The lock is the system's own and vanishes with its process, however that ends. All processes of a
run are one holder.
"""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout

# uploads to the Hub leave out what begins with an underscore
LOCK, HOLDER = "_training.lock", "_training.json"


@contextmanager
def sole_run(folder: str | Path, is_main: bool) -> Iterator[None]:
    """Hold a folder for a run; every process of the run enters, the main one holds the lock.

    Raises:
        ValueError: if another run holds it, in every process.
    """
    folder = Path(folder)
    lock = FileLock(folder / LOCK, timeout=0)
    answer = broadcast_object_list([_refusal(lock, folder) if is_main else None])
    if answer[0] is not None:
        raise ValueError(answer[0])
    try:
        yield
    finally:
        if is_main:
            (folder / HOLDER).unlink(missing_ok=True)
            lock.release()


def _refusal(lock: FileLock, folder: Path) -> str | None:
    """Take the lock, or say who has it."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock.acquire()
    except Timeout:
        return (
            f"The folder {folder} is in use: {_holder(folder)}. Wait for that run, stop it, or use"
            " another folder."
        )
    since = datetime.now().isoformat(" ", "seconds")
    holder = {"process": os.getpid(), "host": socket.gethostname(), "since": since}
    with suppress(OSError):  # on a full disk the lock alone has to do
        (folder / HOLDER).write_text(json.dumps(holder))
    return None


def _holder(folder: Path) -> str:
    try:
        found = json.loads((folder / HOLDER).read_text())
    except (OSError, ValueError):  # it has just begun or ended, or could not write
        return "another run trains there"
    return f"process {found['process']} on {found['host']} trains there since {found['since']}"
