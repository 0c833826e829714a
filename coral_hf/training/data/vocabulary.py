"""Checks that token ids are the target's: within its vocabulary, with its special tokens.

In: a tokenizer or rows of ids, the number of rows of the target's embeddings. Out: an error, a
warning, or nothing. On a GPU an id outside the embeddings is an assertion that names nothing.
"""

from collections.abc import Iterable
from typing import Any

import datasets
import pyarrow.compute as arrow
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

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
    """Warn of a tokenizer whose BOS or EOS is not the target's.

    Its ids may all be within the vocabulary and still be those of another target.
    """
    configs = (target.config.get_text_config(decoder=True), target.generation_config)
    for name in ("bos_token_id", "eos_token_id"):
        own, known = getattr(tokenizer, name), set[Any]()
        for config in configs:  # chat models have several ends
            found = getattr(config, name, None)
            known |= {*found} if isinstance(found, list) else {found} - {None}
        if own is not None and known and own not in known:
            expected = " or ".join(map(str, sorted(known)))
            logger.warning(
                f"The tokenizer's {name[:3].upper()} is token {own}, the target's {expected}: it"
                " may be another target's. Pass the target's own tokenizer."
            )


def check_ids(ids: Iterable[int], vocab_size: float, where: str = "") -> None:
    """Raise a ValueError if token ids of a row, (length,), are outside the vocabulary."""
    for token in ids:
        if not 0 <= token < vocab_size:
            raise ValueError(
                f"{where}`input_ids` has {token}, outside the target's vocabulary of {vocab_size}"
                " tokens; encode it with the target's own tokenizer."
            )


def check_rows(dataset: Any, vocab_size: int) -> None:
    """Raise a ValueError naming the first row of `input_ids` outside the vocabulary.

    Only a `datasets.Dataset` is read, as Arrow arrays; a stream can be read only once.
    """
    if not isinstance(dataset, datasets.Dataset) or "input_ids" not in dataset.column_names:
        return
    start = 0
    for batch in dataset.with_format("arrow").iter(batch_size=1000):
        extremes = arrow.min_max(arrow.list_flatten(batch["input_ids"])).as_py().values()
        if any(not 0 <= token < vocab_size for token in extremes if token is not None):
            for row, ids in enumerate(batch["input_ids"].to_pylist(), start):
                check_ids(ids, vocab_size, f"Row {row}: ")
        start += len(batch)
