"""Memory of a call beyond the weights: the target's cache, the drafter's, and everything else.

    python examples/memory.py                      # on a CPU, in two minutes
    python examples/memory.py --window 512         # a drafter that attends to 512 tokens

Bytes come from torch's profiler, which sees every allocation. The three peaks of a call are those
of the target's pass over the prompt, of the drafter's, and of the rounds.
"""

import argparse
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, PreTrainedModel

from coral_hf import CoralDrafter
from coral_hf.decoding.caches import ragged_cache

MARKS = {2: "the first token", 3: "the next ones"}  # by calls of the streamer
SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 32768,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
PATTERNS = {
    "Llama": lambda: LlamaConfig(**SIZES),
    "Gemma 3": lambda: Gemma3TextConfig(
        **SIZES,
        sliding_window=512,
        layer_types=(["sliding_attention"] * 5 + ["full_attention"]) * 2,
        query_pre_attn_scalar=64,
    ),
}


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

    def __init__(self, num_layers: int):
        self.target, self.drafter, self._num_layers = 0, 0, num_layers

    def watch(self) -> None:
        """Look at every ragged cache from now on."""
        commit = ragged_cache.RaggedCache.commit

        def look(cache, *args, **kwargs):
            name = "target" if len(cache.layers) == self._num_layers else "drafter"
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
            max_new_tokens=12,
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


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description="Memory of calls beyond the weights.")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 8192, 16384])
    parser.add_argument("--window", type=int, help="tokens that the drafter attends to")
    parser.add_argument("--chunk", type=int, help="tokens of a prompt read in one pass")
    own = parser.parse_args()
    transformers.logging.set_verbosity_error()
    print(f"torch {torch.__version__}, transformers {transformers.__version__}; KiB")
    names = (
        "pattern, tokens, plain's peaks, cache, peaks with a drafter, target's cache, less the tree"
    )
    names += ", drafter's cache, everything else, plain's"
    print(f"| {' | '.join(names.split(', '))} |")
    print("|---|" + "---:|" * 9)
    for name, config in PATTERNS.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config()).eval()
        drafter = CoralDrafter.from_target(model).eval()
        if own.window:
            drafter.generation_config.draft_window = own.window
        tree = 60 * SIZES["num_hidden_layers"] * 2 * 128 * 4  # nodes of the default tree
        largest = Largest(len(model.model.layers))
        largest.watch()
        settings = {"prefill_chunk_size": own.chunk}
        for length in own.lengths:
            largest.target = largest.drafter = 0
            ids = torch.randint(3, 500, (1, length))
            alone, cache = peaks(model, ids, **settings)
            plain = bytes_of(cache)
            del cache
            drafted = {"assistant_model": drafter, "speculation": "always"}
            ours, _ = peaks(model, ids, **settings, **drafted)
            other = ours[2] - largest.target - largest.drafter
            cells = [in_kib(*alone), in_kib(plain), in_kib(*ours), in_kib(largest.target)]
            cells += [f"{(largest.target - tree) / plain:.3f}", in_kib(largest.drafter)]
            cells += [f"{in_kib(other)} ({other / ours[2]:.1%})", in_kib(alone[2] - plain)]
            print(f"| {name} | {length} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
