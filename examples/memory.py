"""Memory of a call beyond the weights: the target's cache, the drafter's, and everything else.

    python examples/memory.py                             # narrow targets on a CPU
    python examples/memory.py --widths published          # heads as published models have them
    python examples/memory.py --patterns gemma --lengths 16384 --chunk 512
    python examples/memory.py --window 512                # a drafter that attends to 512 tokens
    python examples/memory.py --static --lengths 1000     # rounds of constant shapes, 1024 tokens

Bytes come from torch's profiler, which sees every allocation. The three peaks of a call are those
of the target's pass over the prompt, of the drafter's, and of the rounds.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from coral_hf import CoralDrafter
from coral_hf.decoding.caches import ragged_cache

MARKS = {2: "the first token", 3: "the next ones"}  # by calls of the streamer
NODES = 60  # of the default tree
SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 12,
    "max_position_embeddings": 32768,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
# heads, heads of keys, size of a head, dtype
WIDTHS: dict[str, dict[str, tuple[int, int, int, torch.dtype]]] = {
    "narrow": {"llama": (2, 2, 64, torch.float32), "gemma": (2, 2, 64, torch.float32)},
    # of Llama 3.1 8B and Gemma 3 4B
    "published": {"llama": (32, 8, 128, torch.bfloat16), "gemma": (8, 4, 256, torch.bfloat16)},
}


def gemma(**sizes: Any) -> PreTrainedConfig:
    """Gemma 3's pattern: of six layers, five with a window of 512."""
    kinds = (["sliding_attention"] * 5 + ["full_attention"]) * (sizes["num_hidden_layers"] // 6)
    scale = sizes["head_dim"]
    return Gemma3TextConfig(
        **sizes, sliding_window=512, layer_types=kinds, query_pre_attn_scalar=scale
    )


PATTERNS: dict[str, Callable[..., PreTrainedConfig]] = {"llama": LlamaConfig, "gemma": gemma}


class Marker:
    """A streamer that marks the first tokens in the profile."""

    count = 0

    def put(self, value: Tensor) -> None:
        """Mark what comes after the prompt."""
        self.count += 1
        if self.count in MARKS:
            with record_function(MARKS[self.count]):
                pass

    def end(self) -> None:
        """Do nothing."""


def bytes_of(cache: Any) -> int:
    """Bytes of all that a cache holds."""
    found: dict[int, int] = {}
    for layer in cache.layers:
        for states in (layer.keys, layer.values, *getattr(layer, "_buffers", [])):
            if isinstance(states, Tensor):
                storage = states.untyped_storage()
                found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


class Largest:
    """The largest caches of a call, target's and drafter's, whenever tokens are committed."""

    target = drafter = 0

    def watch(self) -> None:
        """Look at every ragged cache from now on."""
        commit = ragged_cache.RaggedCache.commit

        def look(cache, *args, **kwargs):
            is_target = len(cache.layers) == SIZES["num_hidden_layers"]
            name = "target" if is_target else "drafter"
            setattr(self, name, max(getattr(self, name), bytes_of(cache)))
            return commit(cache, *args, **kwargs)

        ragged_cache.RaggedCache.commit = look


def peaks(model: PreTrainedModel, ids: Tensor, **settings: Any) -> tuple[list[int], Any]:
    """Bytes at the peaks of a call's stages, and the cache that it returns."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            streamer=Marker(),
            return_dict_in_generate=True,
            **settings,
        )
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    live, found = 0, [0, 0, 0]
    stage = 0
    for event in events:
        stage += event.name() in MARKS.values()
        if event.name() == "[memory]":
            live += event.nbytes()
            found[stage] = max(found[stage], live)
    return found, output.get("cache", output.get("past_key_values"))


def in_kib(*sizes: int) -> str:
    """Bytes as KiB, side by side."""
    return ", ".join(f"{size / 1024:.0f}" for size in sizes)


def make(pattern: str, widths: str) -> tuple[PreTrainedModel, int]:
    """A target of a pattern, and the bytes of a tree in its cache."""
    heads, kv_heads, head_dim, dtype = WIDTHS[widths][pattern]
    config = PATTERNS[pattern](
        **SIZES, num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim
    )
    torch.manual_seed(0)
    tree = NODES * config.num_hidden_layers * 2 * kv_heads * head_dim * dtype.itemsize
    return AutoModelForCausalLM.from_config(config).to(dtype).eval(), tree


def line(own: argparse.Namespace, pattern: str, length: int, largest: Largest) -> list[str]:
    """The cells of a pattern and a length."""
    model, tree = make(pattern, own.widths)
    drafter = CoralDrafter.from_target(model).to(model.dtype).eval()
    if own.window:
        drafter.generation_config.draft_window = own.window
    largest.target = largest.drafter = 0
    ids = torch.randint(3, 500, (1, length))
    settings = {"prefill_chunk_size": own.chunk, "max_new_tokens": own.new}
    alone, cache = peaks(model, ids, **settings)
    plain = bytes_of(cache)
    del cache
    ours, _ = peaks(model, ids, **settings, assistant_model=drafter, speculation="always")
    other = ours[2] - largest.target - largest.drafter
    cells = [pattern, str(length), in_kib(*alone), in_kib(plain), in_kib(*ours)]
    cells += [in_kib(largest.target), f"{(largest.target - tree) / plain:.3f}"]
    cells += [in_kib(largest.drafter), f"{in_kib(other)} ({other / ours[2]:.1%})"]
    cells.append(f"{in_kib(alone[2] - plain)} ({(alone[2] - plain) / alone[2]:.1%})")
    if own.static:
        settings |= {"assistant_model": drafter, "speculation": "always"}
        static, _ = peaks(model, ids, **settings, cache_implementation="static")
        cells += [in_kib(*static), f"{static[2] / ours[2]:.3f}, {max(static) / max(ours):.3f}"]
    return cells


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description="Memory of calls beyond the weights.")
    parser.add_argument("--patterns", nargs="+", choices=PATTERNS, default=[*PATTERNS])
    parser.add_argument("--widths", choices=WIDTHS, default="narrow")
    parser.add_argument("--layers", type=int, default=SIZES["num_hidden_layers"])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 8192, 16384])
    parser.add_argument("--new", type=int, default=12, help="tokens of an answer")
    parser.add_argument("--window", type=int, help="tokens that the drafter attends to")
    parser.add_argument("--chunk", type=int, help="tokens of a prompt read in one pass")
    parser.add_argument("--static", action="store_true", help="rounds of constant shapes too")
    own = parser.parse_args()
    SIZES["num_hidden_layers"] = own.layers
    transformers.logging.set_verbosity_error()
    print(f"torch {torch.__version__}, transformers {transformers.__version__}; KiB")
    names = (
        "pattern, tokens, plain's peaks, cache, peaks with a drafter, target's cache, less the tree"
    )
    names += ", drafter's cache, everything else, plain's"
    if own.static:
        names += ", peaks of static rounds, over growing ones: rounds and all"
    print(f"| {' | '.join(names.split(', '))} |")
    print("|---|" + "---:|" * names.count(", "))
    largest = Largest()
    largest.watch()
    for pattern in own.patterns:
        for length in own.lengths:
            print(f"| {' | '.join(line(own, pattern, length, largest))} |", flush=True)


if __name__ == "__main__":
    main()
