"""Import of EAGLE and HASS drafters: predictions stay, and what does not fit is named."""

import json

import pytest
import torch
from conftest import invoke, printed, shared_file, tiny_target
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
from loopback_hub import Client, Fault, running_hub
from medusa_checkpoint import PUBLISHED, medusa_tensors
from test_examples import folder  # noqa: F401  a saved target and its conversations
from transformers import AutoModel

import coral_hf
from coral_hf import CoralDrafter
from coral_hf.checkpoints import import_drafter, read_shape
from coral_hf.identity import tokenizer_hash
from coral_hf.target import read_target


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
    drafter = coral_hf.import_drafter(target, tmp_path)
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
    drafter = import_drafter(target, tmp_path, dtype=torch.float64)
    inputs = random(2, 9, HIDDEN)
    expected = eagle_step(config, tensors, *inputs)
    torch.testing.assert_close(drafter(*inputs[:, None])[0], expected, rtol=1e-5, atol=1e-5)


def test_a_bias_that_the_config_denies_is_read_as_the_tensors_say(target, tmp_path):
    tensors = eagle_tensors(LLAMA2)  # with a bias
    write_checkpoint(tmp_path, {**LLAMA2, "bias": False}, tensors)
    drafter = import_drafter(target, tmp_path, dtype=torch.float64)
    assert drafter.config.fc_bias and tensors["fc.bias"].abs().min() > 0
    inputs = random(2, 9, HIDDEN)
    expected = eagle_step(LLAMA2, tensors, *inputs)
    torch.testing.assert_close(drafter(*inputs[:, None])[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["granite", "gemma"])
def test_a_drafter_reads_rows_of_the_table_where_the_target_scales_them(tmp_path, family):
    target = tiny_target(family, torch.float64)
    config = {**LLAMA3, "num_key_value_heads": 2}
    tensors = eagle_tensors(config, torch.float64)
    write_checkpoint(tmp_path, config, tensors)
    drafter = import_drafter(target, tmp_path)
    ids, features = torch.arange(6), random(6, HIDDEN)
    seen = read_target(target).embed(ids)
    table = target.model.embed_tokens.weight.detach()[ids]
    assert not torch.allclose(seen, table)
    expected = eagle_step(config, tensors, table, features)
    found = drafter(seen[None], features[None])[0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_target_writes_the_same_tokens_with_an_imported_drafter(target, tmp_path):
    write_checkpoint(tmp_path, LLAMA3, {**eagle_tensors(LLAMA3), **copies(target)})
    drafter = import_drafter(target, tmp_path)
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
    write_checkpoint(tmp_path, config, {})
    shape = read_shape(tmp_path).fields
    assert shape["rope_parameters"] == {"rope_type": "default", "rope_theta": theta}
    assert shape["num_key_value_heads"] == kv_heads and shape["head_dim"] == 128
    assert "fc_bias" not in shape and "attention_bias" not in shape  # the tensors tell


def test_a_config_that_is_not_json_is_named(target, tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(OSError, match="config.json' is not a valid JSON file"):
        import_drafter(target, tmp_path)


def test_an_unknown_argument_is_refused_for_a_folder_too(target, tmp_path):
    with pytest.raises(TypeError, match="unexpected arguments: dtyp"):
        import_drafter(target, tmp_path, dtyp="float32")


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
    rope = import_drafter(target, tmp_path).config.rope_parameters
    assert rope == {"rope_type": "linear", "factor": 2.0, "rope_theta": 500000.0}


def test_an_lm_head_of_its_own_is_compared_and_dropped(target, tmp_path):
    head = target.lm_head.weight.detach().half()
    write_checkpoint(tmp_path, LLAMA2, {**eagle_tensors(LLAMA2), "lm_head.weight": head})
    assert "lm_head.weight" not in import_drafter(target, tmp_path).state_dict()
    write_checkpoint(tmp_path, LLAMA2, {**eagle_tensors(LLAMA2), "lm_head.weight": -head})
    with pytest.raises(ValueError, match="`lm_head.weight`.*made for another target"):
        import_drafter(target, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_copy_in_half_precision_is_the_same_table(target, tmp_path, dtype):
    table = target.model.embed_tokens.weight.detach().to(dtype)
    write_checkpoint(tmp_path, LLAMA2, {**eagle_tensors(LLAMA2), "embed_tokens.weight": table})
    import_drafter(target, tmp_path)


# ---- fields that make no sense


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"rope_scaling": {"type": "foo", "factor": 2.0}}, "KeyError: 'foo'"),
        ({"rope_scaling": "linear"}, "ValueError: dictionary update sequence"),
        ({"rope_scaling": {"type": "linear"}}, "'linear': {'factor'}"),
        ({"rope_theta": "abc"}, "could not convert string to float: 'abc'"),
        ({"hidden_act": "nonsense"}, "nonsense"),
        ({"num_attention_heads": 0}, "ZeroDivisionError"),
        ({"head_dim": 7}, "even rotary dimension, but got `head_dim`=7"),
        ({"bias": "true"}, "fc_bias.*expected bool, got str"),
        ({"vocab_size": 40.0}, "vocab_size.*expected int, got float"),
    ],
)
def test_a_field_that_makes_no_sense_is_named_with_its_file(target, tmp_path, fields, said):
    write_checkpoint(tmp_path, {**LLAMA2, **fields}, eagle_tensors(LLAMA2))
    # older versions of transformers let an odd `head_dim` through to the check of shapes
    said = f"config.json lacks a field, or has one that makes.*{said}"
    if "head_dim" in fields:
        said += "|of another shape: layers.0.self_attn"
    with pytest.raises(ValueError, match=f"(?s){said}"):
        import_drafter(target, tmp_path)


