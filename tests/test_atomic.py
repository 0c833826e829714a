"""Files that are whole or absent, whatever interrupts their writing."""

import json
import os
import resource
import signal
import threading
from contextlib import contextmanager

import pytest

from coral_hf.atomic import (
    JsonLines,
    keep_settings,
    new_file,
    new_folder,
    sole_writer,
    write_json,
    write_text,
)


@contextmanager
def full_disk(size):
    """No file grows beyond so many bytes, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def killed(work) -> None:
    """Do some work in another process that kills itself within it, by `kill()`."""
    child = os.fork()
    if not child:
        try:
            work()
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


forking = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


# Files


def test_a_file_is_replaced_in_one_move(tmp_path):
    write_json(tmp_path / "a.json", {"a": 1})
    write_json(tmp_path / "a.json", {"b": "é\ud800"})
    assert json.loads((tmp_path / "a.json").read_text()) == {"b": "é\ud800"}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("old", [None, "old"])
def test_a_full_disk_keeps_the_old_file_and_is_named_with_the_file(tmp_path, old):
    file = tmp_path / "a.txt"
    if old is not None:
        file.write_text(old)
    with full_disk(100), pytest.raises(OSError, match="File too large: .*a.txt'$"):
        write_text(file, "x" * 1000)
    assert [path.read_text() for path in tmp_path.iterdir()] == [old] * (old is not None)


def test_an_error_while_writing_keeps_the_old_file_and_is_raised_unchanged(tmp_path):
    write_text(tmp_path / "a.txt", "old")
    with pytest.raises(FileNotFoundError, match="weights.bin"), new_file(tmp_path / "a.txt"):
        (tmp_path / "weights.bin").read_bytes()
    with pytest.raises(KeyboardInterrupt), new_file(tmp_path / "a.txt") as partial:
        partial.write_text("half")
        raise KeyboardInterrupt
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_a_writer_sees_the_suffix_of_its_file(tmp_path):
    with new_file(tmp_path / "a.svg") as partial:
        assert partial.suffix == ".svg" and partial.parent == tmp_path
        partial.touch()


@forking
def test_a_kill_leaves_the_old_file_and_the_next_writer_removes_partial_files(tmp_path):
    write_text(tmp_path / "a.txt", "old")

    def work():
        with new_file(tmp_path / "a.txt") as partial:
            partial.write_text("half")
            kill()

    killed(work)
    assert (tmp_path / "a.txt").read_text() == "old" and len([*tmp_path.iterdir()]) == 2
    with sole_writer(tmp_path, "b.txt"):
        assert [*tmp_path.glob(".partial*")]  # of another file, which somebody may be writing
    with sole_writer(tmp_path, "a.txt"):
        assert not [*tmp_path.glob(".partial*")]
    with sole_writer(tmp_path, "[a-z].txt"):  # a name, not a pattern
        pass


# Folders


def filled(folder, text):
    for name in ("a", "z-config", "b"):
        (folder / name).write_text(text)


def content(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_a_folder_appears_whole_and_an_existing_one_is_filled(tmp_path):
    for text in ("old", "new"):
        with new_folder(tmp_path / "x" / "run") as partial:
            filled(partial, text)
        assert content(tmp_path / "x" / "run") == dict.fromkeys(("a", "b", "z-config"), text)
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["run"]


def test_the_lock_of_a_folder_outlives_the_replacement_of_its_files(tmp_path):
    with sole_writer(tmp_path / "run"):
        with new_folder(tmp_path / "run") as partial:
            filled(partial, "new")
        with pytest.raises(ValueError, match="run is in use"), sole_writer(tmp_path / "run"):
            pass
    assert {"a", "b", "z-config"} < content(tmp_path / "run").keys()


def test_a_folder_that_cannot_be_filled_stays_absent(tmp_path):
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "run") as partial:
        filled(partial, "new")
        _ = 1 / 0
    assert not [*tmp_path.iterdir()]


# Writers


def test_a_second_writer_is_refused_and_the_first_is_named(tmp_path):
    with sole_writer(tmp_path / "run"):
        with pytest.raises(ValueError, match="run is in use: .* .`fuser .*_writer.lock` names"):
            with sole_writer(tmp_path / "run"):
                pass
        with sole_writer(tmp_path / "run", "own.jsonl"), sole_writer(tmp_path):  # other outputs
            pass
    with sole_writer(tmp_path / "run"):
        pass


def test_only_one_of_many_simultaneous_writers_gets_the_output(tmp_path):
    barrier, outcomes = threading.Barrier(8), []

    def work():
        barrier.wait()
        try:
            with sole_writer(tmp_path / "new" / "run"):
                outcomes.append("held")
                end.wait()
        except ValueError:
            outcomes.append("refused")

    end = threading.Event()
    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    while len(outcomes) < 8:
        pass
    end.set()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["held"] + 7 * ["refused"]


@forking
def test_the_lock_of_a_killed_writer_is_free(tmp_path):
    def work():
        with sole_writer(tmp_path):
            kill()

    killed(work)
    with sole_writer(tmp_path):
        pass


def test_the_lock_works_on_a_full_disk(tmp_path):
    with full_disk(0), sole_writer(tmp_path):
        with pytest.raises(ValueError, match="another run writes to it"):
            with sole_writer(tmp_path):
                pass


# Settings and lines


def test_an_output_is_continued_with_its_first_settings_alone(tmp_path):
    path = tmp_path / "settings.json"
    for _ in range(2):
        keep_settings(path, {"seed": 0, "names": ("a",)}, "out.jsonl")
    message = "`output` out.jsonl was written with names = ..a.., now it is ..b"
    with pytest.raises(ValueError, match=message):
        keep_settings(path, {"seed": 0, "names": ["b"]}, "out.jsonl")
    with pytest.raises(ValueError, match="with other = None, now it is 1"):
        keep_settings(path, {"seed": 0, "names": ["a"], "other": 1}, "out.jsonl")


def test_lines_that_a_full_disk_cut_off_are_dropped(tmp_path):
    lines = JsonLines(tmp_path / "a.jsonl")
    assert [*lines.read()] == []
    with full_disk(50):
        lines.append([{"row": 0, "text": "é\ud800"}])
        with pytest.raises(OSError):
            lines.append([{"row": 1, "text": "x" * 100}])
    lines.mend().append([{"row": 1}])
    lines.append([])
    assert [row["row"] for row in lines.read()] == [0, 1]


def test_a_line_that_was_cut_off_is_dropped_and_a_damaged_one_is_named(tmp_path):
    lines = JsonLines(tmp_path / "a.jsonl")
    lines.mend()
    lines.path.write_bytes(b'{"row": 0}\n{"row": 1}\n{"row')
    lines.mend()
    assert [row["row"] for row in lines.read()] == [0, 1]
    lines.path.write_bytes(b'{"row": 0}\n{"ro\n')
    with pytest.raises(ValueError, match="a.jsonl, line 2 is not JSON"):
        [*lines.read()]
