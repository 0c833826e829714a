"""Export of drafters: an engine's names and fields, the same predictions, or a refusal."""

import json

import pytest
import torch
from conftest import invoke, printed, tiny_target
from eagle_checkpoint import (
    HIDDEN,
    LLAMA2,
    VOCAB,
    eagle_step,
    eagle_tensors,
    write_checkpoint,
)
from safetensors.torch import load_file
from test_examples import folder  # noqa: F401  a saved target and its conversations
from transformers import AutoConfig, AutoModelForCausalLM

from coral_hf import CoralDrafter
from coral_hf.checkpoints import (
    export_drafter,
    import_drafter,
)
from coral_hf.target import read_target

ENGINES = ("vllm", "sglang")
# what every engine's drafter of one layer has
NAMES = {
    "fc.weight",
    "layers.0.self_attn.q_proj.weight",
    "layers.0.self_attn.k_proj.weight",
    "layers.0.self_attn.v_proj.weight",
    "layers.0.self_attn.o_proj.weight",
    "layers.0.mlp.gate_proj.weight",
    "layers.0.mlp.up_proj.weight",
    "layers.0.mlp.down_proj.weight",
    "layers.0.post_attention_layernorm.weight",
}
BIASES = {f"layers.0.self_attn.{name}_proj.bias" for name in "qkv"}


def make_drafter(target, **overrides) -> CoralDrafter:
    """A drafter whose every tensor is random, so that none can be left out unseen."""
    drafter = CoralDrafter.from_target(target, **overrides)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in drafter.parameters():
            noise = torch.empty_like(parameter, dtype=torch.float32)
            parameter.copy_(noise.normal_(0, 0.2, generator=generator))
    return drafter.eval()


def written(where) -> tuple[dict, dict]:
    """The config and the tensors of an export."""
    config = json.loads((where / "config.json").read_text())
    return config, load_file(where / "model.safetensors")


@pytest.fixture(scope="module")
def target():
    return tiny_target("llama", torch.float32)


# ---- layouts


@pytest.mark.parametrize(
    ("engine", "architecture", "more"),
    [
        ("vllm", "LlamaForCausalLM", {"embed_tokens.weight"}),
        ("sglang", "LlamaForCausalLMEagle", {"fc.bias"}),
    ],
)
def test_an_engine_gets_its_own_names_and_fields(target, tmp_path, engine, architecture, more):
    done = export_drafter(make_drafter(target), engine, tmp_path / "out", target)
    config, tensors = written(tmp_path / "out")
    assert tensors.keys() == NAMES | more and done.notes == []
    assert config["architectures"] == [architecture] and config["model_type"] == "llama"
    assert config["num_hidden_layers"] == 1 and config["vocab_size"] == VOCAB
    assert config["num_key_value_heads"] == 2 and config["head_dim"] == 8
    assert config["rope_theta"] == 10000.0 and config["rope_scaling"] is None
    assert config["tie_word_embeddings"] is False and config["dtype"] == "float32"
    assert "bias" not in config  # both read it as biases of the attention
    if engine == "sglang":
        assert torch.equal(tensors["fc.bias"], torch.zeros(HIDDEN))


@pytest.mark.parametrize(
    ("engine", "fields"),
    [
        ("vllm", {"model_type": "llama", "qkv_bias": True, "attention_bias": False}),
        ("sglang", {"architectures": ["Qwen2ForCausalLMEagle"], "model_type": "qwen2"}),
    ],
)
def test_biases_of_the_attention_have_a_place_in_every_engine(tmp_path, engine, fields):
    target = tiny_target("qwen2", torch.float32)
    export_drafter(make_drafter(target), engine, tmp_path / "out", target)
    config, tensors = written(tmp_path / "out")
    assert tensors.keys() - {"fc.bias", "embed_tokens.weight"} == NAMES | BIASES
    assert fields.items() <= config.items()


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_transformers_reads_the_config_as_the_engines_do(tmp_path, engine):
    scaled = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0}
    scaled |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    target = tiny_target("qwen2", torch.float32)
    drafter = make_drafter(target, rope_parameters=scaled, head_dim=16)
    export_drafter(drafter, engine, tmp_path / "out", target)
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert config.rope_parameters == scaled and config.head_dim == 16
    assert config.dtype == torch.float32
    raw = written(tmp_path / "out")[0]
    assert raw["rope_theta"] == 5e5  # as transformers 4 reads it
    assert raw["rope_scaling"] == {k: v for k, v in scaled.items() if k != "rope_theta"}


@pytest.mark.parametrize("engine", ENGINES)
def test_the_embeddings_go_along_where_an_engine_may_need_them(target, tmp_path, engine):
    export_drafter(make_drafter(target).bfloat16(), engine, tmp_path / "out", target)
    tensors = written(tmp_path / "out")[1]
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    own = target.model.embed_tokens.weight.bfloat16()
    found = tensors.get("embed_tokens.weight")
    assert found is None if engine == "sglang" else torch.equal(found, own)


