"""Simulate when adaptive drafting steps back: the second table of docs/results/adaptive.md.

    python examples/patience.py

Rounds that cost so many plain passes give as many tokens, on average, as they cost times what
drafting gains; each drafted token is accepted with one chance, up to six in a row. The policy is
the package's own, without a clock. Printed is the speed of whole calls over plain decoding.
"""

import argparse
import random
from itertools import product
from statistics import fmean
from unittest.mock import patch

from coral_hf.decoding.drafting import TreeShape
from coral_hf.decoding.plain import draft_policy
from coral_hf.decoding.plain.costs import CostModel, Costs, RoundSample
from coral_hf.measure.report import Table

DEPTH = 6
SHAPE = TreeShape(DEPTH, 10, 60)


def chance_for(tokens: float) -> float:
    """With what chance a token is accepted where rounds give so many on average."""
    low, high = 0.0, 1.0
    for _ in range(50):
        chance = (low + high) / 2
        is_low = sum(chance**depth for depth in range(DEPTH + 1)) < tokens
        low, high = (chance, high) if is_low else (low, chance)
    return low


def call(cost: float, chance: float, length: int, generator: random.Random) -> float:
    """Decode `length` tokens and return the tokens a plain pass."""
    policy = draft_policy.AdaptiveDraft(SHAPE, CostModel(Costs(base=cost, level=0.0, node=0.0)))
    spent, found = 0.0, 0
    while found < length and not policy.is_plain:
        tokens = 1
        while tokens <= DEPTH and generator.random() < chance:
            tokens += 1
        policy.note(RoundSample(1, DEPTH, SHAPE.nodes, tokens))
        spent, found = spent + cost, found + tokens
    return found / spent if found >= length else length / (spent + length - found)


def main(options: argparse.Namespace) -> None:
    generator, lines = random.Random(0), list[list[str]]()
    for cost, gain in product(options.cost, options.gain):
        if (tokens := cost * gain) < 1:
            continue
        cells = [f"{cost:g}", f"{gain:g}", f"{tokens:.2f}"]
        for length, spreads in product(options.length, options.spreads):
            with patch.object(draft_policy, "SPREADS", spreads):
                chance = chance_for(tokens)
                calls = (call(cost, chance, length, generator) for _ in range(options.calls))
                cells.append(f"{fmean(calls):.3f}")
        lines.append(cells)
    pairs = product(options.length, options.spreads)
    each = [f"{length}, {spreads:g}" for length, spreads in pairs]
    print(Table("", ["cost of a round", "gain", "τ", *each], lines).to_markdown())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    default = draft_policy.SPREADS
    for name, values in {
        "cost": [1.3, 2.0, 3.0],
        "gain": [0.6, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5],
        "spreads": [0.0, default / 2, default, 2 * default],
    }.items():
        parser.add_argument(f"--{name}", type=float, nargs="+", default=values)
    parser.add_argument("--length", type=int, nargs="+", default=[64, 512], help="tokens of a call")
    parser.add_argument("--calls", type=int, default=2000)
    main(parser.parse_args())