def test_fields_that_are_null_mean_their_default(target, tmp_path):
    names = ("num_key_value_heads", "head_dim", "rope_theta", "rope_scaling", "bias", "qkv_bias")
    write_checkpoint(tmp_path, {**LLAMA2, **dict.fromkeys(names)}, eagle_tensors(LLAMA2))
    config = import_drafter(target, tmp_path).config
    assert config.num_key_value_heads == 4 and config.head_dim == 8 and config.fc_bias
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}


@pytest.mark.parametrize(
    "scaling",
    [
        {"type": "yarn", "factor": 4.0},
        {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    ],
)
def test_what_transformers_rotates_by_is_taken(target, tmp_path, scaling):
    write_checkpoint(tmp_path, {**LLAMA3, "rope_scaling": scaling}, eagle_tensors(LLAMA3))
    rope = import_drafter(target, tmp_path).config.rope_parameters
    assert rope["rope_theta"] == 500000.0 and rope["rope_type"] in scaling.values()


# ---- shards


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_shards_are_read_together(target, tmp_path, kind):
    tensors = list({**eagle_tensors(LLAMA2), **copies(target)}.items())
    write_shards(tmp_path, LLAMA2, [dict(tensors[::2]), dict(tensors[1::2])], kind)
    state = import_drafter(target, tmp_path).state_dict()
    assert all(torch.equal(state[k], v) for k, v in tensors if k in state)
    assert len(state) == len(tensors) - 1


def shards() -> list[dict]:
    tensors = list(eagle_tensors(LLAMA2).items())
    return [dict(tensors[:4]), dict(tensors[4:])]


def test_a_missing_shard_is_named(target, tmp_path):
    write_shards(tmp_path, LLAMA2, shards())
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match="missing: .*layers.0"):
        import_drafter(target, tmp_path)


# ---- what is refused


class Stranger:
    """Something that a pickle would have to build."""


@pytest.mark.parametrize(
    "content",
    [[torch.ones(2)], {"state_dict": {"fc.weight": torch.ones(2)}}, {"fc.weight": 3}],
)
def test_a_pickle_that_is_no_state_dict_is_refused(target, tmp_path, content):
    write_checkpoint(tmp_path, LLAMA2, {})
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin is not a state dict; save drafter.s"):
        import_drafter(target, tmp_path)


def test_a_pickle_of_any_age_is_read_and_runs_nothing(target, tmp_path):
    write_checkpoint(tmp_path, LLAMA2, {})
    path = tmp_path / "pytorch_model.bin"
    torch.save(eagle_tensors(LLAMA2), path, _use_new_zipfile_serialization=False)
    assert "fc.weight" in import_drafter(target, tmp_path).state_dict()
    for is_new in (False, True):
        torch.save({"fc.weight": Stranger()}, path, _use_new_zipfile_serialization=is_new)
        with pytest.raises(ValueError, match="_model.bin is damaged, or holds more than tensors"):
            import_drafter(target, tmp_path)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.mark.parametrize("weights", ["pytorch_model.bin", "model.safetensors"])
