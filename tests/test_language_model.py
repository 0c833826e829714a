"""A small language model drafts trees for batches: what it takes, refuses and reads."""

import json
from copy import deepcopy

import pytest
import torch
from conftest import any_target, scatter_weights, tiny_target
from test_examples import folder  # noqa: F401  a fixture: a saved target and its conversations
from test_generate import tokenizer  # noqa: F401  a fixture: of the tiny targets' 40 tokens
from transformers import CompileConfig, pipeline

import coral_hf
from coral_hf import CoralDrafter, LanguageModelDrafter, cli
from coral_hf.decoding.caches.continuation import CACHE
from coral_hf.drafters.language_model import LanguageModelDrafting
from coral_hf.target import read_target

PLAIN = {"do_sample": False, "max_new_tokens": 24, "pad_token_id": 0}
TREE = {"tree_depth": 3, "tree_top_k": 2, "tree_nodes": 8, "speculation": "always"}


def prompts(rows=3, length=40):
    ids = torch.randint(3, 40, (rows, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        mask[row, : 5 * row] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def drafted(target, drafter, given, **settings):
    settings = {**PLAIN, **TREE, "return_dict_in_generate": True, **settings}
    return target.generate(**given, assistant_model=drafter, **settings)


@pytest.mark.parametrize("way", [{}, {"cache_implementation": "static"}], ids=["growing", "static"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral_window", "gpt_oss", "gpt2"])
def test_the_target_as_its_own_drafter_accepts_every_path(family, way):
    """Whatever it has read, windows and paddings included, it reads as the target does."""
    target = tiny_target(family)
    given = prompts()
    ours = drafted(target, LanguageModelDrafter(target), given, tree_top_k=1, tree_nodes=4, **way)
    assert ours.sequences.equal(target.generate(**given, **PLAIN))
    # only the end of a text cuts a path
    assert {*ours.stats.round_lengths[:-3]} == {4}


COMPILED = {"compile_config": CompileConfig(backend="eager")}


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        *((family, {}) for family in ("qwen3", "gemma3", "gpt2")),
        # each family of drafters is compiled, this one too, in tests/test_families.py
        *(
            pytest.param(family, COMPILED, marks=pytest.mark.slow)
            for family in ("qwen3", "gemma3", "gpt2")
        ),
    ],
)
def test_a_drafter_of_another_architecture_changes_no_token(family, settings):
    target, small = tiny_target("llama"), tiny_target(family, seed=1)
    given = prompts()
    ours = drafted(target, LanguageModelDrafter(small), given, **settings)
    assert ours.sequences.equal(target.generate(**given, **PLAIN))


@pytest.mark.parametrize("num_tokens", [32, 48])
def test_a_vocabulary_that_is_padded_otherwise_needs_the_tokenizer(tokenizer, num_tokens):  # noqa: F811
    target, small = tiny_target("llama"), tiny_target("llama", seed=0, vocab_size=num_tokens)
    given = prompts()
    given["input_ids"].clamp_(max=31)  # a smaller vocabulary has these alone
    target.get_output_embeddings().weight.data[32:] = 0  # and the target writes few others
    with pytest.raises(ValueError, match=r"has (32|48) tokens and the target 40.*tokenizer="):
        drafted(target, LanguageModelDrafter(small), given)
    if num_tokens > 40:
        drafter = LanguageModelDrafter(small, tokenizer=tokenizer)
        ours = drafted(target, drafter, given)
        assert ours.sequences.equal(target.generate(**given, **PLAIN))


def test_tokens_beyond_the_targets_are_never_drafted(tokenizer):  # noqa: F811
    target, small = tiny_target("llama"), tiny_target("llama", vocab_size=48)
    head = small.get_output_embeddings().weight
    head.data[40:] = 10 * head.data[:8]  # they would be the best
    drafting = LanguageModelDrafting(LanguageModelDrafter(small, tokenizer), read_target(target))
    hidden = torch.randn(1, 1, 32, dtype=head.dtype)
    assert drafting.head.logits(hidden, None).shape == (1, 1, 40)
    assert drafting.head.children(hidden, None, 40).tokens.max() == 39


def test_another_tokenizer_is_refused_by_a_call_that_has_one(tokenizer):  # noqa: F811
    other = deepcopy(tokenizer)
    other.add_tokens(["word0!"])
    target = tiny_target("llama")
    drafter = LanguageModelDrafter(tiny_target("llama"), tokenizer=other)
    with pytest.raises(ValueError, match="maps tokens to other ids"):
        drafted(target, drafter, prompts(), tokenizer=tokenizer, stop_strings=["zzz"])


def test_a_conversation_goes_on_without_reading_it_again(monkeypatch):
    target, small = tiny_target("llama"), tiny_target("llama", seed=1)
    drafter, given = LanguageModelDrafter(small), prompts(rows=1)
    first = drafted(target, drafter, given)
    text = torch.cat([first.sequences, torch.tensor([[7, 8, 9]])], dim=1)
    read, plain = [], LanguageModelDrafting._read
    monkeypatch.setattr(
        LanguageModelDrafting,
        "_read",
        lambda own, tokens, *rest: (read.append(tokens), plain(own, tokens, *rest)),
    )
    ours = drafted(target, drafter, {"input_ids": text, CACHE: first[CACHE]})
    assert read[0][:, :-1].tolist() == [[7, 8, 9]]  # and the token that the target wrote behind
    assert ours.sequences.equal(target.generate(text, **PLAIN))


def test_it_drafts_the_same_whether_it_read_a_text_at_once_or_in_calls():
    target, small = tiny_target("llama"), tiny_target("llama", seed=1)
    drafter, given = LanguageModelDrafter(small), prompts(rows=1)
    first = drafted(target, drafter, given)
    text = torch.cat([first.sequences, torch.tensor([[7, 8, 9]])], dim=1)
    calls = [
        drafted(target, drafter, {"input_ids": text, **cache})
        for cache in ({}, {CACHE: first[CACHE]})
    ]
    assert calls[0].stats.round_lengths == calls[1].stats.round_lengths


def test_models_that_cannot_draft_are_refused():
    with pytest.raises(ValueError, match="CoralDrafter has no LM head"):
        LanguageModelDrafter(CoralDrafter.from_target(tiny_target("llama")))
    with pytest.raises(ValueError, match="BloomForCausalLM cannot draft trees: .* Pass the model"):
        LanguageModelDrafter(any_target("bloom"))


def test_a_pipeline_takes_it_and_autotune_writes_into_the_models_settings(tokenizer):  # noqa: F811
    target, small = tiny_target("llama"), tiny_target("llama", seed=1)
    drafter = LanguageModelDrafter(small)
    writer = pipeline("text-generation", target, tokenizer=tokenizer, assistant_model=drafter)
    plain = pipeline("text-generation", target, tokenizer=tokenizer)
    text = tokenizer.decode(prompts(rows=1)["input_ids"][0, :5])
    settings = {"do_sample": False, "max_new_tokens": 8}
    assert writer(text, **settings) == plain(text, **settings)
    coral_hf.autotune(drafter, target, [prompts(rows=1)["input_ids"]], max_seconds=0.2)
    assert small.generation_config.tree_depth == drafter.generation_config.tree_depth


def test_scattered_weights_make_two_different_models():
    """The tests above would say little of a drafter that equals its target."""
    target, small = tiny_target("llama"), tiny_target("llama", seed=1)
    scatter_weights(small, seed=5)
    ours = drafted(target, LanguageModelDrafter(small), prompts())
    assert min(ours.stats.round_lengths) < 4


def test_the_command_line_takes_a_language_model_as_a_drafter(folder, tmp_path):  # noqa: F811
    """`folder`: a saved target, which here drafts for itself."""
    cli.main(
        f"benchmark --target {folder / 'target'} --drafter {folder / 'target'} --prompts"
        f" {folder / 'talk.jsonl'} --limit 1 --max-new-tokens 9 --output {tmp_path}"
        " --tree-depth 3 --tree-top-k 1 --tree-nodes 4 --speculation always --repeats 1".split()
    )
    report = json.loads((tmp_path / "report.json").read_text())
    own = next(row for row in report["rows"] if row["method"] == "coral")
    assert own["tau_per_token"] == 4  # all of a chain, and the target's own token
