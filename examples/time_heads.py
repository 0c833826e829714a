"""Time the full LM head against routed and quantized heads, on random weights and features.

    OMP_NUM_THREADS=2 python examples/time_heads.py --groups 64 --share 4 --share 8 --share 16

A timed call is one level of one sequence's draft tree: router, logits, ranking. The cost of a head
depends on which weights it reads, not on their values.
"""

import argparse
import random
from statistics import median, quantiles

import torch
from torch import nn
from torch.utils.benchmark import Timer

from coral_hf.heads.draft_heads import FullHead, QuantizedHead, RoutedHead
from coral_hf.heads.products import has_kernel, quantize
from coral_hf.heads.router import Router, Routing
from coral_hf.lm_head import LMHead

SHAPES = ("Llama-3-8B:128256:4096", "Qwen2.5-7B:152064:3584", "Gemma-2-2B:256000:2304")


def heads_of(head: LMHead, options: argparse.Namespace) -> dict:
    """Return heads of the same weight by name, with the MiB that they read."""
    vocab, hidden = head.weight.shape
    row = hidden * head.weight.element_size() / 2**20
    heads = {"all: full head": (FullHead(head), vocab * row)}
    rounded = QuantizedHead(head, quantize(head.weight))
    heads["all, quantized"] = rounded, vocab * (hidden + 4) / 2**20  # a row has a scale
    order = torch.randperm(vocab, device=options.device) if options.random_groups else None
    # as a drafter does: without a kernel, the weight is copied once in the order of the groups
    weight = None if order is None or has_kernel(head.weight) else head.weight[order]
    for groups in options.groups or [16, 32]:
        router = Router(hidden, groups).to(options.device, head.weight.dtype)
        router.order = order
        for active in (groups // share for share in options.share or [4, 8, 16]):
            routed = RoutedHead(head, router, Routing("shared", active), weight)
            read, own = min(active * routed.groups.size, vocab), (hidden + groups) * row
            heads[f"{active} of {groups}"] = routed, read * row + own  # the router's own too
    return heads


def times(heads: dict, features: torch.Tensor, options: argparse.Namespace) -> dict:
    """Return milliseconds of each head, called in shuffled order; features (1, rows, hidden)."""
    log_path = torch.zeros(features.shape[:2], device=features.device)
    call = f"head.children(features, log_path, {options.top_k})"
    threads, found = torch.get_num_threads(), {name: [] for name in heads}
    for _ in range(options.repeats):
        for name in random.sample(list(heads), len(heads)):
            names = {"head": heads[name][0], "features": features, "log_path": log_path}
            # new features for each call, so that no cache holds the groups that they choose
            timer = Timer(call, "features.normal_()", globals=names, num_threads=threads)
            found[name].append(1000 * timer.timeit(1).median)
    return found


@torch.no_grad()
def main(options: argparse.Namespace) -> None:
    print("| head of | dtype | rows | groups read | read, MiB | ms (quartiles) | speed-up | GB/s |")
    print("|---|---|---|---|---|---|---|---|")
    for shape in options.shape or SHAPES:
        name, vocab, hidden = shape.split(":")
        for dtype in options.dtype or ["bfloat16", "float32"]:
            sizes = {"device": options.device, "dtype": getattr(torch, dtype)}
            heads = heads_of(LMHead(nn.Linear(int(hidden), int(vocab), False, **sizes)), options)
            for rows in options.rows or [1, 10]:
                found = times(heads, torch.zeros(1, rows, int(hidden), **sizes), options)
                for head, own in found.items():
                    low, ms, high = quantiles(own, n=4, method="inclusive")
                    full = found["all: full head"]
                    faster = median(a / b for a, b in zip(full, own, strict=True))
                    mib = heads[head][1]
                    cells = f"{mib:.0f} | {ms:.2f} ({low:.2f} – {high:.2f}) | {faster:.2f}x"
                    rate = mib * 2**20 / 1e6 / ms
                    print(f"| {name} | {dtype} | {rows} | {head} | {cells} | {rate:.1f} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", action="append", help="name:vocabulary:channels")
    parser.add_argument("--dtype", action="append", help="bfloat16 and float32")
    parser.add_argument("--rows", type=int, action="append", help="of a tree level: 1 and 10")
    parser.add_argument("--groups", type=int, action="append", help="of the router: 16 and 32")
    parser.add_argument("--share", type=int, action="append", help="one of so many: 4, 8 and 16")
    parser.add_argument("--random-groups", action="store_true", help="as learned groups are")
    parser.add_argument("--top-k", type=int, default=10, help="children of a row")
    parser.add_argument("--repeats", type=int, default=20, help="timed calls of each head")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    main(parser.parse_args())
