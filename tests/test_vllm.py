"""Drafters inside vLLM, run on the CPU: the target's own texts, and the rounds of our own chains.

Tiny pairs of every family and draft head; a drafter of a real target is in `test_vllm_trained.py`.
"""

import shutil
from pathlib import Path

import pytest
import torch
from conftest import shared_file, tiny_target
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from vllm_environment import ROOT, environment, run, run_jobs, vllm_python

from coral_hf import CoralDrafter, CoralTrainer, CoralTrainingArguments
from coral_hf.checkpoints import export_drafter

pytestmark = pytest.mark.slow

VOCAB = 100  # vLLM pads it
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,  # the smallest of vLLM's attention on the CPU
    "max_position_embeddings": 256,
}
FAMILIES = {
    "llama": {},
    "qwen2": {},  # biases of q, k and v
    "granite": {},  # scaled embeddings, scaled logits
    "gemma2": {"query_pre_attn_scalar": 32, "sliding_window": 64, "tie_word_embeddings": True},
}
PROMPT, NEW, DEPTH, BATCH = 6, 40, 3, 4


@pytest.fixture(scope="session")
def python() -> str:
    return vllm_python()


class Pair:
    """A tiny target and a drafter of it, in folders, and their prompts."""

    def __init__(self, family: str, folder: Path, **shape):
        self.folder = folder
        self.target = tiny_target(family, torch.float32, **SIZES, **FAMILIES[family])
        self.target.save_pretrained(folder / "target")
        torch.manual_seed(0)
        self.prompts = torch.randint(2, VOCAB, (64, PROMPT))
        mask = torch.ones_like(self.prompts)
        texts = self.target.generate(
            self.prompts, attention_mask=mask, do_sample=False, max_new_tokens=26
        )
        length = texts.shape[1]
        self.rows = Dataset.from_list(
            [
                {"input_ids": t, "attention_mask": [1] * length, "labels": [-100] * 6 + t[6:]}
                for t in texts.tolist()
            ]
        )
        self.drafter = CoralDrafter.from_target(self.target, **shape)
        self.train(max_steps=150)

    def train(self, **settings) -> None:
        args = CoralTrainingArguments(
            output_dir=str(self.folder / "run"),
            per_device_train_batch_size=16,
            learning_rate=5e-3,
            classification_weight=1.0,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            dataloader_pin_memory=False,
            **settings,
        )
        CoralTrainer(self.drafter, self.target, args=args, train_dataset=self.rows).train()
        self.drafter.eval()

    def add_heads(self) -> None:
        """A trained router over groups of tokens in any order, and the fixed heads."""
        order = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(1))
        self.drafter.heads.add_router(4, 1, order)
        self.train(stage="router", max_steps=60)
        self.drafter.heads.add_frequency_head(torch.arange(0, VOCAB, 2))

    def save(self, head: str) -> str:
        """The folder of the drafter as one that reads a draft head of this name."""
        self.drafter.config.draft_head = head
        self.drafter.save_pretrained(self.folder / head)
        return str(self.folder / head)

    def chains(self, head: str) -> tuple[list[list[int]], list[int]]:
        """Our own texts, and the tokens of each round, with chains of `DEPTH`."""
        tokens, rounds = [], []
        for prompt in self.prompts[:8, None].roll(1, -1):
            output = self.target.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                assistant_model=self.drafter,
                draft_head=head,
                **{"tree_depth": DEPTH, "tree_top_k": 1, "tree_nodes": DEPTH + 1},
                speculation="always",
                do_sample=False,
                max_new_tokens=NEW,
                return_dict_in_generate=True,
            )
            tokens.append(output.sequences[0, PROMPT:].tolist())
            rounds += output.stats.round_lengths
        return tokens, rounds

    def job(self, drafter: str | None) -> dict:
        return {
            "target": str(self.folder / "target"),
            "drafter": drafter,
            "prompts": self.prompts[:8].roll(1, -1).tolist(),
            "batch": BATCH,
            "depth": DEPTH,
            "new_tokens": NEW,
            "max_length": 128,
        }


