"""Profile rounds of a drafter: the operators that take most of the time, in each way of running.

    python examples/round_operators.py --target coral-bench --drafter mixed --layers 32

One greedy text behind a random prompt. Milliseconds of a round are those of the operators alone,
on one row of the table each; what lies between them is the host's, and is in the last row.
"""

import argparse

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModel, AutoModelForCausalLM, CompileConfig

import coral_hf  # noqa: F401  which registers the drafter
from coral_hf.measure.padding import pad_target

WAYS = {
    "growing": {},
    "static": {"cache_implementation": "static"},
    "compiled": {"compile_config": CompileConfig(mode="default")},
}


@torch.no_grad()
def main(own: argparse.Namespace) -> None:
    load = {"dtype": torch.bfloat16}
    target = AutoModelForCausalLM.from_pretrained(own.target, **load).eval()
    target = pad_target(target, own.layers) if own.layers else target
    drafter = AutoModel.from_pretrained(own.drafter, **load).eval()
    ids = torch.randint(3, 200, (1, own.context), generator=torch.Generator().manual_seed(0))
    names = ("tree_depth", "tree_top_k", "tree_nodes")
    settings = dict(zip(names, own.tree, strict=True)) | {
        "attention_mask": torch.ones_like(ids),
        "assistant_model": drafter,
        "speculation": "always",
        "do_sample": False,
        "max_new_tokens": own.new,
        "eos_token_id": None,
        "pad_token_id": 0,
        "return_dict_in_generate": True,
    }
    print("| way | operator | calls a round | ms a round |\n|---|---|--:|--:|")
    for way in own.way:
        target.generate(ids, **settings, **WAYS[way])
        with profile(activities=[ProfilerActivity.CPU]) as prefill:
            target.generate(ids, **settings | {"max_new_tokens": 1}, **WAYS[way])
        with profile(activities=[ProfilerActivity.CPU]) as whole:
            stats = target.generate(ids, **settings, **WAYS[way]).stats
        before = {one.key: one for one in prefill.key_averages()}
        found = []
        for one in whole.key_averages():
            less = before.get(one.key)
            time = one.self_cpu_time_total - (less.self_cpu_time_total if less else 0)
            count = one.count - (less.count if less else 0)
            found.append((time / stats.num_rounds / 1000, count / stats.num_rounds, one.key))
        for ms, count, name in sorted(found, reverse=True)[: own.top]:
            print(f"| {way} | {name[:60]} | {count:.0f} | {ms:.2f} |")
        calls, ms = sum(one[1] for one in found), sum(one[0] for one in found)
        print(f"| {way} | all | {calls:.0f} | {ms:.2f} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", required=True)
    parser.add_argument("--drafter", required=True)
    parser.add_argument("--layers", type=int, help="depth of the target, padded")
    parser.add_argument("--context", type=int, default=128, help="tokens of the prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens of the answer")
    parser.add_argument("--tree", type=int, nargs=3, default=[4, 2, 8], help="depth, top-k, nodes")
    parser.add_argument("--way", nargs="+", choices=WAYS, default=[*WAYS])
    parser.add_argument("--top", type=int, default=5, help="operators of each way")
    main(parser.parse_args())
