"""Calls in rounds of constant shapes, on a tiny target of few tokens: much is accepted."""

import torch
from conftest import WINDOW, scatter_weights, tiny_target
from transformers import CompileConfig

from coral_hf import CoralDrafter
from coral_hf.decoding.plain.costs import Costs

VOCAB = 8
TREE = {"tree_depth": 4, "tree_top_k": 3, "tree_nodes": 12}
STATIC = {"cache_implementation": "static"}
COMPILED = {"compile_config": CompileConfig(backend="eager")}
SAMPLING = {"do_sample": True, "top_k": 5, "temperature": 0.7}
PLAIN = {"do_sample": False, "max_new_tokens": 40, "pad_token_id": 0}
FAMILIES = ["llama", "qwen3", "gemma3", "gpt_oss", "mistral_window", "phi3", "olmo2", "gpt2"]


def pair(family="llama", dtype=torch.float64, **overrides):
    target = tiny_target(family, dtype, vocab_size=VOCAB, **overrides)
    torch.manual_seed(0)
    drafter = CoralDrafter.from_target(target).eval()
    scatter_weights(drafter, seed=1)
    return target, drafter


def prompts(rows=1, length=WINDOW + 5):
    ids = torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        mask[row, : 2 * row] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def drafted(target, drafter, given, **settings):
    keep = {"return_dict_in_generate": True}
    return target.generate(**given, assistant_model=drafter, **TREE, **keep, **settings)


def costing(base, level=0.0, node=0.0):
    """Rounds that cost so much, in place of `measure_costs`."""

    def measure(rounds):
        rounds.steps.costs[:] = [Costs(base, level, node)]
        return rounds.steps.costs[0]

    return measure
