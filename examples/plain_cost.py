"""What a token costs without drafting: plain `generate`, `speculation="never"`, and stepped back.

    python examples/plain_cost.py                    # the whole table, in some minutes on a CPU
    python examples/plain_cost.py --only "Llama, 8k" --repeats 9

Each repeat calls all kinds in turn. Of a call, the last tokens count: a streamer takes the time at
each, in processor time of one thread, and how many operations of torch there were. Tokens are
sampled, so that stored costs decide; they say that drafting is dear, and the third kind steps back
after its first round.
"""

import argparse
import statistics
import time
from itertools import pairwise
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, PreTrainedModel

from coral_hf import CoralDrafter

NEW, COUNTED = 44, 32  # tokens of a call, and those of its end that count
DEAR = {"base": 1.0, "level": 1.0, "node": 0.0}
PROCESSORS = {"repetition_penalty": 1.1, "no_repeat_ngram_size": 3, "min_new_tokens": 8}
SIZES: dict[str, Any] = {
    "vocab_size": 1000,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 32768,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
TARGETS = {
    "Llama": lambda: LlamaConfig(**SIZES),
    "Gemma 3's windows": lambda: Gemma3TextConfig(
        **SIZES,
        sliding_window=256,
        layer_types=(["sliding_attention"] * 5 + ["full_attention"]) * 2,
    ),
}
# name of the call → its rows, tokens of the prompts, settings
CALLS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "1 row": (1, 128, {}),
    "48 rows, processors": (48, 128, PROCESSORS),
    "4k tokens": (1, 4096, {}),
    "8k tokens": (1, 8192, {}),
}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "never": {"speculation": "never"},
    "stepped back": {"speculation": "adaptive"},
}


class Operations(TorchDispatchMode):
    """Counts operations of torch."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Count one and run it."""
        self.count += 1
        return func(*args, **(kwargs or {}))


class Stamps:
    """A streamer that asks a clock at each token."""

    def __init__(self, clock) -> None:
        self.clock, self.found = clock, []

    def put(self, value: Tensor) -> None:
        """Ask the clock."""
        self.found.append(self.clock())

    def end(self) -> None:
        """Do nothing."""

    @property
    def step(self) -> float:
        """The median of the last tokens."""
        steps = [after - before for before, after in pairwise(self.found)]
        return statistics.median(steps[-COUNTED:])


def call(target: PreTrainedModel, kind: str, drafter, inputs: dict, clock) -> float:
    """What one of the last tokens of a call of a kind takes of a clock."""
    stamps, settings = Stamps(clock), dict(KINDS[kind])
    if settings:
        settings["assistant_model"] = drafter
    settings |= {"do_sample": True, "streamer": stamps, "return_dict_in_generate": True}
    stats = getattr(target.generate(**inputs, **settings), "stats", None)
    if kind == "stepped back":
        assert stats.is_stepped_back and stats.num_levels <= 6, "at once"
    return stamps.step


def row(target: PreTrainedModel, drafter, name: str, repeats: int) -> str:
    """The cells of one kind of call: milliseconds of plain `generate`, and parts of it."""
    rows, context, given = CALLS[name]
    ids = torch.randint(3, SIZES["vocab_size"], (rows, context))
    inputs = {"inputs": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": NEW, **given}
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(repeats):
        for kind, steps in found.items():
            steps.append(call(target, kind, drafter, inputs, time.process_time))
    cells = [f"{1000 * statistics.median(found['plain']):.2f}"]
    for kind in list(KINDS)[1:]:
        parts = [own / plain for own, plain in zip(found[kind], found["plain"], strict=True)]
        cells.append(f"{statistics.median(parts):.3f}")
    for kind in KINDS:
        with Operations() as counted:
            steps = call(target, kind, drafter, inputs, lambda: counted.count)
        cells.append(f"{steps:.0f}")
    return " | ".join(cells)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="What a token costs without drafting.")
    parser.add_argument("--only", default="", help="rows of the table that have these letters")
    parser.add_argument("--repeats", type=int, default=5)
    own = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    print("| target | call | plain, ms | never | stepped back | operations of each |||")
    print("|---|---|--:|--:|--:|--:|--:|--:|", flush=True)
    for target_name, make in TARGETS.items():
        torch.manual_seed(0)
        target = AutoModelForCausalLM.from_config(make()).eval()
        target.generation_config.eos_token_id, target.generation_config.pad_token_id = None, 0
        drafter = CoralDrafter.from_target(target).eval()
        drafter.generation_config.draft_costs = DEAR
        for name in CALLS:
            if own.only in f"{target_name}, {name}":
                cells = row(target, drafter, name, own.repeats)
                print(f"| {target_name} | {name} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