@pytest.mark.parametrize("content", [0.0, 0.01, 0.9, POINTER, b"<!doctype html><html>", b"PK"])
def test_a_file_that_is_cut_off_or_stands_for_another_is_named(target, tmp_path, weights, content):
    write_checkpoint(tmp_path, LLAMA2, eagle_tensors(LLAMA2), weights)
    path = tmp_path / weights
    whole = path.read_bytes()
    path.write_bytes(whole[: int(content * len(whole))] if isinstance(content, float) else content)
    with pytest.raises(ValueError, match=f"{weights} is damaged, or.*Download it again.*git lfs"):
        import_drafter(target, tmp_path)


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (torch.ones(32, 64, dtype=torch.int8), "a torch.strided tensor of torch.int8; expected"),
        (
            torch.ones(32, 64, dtype=torch.complex64),
            "a torch.strided tensor of torch.complex64",
        ),
        (
            torch.ones(32, 64).to(torch.float8_e4m3fn),
            "a torch.strided tensor of torch.float8",
        ),
        (torch.ones(32, 64).to_sparse(), "a torch.sparse_coo tensor of torch.float32; expected"),
        (torch.ones(32, 64, device="meta"), "a meta tensor of torch.float32; expected"),
    ],
)
@pytest.mark.parametrize("name", ["fc.weight", "embed_tokens.weight"])
def test_a_tensor_that_a_cast_would_spoil_is_refused(target, tmp_path, name, tensor, said):
    write_checkpoint(tmp_path, LLAMA2, {**eagle_tensors(LLAMA2), name: tensor})
    with pytest.raises(
        ValueError, match=f"`{name}` in .* is {said}.*torch.bfloat16, torch.float32"
    ):
        import_drafter(target, tmp_path)


@pytest.mark.parametrize(
    ("config", "changes", "said"),
    [
        (LLAMA2, {"norm.weight": torch.ones(32)}, "unknown: norm.weight"),
        (LLAMA2, {"layers.0.input_layernorm.weight": torch.ones(32)}, "unknown: layers.0.input"),
        (LLAMA2, {"layers.0.mlp.up_proj.weight": None}, "missing: layers.0.mlp.up_proj.weight"),
        (LLAMA2, {"fc.weight": torch.ones(32, 96)}, r"fc.weight \(32, 96\), not \(32, 64\)"),
        (LLAMA2, {"fc.bias": torch.full((32,), float("nan"))}, "not finite: fc.bias"),
        ({**LLAMA2, "bias": True}, {"fc.bias": None}, "missing: fc.bias"),
        (
            QWEN2,
            {"layers.0.self_attn.k_proj.bias": None},
            "missing: layers.0.self_attn.k_proj.bias",
        ),
        (
            {**LLAMA2, "vocab_size": 48},
            {"embed_tokens.weight": None},
            "`vocab_size` of the target is 40, but .* with 48",
        ),
        ({**LLAMA2, "hidden_size": 64}, {}, "`hidden_size` of the target is 32, but .* with 64"),
        (
            LLAMA2,
            {"embed_tokens.weight": torch.ones(VOCAB, 32)},
            "embed_tokens.*another target.*are not near those",
        ),
        (
            LLAMA2,
            {"embed_tokens.weight": torch.ones(9, 32)},
            r"embed_tokens.*another target.*shape \(9, 32\)",
        ),
        ({"model_type": "llama"}, {}, "lacks a field, or .*KeyError: 'vocab_size'"),
    ],
)
def test_what_does_not_fit_is_named(target, tmp_path, config, changes, said):
    tensors = eagle_tensors({**LLAMA2, **config})
    write_checkpoint(tmp_path, config, {**tensors, **copies(target), **changes})
    with pytest.raises(ValueError, match=said):
        import_drafter(target, tmp_path)


def test_a_coral_drafter_is_not_imported_again(target, tmp_path):
    CoralDrafter.from_target(target).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"of coral_hf already \(CORAL\); load it with AutoModel"):
        import_drafter(target, tmp_path)


# ---- from the Hub


TAKE = """
from conftest import tiny_target
import coral_hf
from coral_hf.checkpoints import import_drafter
import_drafter(tiny_target("llama"), *a, **k)
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A Hub with checkpoints in both formats, in a pickle alone, of another target, in shards."""
    safe, pickled, wide = (tmp_path_factory.mktemp(name) for name in ("safe", "pickled", "wide"))
    write_checkpoint(safe, LLAMA2, eagle_tensors(LLAMA2), "model.safetensors")
    for where, config in ((safe, LLAMA2), (pickled, LLAMA2), (wide, {**LLAMA2, "hidden_size": 64})):
        write_checkpoint(where, config, eagle_tensors(LLAMA2))
    cut = tmp_path_factory.mktemp("cut")
    write_checkpoint(cut, LLAMA2, eagle_tensors(LLAMA2))
    write_shards(cut, LLAMA2, shards())
    with running_hub() as hub:
        for name, where in (("safe", safe), ("pickled", pickled), ("wide", wide), ("cut", cut)):
            hub.put(f"org/{name}", where)
        yield hub


@pytest.fixture(scope="module")
def reader(hub, tmp_path_factory):
    reader = Client(hub.url, tmp_path_factory.mktemp("reader"))
    reader.run("import time; time.sleep = lambda seconds: None")  # before it tries again
    yield reader
    reader.close()


