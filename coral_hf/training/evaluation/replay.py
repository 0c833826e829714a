"""Greedy chain decoding replayed over a given text, from one unroll.

In: what each step of the unroll predicts, and the target's features. Out: the rounds that chain
decoding would take. Step d of the unroll stands where a chain of depth d stands: a chain that
starts with the root x3 is the diagonal marked *.

    token                 x0    x1    x2    x3    x4    x5    x6    x7
    label                 -     -     -     x3    x4    x5    x6    x7        trained: 3 … 7
    position t            0     1     2     3     4     5
    a step there predicts x2    x3    x4    x5    x6    x7                    by reading x1 … x6
    step 1                            *                                       x4 after root x3
    step 2                                  *                                 x5 after x4, f̂¹_3
    step 3                                        *                           x6 after x5, f̂²_4

On the target's own greedy text these are the rounds of real chain decoding, one by one. On any
other text a round continues along the text where the target itself would have gone another way.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import takewhile

import torch
from torch import Tensor
from torch.nn import functional as F

from ...target import Target
from ..data.encoding import IGNORED
from ..steps import Unrolled

CHUNK = 256  # rows of logits held at a time
# a token for each row, (rows, hidden) → (rows,), and the step that predicted it
Choose = Callable[..., Tensor]


def replayed_rounds(choose: Choose, target: Target, unrolled: Unrolled) -> list[int]:
    """Count the tokens that each round of greedy chain decoding would emit, row after row.

    Args:
        choose: the drafter's first choices.
        target: of the drafter.
        unrolled: of as many steps as a chain has levels.
    """
    found = unrolled.trained()
    return rounds_of(agreement(choose, target, found.predicted, found.target), unrolled.labels)


def rounds_of(agreed: Tensor, labels: Tensor) -> list[int]:
    """Count the tokens that each round of a greedy chain would emit, row after row.

    Args:
        agreed: (steps, positions), at trained positions: the first choices of step and target are
            the same.
        labels: (batch, length).
    """
    is_trained = labels != IGNORED
    is_trained[:, :2] = False
    spread = agreed.new_zeros(len(agreed), *is_trained[:, 2:].shape)  # t predicts token t + 2
    spread[:, is_trained[:, 2:]] = agreed
    rows = zip(accepted_chains(spread).tolist(), is_trained.tolist(), strict=True)
    return [tokens for accepted, row in rows for tokens in walk(accepted, row)]


@torch.no_grad()
def agreement(choose: Choose, target: Target, predicted: Tensor, features: Tensor) -> Tensor:
    """Mark where the drafter's first choice is the target's: (steps, positions).

    Args:
        choose, target: see `replayed_rounds`.
        predicted: (steps, positions, hidden).
        features: (positions, hidden), what was to be predicted.
    """
    best = _by_chunk(lambda rows: target.head.logits(rows).argmax(-1), features)
    chosen = [_by_chunk(partial(choose, step=step), one) for step, one in enumerate(predicted)]
    return torch.stack([one == best for one in chosen])


def _by_chunk(choose: Callable[[Tensor], Tensor], features: Tensor) -> Tensor:
    """Apply a function to a few features at a time: (rows, hidden) → (rows,)."""
    return torch.cat([choose(rows) for rows in features.split(CHUNK)])


def accepted_chains(agreed: Tensor) -> Tensor:
    """Count the accepted guesses of each chain, by the position of its first one.

    Args:
        agreed: (steps, batch, positions).

    Returns:
        (batch, positions): at t the leading agreements of step 1 at t, step 2 at t + 1, …
    """
    # step d moves left by d - 1, so that a chain is a column; what moves in is beyond the text
    columns = [F.pad(one[:, step:], (0, step)) for step, one in enumerate(agreed)]
    return torch.stack(columns).long().cumprod(0).sum(0)


def walk(accepted: list[int], trained: list[bool]) -> Iterator[int]:
    """Count the tokens of each round of a row, from root to root through each trained stretch.

    The first token of a stretch is that of the prompt's pass; the last round ends with the stretch.

        token       x3    x4    x5    x6    x7        a stretch, 3 … 7
        round 1     root  ✓     +                     accepted[2] = 1: emits x4 and one more, x5
        round 2                 root  ✓     ✓         accepted[4] = 3: emits what is left, x6 x7

    Args:
        accepted: by position t of a chain's first guess, which is of token t + 2.
        trained: by token.
    """
    root = 0
    while root < len(trained) - 1:
        if not (trained[root] and trained[root + 1]):
            root += 1
            continue
        emitted = list(takewhile(bool, trained[root + 1 : root + 2 + accepted[root - 1]]))
        yield len(emitted)
        root += len(emitted)
