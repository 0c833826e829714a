"""Rounds on a CUDA device: static and compiled ones give the text of a plain call.

Run them with `python -m pytest -n 0 -m gpu`; it takes some minutes.
"""

import statistics
import time

import pytest
import torch
from conftest import scatter_weights, tiny_target
from transformers import CompileConfig, LlamaConfig, LlamaForCausalLM

from coral_hf import CoralDrafter
from coral_hf.decoding.rounds import steps

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

VOCAB = 64
TREE = {"tree_depth": 4, "tree_top_k": 4, "tree_nodes": 16}
WAYS = {
    "static": {"cache_implementation": "static"},
    "compiled": {"compile_config": CompileConfig(mode="default")},
}
PLAIN = {"do_sample": False, "max_new_tokens": 64, "pad_token_id": 0}


def pair(family, dtype=torch.float64):
    target = tiny_target(family, dtype, vocab_size=VOCAB).cuda()
    drafter = CoralDrafter.from_target(target).eval()
    scatter_weights(drafter.cpu(), seed=1)
    return target, drafter.cuda()


def prompts(rows):
    ids = torch.randint(3, VOCAB, (rows, 20), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        mask[row, : 2 * row] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0).cuda(), "attention_mask": mask.cuda()}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral_window", "gpt2"])
def test_every_way_of_running_gives_the_tokens_of_a_plain_call(family, rows, way):
    target, drafter = pair(family)
    given = prompts(rows)
    plain = target.generate(**given, **PLAIN)
    for _ in range(2):
        settings = {**PLAIN, **TREE, **WAYS[way]}
        assert target.generate(**given, assistant_model=drafter, **settings).equal(plain)


def test_no_step_waits_for_anything(monkeypatch):
    target, drafter = pair("llama", torch.float16)

    def watched(step):
        def run(own):
            torch.cuda.set_sync_debug_mode("error")
            try:
                return step(own)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        return run

    monkeypatch.setattr(steps, "STEPS", {name: watched(one) for name, one in steps.STEPS.items()})
    for sampling in ({}, {"do_sample": True, "verification": "traversal", "top_p": 0.9}):
        settings = {**PLAIN, **TREE, **WAYS["static"], **sampling, "speculation": "always"}
        target.generate(**prompts(2), assistant_model=drafter, **settings)


def test_the_speed_of_each_way(capsys):
    """A table of milliseconds a token, of a target of 1B parameters in bfloat16; no assertion."""
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
    )
    with torch.device("cuda"):
        target = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    target.generation_config.eos_token_id = None
    drafter = CoralDrafter.from_target(target).eval()
    given = {"input_ids": torch.randint(3, 32000, (1, 64), device="cuda")}
    settings = {"do_sample": False, "max_new_tokens": 64, "pad_token_id": 0}
    ways = {"plain": {}, "growing": {"assistant_model": drafter, "speculation": "always"}}
    ways |= {name: ways["growing"] | way for name, way in WAYS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    rounds = {}
    for _ in range(4):  # the first warms up
        for name, way in ways.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            out = target.generate(**given, **settings, **way, return_dict_in_generate=True)
            torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
            rounds[name] = getattr(getattr(out, "stats", None), "num_rounds", 64)
    with capsys.disabled():
        print(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}")
        for name, found in seconds.items():
            per_pass = 1000 * statistics.median(found[1:]) / rounds[name]
            print(f"{name:10} {per_pass:7.2f} ms a pass or round")
