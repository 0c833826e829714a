"""A trained drafter of a real target inside vLLM: exported, as it is, and behind `vllm serve`.

Two minutes of training make a drafter that is far from good, and good enough to be compared:
vLLM has to say what the target says, in the rounds that our own chains take.
"""

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import shared_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm_environment import run_jobs, vllm_python

from coral_hf import CoralDrafter, CoralTrainingArguments
from coral_hf.checkpoints import export_drafter
from coral_hf.measure import encode, read_prompts
from coral_hf.training import pipeline
from coral_hf.training.data import load_conversations

pytestmark = pytest.mark.slow

NEW, DEPTH, BATCH = 64, 4, 4
PROMPTS = ("benchmarks/mt_bench/question.jsonl", "benchmarks/gsm8k/question_eagle.jsonl")


class Trained(NamedTuple):
    """A target, its drafter, and prompts as token ids."""

    source: Path
    target: torch.nn.Module
    drafter: CoralDrafter
    prompts: list[list[int]]

    def job(self, drafter: Path | None, **settings) -> dict:
        """What `served.py` is asked for."""
        name = None if drafter is None else str(drafter)
        shape = {"batch": BATCH, "depth": DEPTH, "new_tokens": NEW, "max_length": 512}
        return {"target": str(self.source), "drafter": name, "prompts": self.prompts, **shape} | (
            settings
        )

    def chains(self, head: str) -> tuple[list[list[int]], list[int]]:
        """Our own texts, and the tokens of each round, with chains of `DEPTH`."""
        texts, rounds = [], []
        for prompt in self.prompts:
            ids = torch.tensor([prompt])
            output = self.target.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                assistant_model=self.drafter,
                draft_head=head,
                **{"tree_depth": DEPTH, "tree_top_k": 1, "tree_nodes": DEPTH + 1},
                speculation="always",
                do_sample=False,
                max_new_tokens=NEW,
                eos_token_id=None,  # vLLM writes on too
                return_dict_in_generate=True,
            )
            texts.append(output.sequences[0, len(prompt) :].tolist())
            rounds += output.stats.round_lengths
        return texts, rounds


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Trained:
    folder, source = tmp_path_factory.mktemp("trained"), shared_file("targets/coral-bench")
    rows = load_conversations(str(shared_file("train/sgd/sgd_train.jsonl.gz"))).select(range(600))
    files = [shared_file(name) for name in PROMPTS]
    target = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(source)
    common = {"per_device_train_batch_size": 4, "learning_rate": 2e-3, "use_cpu": True}
    common |= {"max_length": 256, "report_to": "none", "save_strategy": "no"}
    common |= {"dataloader_pin_memory": False, "disable_tqdm": True}
    steps = {"drafter": 100, "router": 40}
    args = [
        CoralTrainingArguments(output_dir=str(folder / name), stage=name, max_steps=n, **common)
        for name, n in steps.items()
    ]
    drafter = pipeline.train(target, tokenizer, rows, args)
    prompts = [prompt for file in files for prompt in read_prompts(file)[:6]]
    prompts += read_prompts(shared_file("train/sgd/sgd_train.jsonl.gz"))[-6:]
    ids = [encode(prompt, tokenizer)[0].tolist() for prompt in prompts]
    return Trained(source, target, drafter, [one for one in ids if len(one) <= 400])


@pytest.fixture(scope="module")
def served(trained, tmp_path_factory) -> dict[str, tuple[dict, tuple]]:
    """By name: what vLLM gave, and the texts and rounds of our own chains."""
    folder = tmp_path_factory.mktemp("served")
    heads = {"exported": "full", "full": "full", "routed": "routed"}
    out = folder / "exported"
    places = {"exported": export_drafter(trained.drafter, "vllm", out, trained.target).folder}
    for head in ("full", "routed"):
        trained.drafter.config.draft_head = head
        trained.drafter.save_pretrained(folder / head)
        places[head] = folder / head
    jobs = [trained.job(None), *(trained.job(places[name]) for name in heads)]
    jobs.append(trained.job(places["routed"], server=True))
    ours = {head: trained.chains(head) for head in ("full", "routed")}
    names = ["alone", *heads, "server"]
    of_head = {"alone": "full", **heads, "server": "routed"}
    results = run_jobs(vllm_python(), folder, jobs)
    return {name: (found, ours[of_head[name]]) for name, found in zip(names, results, strict=True)}


@pytest.mark.parametrize("name", ["exported", "full", "routed", "server"])
def test_texts_are_those_of_vllm_without_a_drafter(served, name):
    found, _ = served[name]
    assert "error" not in found, found
    assert found["tokens"] == served["alone"][0]["tokens"]


@pytest.mark.parametrize("name", ["exported", "full", "routed"])
def test_rounds_and_acceptance_by_position_are_those_of_our_chains(served, name):
    found, (texts, rounds) = served[name]
    assert served["alone"][0]["tokens"] == texts
    assert found["rounds"] == pytest.approx(len(rounds), rel=0.01)
    accepted = [sum(length > position for length in rounds) for position in range(1, DEPTH + 1)]
    assert accepted[0] > 0.1 * len(rounds) and accepted[1] > 0
    for vllms, own in zip(found["accepted"], accepted, strict=True):
        # vLLM also counts what was accepted behind the end of a text, once for each prompt
        assert 0.98 * own <= vllms <= 1.02 * own + len(texts)


def test_the_server_drafts_as_the_engine_does(served):
    server, _ = served["server"]
    assert server["rounds"] == pytest.approx(served["routed"][0]["rounds"], rel=0.05)
