"""Several datasets as one, though their rows have other keys.

In: datasets as they were loaded. Out: one, with the columns and keys of all; a key that a row does
not have is null in it, which reading the row leaves out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset


def join_datasets(parts: Sequence[Dataset], names: Sequence[str]) -> Dataset:
    """Put datasets behind one another.

    Args:
        names: of their files, for errors.

    Raises:
        ValueError: if they hold different kinds of values under the same key.
    """
    if len(parts) == 1:
        return parts[0]
    merged: dict[str, Any] = {}
    for number, part in enumerate(parts):
        try:
            merged = _merged(merged, dict(part.features))
        except _Conflict as conflict:
            raise ValueError(
                f"{names[number]} has `{conflict.key}` as {conflict.found}, but"
                f" {', '.join(names[:number])} as {conflict.expected}; write it in one way, or drop"
                " it where it is not needed."
            ) from conflict
    from datasets import concatenate_datasets

    return concatenate_datasets([_as(merged, part) for part in parts])


def _as(merged: dict[str, Any], part: Dataset) -> Dataset:
    """A dataset whose columns have the keys of all."""
    import datasets

    features = datasets.Features({column: merged[column] for column in part.features})
    return part if part.features == features else part.cast(features)


class _Conflict(Exception):
    """Two kinds of values under one key."""

    def __init__(self, key: str, expected: Any, found: Any):
        super().__init__(key)
        self.key, self.expected, self.found = key, expected, found


def _merged(one: Any, other: Any, key: str = "") -> Any:
    """The keys of two kinds of values, at any depth."""
    import datasets

    nothing = datasets.Value("null")
    if one == other or other == nothing:
        return one
    if one == nothing:
        return other
    if isinstance(one, dict) and isinstance(other, dict):
        start = f"{key}." if key else ""
        return {
            name: _merged(one.get(name, nothing), other.get(name, nothing), start + name)
            for name in {**one, **other}
        }
    if isinstance(one, list) and isinstance(other, list):  # as older versions write lists
        return [_merged(one[0], other[0], key)]
    if type(one) is type(other) and "feature" in vars(one):
        return replace(one, feature=_merged(one.feature, other.feature, key))
    return _free_form(one, other, key)


def _free_form(one: Any, other: Any, key: str) -> Any:
    """Newer versions read objects that differ within a file as JSON, which holds any others too."""
    import datasets

    free = getattr(datasets, "Json", ())
    for kind, beside in ((one, other), (other, one)):
        # not text, of which what looks like JSON would come back as what it says
        if isinstance(kind, free) and not isinstance(beside, datasets.Value):
            return kind
    raise _Conflict(key, one, other)
