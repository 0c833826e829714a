"""Throughput and peak memory of a training step, against a straightforward implementation.

    python examples/training_cost.py --vocab-size 152064 --length 512 --length 2048

Each case runs in a process of its own. The straightforward one holds the logits of every step, one
mask for each step's attention, and the whole similarity matrix of CSRA.
"""

import argparse
import re
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from statistics import median
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from coral_hf import CoralDrafter
from coral_hf.training.losses import csra_loss, regression_loss
from coral_hf.training.losses.token_loss import Head, target_goal, token_loss
from coral_hf.training.steps.attention import plain_mixed_attention
from coral_hf.training.steps.unroll import unroll

STEPS, TEMPERATURE = 3, 0.07


def library_loss(drafter, embeddings, features, goal, logits_of):
    """Compute the loss as the trainer does; embeddings and features (1, length, hidden)."""
    predicted = unroll(drafter, embeddings, features, STEPS)
    predicted = predicted.flatten(1, 2)
    tokens = token_loss(predicted, lambda rows: target_goal(logits_of(goal[rows])), Head(logits_of))
    loss = regression_loss(predicted, goal).sum() + tokens.loss
    return loss + csra_loss(predicted, TEMPERATURE)


def straightforward_loss(drafter, embeddings, features, goal, logits_of):
    """Compute the same loss from its definition; embeddings and features (1, length, hidden)."""
    with mock.patch("coral_hf.training.steps.unroll.mixed_attention", plain_mixed_attention):
        predicted = unroll(drafter, embeddings, features, STEPS)
    predicted = predicted.flatten(1, 2)
    probs = logits_of(goal).float().softmax(-1)
    loss = regression_loss(predicted, goal).sum()
    for step in predicted:
        loss = loss - (probs * logits_of(step).float().log_softmax(-1)).sum()
    unit = F.normalize(predicted.float(), dim=-1).flatten(0, 1)
    with torch.autocast("cpu", enabled=False):
        scores = unit @ unit.T / TEMPERATURE
    itself = torch.eye(len(unit), dtype=torch.bool)
    log_probs = scores.masked_fill(itself, float("-inf")).log_softmax(-1)
    position = torch.arange(len(goal)).repeat(STEPS)
    positive = (position[:, None] == position) & ~itself
    return loss - log_probs[positive].sum() / (STEPS - 1) / STEPS


LOSSES = {"library": library_loss, "straightforward": straightforward_loss}


def measure(name: str, vocab_size: int, length: int, hidden_size: int, repeats: int) -> str:
    """Return the seconds of a step, megabytes beyond the models, and the loss, as text."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=1,
        num_attention_heads=hidden_size // 64,
        num_key_value_heads=hidden_size // 64,
    )
    target = LlamaForCausalLM(config).bfloat16().requires_grad_(False)
    drafter = CoralDrafter.from_target(target).float()
    embeddings, features = torch.randn(2, 1, length, hidden_size)
    goal = torch.randn(length, hidden_size).bfloat16()
    seconds = []
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = resident("VmRSS")
    for _ in range(1 + repeats):
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            loss = LOSSES[name](drafter, embeddings, features, goal, target.lm_head)
        loss.backward()
        drafter.zero_grad()
        seconds.append(time.perf_counter() - start)
    return f"{median(seconds[1:])} {resident('VmHWM') - before} {float(loss)}"


def resident(name: str) -> float:
    """Return the megabytes of this process now (VmRSS) or at most (VmHWM), on Linux."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{name}:\s*(\d+) kB", status)[1]) / 1024


def main(options: argparse.Namespace) -> None:
    """Measure every case, or print the numbers of one."""
    sizes = options.hidden_size, options.repeats
    if options.only is not None:
        print(measure(options.only, options.vocab_size[0], options.length[0], *sizes))
        return
    table = Table("vocabulary", "length", "implementation", "tokens/s", "peak MB", "loss")
    for vocab, tokens, name in product(options.vocab_size, options.length, LOSSES):
        case = f"--vocab-size {vocab} --length {tokens} --only {name}"
        case += f" --hidden-size {sizes[0]} --repeats {sizes[1]}"
        run = [sys.executable, __file__, *case.split()]
        output = subprocess.run(run, check=True, capture_output=True, text=True).stdout
        seconds, peak, loss = map(float, output.split())
        row = (vocab, tokens, name, f"{tokens / seconds:.0f}", f"{peak:.0f}", f"{loss:.0f}")
        table.add_row(*map(str, row))
    Console().print(table)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocab-size", type=int, action="append", required=True)
    parser.add_argument("--length", type=int, action="append", required=True)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=LOSSES)
    main(parser.parse_args())