def without_tensor(folder: str, name: str) -> str:
    """A copy of a checkpoint that lacks a tensor."""
    copy = f"{folder}-broken"
    shutil.copytree(folder, copy)
    tensors = load_file(f"{copy}/model.safetensors")
    del tensors[name]
    save_file(tensors, f"{copy}/model.safetensors", metadata={"format": "pt"})
    return copy


@pytest.fixture(scope="module")
def served(python, tmp_path_factory) -> dict[str, tuple[dict, tuple]]:
    """By name: what vLLM gave, and the texts and rounds of our own chains."""
    folder = tmp_path_factory.mktemp("served")
    llama = Pair("llama", folder / "llama")
    llama.add_heads()
    exported = export_drafter(llama.drafter, "vllm", folder / "exported", llama.target)
    jobs = {"alone": llama.job(None), "exported": llama.job(str(exported.folder))}
    ours = {"alone": llama.chains("full"), "exported": llama.chains("full")}
    for head in ("full", "routed", "frequency"):
        jobs[head], ours[head] = llama.job(llama.save(head)), llama.chains(head)
    broken = without_tensor(str(folder / "llama" / "routed"), "heads.router.fc.weight")
    jobs["broken"], ours["broken"] = llama.job(broken), ours["full"]
    llama.drafter.config.num_active_groups = 2
    llama.drafter.config.draft_head = "routed"
    llama.drafter.save_pretrained(folder / "two")
    jobs["two groups"], ours["two groups"] = llama.job(str(folder / "two")), llama.chains("routed")
    for family in ("qwen2", "granite", "gemma2"):
        pair = Pair(family, folder / family, fc_bias=True)
        jobs[family], ours[family] = pair.job(pair.save("full")), pair.chains("full")
    results = run_jobs(python, folder, list(jobs.values()))
    return {name: (found, ours[name]) for name, found in zip(jobs, results, strict=True)}


HEADS = ["exported", "full", "routed", "frequency"]
TARGETS = ["qwen2", "granite", "gemma2"]


@pytest.mark.parametrize("name", [*HEADS, "two groups", *TARGETS])
def test_texts_are_those_of_the_target_alone(served, name):
    found, (tokens, _) = served[name]
    assert found["tokens"] == tokens
    assert name in TARGETS or found["tokens"] == served["alone"][0]["tokens"]


@pytest.mark.parametrize("name", HEADS + TARGETS)
def test_rounds_and_acceptance_by_position_are_those_of_our_chains(served, name):
    found, (_, rounds) = served[name]
    assert found["rounds"] == len(rounds)
    accepted = [sum(length > position for length in rounds) for position in range(1, DEPTH + 1)]
    assert accepted[0] > 0
    for vllms, own in zip(found["accepted"], accepted, strict=True):
        # vLLM also counts what was accepted behind the end of a text, once for each prompt
        assert own <= vllms <= own + 8


def test_one_of_several_groups_is_chosen_by_logits_alone_with_nearly_the_same_rounds(served):
    found, (_, rounds) = served["two groups"]
    assert found["rounds"] == pytest.approx(len(rounds), rel=0.1)
    assert found["accepted"][0] > 0


def test_a_checkpoint_that_lacks_a_tensor_is_refused(served):
    assert "missing: heads.router.fc.weight" in served["broken"][0]["error"]


def test_the_example_says_how_fast_vllm_is_with_and_without_a_drafter(python, tmp_path):
    source = shared_file("targets/coral-bench")
    prompts = shared_file("benchmarks/mt_bench/question.jsonl")
    target = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    CoralDrafter.from_target(target).save_pretrained(tmp_path)
    options = {"--target": source, "--drafter": tmp_path, "--prompts": prompts, "--repeats": 1}
    options |= {"--limit": 2, "--batch-size": 2, "--max-new-tokens": 8, "--dtype": "float32"}
    flat = [part for option in options.items() for part in option]
    said = run(python, ROOT / "examples" / "vllm_speed.py", *flat, env=environment()).stdout
    assert said.count("2 of 2 answers equal") == 2
    assert "no drafter: " in said and "by position 0." in said