# ---- the same drafter

# all but vLLM refuse scaled logits
UNSCALED = {"granite": {"logits_scaling": 1.0}}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("llama", {}),
        ("qwen2", {}),
        ("gemma", {"hidden_act": "silu"}),
        ("granite", {}),
        ("llama", {"num_hidden_layers": 2}),
    ],
)
def test_the_tensors_predict_in_an_engine_what_they_did_here(tmp_path, engine, family, overrides):
    target = tiny_target(family, **UNSCALED.get(family, {}))
    drafter = make_drafter(target, **overrides)
    export_drafter(drafter, engine, tmp_path / "out", target)
    config, tensors = written(tmp_path / "out")
    config["qkv_bias"] = drafter.config.attention_bias
    ids, generator = torch.arange(7), torch.Generator().manual_seed(0)
    features = torch.randn(7, HIDDEN, dtype=torch.float64, generator=generator)
    seen = read_target(target).embed(ids)
    expected = drafter(seen[None], features[None])[0]
    table = target.model.embed_tokens.weight.detach()[ids]
    found = eagle_step(config, tensors, table, features)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_export_and_import_leave_every_round_as_it_was(tmp_path, engine, family):
    target = tiny_target(family, torch.float32)
    drafter = make_drafter(target)
    export_drafter(drafter, engine, tmp_path / "out", target)
    back = import_drafter(target, tmp_path / "out")
    prompt = torch.tensor([[3, 9, 14]])
    settings = {"do_sample": False, "max_new_tokens": 40, "attention_mask": prompt.ne(-1)}
    settings |= {"return_dict_in_generate": True}
    before, after = (
        target.generate(prompt, assistant_model=one, **settings).stats for one in (drafter, back)
    )
    assert before.round_lengths == after.round_lengths
    assert 1 < before.acceptance_length


@pytest.mark.parametrize("family", ["gemma", "granite"])
def test_a_scale_of_the_embeddings_comes_back(tmp_path, family):
    target = tiny_target(family, **UNSCALED.get(family, {}))
    drafter = make_drafter(target, hidden_act="silu")
    export_drafter(drafter, "vllm", tmp_path / "out", target)
    assert not torch.allclose(written(tmp_path / "out")[1]["fc.weight"], drafter.fc.weight)
    back = import_drafter(target, tmp_path / "out")
    torch.testing.assert_close(back.fc.weight, drafter.fc.weight)


# ---- what cannot be expressed


def test_a_bias_of_fc_that_is_0_is_left_out(target, tmp_path):
    drafter = make_drafter(target, fc_bias=True)
    with torch.no_grad():
        drafter.fc.bias.zero_()
    export_drafter(drafter, "vllm", tmp_path / "out", target)
    assert "fc.bias" not in written(tmp_path / "out")[1]


def test_a_logit_scale_goes_to_vllm_and_a_cap_to_sglang(tmp_path):
    granite, gemma2 = (tiny_target(name, torch.float32) for name in ("granite", "gemma2"))
    export_drafter(make_drafter(granite), "vllm", tmp_path / "scale", granite)
    assert written(tmp_path / "scale")[0]["logit_scale"] == 0.5
    drafter = make_drafter(gemma2, hidden_act="silu")
    export_drafter(drafter, "sglang", tmp_path / "cap", gemma2)
    assert written(tmp_path / "cap")[0]["final_logit_softcapping"] == 30.0


def test_scaled_logits_are_refused_where_an_engine_leaves_them_as_they_are(tmp_path):
    granite, gemma2 = (tiny_target(name, torch.float32) for name in ("granite", "gemma2"))
    drafter = make_drafter(granite)
    with pytest.raises(
        ValueError, match="only vLLM's drafters scale logits, .* by 0.5.*Serve it with"
    ):
        export_drafter(drafter, "sglang", tmp_path / "out", granite)
    drafter = make_drafter(gemma2, fc_bias=True)
    with pytest.raises(ValueError, match="`fc.bias`.*only SGLang's drafters cap .* at 30.0"):
        export_drafter(drafter, "vllm", tmp_path / "out", gemma2)
    assert list(tmp_path.iterdir()) == []


LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4}
LONG |= {"long_factor": [2.0] * 4, "factor": 2.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("engine", "overrides", "said"),
    [
        (
            "vllm",
            {"fc_bias": True},
            "`fc.bias` is not 0, and vLLM's .*SGLang's do.*Serve it with",
        ),
        ("vllm", {"hidden_act": "gelu"}, "`hidden_act` is 'gelu', and the.*Serve it with transf"),
        ("sglang", {"rope_parameters": LONG}, "rotary embedding .*longrope.* is none of"),
        ("trt", {}, r"`engine` is 'trt' and the drafter a CoralDrafter; use one of \('vllm', 'sg"),
    ],
)
def test_what_an_engine_cannot_express_is_refused(target, tmp_path, engine, overrides, said):
    with pytest.raises(ValueError, match=said):
        export_drafter(make_drafter(target, **overrides), engine, tmp_path / "out", target)
    assert list(tmp_path.iterdir()) == []


