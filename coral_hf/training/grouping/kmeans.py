"""Groups of tokens whose rows of the LM head are alike.

In: rows of the LM head. Out: (tokens,) groups. Lengths of rows stay as they are: they tell common
tokens from rare ones, which a router needs as much as directions.
"""

import torch
from torch import Tensor

from .balance import balanced_groups

MAX_TURNS = 10
SETTLED = 0.002  # the share of tokens that may still move
BATCH_SIZE = 4096


def kmeans_groups(rows: Tensor, sizes: Tensor, seed: int = 0) -> Tensor:
    """Balanced k-means: centroids of k-means, then turns of balanced assignment and new centroids.

    Args:
        rows: (tokens, hidden), fp32.
        sizes: (groups,), tokens of each group.

    Returns:
        (tokens,), int64.
    """
    from sklearn.cluster import MiniBatchKMeans

    clustering = MiniBatchKMeans(
        len(sizes), batch_size=BATCH_SIZE, n_init=1, random_state=seed, compute_labels=False
    ).fit(rows.numpy())
    centroids = torch.from_numpy(clustering.cluster_centers_)
    groups = balanced_groups(similarity(rows, centroids), sizes)
    for _ in range(MAX_TURNS):
        before = groups
        centroids = centroids_of(rows, groups, len(sizes))
        groups = balanced_groups(similarity(rows, centroids), sizes, groups)
        if (groups != before).float().mean() <= SETTLED:
            break
    return groups


def centroids_of(rows: Tensor, groups: Tensor, num_groups: int) -> Tensor:
    """The mean row of each group: (tokens, hidden) → (groups, hidden)."""
    sums = rows.new_zeros(num_groups, rows.shape[-1]).index_add_(0, groups, rows)
    return sums / torch.bincount(groups, minlength=num_groups)[:, None]


def similarity(rows: Tensor, centroids: Tensor) -> Tensor:
    """|row|² - |row - centroid|²: (tokens, hidden) → (tokens, groups)."""
    return 2 * rows @ centroids.T - centroids.square().sum(-1)
