"""How the vocabulary is cut into groups, and which tokens a target writes most.

    contiguous    slices of the token ids
    kmeans        tokens whose rows of the LM head are alike
    frequency     slices of the tokens by how often the target writes them
    coactivation  tokens that the target has in mind at the same places

All but the first are an order of the vocabulary, of which groups are equal slices. A good one lets
few groups hold what the target may say next, whatever the text is.
"""

from .frequency import most_frequent_first, token_counts
from .order import group_order

__all__ = ["group_order", "most_frequent_first", "token_counts"]
