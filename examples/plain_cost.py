"""What a token costs without drafting: plain `generate`, `speculation="never"`, and stepped back.

    python examples/plain_cost.py --rows 48 --processors        # a target with Gemma 3's windows
    python examples/plain_cost.py --target coral-bench --context 128

Costs are processor time, and operations of torch, which no other work on the machine changes:
those of the fastest of several calls of 56 tokens less those of 24. The drafter is untrained and
drafting is said to be dear, so the third kind steps back at once.
"""

import argparse
import time
from typing import Any

import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, Gemma3TextConfig, PreTrainedModel

from coral_hf import CoralDrafter

SHORT, LONG = 24, 56  # tokens of a call
PROCESSORS = {"repetition_penalty": 1.1, "no_repeat_ngram_size": 3, "do_sample": True, "top_p": 0.9}


class Operations(TorchDispatchMode):
    """Counts operations of torch."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Count one and run it."""
        self.count += 1
        return func(*args, **(kwargs or {}))


def small_gemma() -> PreTrainedModel:
    """A small target with Gemma 3's pattern of sliding windows."""
    config = Gemma3TextConfig(
        vocab_size=1000,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=12,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=64,
        sliding_window=256,
        layer_types=(["sliding_attention"] * 5 + ["full_attention"]) * 2,
        max_position_embeddings=32768,
    )
    return AutoModelForCausalLM.from_config(config)


def main() -> None:
    """Print the cost of a token of each kind, and what it is of plain `generate`'s."""
    parser = argparse.ArgumentParser(description="What a token costs without drafting.")
    parser.add_argument("--target", help="a folder or Hub id; by default a small Gemma 3")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--processors", action="store_true", help="sample, with three processors")
    parser.add_argument("--repeats", type=int, default=5)
    own = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    load = AutoModelForCausalLM.from_pretrained
    target = (load(own.target) if own.target else small_gemma()).eval()
    target.generation_config.eos_token_id, target.generation_config.pad_token_id = None, 0
    drafter = CoralDrafter.from_target(target).eval()
    drafter.generation_config.draft_costs = {"base": 1.0, "level": 1.0, "node": 0.0}
    ids = torch.randint(3, 500, (own.rows, own.context))
    given: dict[str, Any] = PROCESSORS if own.processors else {"do_sample": False}
    kinds: dict[str, Any] = {"plain": {}}
    for speculation in ("never", "adaptive"):
        kinds[speculation] = {"assistant_model": drafter, "speculation": speculation}

    def call(tokens: int, kind: str) -> None:
        mask = torch.ones_like(ids)
        target.generate(ids, attention_mask=mask, max_new_tokens=tokens, **given, **kinds[kind])

    def seconds(tokens: int, kind: str) -> float:
        start = time.process_time()
        call(tokens, kind)
        return time.process_time() - start

    def operations(tokens: int, kind: str) -> int:
        with Operations() as counted:
            call(tokens, kind)
        return counted.count

    spent: dict[tuple[str, int], list[float]] = {}
    for _ in range(own.repeats):
        for kind in kinds:
            for tokens in (SHORT, LONG):
                spent.setdefault((kind, tokens), []).append(seconds(tokens, kind))
    plain = 0.0
    for kind in kinds:
        more = min(spent[kind, LONG]) - min(spent[kind, SHORT])
        plain = plain or more
        cost = f"{1000 * more / (LONG - SHORT):.2f} ms a token ({more / plain:.3f})"
        count = (operations(LONG, kind) - operations(SHORT, kind)) / (LONG - SHORT)
        print(f"{kind}: {cost}, {count:.0f} operations", flush=True)


if __name__ == "__main__":
    main()
