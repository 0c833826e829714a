"""EAGLE and HASS drafters come in: what they predict stays, what does not fit is named."""

import json

import pytest
import torch
from conftest import printed, shared_file, tiny_target
from eagle_checkpoint import (
    FAMILIES,
    HIDDEN,
    LLAMA2,
    LLAMA3,
    QWEN2,
    VOCAB,
    eagle_step,
    eagle_tensors,
    write_checkpoint,
    write_shards,
)
from test_examples import folder  # noqa: F401  a saved target and its conversations
from transformers import AutoModel
from typer.testing import CliRunner

from coral_hf import CoralDrafter
from coral_hf.checkpoints import from_eagle, read_eagle
from coral_hf.cli import app
from coral_hf.target import tokenizer_hash


@pytest.fixture(scope="module")
def target():
    return tiny_target("llama", torch.float32)


def copies(target) -> dict:
    """The target's embeddings, as a checkpoint repeats them."""
    return {"embed_tokens.weight": target.model.embed_tokens.weight.detach().half()}


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


# ---- what a drafter predicts


@pytest.mark.parametrize("weights", ["pytorch_model.bin", "model.safetensors"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_is_what_the_raw_tensors_and_the_formulas_give(tmp_path, family, weights):
    name, config = FAMILIES[family]
    target = tiny_target(name)
    tensors = eagle_tensors(config)
    write_checkpoint(tmp_path, config, {**tensors, **copies(target)}, weights)
    drafter = CoralDrafter.from_eagle(target, tmp_path)
    assert type(drafter) is CoralDrafter and drafter.config.target_model_type == name
    ids = torch.randint(VOCAB, (13,), generator=torch.Generator().manual_seed(1))
    embeddings = target.model.embed_tokens.weight.detach()[ids]  # (13, hidden)
    features = random(13, HIDDEN)
    found = drafter(embeddings[None], features[None])[0]
    expected = eagle_step(config, tensors, embeddings, features)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_step_of_two_layers_is_what_the_formulas_give(target, tmp_path):
    config = {**LLAMA3, "num_hidden_layers": 2}
    tensors = eagle_tensors(config)
    write_checkpoint(tmp_path, config, tensors)
    drafter = from_eagle(target, tmp_path, dtype=torch.float64)
    inputs = random(2, 9, HIDDEN)
    expected = eagle_step(config, tensors, *inputs)
    torch.testing.assert_close(drafter(*inputs[:, None])[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["granite", "gemma"])
def test_a_drafter_reads_rows_of_the_table_where_the_target_scales_them(tmp_path, family):
    target = tiny_target(family, torch.float64)
    config = {**LLAMA3, "num_key_value_heads": 2}
    tensors = eagle_tensors(config, torch.float64)
    write_checkpoint(tmp_path, config, tensors)
    drafter = from_eagle(target, tmp_path)
    ids, features = torch.arange(6), random(6, HIDDEN)
    seen = target.model.embed_tokens(ids) * drafter.config.embedding_scale
    table = target.model.embed_tokens.weight.detach()[ids]
    assert not torch.allclose(seen, table)
    expected = eagle_step(config, tensors, table, features)
    found = drafter(seen[None], features[None])[0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_target_says_the_same_with_an_imported_drafter(target, tmp_path):
    write_checkpoint(tmp_path, LLAMA3, {**eagle_tensors(LLAMA3), **copies(target)})
    drafter = from_eagle(target, tmp_path)
    prompt = torch.tensor([[3, 9, 14]])
    settings = {"do_sample": False, "max_new_tokens": 12, "attention_mask": prompt.ne(-1)}
    drafted = target.generate(prompt, assistant_model=drafter, **settings)
    assert torch.equal(drafted, target.generate(prompt, **settings))


# ---- what a checkpoint says of itself


@pytest.mark.parametrize(
    ("name", "theta", "kv_heads"),
    [("vicuna_7B", 10000.0, 32), ("llama2_chat_7B", 10000.0, 32), ("mixtral_8x7B", 10000.0, 32)],
)
def test_published_configs_mean_what_eagle_takes_them_for(tmp_path, name, theta, kv_heads):
    config = json.loads(shared_file(f"drafter_configs/eagle1/{name}.json").read_text())
    write_checkpoint(tmp_path, config, {"fc.bias": torch.zeros(4096)})
    shape = read_eagle(tmp_path).shape
    assert shape["rope_parameters"] == {"rope_type": "default", "rope_theta": theta}
    assert shape["num_key_value_heads"] == kv_heads and shape["head_dim"] == 128
    assert shape["fc_bias"] and not shape["attention_bias"]


def test_published_eagle3_drafters_are_refused(tmp_path):
    path = shared_file("drafter_configs/eagle3/llama3_8B_eagle3.json")
    write_checkpoint(tmp_path, json.loads(path.read_text()), {"norm.weight": torch.ones(4)})
    with pytest.raises(ValueError, match="EAGLE-3 drafter .`draft_vocab_size`.*three of the targ"):
        read_eagle(tmp_path)


def test_eagle3_drafters_are_known_by_their_tensors(target, tmp_path):
    tensors = {**eagle_tensors(LLAMA2), "d2t": torch.arange(9), "t2d": torch.ones(9).bool()}
    write_checkpoint(tmp_path, LLAMA2, tensors)
    with pytest.raises(ValueError, match=r"EAGLE-3 drafter \(d2t, t2d\).*or serve this one with"):
        from_eagle(target, tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        {**LLAMA3, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {**LLAMA3, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {
            **{k: v for k, v in LLAMA3.items() if k != "rope_theta"},
            "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500000.0},
        },
    ],
)
def test_rotary_fields_of_every_generation_mean_the_same(target, tmp_path, config):
    write_checkpoint(tmp_path, config, eagle_tensors(config))
    rope = from_eagle(target, tmp_path).config.rope_parameters
    assert rope == {"rope_type": "linear", "factor": 2.0, "rope_theta": 500000.0}


def test_rotary_frequencies_are_compared_with_the_config(target, tmp_path):
    frequencies = 10000.0 ** (-torch.arange(4) / 4)  # of heads of 8 channels
    name = "layers.0.self_attn.rotary_emb.inv_freq"
    write_checkpoint(tmp_path, LLAMA2, {**eagle_tensors(LLAMA2), name: frequencies})
    assert from_eagle(target, tmp_path).config.rope_parameters["rope_theta"] == 10000.0
    write_checkpoint(
        tmp_path, {**LLAMA2, "rope_theta": 5e5}, {**eagle_tensors(LLAMA2), name: frequencies}
    )
    with pytest.raises(ValueError, match="inv_freq.*is not what its config's `rope_theta` gives"):
        from_eagle(target, tmp_path)


def test_an_lm_head_of_its_own_is_compared_and_dropped(target, tmp_path):
    head = target.lm_head.weight.detach().half()
    write_checkpoint(tmp_path, LLAMA2, {**eagle_tensors(LLAMA2), "lm_head.weight": head})
    assert "lm_head.weight" not in from_eagle(target, tmp_path).state_dict()
    write_checkpoint(tmp_path, LLAMA2, {**eagle_tensors(LLAMA2), "lm_head.weight": head + 1})
    with pytest.raises(ValueError, match="`lm_head.weight`.*made for another target"):
        from_eagle(target, tmp_path)


# ---- shards


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_shards_are_read_together(target, tmp_path, kind):
    tensors = list({**eagle_tensors(LLAMA2), **copies(target)}.items())
    write_shards(tmp_path, LLAMA2, [dict(tensors[::2]), dict(tensors[1::2])], kind)
    state = from_eagle(target, tmp_path).state_dict()
    assert all(torch.equal(state[k], v) for k, v in tensors if k in state)
    assert len(state) == len(tensors) - 1


def shards() -> list[dict]:
    tensors = list(eagle_tensors(LLAMA2).items())
    return [dict(tensors[:4]), dict(tensors[4:])]


def test_a_missing_shard_is_named(target, tmp_path):
    write_shards(tmp_path, LLAMA2, shards())
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match="lacks the shard model-00002-of-00002.safetensors, whic"):
        from_eagle(target, tmp_path)


def test_shards_without_an_index_are_refused(target, tmp_path):
    write_shards(tmp_path, LLAMA2, shards())
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(ValueError, match="only shards without an index: model-00001-of-00002"):
        from_eagle(target, tmp_path)


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ({"more": "model-00001-of-00002.safetensors"}, "00001.*has no tensor more, which"),
        ({"fc.weight": "../fc.safetensors"}, "names '../fc.safetensors', which is no file of"),
        ({"fc.weight": 3, "fc.bias": 3}, "names 3, which is no file of"),
        ({"fc.weight": "model-00002-of-00002.safetensors"}, "second fc.weight: .* places that"),
    ],
)
def test_an_index_that_is_wrong_is_refused(target, tmp_path, index, said):
    write_shards(tmp_path, LLAMA2, shards(), **index)
    with pytest.raises(ValueError, match=said):
        from_eagle(target, tmp_path)


def test_a_tensor_in_two_shards_is_refused(target, tmp_path):
    first, second = shards()
    write_shards(tmp_path, LLAMA2, [first, {**second, "fc.weight": torch.ones(1)}])
    with pytest.raises(
        ValueError, match="00001-of.* has a second fc.*places that tensor in .*00002"
    ):
        from_eagle(target, tmp_path)


def test_a_shard_beside_the_index_is_refused(target, tmp_path):
    first, second = shards()
    write_shards(tmp_path, LLAMA2, [first, first | second])
    with pytest.raises(ValueError, match="holds model-00001-of.*safetensors.index.json does not"):
        from_eagle(target, tmp_path)


def test_a_shard_with_a_tensor_that_no_index_lists_is_refused(target, tmp_path):
    write_shards(tmp_path, LLAMA2, shards())
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"]["fc.weight"]
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="has a tensor fc.weight, which model.safetensors.index"):
        from_eagle(target, tmp_path)
    index.write_text("{}")
    with pytest.raises(ValueError, match="has no `weight_map`"):
        from_eagle(target, tmp_path)
    index.write_text("{")
    with pytest.raises(ValueError, match="index.json is no JSON"):
        from_eagle(target, tmp_path)


# ---- what is refused


class Stranger:
    """Something that a pickle would have to build."""


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"fc.weight": Stranger()}, "holds more than tensors, and reading it could run code"),
        ([torch.ones(2)], "is no state dict: it holds a list"),
        ({"state_dict": {"fc.weight": torch.ones(2)}}, "it holds a dict under 'state_dict'"),
        ({"fc.weight": 3}, "it holds a int under 'fc.weight'"),
        ({0: torch.ones(2)}, "it holds a Tensor under 0"),
    ],
)
def test_a_pickle_that_is_no_state_dict_is_refused(target, tmp_path, content, said):
    write_checkpoint(tmp_path, LLAMA2, {})
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=f"pytorch_model.bin .*{said}"):
        from_eagle(target, tmp_path)


