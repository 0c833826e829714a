"""Hot tokens: the most frequent proposals of a drafter, which SGLang's drafter may read alone.

In: a drafter, its target, sequences; or counts from elsewhere. Out: token ids, the most frequent
first (FR-Spec, Zhao et al. 2025). Other tokens are lost to the drafter, never to the target.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..drafters.coral.modeling import CoralDrafter
from ..target import read_features, read_target, text_config

HOT_TOKENS = "hot_tokens.pt"


@torch.no_grad()
def proposal_counts(
    target: PreTrainedModel,
    drafter: CoralDrafter,
    rows: Iterable[Tensor],
    head: str | None = None,
    top_k: int = 10,
    chunk: int = 256,
) -> Tensor:
    """Count how often a drafter proposes each token, weighted by its confidence.

    Confidence with a routed head is the router's mass of what was read × the probability there.

    Args:
        rows: token ids (1, length) of sequences as the target writes them.
        head: the draft head that proposes; the drafter's own by default.
        top_k: proposals after each token of a sequence.
        chunk: tokens whose proposals are computed at a time.

    Returns:
        of shape (vocab,), in float64.
    """
    bound = read_target(target)
    draft_head = drafter.heads.bind(bound.head, head)
    counts = torch.zeros(text_config(target).vocab_size, dtype=torch.float64)
    for ids in rows:
        ids = ids.to(bound.device)
        features = read_features(target, ids, torch.ones_like(ids))  # (1, length, hidden)
        if ids.shape[1] < 2:
            continue
        # each position is a sequence of its own to the head, with groups of its own
        predicted = drafter(bound.embed(ids[:, 1:]), features[:, :-1]).transpose(0, 1)
        for part in predicted.split(chunk):  # (positions, 1, hidden)
            children = draft_head.children(part, part.new_zeros(part.shape[:2]), top_k)
            weights = children.log_confidence.double().exp().flatten().cpu()
            counts.scatter_add_(0, children.tokens.flatten().cpu(), weights)
    return counts


def most_frequent(counts: Tensor, size: int, always: Sequence[int] = ()) -> list[int]:
    """Return the tokens that occur most often, at most `size`, including those of `always`.

    Args:
        counts: of shape (vocab,), of any kind that grows with how often a token is needed.
        always: ids that are kept whatever their count, such as end-of-sequence tokens.

    Returns:
        fewer than `size` where fewer tokens have a count above 0.
    """
    check_size(size, len(counts), always)
    order = counts.argsort(descending=True, stable=True).tolist()
    kept = set(always)
    found = [token for token in order if token not in kept and counts[token] > 0]
    return [*dict.fromkeys(always), *found][:size]


def check_size(size: int, vocab_size: int, always: Sequence[int] = ()) -> None:
    """Raise a ValueError if so many tokens cannot be chosen; see [`most_frequent`]."""
    if not len(always) < size <= vocab_size:
        raise ValueError(
            f"`size` is {size}; use more than the {len(always)} tokens that are always kept, and"
            f" at most the {vocab_size} of the vocabulary."
        )
