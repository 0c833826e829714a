"""The full LM head against the routed one, timed alone.

In: shapes of heads, `HeadTimingSettings`. Out: `HeadTimingReport`. Weights and features are random:
what a head costs follows from what it reads, never from the values. A timed call is what a level of
a draft tree calls, `children`: router, logits, ranking, everything.
"""

import random
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ..heads.group_logits import has_kernel
from ..heads.routed_head import RoutedHead
from ..heads.router import Router, Routing
from ..heads.simple import DraftHead, FullHead
from ..lm_head import LMHead
from .head_timing_report import HeadTimes, HeadTimingReport, describe_machine
from .head_timing_settings import HeadShape, HeadTimingSettings
from .timing import timed

Module = TypeVar("Module", bound=nn.Module)


class Candidate(NamedTuple):
    """A head to time, and what one call of it reads."""

    head: DraftHead
    num_groups: int | None  # None for the full head
    num_active: int | None
    read_bytes: int


@torch.no_grad()
def time_heads(settings: HeadTimingSettings) -> HeadTimingReport:
    """Time the full head and routed ones on one text, call by call in changing order.

    One shape and dtype is in memory at a time, twice where a random grouping is copied into place.
    """
    times = [
        one
        for shape in settings.shapes
        for dtype in settings.dtypes
        for one in _time_shape(shape, dtype, settings)
    ]
    return HeadTimingReport(settings, describe_machine(torch.device(settings.device)), times)


def _time_shape(shape: HeadShape, dtype: str, settings: HeadTimingSettings) -> Iterator[HeadTimes]:
    """All heads of a shape and dtype, for each number of rows."""
    torch.manual_seed(settings.seed)
    with torch.device("meta"):
        module = nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)
    head = LMHead(_randomised(module, getattr(torch, dtype), settings.device))
    candidates = list(_make_candidates(head, settings))
    for rows in settings.rows:
        seconds = _time_in_turns(candidates, head.weight, rows, settings)
        for candidate, taken in zip(candidates, seconds, strict=True):
            _, num_groups, num_active, read_bytes = candidate
            yield HeadTimes(shape.name, dtype, rows, num_groups, num_active, read_bytes, taken)


def _make_candidates(head: LMHead, settings: HeadTimingSettings) -> Iterator[Candidate]:
    """The full head, then routed ones that all read the same weight."""
    vocab, hidden = head.weight.shape
    row_bytes = hidden * head.weight.element_size()
    yield Candidate(FullHead(head), None, None, vocab * row_bytes)

    is_random = settings.grouping == "random"
    order = torch.randperm(vocab, device=head.weight.device) if is_random else None
    # as a drafter does: rows that cannot be read through an order are copied into it, once
    weight = None if order is None or has_kernel(head.weight) else head.weight[order]
    for num_groups in settings.groups:
        with torch.device("meta"):
            router = Router(hidden, num_groups)
        _randomised(router, head.weight.dtype, settings.device).order = order
        for num_active in sorted({num_groups // share for share in settings.shares}, reverse=True):
            routed = RoutedHead(head, router, Routing("shared", num_active), weight)
            # the groups' rows, and those of the router's two matrices
            read = min(num_active * routed.groups.size, vocab) + hidden + num_groups
            yield Candidate(routed, num_groups, num_active, read * row_bytes)


def _randomised(module: Module, dtype: torch.dtype, device: str) -> Module:
    """A module without storage, given one of small random numbers."""
    module.to(dtype).to_empty(device=device)
    for parameter in module.parameters():
        nn.init.uniform_(parameter, -0.05, 0.05)
    return module


def _time_in_turns(
    candidates: list[Candidate], weight: Tensor, rows: int, settings: HeadTimingSettings
) -> list[list[float]]:
    """Seconds of each candidate's calls: each turn calls each once, in an order of its own.

    Args:
        weight: (vocab, hidden)
    """
    seconds: list[list[float]] = [[] for _ in candidates]
    log_path = torch.zeros(1, rows, device=weight.device)
    shuffle = random.Random(settings.seed).shuffle
    for turn in range(settings.warmup + settings.repeats):
        # new features choose other groups, so that no cache has read them before
        features = torch.randn(1, rows, weight.shape[1], device=weight.device).to(weight.dtype)
        places = list(range(len(candidates)))
        shuffle(places)
        for place in places:
            call = partial(candidates[place].head.children, features, log_path, settings.top_k)
            taken = timed(call, weight.device).seconds
            if turn >= settings.warmup:
                seconds[place].append(taken)
    return seconds