@pytest.mark.parametrize("weights", ["pytorch_model.bin", "model.safetensors"])
@pytest.mark.parametrize("kept", [0.0, 0.01, 0.9])
def test_a_file_that_is_cut_off_is_named(target, tmp_path, weights, kept):
    write_checkpoint(tmp_path, LLAMA2, eagle_tensors(LLAMA2), weights)
    path = tmp_path / weights
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ValueError, match=f"{weights} (cannot be read|holds more)"):
        from_eagle(target, tmp_path)


@pytest.mark.parametrize(
    ("config", "changes", "said"),
    [
        (LLAMA2, {"norm.weight": torch.ones(32)}, "unknown: norm.weight"),
        (LLAMA2, {"layers.0.input_layernorm.weight": torch.ones(32)}, "unknown: layers.0.input"),
        (LLAMA2, {"layers.0.mlp.up_proj.weight": None}, "missing: layers.0.mlp.up_proj.weight"),
        (LLAMA2, {"fc.weight": torch.ones(32, 96)}, r"fc.weight \(32, 96\), not \(32, 64\)"),
        (LLAMA2, {"fc.bias": torch.full((32,), float("nan"))}, "not finite: fc.bias"),
        (LLAMA3, {"fc.bias": torch.ones(32)}, "unknown: fc.bias"),
        ({**LLAMA2, "bias": True}, {"fc.bias": None}, "missing: fc.bias"),
        (
            QWEN2,
            {"layers.0.self_attn.k_proj.bias": None},
            "missing: layers.0.self_attn.k_proj.bias",
        ),
        ({**LLAMA2, "vocab_size": 48}, {}, "`vocab_size` of the target is 40, but .* with 48"),
        ({**LLAMA2, "hidden_size": 64}, {}, "`hidden_size` of the target is 32, but .* with 64"),
        (LLAMA2, {"embed_tokens.weight": torch.ones(VOCAB, 32)}, "embed_tokens.*by up to"),
        (LLAMA2, {"embed_tokens.weight": torch.ones(9, 32)}, r"embed_tokens.*shape \(9, 32\)"),
        ({"model_type": "llama"}, {}, "lacks vocab_size, hidden_size, intermediate_size, num_at"),
    ],
)
def test_what_does_not_fit_is_named(target, tmp_path, config, changes, said):
    tensors = eagle_tensors({**LLAMA2, **config})
    write_checkpoint(tmp_path, config, {**tensors, **copies(target), **changes})
    with pytest.raises(ValueError, match=said):
        from_eagle(target, tmp_path)


