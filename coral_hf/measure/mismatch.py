"""Where a method's greedy tokens leave those of the target alone, and how close a call it was.

In: a prompt, the tokens of "plain" and of a method. Out: a Mismatch. A pass over several tokens
rounds differently from one token at a time, so a near tie (a top-2 gap of some ulps of the dtype)
may flip; a wide gap is a bug.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Mismatch:
    """The first place where two continuations of a prompt differ."""

    task: str
    prompt: str
    turn: int
    method: str
    position: int  # among the new tokens
    top2_gap: float  # between the target's two highest logits there, in its own dtype


def first_difference(expected: list[int], found: list[int]) -> int | None:
    """Index of the first token that differs, or that only one has; None where they are equal."""
    if expected == found:
        return None
    differing = (i for i, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b)
    return next(differing, min(len(expected), len(found)))


@torch.no_grad()
def top2_gap(target: PreTrainedModel, ids: Tensor, tokens: list[int]) -> float:
    """Gap between the two highest logits after a prompt (1, length) and its shared continuation."""
    shared = (
        torch.cat([ids, ids.new_tensor([tokens])], dim=1) if tokens else ids
    )  # (1, length + shared)
    logits = target(input_ids=shared, use_cache=False).logits[0, -1]  # (vocab,)
    best, second = logits.float().topk(2).values.tolist()
    return best - second
