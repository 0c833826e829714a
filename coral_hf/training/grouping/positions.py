"""The target's features at trained positions, and counts of tokens.

In: a target, training rows or a feature cache. Out: its features there, or the expected count of
every token, in work that is bounded by a number of positions; how often each token is trained.

    position   0    1    2    3    4
    token      x0   x1   x2   x3   x4
    label      -    -    x2   x3   -         (-: not trained)
    feature         f1   f2                  from which the target predicts x2 and x3
"""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import pyarrow.compute as arrow
import torch
from datasets import Dataset, IterableDataset
from torch import Tensor
from tqdm.auto import tqdm

from ...lm_head import execution_device
from ...target import Target, text_config
from ..data import CoralCollator
from ..data.encoding import IGNORED
from ..features import CachedFeatures
from ..features.reading import TargetFeatures

# rows of target logits held at a time
CHUNK_SIZE = 128
# on a target of 32k tokens 10k positions made groups as good as 100k did
MAX_TOKENS = 50_000
NO_TOKEN = "`rows` have no trained token; check the chat template and the data."


def trained_features(
    target: Target, rows: Any, max_tokens: int, seed: int = 0, batch_size: int = 8
) -> Iterator[Tensor]:
    """Yield the target's features that predict a trained token, of rows in a shuffled order.

    A stream is read from its beginning instead.

    Args:
        target: the target.
        rows: a `datasets.Dataset` of `prepare_dataset`, or another dataset of such rows;
            `CachedFeatures` spare the target's forward pass.
        max_tokens: positions that are read at most.
        seed: of the order.
        batch_size: rows that are read at once.

    Yields:
        (positions, hidden), `max_tokens` positions in all, or as many as there are.
    """
    if rows is None:
        raise ValueError("This needs training rows, but `rows` is None; pass the training dataset.")
    reader, collate = TargetFeatures(target.model.eval()), CoralCollator()
    device, left = execution_device(target.head.module), max_tokens
    shuffled = iter(rows)
    if hasattr(rows, "__len__"):
        order = torch.randperm(
            len(rows), generator=torch.Generator("cpu").manual_seed(seed), device="cpu"
        )  # (rows,)
        shuffled = (rows[row] for row in order.tolist())
    while left > 0 and (part := [*islice(shuffled, batch_size)]):
        batch = {name: tensor.to(target.device) for name, tensor in collate(part).items()}
        trained = batch["labels"][:, 1:] != IGNORED  # (batch, length - 1)
        if trained.any():
            features = reader.read(batch)[:, :-1]  # (batch, length - 1, hidden)
            yield features[trained.to(features.device)][:left].to(device)
            left -= int(trained.sum())


@torch.no_grad()
def token_counts(
    target: Target,
    rows: Any,
    max_tokens: int = MAX_TOKENS,
    num_tokens: int | None = None,
    seed: int = 0,
) -> Tensor:
    """Sum the target's probabilities, (positions, vocab), over trained positions.

    A position counts for all likely tokens, not for the one in the row, so fewer positions suffice,
    tokens that are in no row are ranked too, and the rows need not be written by the target.

    Args:
        target: the target.
        rows: as the trainer has them: token ids and labels, or `CachedFeatures`.
        max_tokens: trained positions that are read at most.
        num_tokens: of the tokenizer; ids from there on, which pad the vocabulary, count nothing.
        seed: of the order in which rows are read.

    Returns:
        (vocab,), fp64, on the CPU.

    Raises:
        ValueError: if there are no rows, or if none of their tokens is trained.
    """
    vocab_size = text_config(target.model).vocab_size
    counts = torch.zeros(vocab_size, dtype=torch.float64)
    own = slice(num_tokens or vocab_size)
    with tqdm(total=max_tokens, unit="token", desc="Reading the target") as progress:
        for features in trained_features(target, rows, max_tokens, seed):
            for chunk in features.split(CHUNK_SIZE):
                probs = target.head.logits(chunk).float().softmax(-1)  # (chunk, vocab)
                counts[own] += probs[:, own].sum(0).cpu()
                progress.update(len(chunk))
        progress.total = progress.n
    if not counts.any():
        raise ValueError(NO_TOKEN)
    return counts


def label_counts(rows: Any, vocab_size: int) -> Tensor:
    """Count the trained tokens of rows, of shape (vocab,), on the CPU.

    Args:
        rows: as the trainer has them: token ids and labels, or `CachedFeatures`.

    Raises:
        ValueError: for a stream, and if none of their tokens is trained.
    """
    if isinstance(rows, IterableDataset):
        raise ValueError(
            "A draft vocabulary is counted from the training rows, but `train_dataset` is a stream;"
            " count a part of it first: drafter.set_draft_vocabulary(tokens)."
        )
    if isinstance(rows, CachedFeatures):
        files = (rows.file(number) for number in range(len(rows.index.shards)))
        parts = (file.get_tensor("labels").numpy() for file in files)
    elif isinstance(rows, Dataset):
        batches = rows.with_format("arrow").select_columns("labels").iter(batch_size=1000)
        parts = (np.asarray(arrow.list_flatten(batch["labels"])) for batch in batches)
    else:
        parts = (np.asarray(row["labels"]) for row in rows)
    counts = np.zeros(vocab_size, dtype=np.int64)
    for labels in parts:  # (tokens,)
        counts += np.bincount(labels[labels != IGNORED], minlength=vocab_size)
    if not counts.any():
        raise ValueError(NO_TOKEN)
    return torch.from_numpy(counts)


def most_frequent_first(counts: Tensor) -> Tensor:
    """Sort the tokens by their counts; equal counts keep the order of the ids.

    The first of them make a frequency head, slices of them a grouping.

    Args:
        counts: of shape (vocab,), of `token_counts` or `label_counts`.

    Returns:
        (vocab,), token ids.
    """
    if not torch.isfinite(counts).all():
        raise ValueError("`counts` are not finite; expected those that `token_counts` returns.")
    return counts.argsort(descending=True, stable=True)