def test_a_bias_of_the_lm_head_is_refused(tmp_path):
    target = tiny_target("llama", torch.float32)
    target.lm_head.bias = torch.nn.Parameter(torch.ones(VOCAB))
    with pytest.raises(ValueError, match="LM head has a bias, which engines drop"):
        export_drafter(make_drafter(target), "vllm", tmp_path / "out", target)


def test_a_target_of_other_sizes_is_refused(target, tmp_path):
    other = tiny_target("llama", torch.float32, hidden_size=HIDDEN // 2)
    with pytest.raises(ValueError, match="`hidden_size` of the target is 16"):
        export_drafter(make_drafter(target), "vllm", tmp_path / "out", other)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is dep:FutureWarning")
def test_an_adapter_is_merged_first(target, tmp_path):
    from peft import get_peft_model

    from coral_hf.training.stages import lora

    drafter = make_drafter(target)
    get_peft_model(drafter, lora(2))
    with pytest.raises(
        ValueError, match="as vllm would load it .*missing: fc.weight.*Merge an adapter"
    ):
        export_drafter(drafter, "vllm", tmp_path / "out", target)


# ---- heads


@pytest.fixture(scope="module")
def routed(target):
    drafter = make_drafter(target)
    drafter.heads.add_router(4, 2)
    drafter.config.is_router_trained = True
    drafter.config.draft_head = "routed"
    return drafter


@pytest.mark.parametrize("engine", ENGINES)
def test_a_router_stays_behind_and_a_note_says_so(target, routed, tmp_path, engine):
    done = export_drafter(routed, engine, tmp_path / "out", target)
    assert not [name for name in written(tmp_path / "out")[1] if "router" in name]
    assert done.notes[0].startswith(
        f"Left behind, since {engine} has no place for them: heads.router."
    )
    assert done.notes[0].endswith("reads the whole LM head.")


# ---- folders


def test_a_folder_that_holds_something_stays_as_it_is(target, tmp_path):
    drafter = make_drafter(target)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds notes.txt; give a new folder"):
        export_drafter(drafter, "vllm", tmp_path, target)
    for below in ("notes.txt", "notes.txt/below/out"):
        with pytest.raises(OSError, match=r"notes.txt"):
            export_drafter(drafter, "vllm", tmp_path / below, target)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_the_current_folder_is_written_to_and_stays_the_current_one(target, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    done = export_drafter(make_drafter(target), "vllm", ".", target)
    assert {path.name for path in done.folder.iterdir()} == {"config.json", "model.safetensors"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# ---- the command


def test_the_command_exports_and_says_how_to_serve(folder, tmp_path):  # noqa: F811
    name = str(folder / "target")
    CoralDrafter.from_target(AutoModelForCausalLM.from_pretrained(name)).save_pretrained(
        tmp_path / "drafter"
    )
    arguments = ["export", tmp_path / "drafter", "--to", "sglang", "--target", name]
    result = invoke(*arguments, "--output", tmp_path / "out", "--dtype", "bfloat16")
    assert result.exit_code == 0, result.output
    assert "--speculative-algorithm EAGLE " in result.output.replace("\n", "")
    assert written(tmp_path / "out")[1]["fc.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--to", "trt"], 2, "argument --to: invalid choice: 'trt'"),
        (["--to", "vllm", "--dtype", "int8"], 2, "argument --dtype: invalid choice: 'int8'"),
        (["--to", "vllm"], 1, "holds notes.txt; give a new folder"),
    ],
)
def test_the_command_refuses_options_before_it_loads_anything(tmp_path, options, code, said):
    (tmp_path / "notes.txt").write_text("mine")
    names = ["--target", "no-target", "--output", str(tmp_path)]
    result = invoke("export", "no-drafter", *names, *options)
    assert result.exit_code == code and said in printed(result)


def test_a_model_of_another_family_is_told_to_be_imported(target, tmp_path):
    with pytest.raises(ValueError, match="the drafter a LlamaForCausalLM; .* coral-hf import"):
        export_drafter(target, "vllm", tmp_path / "out", target)


def test_a_checkpoint_of_eagle_survives_the_way_in_and_out(target, tmp_path):
    tensors = eagle_tensors(LLAMA2)
    write_checkpoint(tmp_path, LLAMA2, tensors)
    export_drafter(import_drafter(target, tmp_path), "sglang", tmp_path / "out", target)
    config, found = written(tmp_path / "out")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    shared = LLAMA2.keys() - {"torch_dtype", "architectures"}
    assert {k: config[k] for k in shared} == {k: LLAMA2[k] for k in shared}
