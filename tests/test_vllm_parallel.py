"""Parallel drafters (P-EAGLE) inside vLLM on the CPU: the target's texts, our chains' rounds."""

import pytest
import torch
from conftest import tiny_target
from test_vllm import BATCH, DEPTH, NEW, PROMPT, SIZES, VOCAB
from test_vllm_eagle3 import DRAFT, LAYERS, chains
from vllm_environment import run_jobs, vllm_python

from coral_hf import ParallelDrafter, import_drafter
from coral_hf.checkpoints import export_drafter

pytestmark = pytest.mark.slow

MASK_TOKEN = 1  # no prompt has it
CASES = {
    "reduced": {"draft_vocab_size": DRAFT},
    "whole": {"draft_vocab_size": VOCAB, "num_hidden_layers": 1, "has_embeddings": True},
}


def trained(target, texts, **overrides) -> ParallelDrafter:
    """A drafter that has learned the `DEPTH` tokens behind each of some places of each text."""
    torch.manual_seed(0)
    overrides = {"num_hidden_layers": 2, "mask_token_id": MASK_TOKEN, **overrides}
    drafter = ParallelDrafter.from_target(target, **overrides)
    size = drafter.config.draft_vocab_size
    frequent = texts.flatten().bincount(minlength=VOCAB).topk(size).indices
    drafter.set_draft_vocabulary(frequent.sort().values)
    place = torch.full((VOCAB,), -100)  # a token that cannot be drafted is not learned
    place[drafter.draft_tokens] = torch.arange(size)
    with torch.no_grad():
        states = target(texts, output_hidden_states=True).hidden_states
        features = torch.cat([states[layer] for layer in drafter.config.target_layers], -1)
        rows = target.get_input_embeddings()(texts)
    optimizer = torch.optim.AdamW(drafter.parameters(), lr=3e-3)
    for step in range(200):
        known = PROMPT + step % (texts.shape[1] - PROMPT - DEPTH)
        read = drafter.embed(texts) if drafter.config.has_embeddings else rows
        masks = drafter.mask_embedding.expand(len(texts), DEPTH - 1, -1)
        shared = drafter.mask_hidden.expand(len(texts), DEPTH - 1, -1)
        hidden = drafter(
            torch.cat([read[:, 1 : known + 1], masks], 1),
            drafter.fuse(torch.cat([features[:, :known], shared], 1)),
        )
        logits = drafter.draft_logits(hidden[:, -DEPTH:]).flatten(0, 1)
        goal = place[texts[:, known + 1 : known + 1 + DEPTH]].flatten()
        torch.nn.functional.cross_entropy(logits, goal).backward()
        optimizer.step()
        optimizer.zero_grad()
    return drafter.eval()


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> dict[str, tuple[dict, tuple]]:
    """By case: what vLLM gave, and the texts and rounds of our own chains."""
    folder = tmp_path_factory.mktemp("served")
    target = tiny_target("llama", torch.float32, **SIZES, num_hidden_layers=LAYERS)
    target.save_pretrained(folder / "target")
    torch.manual_seed(0)
    prompts = torch.randint(2, VOCAB, (48, PROMPT))
    mask = torch.ones_like(prompts)
    texts = target.generate(prompts, attention_mask=mask, do_sample=False, max_new_tokens=26)
    prompts = prompts[:8]  # learned by heart, so that masks are accepted
    job = {"target": str(folder / "target"), "method": "eagle3", "prompts": prompts.tolist()}
    job |= {"batch": BATCH, "depth": DEPTH, "new_tokens": NEW, "max_length": 128}
    jobs, ours = [], {}
    for name, overrides in CASES.items():
        drafter = trained(target, texts, **overrides)
        export_drafter(drafter, "vllm", folder / name, target)
        speculation = {"parallel_drafting": True}
        jobs.append({**job, "drafter": str(folder / name), "speculation": speculation})
        ours[name] = chains(target, drafter, prompts)
        assert chains(target, import_drafter(target, folder / name), prompts) == ours[name]
    results = run_jobs(vllm_python(), folder, jobs)
    return {name: (one, ours[name]) for name, one in zip(CASES, results, strict=True)}


@pytest.mark.parametrize("name", CASES)
def test_texts_and_rounds_are_those_of_our_chains(served, name):
    found, (tokens, rounds) = served[name]
    assert "error" not in found, found
    assert found["tokens"] == tokens
    assert found["rounds"] == len(rounds)
    accepted = [sum(length > position for length in rounds) for position in range(1, DEPTH + 1)]
    assert accepted[1] > 0  # of a mask
    for vllms, own in zip(found["accepted"], accepted, strict=True):
        # vLLM also counts what was accepted behind the end of a text, once for each prompt
        assert own <= vllms <= own + 8