@pytest.fixture
def take(hub, reader, tmp_path):
    """A function that imports from the Hub into a cache of its own."""
    hub.faults, hub.requests = [], []

    def take(source: str, **settings) -> str:
        return reader.run(TAKE, a=[source], k={"cache_dir": str(tmp_path), **settings})

    return take


@pytest.mark.parametrize(
    ("source", "settings", "said"),
    [
        ("org/absent", {}, "RepositoryNotFoundError.*org/absent"),
        ("org/safe", {"revision": "gone"}, "RevisionNotFoundError.*gone"),
        (
            "no/such/folder",
            {},
            "ValueError: There is no folder no/such/folder, and it",
        ),
        (
            "org/safe",
            {"local_files_only": True},
            "LocalEntryNotFoundError.*local_files_only",
        ),
    ],
)
def test_a_name_that_is_not_there_is_an_error_of_the_hubs_client(take, source, settings, said):
    with pytest.raises(RuntimeError, match=f"(?s){said}"):
        take(source, **settings)


def test_a_repository_without_a_config_is_no_checkpoint(hub, take):
    hub.put_files("org/bare", {"pytorch_model.bin": b""})
    with pytest.raises(RuntimeError, match="ValueError: .* has no config.json; start from"):
        take("org/bare")


def test_only_the_format_that_is_read_is_downloaded(hub, take):
    take("org/safe")
    assert hub.asked("GET .*model.safetensors") == 1 and hub.asked("pytorch_model.bin") == 0
    take("org/pickled")
    assert hub.asked("GET .*pytorch_model.bin") == 1
    hub.requests = []
    take("org/cut")
    assert hub.asked("GET .*-of-00002.safetensors") == 2 and hub.asked("pytorch_model.bin") == 0


def test_medusa_heads_are_downloaded_as_they_are_published(hub, take, tmp_path):
    torch.save(medusa_tensors(), tmp_path / "medusa_lm_head.pt")
    heads = (tmp_path / "medusa_lm_head.pt").read_bytes()
    config = json.dumps(PUBLISHED).encode()
    hub.put_files("org/heads", {"config.json": config, "medusa_lm_head.pt": heads})
    take("org/heads")
    assert hub.asked("GET .*medusa_lm_head.pt") == 1


def test_what_is_in_the_cache_is_read_without_the_hub(hub, take):
    for source in ("org/safe", "org/pickled", "org/cut"):
        take(source)
        hub.requests = []
        take(source, local_files_only=True)
        assert hub.requests == []
        hub.faults = [Fault("HEAD", 503, times=99)]
        take(source)
        hub.faults = []


def test_a_checkpoint_without_weights_on_the_hub_is_named(hub, take):
    hub.put_files("org/empty", {"config.json": json.dumps(LLAMA2).encode()})
    with pytest.raises(RuntimeError, match="has none of .*pytorch_model.bin and no shards"):
        take("org/empty")


def test_a_private_checkpoint_is_read_with_a_token_of_a_revision(hub, reader, take, tmp_path):
    (tmp_path / "mine").mkdir()
    write_checkpoint(tmp_path / "mine", LLAMA2, eagle_tensors(LLAMA2))
    first = hub.put("org/mine", tmp_path / "mine", private=True)
    hub.put_files("org/mine", {"config.json": b'{"model_type": "coral"}'})
    with pytest.raises(RuntimeError, match="(?s)RepositoryNotFoundError.*org/mine"):
        take("org/mine", token=False)
    with pytest.raises(RuntimeError, match="holds a drafter of coral_hf already"):
        take("org/mine")
    take("org/mine", revision=first)


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
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    drafter = AutoModel.from_pretrained(tmp_path / "drafter")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "drafter")
    assert drafter.config.tokenizer_hash == tokenizer_hash(tokenizer)
    assert torch.equal(drafter.fc.weight, eagle_tensors(config)["fc.weight"])
    again = invoke(*arguments)
    assert again.exit_code == 1 and "give a new folder" in printed(again)


def test_the_command_reads_the_config_and_its_options_before_the_target(tmp_path):
    arguments = [
        "import",
        str(tmp_path),
        "--target",
        "no-target",
        "--output",
        str(tmp_path / "out"),
    ]
    write_checkpoint(tmp_path, {**LLAMA2, "architectures": ["DFlashDraftModel"]}, {})
    assert "of another kind, dflash; import one of EAGLE-1" in printed(invoke(*arguments))
    refused = invoke(*arguments, "--dtype", "int8")
    assert refused.exit_code == 2 and "invalid choice: 'int8'" in printed(refused)
