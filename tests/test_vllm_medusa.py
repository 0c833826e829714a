"""Medusa heads inside vLLM on the CPU: the target's own texts, the rounds of our chains."""

import pytest
import torch
from conftest import tiny_target
from test_vllm import BATCH, DEPTH, NEW, PROMPT, SIZES, VOCAB
from test_vllm_eagle3 import chains
from torch.nn import functional as F
from vllm_environment import run_jobs, vllm_python

from coral_hf import MedusaDrafter, import_drafter
from coral_hf.checkpoints import export_drafter
from coral_hf.target import read_features, read_target

pytestmark = pytest.mark.slow

CASES = {"own": {}, "shared": {"has_lm_heads": False, "num_hidden_layers": 2}}


def trained(target, texts, **overrides) -> MedusaDrafter:
    """Heads that have learned the tokens of each text."""
    drafter = MedusaDrafter.from_target(target, num_heads=DEPTH, **overrides)
    features, head = read_features(target, texts, None), read_target(target).head
    optimizer = torch.optim.AdamW(drafter.parameters(), lr=3e-3)
    for _ in range(120):
        logits = drafter.logits(drafter(features), head)
        pairs = [(own[:, : -2 - step], texts[:, 2 + step :]) for step, own in enumerate(logits)]
        sum(F.cross_entropy(own.flatten(0, 1), goal.flatten()) for own, goal in pairs).backward()
        optimizer.step()
        optimizer.zero_grad()
    return drafter.eval()


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> dict[str, tuple[dict, tuple]]:
    """By case: what vLLM gave, and the texts and rounds of our own chains."""
    folder = tmp_path_factory.mktemp("served")
    target = tiny_target("llama", torch.float32, **SIZES)
    target.requires_grad_(False).save_pretrained(folder / "target")
    torch.manual_seed(0)
    prompts = torch.randint(2, VOCAB, (48, PROMPT))
    mask = torch.ones_like(prompts)
    texts = target.generate(prompts, attention_mask=mask, do_sample=False, max_new_tokens=26)
    prompts = prompts[:8].roll(1, -1)
    job = {"target": str(folder / "target"), "method": "medusa", "prompts": prompts.tolist()}
    job |= {"batch": BATCH, "depth": DEPTH, "new_tokens": NEW, "max_length": 128}
    jobs, ours = [], {}
    for name, overrides in CASES.items():
        drafter = trained(target, texts, **overrides)
        export_drafter(drafter, "vllm", folder / name, target)
        jobs.append({**job, "drafter": str(folder / name)})
        ours[name] = chains(target, drafter, prompts)
        assert chains(target, import_drafter(target, folder / name), prompts) == ours[name]
    results = run_jobs(vllm_python(), folder, jobs)
    return {name: (one, ours[name]) for name, one in zip(CASES, results, strict=True)}


@pytest.mark.parametrize("name", CASES)
def test_texts_and_rounds_are_those_of_our_chains(served, name):
    found, (tokens, rounds) = served[name]
    assert found["tokens"] == tokens
    assert found["rounds"] == len(rounds)
    accepted = [sum(length > position for length in rounds) for position in range(1, DEPTH + 1)]
    assert accepted[0] > 0
    for vllms, own in zip(found["accepted"], accepted, strict=True):
        # vLLM also counts what was accepted behind the end of a text, once for each prompt
        assert own <= vllms <= own + 8
