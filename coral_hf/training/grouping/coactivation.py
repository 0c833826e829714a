"""Groups of tokens that are likely at the same positions.

In: the target's most probable tokens at trained positions, rows of the LM head. Out: the group of
each token. What is maximised, over groups of given sizes:

    mean over positions of  Σ p(v), v in the best few groups of the position
    + SIMILARITY × mean over tokens of  (|row|² - |row - centroid of its group|²) / mean |row|²

The first term is the target's mass that a perfect router would read. The second, balanced k-means,
places the tokens that no position has, and steadies those that few have.
"""

import math

import torch
from torch import Tensor

from .kmeans import MAX_TURNS, SETTLED, balanced_groups, centroids_of, similarity
from .positions import TargetTopK

# the share of the groups that a position is taken to read
READ_SHARE = 1 / 16
# with less of it groups fit the training rows better, and rows of other kinds worse
SIMILARITY = 2.0


def coactivation_groups(top: TargetTopK, vectors: Tensor, groups: Tensor, sizes: Tensor) -> Tensor:
    """Improve groups in turns: which groups each position reads, then where each token is best.

    Args:
        top: the target's most probable tokens.
        vectors: (tokens, hidden), rows of the LM head in fp32.
        groups: (tokens,), to start from.
        sizes: (groups,), tokens of each group.

    Returns:
        (tokens,), int64.
    """
    vectors = vectors - vectors.mean(0)
    weight = SIMILARITY / max(float(vectors.square().sum(-1).mean()), 1e-12)
    for _ in range(MAX_TURNS):
        alike = similarity(vectors, centroids_of(vectors, groups, len(sizes)))  # (tokens, groups)
        read = read_groups(top, groups, len(sizes))
        before = groups
        scores = gain(top, read, alike.shape).add_(alike, alpha=weight)  # (tokens, groups)
        groups = balanced_groups(scores, sizes, groups)
        if (groups != before).float().mean() <= SETTLED:
            break
    return groups


def read_groups(top: TargetTopK, groups: Tensor, num_groups: int) -> Tensor:
    """Find the groups with most of each position's mass.

    Args:
        top: the target's most probable tokens.
        groups: (tokens,).
        num_groups: of which a share is read.

    Returns:
        (positions, groups that are read).
    """
    mass = top.probs.new_zeros(len(top.probs), num_groups)
    mass.scatter_add_(1, groups[top.tokens], top.probs)
    return mass.topk(math.ceil(num_groups * READ_SHARE), dim=-1).indices


def gain(top: TargetTopK, read: Tensor, shape: torch.Size) -> Tensor:
    """Sum the mass of each token over the positions that read each group.

    It is a share of all positions, times tokens: its mean over tokens is the mean over positions.

    Args:
        top: the target's most probable tokens.
        read: (positions, groups that are read).
        shape: tokens and groups.

    Returns:
        (tokens, groups).
    """
    num_tokens, num_groups = shape
    found = torch.zeros(num_tokens * num_groups, dtype=torch.float64)
    for slot in read.T:
        cells = top.tokens * num_groups + slot[:, None]  # (positions, top_k)
        found += torch.bincount(cells.flatten(), top.probs.flatten().double(), len(found))
    return (found * (num_tokens / len(read))).float().view(shape)
