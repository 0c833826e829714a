"""Packing: several documents in one row, so that no computation goes into padding.

In: rows of `prepare_dataset`. Out: fewer rows, of at most `max_length` tokens each, with
`position_ids` that begin at 0 with each document. Documents that begin alike may share that.

    input_ids       a0  a1  a2  b0  b1  b2  b3  c0  c1
    position_ids    0   1   2   0   1   2   3   0   1
"""

from bisect import bisect_left, insort
from collections.abc import Callable
from itertools import chain

import datasets
from datasets import Dataset

from .conversation import IGNORED
from .dataset import COLUMNS, IDS, Data, code_version
from .documents import REPEATED

WINDOW = 1000  # rows that are packed together: the best fits are among a few hundred
PACKED = {**COLUMNS, "position_ids": IDS}


def share_prompts(dataset: Dataset, max_length: int) -> Dataset:
    """Join rows of at most `max_length` tokens where the prompt of one begins a later one.

    So do the answers of a conversation, if each is a row of its own. The last row is the trunk, and
    those before it become its branches, which keep what differs: see `documents.py`. A dataset
    without such rows stays as it is.
    """
    shared = _map(dataset, _share, max_length)
    return shared if len(shared) < len(dataset) else dataset


def pack_dataset(dataset: Data, max_length: int) -> Data:
    """Pack documents into rows of at most `max_length` tokens, none of them cut.

    Each goes into the fullest row that has room for it, the longest first (best fit decreasing),
    within windows of 1000 rows, so that a stream can be packed too.
    """
    return _map(dataset, _pack, max_length)


def _map(dataset: Data, function: Callable[..., dict[str, list]], max_length: int) -> Data:
    return dataset.map(
        function,
        batched=True,
        batch_size=WINDOW,
        # a stream may not know its columns
        remove_columns=dataset.column_names or list(next(iter(dataset))),
        features=datasets.Features(PACKED),
        fn_kwargs={"max_length": max_length, "code": code_version()},
    )


def _share(window: dict[str, list], max_length: int, code: str) -> dict[str, list]:
    groups = list[list[dict[str, list[int]]]]()  # the last ones first
    room = 0
    for ids, labels in zip(reversed(window["input_ids"]), reversed(window["labels"]), strict=True):
        start = shared_length(ids, labels, groups[-1][0]["input_ids"]) if groups else 0
        length = len(ids) - start
        if not start or length > room:
            groups.append([])
            start, length, room = 0, len(ids), max_length
        room -= length
        row = {"input_ids": ids[start:], "attention_mask": [1] * length, "labels": labels[start:]}
        groups[-1].append({**row, "position_ids": [*range(start, len(ids))]})
    rows = list[dict[str, list[int]]]()
    for trunk, *branches in reversed(groups):
        # a branch that began right after the end of another would look like a part of it
        branches.sort(key=lambda part: -part["position_ids"][0])
        parts = [trunk, *branches]
        rows.append({name: [*chain.from_iterable(p[name] for p in parts)] for name in PACKED})
    return {name: [row[name] for row in rows] for name in PACKED}


def shared_length(ids: list[int], labels: list[int], trunk: list[int]) -> int:
    """Count the tokens that a row, (length,), can leave out as a branch of a trunk.

    It repeats the last ones that both have. It leaves out none where its prompt, but for the mark
    that it ends with, is not the trunk's beginning.
    """
    prompt = next((i for i, label in enumerate(labels) if label != IGNORED), 0)
    pairs = zip(ids[:prompt], trunk, strict=False)
    shared = next((i for i, (a, b) in enumerate(pairs) if a != b), min(prompt, len(trunk)))
    return max(shared - REPEATED, 0) if shared + REPEATED >= prompt else 0


def _pack(window: dict[str, list], max_length: int, code: str) -> dict[str, list]:
    lengths = [len(ids) for ids in window["input_ids"]]
    columns = {name: window[name] for name in COLUMNS}
    columns["position_ids"] = window.get("position_ids") or [range(length) for length in lengths]
    rows = best_fit(lengths, max_length)
    return {
        name: [[*chain.from_iterable(documents[i] for i in row)] for row in rows]
        for name, documents in columns.items()
    }


def best_fit(lengths: list[int], room: int) -> list[list[int]]:
    """Distribute documents over rows of at most `room` tokens.

    Args:
        lengths: (documents,), tokens of each.
        room: at least the longest.

    Returns:
        The indices of the documents of each row.
    """
    rows: list[list[int]] = []
    spaces: list[tuple[int, int]] = []  # (what is left, row), ascending
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = bisect_left(spaces, (lengths[index], -1))
        left, row = spaces.pop(place) if place < len(spaces) else (room, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(index)
        insort(spaces, (left - lengths[index], row))
    return rows
