"""Whether token ids are the target's: within its vocabulary, with its marks of start and end.

In: a tokenizer or rows of ids, the number of rows of the target's embeddings. Out: an error, or
nothing. Beyond the vocabulary an embedding is out of range: on a GPU, an assertion without a name.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.get_logger(__name__)


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Raise a ValueError if a tokenizer has ids that the target has no embedding for."""
    beyond = sorted((i, token) for token, i in tokenizer.get_vocab().items() if i >= vocab_size)
    if beyond:
        named = ", ".join(f"{token!r} ({i})" for i, token in beyond[:3])
        raise ValueError(
            f"The tokenizer has {len(beyond)} tokens beyond the target's `vocab_size` of"
            f" {vocab_size}, such as {named}. Pass the target's own tokenizer, or grow the target"
            " with `target.resize_token_embeddings(len(tokenizer))` before making its drafter."
        )


def warn_of_other_ends(tokenizer: PreTrainedTokenizerBase, target: PreTrainedModel) -> None:
    """Warn of a tokenizer whose texts begin or end with other tokens than its target's.

    Its ids may all be within the vocabulary and still be those of another target.
    """
    for mark, own in (("bos", tokenizer.bos_token_id), ("eos", tokenizer.eos_token_id)):
        known = _ids_of_target(target, f"{mark}_token_id")
        if own is not None and known and own not in known:
            expected = " or ".join(map(str, sorted(known)))
            logger.warning(
                f"The tokenizer's {mark.upper()} is token {own}, the target's {expected}: it may be"
                " another target's. Pass the target's own tokenizer."
            )


def _ids_of_target(target: PreTrainedModel, name: str) -> set[int]:
    """What the configs of a target say of a special token; chat models have several ends."""
    found: set[int] = set()
    for config in (target.config.get_text_config(decoder=True), target.generation_config):
        ids = getattr(config, name, None)  # not every config has them
        found |= set(ids) if isinstance(ids, list) else set() if ids is None else {ids}
    return found


def check_ids(ids: Iterable[int], vocab_size: int) -> None:
    """Raise a ValueError if token ids of a row, (length,), are outside the vocabulary."""
    outside = next((i for i in ids if not 0 <= i < vocab_size), None)
    if outside is not None:
        raise ValueError(
            f"`input_ids` has {outside}, outside the target's vocabulary of {vocab_size} tokens;"
            " encode it with the target's own tokenizer."
        )


def check_rows(dataset: Any, vocab_size: int) -> None:
    """Raise a ValueError naming the first row of `input_ids` outside the vocabulary.

    Args:
        dataset: a `datasets.Dataset`, or several by name. Others are not read: a stream can be
            read once.
    """
    import datasets

    if isinstance(dataset, dict):
        for part in dataset.values():
            check_rows(part, vocab_size)
    elif isinstance(dataset, datasets.Dataset) and "input_ids" in dataset.column_names:
        bad = _rows_outside(dataset, vocab_size)
        if bad:
            try:
                check_ids(dataset.with_format(None)[bad[0]]["input_ids"], vocab_size)
            except ValueError as error:
                raise ValueError(
                    f"Row {bad[0]}: {error} Of {len(dataset)} rows, {len(bad)} are like this."
                ) from None


def _rows_outside(dataset: Dataset, vocab_size: int) -> list[int]:
    """The numbers of rows with an id outside the vocabulary, read as Arrow columns: no lists."""
    import pyarrow.compute as arrow

    bad, start = [], 0
    for batch in dataset.with_format("arrow").iter(batch_size=1000):
        column = batch["input_ids"]
        ids = arrow.list_flatten(column)
        outside = arrow.or_(arrow.less(ids, 0), arrow.greater_equal(ids, vocab_size))
        parents = arrow.filter(arrow.list_parent_indices(column), outside)
        bad += [start + int(row) for row in arrow.unique(parents).to_pylist()]
        start += len(column)
    return bad
