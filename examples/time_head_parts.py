"""Time the parts of a draft head: ranking its logits, and reading the active groups of its weight.

    OMP_NUM_THREADS=2 python examples/time_head_parts.py

Random numbers, in milliseconds: the median, and in brackets the fastest of the repeats. Calls of a
line take turns, each on new numbers.
"""

import argparse
from collections.abc import Callable
from statistics import median
from time import perf_counter

import torch
from torch import Tensor
from torch.nn import functional as F

from coral_hf.heads.products import plain_group_logits, rank

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
GROUPS, ACTIVE = 64, 8


def times(calls: dict[str, Callable], draw: Callable, repeats: int) -> str:
    """Return the cells of a line: each call's milliseconds on what `draw()` gives."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        inputs = draw()
        for name, call in calls.items():
            start = perf_counter()
            call(*inputs)
            found[name].append(1000 * (perf_counter() - start))
    return " | ".join(f"{median(own):.2f} ({min(own):.2f})" for own in found.values())


def torch_rank(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Rank logits (1, rows, vocab) by torch's own operators."""
    best, places = logits.topk(top_k)
    return places, best - logits.logsumexp(-1, keepdim=True)


def copied_group_logits(features: Tensor, weight: Tensor, active: Tensor, size: int) -> Tensor:
    """Compute the logits of active groups from a copy of their rows; see `group_logits`."""
    rows = weight.unflatten(0, (-1, size)).index_select(0, active[0, 0]).flatten(0, 1)
    return F.linear(features, rows).float().unflatten(-1, (-1, size))


def copied_one_by_one(features: Tensor, weight: Tensor, active: Tensor, size: int) -> Tensor:
    """The same from a copy of one group at a time, which is smaller than a cache."""
    groups = weight.unflatten(0, (-1, size))
    read = [F.linear(features, groups.index_select(0, one)[0]) for one in active[0, 0].split(1)]
    return torch.stack(read, 2).float()


@torch.no_grad()
def main(options: argparse.Namespace) -> None:
    print("| rows × logits | dtype | top-k and logsumexp | rank |\n|---|---|---|---|")
    calls = {
        "torch": lambda logits: torch_rank(logits.float(), options.top_k),
        "ours": lambda logits: rank(logits.float(), options.top_k),
    }
    for vocab in options.vocab or [32000, 128256]:
        for name, dtype in DTYPES.items():
            for rows in options.rows or [1, 8, 10, 80]:

                def draw_logits(shape=(1, rows, vocab), dtype=dtype):
                    return ((3 * torch.randn(shape)).to(dtype),)

                cells = times(calls, draw_logits, options.repeats)
                print(f"| {rows} × {vocab:,} | {name} | {cells} |", flush=True)
    print("\n| head | dtype | rows | in place | one group copied at a time | all copied |")
    print("|---|---|---|---|---|---|")
    forms = (plain_group_logits, copied_one_by_one, copied_group_logits)
    for shape in options.shape or ["32000:256", "32000:1024", "128000:4096"]:
        vocab, hidden = map(int, shape.split(":"))
        for name, dtype in DTYPES.items():
            weight, size = torch.randn(vocab, hidden, dtype=dtype), vocab // GROUPS
            for rows in (1, 10):

                def draw_groups(weight=weight, rows=rows, size=size):
                    features = torch.randn(1, rows, weight.shape[1], dtype=weight.dtype)
                    return features, weight, torch.randperm(GROUPS)[:ACTIVE][None, None], size

                cells = times({form.__name__: form for form in forms}, draw_groups, options.repeats)
                print(f"| {vocab:,} × {hidden:,} | {name} | {rows} | {cells} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocab", type=int, action="append", help="logits of a row that is ranked")
    parser.add_argument("--rows", type=int, action="append", help="rows that are ranked")
    parser.add_argument("--shape", action="append", help="vocabulary:channels of a grouped head")
    parser.add_argument("--top-k", type=int, default=10, help="of a row")
    parser.add_argument("--repeats", type=int, default=21, help="of each call")
    main(parser.parse_args())