def test_a_coral_drafter_is_not_imported_again(target, tmp_path):
    CoralDrafter.from_target(target).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a CORAL drafter already; load it with AutoModel"):
        from_eagle(target, tmp_path)


# ---- the command


def test_the_command_makes_a_drafter_that_loads(folder, tmp_path):  # noqa: F811
    from transformers import AutoModelForCausalLM, AutoTokenizer

    target = AutoModelForCausalLM.from_pretrained(folder / "target")
    fields = {"vocab_size": target.config.vocab_size, "hidden_size": target.config.hidden_size}
    config = {**LLAMA3, **fields}
    (tmp_path / "eagle").mkdir()
    write_checkpoint(tmp_path / "eagle", config, eagle_tensors(config))
    names = ["--target", str(folder / "target"), "--output", str(tmp_path / "drafter")]
    arguments = ["import", str(tmp_path / "eagle"), *names]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    drafter = AutoModel.from_pretrained(tmp_path / "drafter")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "drafter")
    assert drafter.config.tokenizer_hash == tokenizer_hash(tokenizer)
    assert torch.equal(drafter.fc.weight, eagle_tensors(config)["fc.weight"])
    again = CliRunner().invoke(app, arguments)
    assert "holds" in printed(again) and "overwrite" in printed(again)
    assert CliRunner().invoke(app, [*arguments, "--overwrite"]).exit_code == 0
