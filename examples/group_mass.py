"""Mass of the target's distribution that a router which is never wrong would read, by grouping.

    python examples/group_mass.py --target TARGET --dataset conversations.jsonl --hold-out 200 \
        --prompts HumanEval.jsonl --groups 16:1 --groups 64:4

Groups are made from the dataset's first rows. They are evaluated on its last rows and on the tokens
of prompt files: the mass in the best groups of each position, and the share of the target's ten
most probable tokens that lie in them.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from coral_hf.heads.router import Groups
from coral_hf.measure.prompts import encode, read_prompts
from coral_hf.target import Target, read_target
from coral_hf.training.data import load_conversations, prepare_dataset
from coral_hf.training.grouping import group_order, trained_features

GROUPINGS = ("contiguous", "frequency", "kmeans")
LENGTH = 512  # tokens of a row at most
TOP = 10  # most probable tokens of a position


def evaluation_rows(options: argparse.Namespace, held_out, tokenizer) -> Iterator[tuple]:
    """Yield the name and the rows of each text that groups are evaluated on."""
    yield "held-out rows", prepare_dataset(held_out, tokenizer, LENGTH)
    for path in options.prompts:
        ids = [encode(one, tokenizer)[0, :LENGTH].tolist() for one in read_prompts(path)]
        ids = [row for row in ids if len(row) > 2]
        whole = [{"input_ids": row, "labels": row, "attention_mask": [1] * len(row)} for row in ids]
        yield f"{path.parent.name}/{path.stem}", whole


def target_probs(target: Target, rows, positions: int) -> Tensor:
    """Return the target's distributions at up to `positions` tokens of rows, (positions, vocab)."""
    features = torch.cat([*trained_features(target, rows, positions)])
    return target.head.logits(features).float().softmax(-1)


def measure(probs: Tensor, order: Tensor | None, num_groups: int, active: int) -> str:
    """Return the mass that the best groups hold and the share of the top tokens, as text.

    `probs`: (positions, vocab); `order`: (vocab,), tokens group by group.
    """
    best = torch.zeros_like(probs).scatter(1, probs.topk(TOP).indices, 1.0 / TOP)
    groups = Groups(probs.shape[1], num_groups)
    padding = groups.num_groups * groups.size - probs.shape[1]
    parts = [part if order is None else part[:, order] for part in (probs, best)]
    # (positions, groups) each
    mass, held = (F.pad(p, (0, padding)).unflatten(1, (-1, groups.size)).sum(2) for p in parts)
    read = mass.topk(active).indices
    return f"{mass.gather(1, read).sum(1).mean():.3f}, {held.gather(1, read).sum(1).mean():.3f}"


@torch.no_grad()
def main(options: argparse.Namespace) -> None:
    model = AutoModelForCausalLM.from_pretrained(options.target, dtype="float32").eval()
    tokenizer, target = AutoTokenizer.from_pretrained(options.target), read_target(model)
    rows = load_conversations(options.dataset)
    first = len(rows) - options.hold_out
    trained = prepare_dataset(rows.select(range(first)), tokenizer, LENGTH)
    probs = {
        name: target_probs(target, own, options.positions)
        for name, own in evaluation_rows(options, rows.select(range(first, len(rows))), tokenizer)
    }
    print(f"| groups, of which read | grouping | {' | '.join(probs)} |")
    print("|---|---|" + "---|" * len(probs))
    for shape in options.groups or ["16:1", "16:2", "64:4"]:
        num_groups, active = map(int, shape.split(":"))
        for grouping in GROUPINGS:
            order = group_order(grouping, target, trained, num_groups, max_tokens=options.read)
            cells = [measure(own, order, num_groups, active) for own in probs.values()]
            print(f"| {active} of {num_groups} | {grouping} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", required=True, help="a folder or a Hub id")
    parser.add_argument("--dataset", required=True, help="conversations: a file or a Hub id")
    parser.add_argument("--hold-out", type=int, default=200, help="last rows, to evaluate on")
    parser.add_argument("--prompts", type=Path, action="append", default=[], help="prompt files")
    parser.add_argument("--groups", action="append", help="groups:read, such as 64:4")
    parser.add_argument("--read", type=int, default=10_000, help="positions that make the groups")
    parser.add_argument("--positions", type=int, default=1500, help="evaluated of each text")
    main(parser.parse_args())
