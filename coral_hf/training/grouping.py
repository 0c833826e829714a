"""Groups of tokens for a router, expected counts of tokens, and the target's features behind them.

    contiguous  slices of the token ids
    kmeans      tokens with similar rows of the LM head
    frequency   slices of the tokens sorted by how often the target generates them

All but the first are an order of the vocabulary, of which groups are equal slices. In a good one,
few groups hold the likely next tokens at any position.

In: a target and its training rows, or a feature cache. Out: token ids, those that pad the
vocabulary last; the target's features at trained positions; how often each token is expected there,
in work that is bounded by a number of positions, or trained.

    position   0    1    2    3    4
    token      x0   x1   x2   x3   x4
    label      -    -    x2   x3   -         (-: not trained)
    feature         f1   f2                  from which the target predicts x2 and x3
"""

import math
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast
from datasets import Dataset, IterableDataset
from torch import Tensor

from ..heads.router import Groups
from ..lm_head import execution_device
from ..target import Target, text_config
from .data import CoralCollator
from .data.encoding import IGNORED
from .features import CachedFeatures
from .features.reading import TargetFeatures

NUM_TURNS = 10  # of k-means: 30 made no better groups
CHUNK_SIZE = 128  # rows of target logits held at a time
# on a target of 32k tokens 10k positions made groups as good as 100k did
MAX_TOKENS = 50_000
NO_TOKEN = "`rows` have no trained token; check the chat template and the data."


def group_order(
    grouping: str,
    target: Target,
    rows: Any,
    num_groups: int,
    seed: int = 0,
    num_tokens: int | None = None,
    max_tokens: int = MAX_TOKENS,
) -> Tensor | None:
    """Order the vocabulary so that its slices are the groups of a router.

    The same arguments make the same order. In a distributed run all processes call this, and get
    the first one's.

    Args:
        grouping: "contiguous", "kmeans" or "frequency".
        target: the target.
        rows: the training rows, as the trainer has them: token ids and labels, or `CachedFeatures`.
            Only the last grouping reads them.
        num_groups: of the router.
        seed: of the order in which rows are read and of k-means.
        num_tokens: of the tokenizer; ids from there on, which pad the vocabulary, come last.
        max_tokens: trained positions that are read at most.

    Returns:
        (vocab,), token ids on the CPU; None for the ids' own order.

    Raises:
        ValueError: if a grouping needs rows, of training or of the LM head, that cannot be read.
    """
    if grouping == "contiguous":
        return None
    vocab_size = text_config(target.model).vocab_size
    num_tokens = num_tokens or vocab_size
    if grouping == "frequency":
        counts = token_counts(target, rows, max_tokens, seed)
        order = most_frequent_first(counts[:num_tokens])
    elif target.head.is_readable:
        vectors = target.head.weight[:num_tokens].detach().float().cpu()  # (tokens, hidden)
        chance = torch.Generator().manual_seed(seed)
        order = alike_together(vectors, Groups(vocab_size, num_groups).size, chance)
    else:
        raise ValueError(
            f"The rows of the target's LM head ({type(target.head.module).__name__}) cannot be"
            " read: it is quantised, offloaded or adapted. Use grouping='frequency'."
        )
    order = torch.cat([order, torch.arange(num_tokens, vocab_size)])
    # the first process's: devices differ in the last bit
    return broadcast(order.to(PartialState().device)).cpu()


def alike_together(vectors: Tensor, size: int, chance: torch.Generator) -> Tensor:
    """Order vectors, (tokens, hidden), so that slices of `size` hold similar ones.

    Balanced k-means of two halves, and so on in each half. The vectors that are nearer to one of
    two centroids than others are the first in the direction between them, so a half is a slice of
    an order too. Rows keep their norms, which tell common tokens from rare ones: a router needs
    them as much as directions.

    Returns:
        (tokens,), their indices.
    """
    num_groups = math.ceil(len(vectors) / size)
    if num_groups < 2:
        return torch.arange(len(vectors))
    direction = torch.randn(vectors.shape[1], generator=chance)
    for _ in range(NUM_TURNS):
        order = (vectors @ direction).argsort(stable=True)
        halves = order[: num_groups // 2 * size], order[num_groups // 2 * size :]
        first, second = (vectors[half].mean(0) for half in halves)
        direction = second - first
    return torch.cat([half[alike_together(vectors[half], size, chance)] for half in halves])


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
        chance = torch.Generator("cpu").manual_seed(seed)
        order = torch.randperm(len(rows), generator=chance, device="cpu")  # (rows,)
        shuffled = (rows[row] for row in order.tolist())
    while left > 0 and (part := [*islice(shuffled, batch_size)]):
        batch = {name: tensor.to(target.device) for name, tensor in collate(part).items()}
        trained = batch["labels"][:, 1:] != IGNORED  # (batch, length - 1)
        if trained.any():
            features = reader.read(batch)[:, :-1]  # (batch, length - 1, hidden)
            yield features[trained.to(features.device)][:left].to(device)
            left -= int(trained.sum())


@torch.no_grad()
def token_counts(target: Target, rows: Any, max_tokens: int = MAX_TOKENS, seed: int = 0) -> Tensor:
    """Sum the target's probabilities, (positions, vocab), over trained positions.

    A position counts for all likely tokens, not for the one in the row, so fewer positions suffice,
    tokens that are in no row are ranked too, and the rows need not be written by the target.

    Args:
        target: the target.
        rows: as the trainer has them: token ids and labels, or `CachedFeatures`.
        max_tokens: trained positions that are read at most.
        seed: of the order in which rows are read.

    Returns:
        (vocab,), fp64, on the CPU.

    Raises:
        ValueError: if there are no rows, or if none of their tokens is trained.
    """
    counts = torch.zeros(text_config(target.model).vocab_size, dtype=torch.float64)
    for features in trained_features(target, rows, max_tokens, seed):
        for chunk in features.split(CHUNK_SIZE):
            # of (chunk, vocab)
            counts += target.head.logits(chunk).float().softmax(-1).sum(0).cpu()
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
    else:
        if isinstance(rows, Dataset):
            rows = rows.select_columns("labels").with_format("numpy")
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
    return counts.argsort(descending=True, stable=True)
