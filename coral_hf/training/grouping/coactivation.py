"""Groups of tokens that the target has in mind at the same places.

In: the target's most probable tokens at trained positions, rows of the LM head. Out: (tokens,)
groups. What is maximised, over groups of given sizes:

    mean over positions of  Σ p(v), v in the best few groups of the position
    + SIMILARITY × mean over tokens of  (|row|² - |row - centroid of its group|²) / mean |row|²

The first term is what a router that is never wrong would read of the target's mass. The second,
balanced k-means, places tokens that the rows lack, and holds back those that they have seldom.
"""

import math

import torch
from torch import Tensor

from .balance import balanced_groups
from .kmeans import SETTLED, centroids_of, similarity
from .positions import Said

# the share of the groups that a position is taken to read
READ_SHARE = 1 / 16
# with less of it groups suit the texts of training better, and texts of other kinds worse
SIMILARITY = 2.0
MAX_TURNS = 10


def coactivation_groups(said: Said, rows: Tensor, groups: Tensor, sizes: Tensor) -> Tensor:
    """Improve groups in turns: which groups each position reads, then where each token is best.

    Args:
        rows: (tokens, hidden), fp32.
        groups: (tokens,), to begin with.
        sizes: (groups,), tokens of each group.

    Returns:
        (tokens,), int64.
    """
    rows = rows - rows.mean(0)
    weight = SIMILARITY / max(float(rows.square().sum(-1).mean()), 1e-12)
    for _ in range(MAX_TURNS):
        alike = similarity(rows, centroids_of(rows, groups, len(sizes)))
        read = read_groups(said, groups, len(sizes))
        before = groups
        scores = gain(said, read, alike.shape).add_(alike, alpha=weight)  # (tokens, groups)
        groups = balanced_groups(scores, sizes, groups)
        if (groups != before).float().mean() <= SETTLED:
            break
    return groups


def read_groups(said: Said, groups: Tensor, num_groups: int) -> Tensor:
    """The groups with most of each position's mass, (positions, groups that are read)."""
    mass = said.probs.new_zeros(len(said.probs), num_groups)
    mass.scatter_add_(1, groups[said.tokens], said.probs)
    return mass.topk(math.ceil(num_groups * READ_SHARE), dim=-1).indices


def gain(said: Said, read: Tensor, shape: torch.Size) -> Tensor:
    """The mass of each token at the positions that read each group, (tokens, groups).

    As a share of all positions, times tokens: its mean over tokens is the mean over positions.
    """
    num_tokens, num_groups = shape
    found = torch.zeros(num_tokens * num_groups, dtype=torch.float64)
    for slot in read.T:
        cells = said.tokens * num_groups + slot[:, None]  # (positions, top_k)
        found += torch.bincount(cells.flatten(), said.probs.flatten().double(), len(found))
    return (found * (num_tokens / len(read))).float().view(shape)
