"""Groupings of the vocabulary for a router, and expected counts of tokens.

    contiguous  slices of the token ids
    kmeans      tokens with similar rows of the LM head
    frequency   slices of the tokens sorted by how often the target generates them

All but the first are an order of the vocabulary, of which groups are equal slices. In a good one,
few groups hold the likely next tokens at any position.
"""

from .order import group_order
from .positions import label_counts, most_frequent_first, token_counts
