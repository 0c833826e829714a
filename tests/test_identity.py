"""Digests that tell targets, datasets and files apart, and nothing else."""

import hashlib

import pytest
import torch
from conftest import tiny_target
from datasets import Dataset, Features, Sequence, Value
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from coral_hf.identity import digest, file_digest, identify, rows_digest, seed_of, weights_digest

# Plain values, files, rows


def test_a_digest_of_plain_values_does_not_depend_on_the_order_of_keys():
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1}) != digest({"a": 1, "b": [3]})


def test_a_digest_of_a_file_is_the_sha256_of_its_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr("coral_hf.identity.CHUNK", 3)
    (tmp_path / "a").write_bytes(b"abcdefgh")
    assert file_digest(tmp_path / "a") == hashlib.sha256(b"abcdefgh").hexdigest()


def rows(**columns) -> Dataset:
    return Dataset.from_dict(columns)


def test_the_digest_of_rows_depends_on_all_token_columns():
    ids, labels = [[5, 6], [7]], [[-100, 6], [7]]
    different = [
        rows(input_ids=ids),
        rows(labels=ids),
        rows(input_ids=[[5], [6, 7]]),
        rows(input_ids=[[7], [5, 6]]),
        rows(input_ids=ids, labels=labels),
        rows(input_ids=ids, labels=ids),
        rows(input_ids=ids, labels=labels, position_ids=[[0, 1], [0]]),
    ]
    assert len({rows_digest(part) for part in different}) == len(different)


def test_equal_rows_have_one_digest_whatever_their_storage():
    ids = [[5, 6], [], [7]]
    long = Features({"input_ids": Sequence(Value("int64")), "id": Value("string")})
    short = Features({"input_ids": Sequence(Value("int16"))})
    same = [
        Dataset.from_dict({"input_ids": ids, "id": ["a", "b", "c"]}, features=long),
        Dataset.from_dict({"input_ids": ids}, features=short),
        rows(input_ids=ids[::-1]).select([2, 1, 0]),
        rows(input_ids=ids).with_format("torch"),
    ]
    assert len({rows_digest(part) for part in same}) == 1


def test_neighbouring_rows_have_unrelated_seeds():
    seeds = [seed_of(seed, row, turn) for seed in range(4) for row in range(9) for turn in range(4)]
    assert len(set(seeds)) == len(seeds)
    torch.Generator().manual_seed(max(seeds))


# Weights


def swap_two(weight) -> None:
    weight[[3, 4]] = weight[[4, 3]]


@pytest.mark.parametrize(
    "change", [lambda weight: weight[5, 7].mul_(1.01), swap_two, lambda weight: weight.mul_(1.0001)]
)
def test_any_change_of_a_weight_changes_the_digest(change):
    target = tiny_target("llama", torch.float32)
    before = weights_digest(target)
    assert before == weights_digest(tiny_target("llama", torch.float32))
    with torch.no_grad():
        change(target.model.layers[1].mlp.up_proj.weight)
    assert weights_digest(target) != before


def test_targets_of_the_same_weights_differ_by_their_dtype():
    target = tiny_target("llama", torch.float32).bfloat16()
    one, other = identify(target), identify(target.float())
    assert one.digest == other.digest
    assert (one.dtype, other.dtype, one.quantization) == ("bfloat16", "float32", None)


def test_the_digest_of_a_large_weight_reads_all_of_it():
    layer = torch.nn.Linear(300, 300)
    model = tiny_target("llama", torch.float32)
    model.lm_head = layer
    digests = {weights_digest(model)}
    for row, column in ((0, 0), (150, 151), (299, 299)):
        with torch.no_grad():
            layer.weight[row, column] += 1
        digests.add(weights_digest(model))
    assert len(digests) == 4


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_digest_of_an_offloaded_target_is_that_of_the_whole_one(tmp_path):
    target = tiny_target("llama", torch.float32)
    target.save_pretrained(tmp_path)
    parts = ("model.embed_tokens", "model.layers", "model.norm", "model.rotary_emb")
    offloaded = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        device_map={**dict.fromkeys(parts, "cpu"), "model.layers": "disk", "lm_head": "disk"},
        offload_folder=tmp_path / "offload",
    )
    assert offloaded.lm_head.weight.is_meta
    assert weights_digest(offloaded) == weights_digest(target)
    assert offloaded.lm_head.weight.is_meta


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_an_adapter_counts_by_its_weights_and_by_whether_it_is_active():
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    target = tiny_target("llama", torch.float32)
    digests = {weights_digest(target)}
    adapted = get_peft_model(target, config)
    digests.add(weights_digest(adapted))
    with adapted.disable_adapter():
        digests.add(weights_digest(adapted))
    digests.add(weights_digest(adapted.merge_and_unload()))
    assert len(digests) == 4
