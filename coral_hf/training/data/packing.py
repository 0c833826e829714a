"""Packing: several documents in one row, so that no computation goes into padding.

In: rows of `prepare_dataset`. Out: fewer rows, of nearly `max_length` tokens each, with
`position_ids` that begin at 0 with each document.

    input_ids       a0  a1  a2  b0  b1  b2  b3  c0  c1
    position_ids    0   1   2   0   1   2   3   0   1
"""

from bisect import bisect_left, insort
from itertools import chain

import datasets

from .dataset import COLUMNS, IDS, Data

WINDOW = 1000  # rows that are packed together: the best fits are among a few hundred


def pack_dataset(dataset: Data, max_length: int) -> Data:
    """Pack documents into rows of at most `max_length` tokens, none of them cut.

    Each goes into the fullest row that has room for it, the longest first (best fit decreasing),
    within windows of 1000 rows, so that a stream can be packed too.
    """
    return dataset.map(
        _pack,
        batched=True,
        batch_size=WINDOW,
        # a stream may not know its columns
        remove_columns=dataset.column_names or list(next(iter(dataset))),
        features=datasets.Features({**COLUMNS, "position_ids": IDS}),
        fn_kwargs={"max_length": max_length},
    )


def _pack(window: dict[str, list], max_length: int) -> dict[str, list]:
    lengths = [len(ids) for ids in window["input_ids"]]
    columns = {name: window[name] for name in COLUMNS}
    columns["position_ids"] = [range(length) for length in lengths]
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
