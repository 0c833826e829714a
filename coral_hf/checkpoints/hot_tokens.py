"""The tokens that a drafter proposes, counted: the static subset that SGLang's drafter may read.

In: a drafter, its target, texts; or counts from elsewhere. Out: token ids, the most frequent first
(FR-Spec, Zhao et al. 2025). What a drafter proposes less often is lost to it, never to the target.
"""

from collections.abc import Iterable, Sequence
from operator import index

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..drafters.coral.modeling import CoralDrafter
from ..target import read_features, read_target

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
    """How often a drafter proposes each token, each time weighed by its confidence.

    With a routed head these are its router's statistics: mass of what was read × probability there.

    Args:
        rows: token ids (1, length) of texts as the target writes them.
        head: the draft head that is asked; the drafter's own by default.
        top_k: proposals after each token of a text.
        chunk: tokens that are asked about at once.

    Returns:
        (vocab,), in float64.
    """
    bound = read_target(target)
    draft_head = drafter.heads.bind(bound.head, head)
    counts = torch.zeros(drafter.config.vocab_size, dtype=torch.float64)
    for ids in rows:
        ids = ids.to(bound.device)
        features = read_features(target, ids, torch.ones_like(ids))  # (1, length, hidden)
        if ids.shape[1] < 2:
            continue
        # each position is a text of its own to the head, with groups of its own
        predicted = drafter(bound.embed(ids[:, 1:]), features[:, :-1]).transpose(0, 1)
        for part in predicted.split(chunk):  # (positions, 1, hidden)
            children = draft_head.children(part, part.new_zeros(part.shape[:2]), top_k)
            weights = children.log_confidence.double().exp().flatten().cpu()
            counts.scatter_add_(0, children.tokens.flatten().cpu(), weights)
    return counts


def most_frequent(counts: Tensor, size: int, always: Sequence[int] = ()) -> list[int]:
    """The tokens that occur most often, at most `size`, those of `always` among them.

    Args:
        counts: (vocab,), of any kind that grows with how often a token is needed.
        always: ids that are kept whatever their count, such as those that end a text.

    Returns:
        fewer than `size` where fewer tokens have a count above 0.
    """
    check_size(size, len(counts), always)
    order = counts.argsort(descending=True, stable=True).tolist()
    kept = set(always)
    found = [token for token in order if token not in kept and counts[token] > 0]
    return [*dict.fromkeys(always), *found][:size]


def check_size(size: int, vocab_size: int, always: Sequence[int] = ()) -> None:
    """Raise a ValueError if there is no choosing so many tokens; see [`most_frequent`]."""
    if not len(always) < size <= vocab_size:
        raise ValueError(
            f"`size` is {size}; use more than the {len(always)} tokens that are always kept, and"
            f" at most the {vocab_size} of the vocabulary."
        )


def check_hot_tokens(tokens: Sequence[int], vocab_size: int) -> list[int]:
    """Ids as integers; a ValueError if they are none, repeated, or outside of the vocabulary."""
    try:
        ids = [index(token) for token in tokens]
    except TypeError as error:
        raise ValueError(f"`hot_tokens` are ids, which are integers: {error}. Pass ids.") from error
    outside = [token for token in ids if not 0 <= token < vocab_size]
    if outside or len(set(ids)) != len(ids) or not ids:
        raise ValueError(
            f"`hot_tokens` has {len(ids)} ids, {len(ids) - len(set(ids))} of them repeated"
            f" and {len(outside)} outside of the vocabulary of {vocab_size}; pass each id once."
        )
    return ids
