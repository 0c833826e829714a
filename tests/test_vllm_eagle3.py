"""EAGLE-3 drafters inside vLLM on the CPU: the target's own texts, the rounds of our chains."""

import pytest
import torch
from conftest import tiny_target
from test_vllm import BATCH, DEPTH, NEW, PROMPT, SIZES, VOCAB
from vllm_environment import run_jobs, vllm_python

from coral_hf import Eagle3Drafter, import_drafter
from coral_hf.checkpoints import export_drafter

pytestmark = pytest.mark.slow

LAYERS, DRAFT = 8, 60
CASES = {
    "3": {},
    "3.1": {"fc_norm": True, "norm_output": True},
    "residual": {"norm_before_residual": True, "norm_before_fc": True, "num_hidden_layers": 2},
    "biases": {"attention_bias": True, "mlp_bias": True, "target_layers": [1, 3, 7]},
    "qwen3": {"qk_norm": True},
    "own": {"has_embeddings": True, "draft_vocab_size": VOCAB},
}


def trained(target, texts, **overrides) -> Eagle3Drafter:
    """A drafter that has learned the next token of each text, one step deep."""
    torch.manual_seed(0)
    overrides = {"draft_vocab_size": DRAFT, **overrides}
    drafter = Eagle3Drafter.from_target(target, **overrides)
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
    for _ in range(120):
        read = drafter.embed(texts) if drafter.config.has_embeddings else rows
        hidden = drafter(read[:, 1:-1], drafter.fuse(features[:, :-2]))
        logits = drafter.draft_logits(hidden).flatten(0, 1)
        torch.nn.functional.cross_entropy(logits, place[texts[:, 2:]].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return drafter.eval()


def chains(target, drafter, prompts) -> tuple[list[list[int]], list[int]]:
    """Our own texts, and the tokens of each round."""
    tokens, rounds = [], []
    for prompt in prompts[:, None]:
        output = target.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            assistant_model=drafter,
            **{"tree_depth": DEPTH, "tree_top_k": 1, "tree_nodes": DEPTH + 1},
            speculation="always",
            do_sample=False,
            max_new_tokens=NEW,
            return_dict_in_generate=True,
        )
        tokens.append(output.sequences[0, PROMPT:].tolist())
        rounds += output.stats.round_lengths
    return tokens, rounds


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> dict[str, tuple[dict, tuple]]:
    """By case: what vLLM gave, and the texts and rounds of our own chains."""
    folder = tmp_path_factory.mktemp("served")
    target = tiny_target("llama", torch.float32, **SIZES, num_hidden_layers=LAYERS)
    target.save_pretrained(folder / "target")
    torch.manual_seed(0)
    prompts = torch.randint(2, VOCAB, (48, PROMPT))
    texts = target.generate(
        prompts, attention_mask=torch.ones_like(prompts), do_sample=False, max_new_tokens=26
    )
    job = {
        "target": str(folder / "target"),
        "drafter": None,
        "method": "eagle3",
        "prompts": prompts[:8].roll(1, -1).tolist(),
        "batch": BATCH,
        "depth": DEPTH,
        "new_tokens": NEW,
        "max_length": 128,
    }
    jobs, ours = [job], {}
    for name, overrides in CASES.items():
        drafter = trained(target, texts, **overrides)
        export_drafter(drafter, "vllm", folder / name, target)
        jobs.append({**job, "drafter": str(folder / name)})
        ours[name] = chains(target, drafter, prompts[:8].roll(1, -1))
        back = import_drafter(target, folder / name)
        assert chains(target, back, prompts[:8].roll(1, -1)) == ours[name]
    alone, *results = run_jobs(vllm_python(), folder, jobs)
    found = {name: (one, ours[name]) for name, one in zip(CASES, results, strict=True)}
    return {"alone": (alone, next(iter(ours.values()))), **found}


@pytest.mark.parametrize("name", ["alone", *CASES])
def test_texts_are_those_of_the_target_alone(served, name):
    found, (tokens, _) = served[name]
    assert found["tokens"] == tokens


@pytest.mark.parametrize("name", CASES)
def test_rounds_and_acceptance_by_position_are_those_of_our_chains(served, name):
    found, (_, rounds) = served[name]
    assert found["rounds"] == len(rounds)
    accepted = [sum(length > position for length in rounds) for position in range(1, DEPTH + 1)]
    assert accepted[0] > 0
    for vllms, own in zip(found["accepted"], accepted, strict=True):
        # vLLM also counts what was accepted behind the end of a text, once for each prompt
        assert own <= vllms <= own + 8
