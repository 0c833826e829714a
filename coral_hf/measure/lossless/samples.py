"""Samples of a target with a drafter, by χ² against the target's own distribution.

In: a prompt and sampling settings. Out: the chances of what may come first, how often it came, and
how well the two fit.

    the tokens of a sample     "It" "was" "a"       "It" "was" "an"      "It" "rained"     "But" …
    the outcome it counts for  It was a             It was …             It …              …

Of each beginning the most probable tokens are outcomes of their own, and the rest of the vocabulary
(…) is one.
"""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..calls import Arguments, Call, call_generate, seeded, until_stop
from ..prompts import left_padded
from ..settings import VerifySettings

NUM_TOKENS = 3  # of a sample that are compared
NUM_LIKELY = 6  # tokens after a beginning that are outcomes of their own
LEAST_EXPECTED = 5.0  # samples of an outcome, as χ² needs; rarer ones are counted together
NEVER = 1e-9  # the chance of what top-k and top-p rule out, up to rounding
REST = -1  # in place of a token: any other

Outcome = tuple[int, ...]  # tokens; after `REST` nothing is told apart


class Fit(NamedTuple):
    """How well counts fit chances."""

    statistic: float
    freedom: int  # degrees of it
    p_value: float
    num_impossible: int = 0  # samples that cannot be

    def __str__(self) -> str:
        if self.num_impossible:
            return f"{self.num_impossible} samples that the target never draws"
        return (
            f"χ² = {self.statistic:.1f}, {self.freedom} degrees of freedom, p = {self.p_value:.2g}"
        )


def draw(
    target: PreTrainedModel, ids: Tensor, arguments: Arguments, settings: VerifySettings
) -> list[Call]:
    """Draw samples after a prompt (1, length), in batches."""
    whole, left = divmod(settings.num_samples, settings.batch_size)
    sizes = [settings.batch_size] * whole + [left] * (left > 0)
    with seeded(settings.seed, target.device):
        batches = (left_padded(ids.expand(size, -1), 0, ids.device) for size in sizes)
        return [call_generate(target, batch, arguments) for batch in batches]


def outcome_chances(
    target: PreTrainedModel, ids: Tensor, arguments: Arguments, num_samples: int
) -> dict[Outcome, float]:
    """Compute how likely the outcomes are after a prompt (1, length).

    Plain `generate` says it, a token at a time, so its processors are those of the call.
    """
    stops = target.generation_config.eos_token_id
    chances: dict[Outcome, float] = {}
    beginnings: dict[Outcome, float] = {(): 1.0}
    for length in range(1, NUM_TOKENS + 1):
        probs = next_probs(target, ids, list(beginnings), arguments)  # (beginnings, vocab)
        best = probs.topk(min(NUM_LIKELY, probs.shape[1]))
        found: dict[Outcome, float] = {}
        pairs = zip(best.values.tolist(), best.indices.tolist(), strict=True)
        for (beginning, chance), (values, tokens) in zip(beginnings.items(), pairs, strict=True):
            found |= {(*beginning, t): chance * p for p, t in zip(values, tokens, strict=True)}
            rest = float(probs.shape[1] > len(values)) * max(1 - sum(values), 0.0)
            chances |= {(*beginning, REST): chance * rest}
        # what goes on, and is told apart by its next token
        beginnings = {
            outcome: chance
            for outcome, chance in found.items()
            if length < NUM_TOKENS
            and chance * num_samples >= LEAST_EXPECTED
            and len(until_stop([*outcome, REST], stops)) > length
        }
        chances |= {outcome: found[outcome] for outcome in found.keys() - beginnings.keys()}
        if not beginnings:
            break
    return chances


def next_probs(
    target: PreTrainedModel, ids: Tensor, beginnings: list[Outcome], arguments: Arguments
) -> Tensor:
    """Compute the target's distribution after a prompt (1, length) and each beginning.

    Returns:
        (beginnings, vocab), in float64.
    """
    tails = torch.tensor(beginnings, dtype=ids.dtype, device=ids.device)
    tails = tails.view(len(beginnings), -1)
    rows = torch.cat([ids.expand(len(tails), -1), tails], dim=1)
    asked = {"max_new_tokens": 1, "output_scores": True, "return_dict_in_generate": True}
    with seeded(0, target.device):
        output = target.generate(**left_padded(rows, 0, ids.device), **arguments | asked)
    return output.scores[0].double().softmax(-1)


def count_outcomes(
    samples: Sequence[list[int]], chances: dict[Outcome, float]
) -> dict[Outcome, int]:
    """Count the outcome of each sample, which is the only one of `chances` that it begins with."""
    counts = Counter[Outcome]()
    going_on = {outcome[:length] for outcome in chances for length in range(1, len(outcome))}
    for tokens in samples:
        length = 1
        while tuple(tokens[:length]) in going_on:
            length += 1
        exact = tuple(tokens[:length])
        counts[exact if exact in chances else (*exact[:-1], REST)] += 1
    return counts


def chi_square(chances: dict[Outcome, float], counts: dict[Outcome, int]) -> Fit:
    """Test counts against chances (Pearson); rare outcomes are counted as one."""
    total = sum(counts.values())
    never = [outcome for outcome, chance in chances.items() if chance < NEVER]
    impossible = sum(counts.get(outcome, 0) for outcome in never)
    if impossible:
        return Fit(float("inf"), 0, 0.0, impossible)
    pairs = [(chance * total, counts.get(outcome, 0)) for outcome, chance in chances.items()]
    pairs.sort()
    pooled, cells = (0.0, 0), list[tuple[float, int]]()
    for expected, count in pairs:
        if pooled[0] < LEAST_EXPECTED:
            pooled = pooled[0] + expected, pooled[1] + count
        else:
            cells.append((expected, count))
    cells.append(pooled)
    statistic = sum((count - expected) ** 2 / expected for expected, count in cells)
    freedom = len(cells) - 1
    halves = torch.tensor([freedom / 2, statistic / 2], dtype=torch.float64)
    p_value = float(torch.special.gammaincc(*halves)) if freedom else 1.0
    return Fit(statistic, freedom, p_value)
