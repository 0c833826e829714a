"""Groups of tokens for a router, as an order of the vocabulary whose equal slices they are.

In: a target and its training rows. Out: (vocab,) token ids, those that pad the vocabulary last.
Groups are of like frequency, or balanced k-means of the LM head's rows. Rows keep their norms,
which tell common tokens from rare ones: a router needs them as much as directions.
"""

from itertools import combinations
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast
from torch import Tensor

from ...heads.router import Groups
from ...heads.settings import GROUPINGS
from ...target import Target, text_config
from .positions import MAX_TOKENS, most_frequent_first, token_counts

MAX_TURNS = 10
SETTLED = 0.002  # the share of tokens that may still move
BATCH_SIZE = 4096
NUM_PASSES = 2


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
        ValueError: if a grouping needs rows, of training or of the LM head, that cannot be read, or
            if there are more groups than tokens.
    """
    if grouping not in GROUPINGS[:-1]:
        raise ValueError(f"`grouping` is {grouping!r}; use one of {GROUPINGS[:-1]}.")
    vocab_size = text_config(target.model).vocab_size
    num_tokens = vocab_size if num_tokens is None else num_tokens
    if not 1 <= num_groups <= vocab_size:
        raise ValueError(f"`num_groups` is {num_groups}; use 1 to `vocab_size` = {vocab_size}.")
    if grouping == "contiguous":
        return None
    size = Groups(vocab_size, num_groups).size
    sizes = torch.full((-(-num_tokens // size),), size)  # of the groups
    sizes[-1] -= int(sizes.sum()) - num_tokens
    if grouping == "frequency":
        counts = token_counts(target, rows, max_tokens, num_tokens, seed)
        order = most_frequent_first(counts[:num_tokens])
    elif target.head.is_readable:
        vectors = target.head.weight[:num_tokens].detach().float().cpu()  # (tokens, hidden)
        order = kmeans_groups(vectors, sizes, seed).argsort(stable=True)
    else:
        raise ValueError(
            f"The rows of the target's LM head ({type(target.head.module).__name__}) cannot be"
            " read: it is quantised, offloaded or adapted. Use grouping='frequency'."
        )
    order = torch.cat([order, torch.arange(num_tokens, vocab_size)])
    # the first process's: devices differ in the last bit
    return broadcast(order.to(PartialState().device)).cpu()


def kmeans_groups(vectors: Tensor, sizes: Tensor, seed: int = 0) -> Tensor:
    """Group similar vectors: k-means, then turns of balanced assignment and new centroids.

    Args:
        vectors: (tokens, hidden), rows of the LM head in fp32.
        sizes: (groups,), tokens of each group.
        seed: of the first centroids.

    Returns:
        (tokens,), int64.
    """
    from sklearn.cluster import MiniBatchKMeans

    clustering = MiniBatchKMeans(
        len(sizes), batch_size=BATCH_SIZE, n_init=1, random_state=seed, compute_labels=False
    ).fit(vectors.numpy())
    centroids = torch.from_numpy(clustering.cluster_centers_)  # (groups, hidden)
    groups = balanced_groups(similarity(vectors, centroids), sizes)
    for _ in range(MAX_TURNS):
        sums = torch.zeros_like(centroids).index_add_(0, groups, vectors)
        before, scores = groups, similarity(vectors, sums / sizes[:, None])
        groups = balanced_groups(scores, sizes, before)
        if (groups != before).float().mean() <= SETTLED:
            break
    return groups


def similarity(vectors: Tensor, centroids: Tensor) -> Tensor:
    """Score vectors by |vector|² - |vector - centroid|².

    Args:
        vectors: (tokens, hidden).
        centroids: (groups, hidden).

    Returns:
        (tokens, groups).
    """
    return 2 * vectors @ centroids.T - centroids.square().sum(-1)


def balanced_groups(scores: Tensor, sizes: Tensor, groups: Tensor | None = None) -> Tensor:
    """Assign each token to a group in which it scores high, so that every group is full.

    Pairs of groups exchange tokens as long as the total score rises. On a real LM head, one pass
    over all pairs came within 0.03% of the score of the best assignment.

    Args:
        scores: (tokens, groups).
        sizes: (groups,), tokens of each group; their sum is the number of tokens.
        groups: (tokens,), of these sizes, to start from.

    Returns:
        (tokens,), int64.
    """
    if groups is None:
        groups = torch.empty(len(scores), dtype=torch.int64)
        by_wish = scores.argmax(-1).argsort(stable=True)  # (tokens,)
        groups[by_wish] = torch.arange(len(sizes)).repeat_interleave(sizes)
    columns = scores.T.contiguous()  # (groups, tokens)
    members = [*groups.argsort(stable=True).split(sizes.tolist())]
    for a, b in NUM_PASSES * [*combinations(range(len(members)), 2)]:
        _exchange(columns, members, a, b)
    found = torch.empty_like(groups)
    found[torch.cat(members)] = torch.arange(len(sizes)).repeat_interleave(sizes)
    return found


def _exchange(columns: Tensor, members: list[Tensor], a: int, b: int) -> None:
    """Exchange tokens between two groups, those that gain most first.

    Args:
        columns: (groups, tokens), the scores.
        members: of each group (size,), its tokens; those of `a` and `b` are replaced.
    """
    here, there = members[a], members[b]
    gains = columns[b][here] - columns[a][here], columns[a][there] - columns[b][there]
    if not len(here) or not len(there) or gains[0].max() + gains[1].max() <= 0:
        return
    sorted_here, sorted_there = (gain.sort(descending=True, stable=True) for gain in gains)
    pairs = min(len(here), len(there))
    # both gains fall, so their sums do
    count = int((sorted_here.values[:pairs] + sorted_there.values[:pairs] > 0).sum())
    here, there = here[sorted_here.indices], there[sorted_there.indices]
    members[a] = torch.cat([there[:count], here[count:]])
    members[b] = torch.cat([here[:count], there[count:]])
