"""A drafter computes EAGLE-1's step; a checkpoint gives back what was saved or raises."""

import json
import socket

import pytest
import torch
from conftest import FAMILIES, VOCAB, scatter_weights, tiny_config, tiny_target
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoModel

from coral_hf import CoralConfig, CoralDrafter
from coral_hf.drafters.layers import rotate

BATCH, LENGTH, HIDDEN = 2, 7, 32
EAGLE_SHAPES = {
    "fc.weight": (32, 64),
    "layers.0.self_attn.q_proj.weight": (32, 32),
    "layers.0.self_attn.k_proj.weight": (16, 32),
    "layers.0.self_attn.v_proj.weight": (16, 32),
    "layers.0.self_attn.o_proj.weight": (32, 32),
    "layers.0.mlp.gate_proj.weight": (48, 32),
    "layers.0.mlp.up_proj.weight": (48, 32),
    "layers.0.mlp.down_proj.weight": (32, 48),
    "layers.0.post_attention_layernorm.weight": (32,),
}


def make_drafter(seed: int = 0, **overrides) -> CoralDrafter:
    drafter = CoralDrafter(CoralConfig.from_target(tiny_config("llama"), **overrides)).eval()
    scatter_weights(drafter, seed)
    return drafter


def make_inputs(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(
        torch.randn(BATCH, LENGTH, HIDDEN, generator=generator, dtype=dtype) for _ in range(2)
    )


def shapes(drafter: CoralDrafter) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in drafter.state_dict().items()}


def enable_checkpointing(drafter: CoralDrafter) -> None:
    """By the newer of transformers' two names where there is one."""
    getattr(drafter, "activation_checkpointing_enable", drafter.gradient_checkpointing_enable)()


def plain_step(weights: dict, embeddings: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """EAGLE-1's step from raw tensors, with loops for views: 4 heads of 8, 2 key heads."""
    layer = {
        name.removeprefix("layers.0."): tensor
        for name, tensor in weights.items()
        if name.startswith("layers.0.")
    }
    hidden = torch.cat([embeddings, features], dim=-1) @ weights["fc.weight"].T
    if "fc.bias" in weights:
        hidden = hidden + weights["fc.bias"]
    projected = {}
    for name in "qkv":
        projected[name] = hidden @ layer[f"self_attn.{name}_proj.weight"].T
        projected[name] = projected[name] + layer.get(f"self_attn.{name}_proj.bias", 0)
    attended = torch.zeros(*hidden.shape[:2], 32, dtype=hidden.dtype)
    for head in range(4):
        own, shared = slice(8 * head, 8 * head + 8), slice(8 * (head // 2), 8 * (head // 2) + 8)
        query, key = turn(projected["q"][..., own]), turn(projected["k"][..., shared])
        for t in range(hidden.shape[1]):
            weight = (query[:, t, None] * key[:, : t + 1]).sum(-1).div(8**0.5).softmax(-1)
            attended[:, t, own] = (weight[..., None] * projected["v"][:, : t + 1, shared]).sum(1)
    hidden = hidden + attended @ layer["self_attn.o_proj.weight"].T
    normed = hidden / (hidden.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    normed = normed * layer["post_attention_layernorm.weight"]
    gate = F.silu(normed @ layer["mlp.gate_proj.weight"].T)
    gated = gate * (normed @ layer["mlp.up_proj.weight"].T)
    return hidden + gated @ layer["mlp.down_proj.weight"].T


def turn(states: torch.Tensor) -> torch.Tensor:
    """Rotary positions 0, 1, …: channels i and i + 4 turn by t / 10000^(i / 4)."""
    turned = states.clone()
    for t in range(states.shape[1]):
        for i in range(4):
            angle = torch.tensor(t / 10000 ** (i / 4), dtype=states.dtype)
            x, y = states[:, t, i], states[:, t, i + 4]
            turned[:, t, i] = x * angle.cos() - y * angle.sin()
            turned[:, t, i + 4] = y * angle.cos() + x * angle.sin()
    return turned


def test_a_drafter_has_eagle_1s_tensors_and_no_others():
    assert shapes(make_drafter()) == EAGLE_SHAPES


def test_biases_of_the_target_add_their_tensors_only():
    added = shapes(make_drafter(fc_bias=True, attention_bias=True)).keys() - EAGLE_SHAPES.keys()
    assert added == {"fc.bias", *(f"layers.0.self_attn.{name}_proj.bias" for name in "qkv")}


def test_only_the_second_layer_has_an_input_norm():
    names = shapes(make_drafter(num_hidden_layers=2))
    assert "layers.1.input_layernorm.weight" in names
    assert "layers.0.input_layernorm.weight" not in names


def test_a_step_keeps_the_shape_of_its_features():
    assert make_drafter()(*make_inputs()).shape == (BATCH, LENGTH, HIDDEN)


@pytest.mark.parametrize("biases", [False, True])
def test_a_step_equals_a_plain_computation_from_the_raw_tensors(biases):
    drafter = make_drafter(fc_bias=biases, attention_bias=biases).double()
    embeddings, features = make_inputs(torch.float64)
    expected = plain_step(drafter.state_dict(), embeddings, features)
    torch.testing.assert_close(drafter(embeddings, features), expected, atol=1e-5, rtol=1e-5)


def test_a_position_sees_nothing_after_it():
    drafter = make_drafter()
    embeddings, features = make_inputs()
    whole = drafter(embeddings, features)
    part = drafter(embeddings[:, :4], features[:, :4])
    torch.testing.assert_close(whole[:, :4], part, atol=1e-5, rtol=1e-5)


def test_positions_matter_by_their_differences_only():
    drafter = make_drafter().double()
    inputs = make_inputs(torch.float64)
    ids = torch.arange(LENGTH)[None]
    far, near = drafter(*inputs, position_ids=ids + 50), drafter(*inputs)
    torch.testing.assert_close(far, near, atol=1e-4, rtol=1e-4)
    assert (drafter(*inputs, position_ids=2 * ids) - near).abs().max() > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_a_drafter_of_every_family_takes_a_step(family):
    target = tiny_target(family, torch.float32)
    drafter = CoralDrafter.from_target(target)
    assert drafter(*make_inputs()).isfinite().all()
    assert (drafter.dtype, drafter.config.vocab_size) == (torch.float32, VOCAB)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(drafter.generation_config, name) == getattr(target.generation_config, name)


@pytest.mark.parametrize(
    ("rope", "rotary_dim"),
    [
        ({"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}, 8),
        (
            {
                "rope_type": "longrope",
                "short_factor": [1.0] * 2,
                "long_factor": [4.0] * 2,
                "partial_rotary_factor": 0.5,
            },
            4,
        ),
        ({"rope_type": "linear", "factor": 2.0}, 8),
        ({"rope_type": "yarn", "factor": 2.0}, 8),
        (
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
            },
            8,
        ),
    ],
    ids=["longrope", "partial longrope", "linear", "yarn", "llama3"],
)
def test_scaled_rotary_positions_construct_and_run(rope, rotary_dim):
    rope = {"rope_theta": 10000.0, "original_max_position_embeddings": 32, **rope}
    family = "phi3" if rope["rope_type"] == "longrope" else "llama"
    drafter = CoralDrafter(CoralConfig.from_target(tiny_config(family, rope_parameters=rope)))
    cos, _ = drafter.rotary_emb(torch.zeros(1, LENGTH, 1), torch.arange(LENGTH)[None])
    assert cos.shape[-1] == rotary_dim
    short = drafter(*make_inputs())
    long = drafter(*make_inputs(), position_ids=torch.arange(LENGTH)[None] + 60)
    assert short.isfinite().all() and long.isfinite().all()


def test_channels_beyond_the_rotary_ones_are_not_turned():
    states = torch.randn(1, 2, 3, 8)
    cos, sin = torch.zeros(1, 1, 3, 4), torch.ones(1, 1, 3, 4)  # a quarter turn
    turned = rotate(states, cos, sin)
    assert turned[..., 4:].equal(states[..., 4:])
    assert turned[..., :4].equal(torch.cat([-states[..., 2:4], states[..., :2]], dim=-1))


def test_gradient_checkpointing_gives_the_same_gradients():
    plain, saving = make_drafter(num_hidden_layers=2), make_drafter(num_hidden_layers=2)
    enable_checkpointing(saving)
    gradients = []
    for drafter in (plain.train(), saving.train()):
        drafter(*make_inputs()).pow(2).sum().backward()
        gradients.append([parameter.grad for parameter in drafter.parameters()])
    assert [drafter.layers[0].gradient_checkpointing for drafter in (plain, saving)] == [
        False,
        True,
    ]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_a_drafter_cannot_generate_alone_and_says_what_to_call():
    with pytest.raises(TypeError, match=r"target.generate\(..., assistant_model=drafter\)"):
        make_drafter().generate(torch.tensor([[1]]))


def test_a_fresh_drafter_carries_its_tree_settings():
    settings = make_drafter().generation_config
    assert (settings.tree_depth, settings.tree_top_k, settings.tree_nodes) == (6, 10, 60)


# ---- saving and loading


@pytest.fixture
def saved(tmp_path):
    """A drafter with a router, and the folder it was saved in."""
    drafter = make_drafter(num_groups=4)
    drafter.save_pretrained(tmp_path / "drafter")
    return drafter, tmp_path / "drafter"


def assert_same(drafter: CoralDrafter, loaded: CoralDrafter) -> None:
    assert drafter(*make_inputs()).equal(loaded(*make_inputs()))
    for name, tensor in drafter.state_dict().items():
        assert tensor.equal(loaded.state_dict()[name]), name


@pytest.mark.parametrize("settings", [{}, {"device_map": "cpu"}, {"dtype": torch.float32}])
def test_auto_model_loads_what_was_saved(saved, settings):
    drafter, folder = saved
    loaded = AutoModel.from_pretrained(folder, **settings)
    assert type(loaded) is CoralDrafter and not loaded.training
    assert_same(drafter, loaded)


def test_a_sharded_checkpoint_loads_alike(tmp_path):
    drafter = make_drafter()
    drafter.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert_same(drafter, AutoModel.from_pretrained(tmp_path))


def test_loading_from_a_folder_opens_no_connection(saved, monkeypatch):
    def refuse(*args):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    drafter, folder = saved
    assert_same(drafter, AutoModel.from_pretrained(folder))


def test_the_dtype_can_be_chosen(saved):
    drafter, folder = saved
    loaded = AutoModel.from_pretrained(folder, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert loaded(*make_inputs()).dtype == torch.bfloat16  # features of another dtype are cast
    assert loaded.fc.weight.equal(drafter.fc.weight.bfloat16())


def test_tree_settings_come_back_from_disk(tmp_path):
    drafter = make_drafter()
    drafter.generation_config.tree_depth = 4
    drafter.generation_config.tree_nodes = 33
    drafter.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text())["tree_nodes"] == 33
    settings = AutoModel.from_pretrained(tmp_path).generation_config
    assert (settings.tree_depth, settings.tree_top_k, settings.tree_nodes) == (4, 10, 33)


def test_a_checkpoint_that_lacks_a_tensor_raises_and_names_it(saved):
    _, folder = saved
    tensors = load_file(folder / "model.safetensors")
    del tensors["layers.0.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.up_proj\.weight"):
        AutoModel.from_pretrained(folder)


def test_a_checkpoint_is_named_by_transformers_own_keyword_too(saved):
    drafter, folder = saved
    loaded = CoralDrafter.from_pretrained(pretrained_model_name_or_path=folder)
    assert loaded.fc.weight.equal(drafter.fc.weight)


def test_a_tensor_of_another_shape_raises(saved):
    _, folder = saved
    tensors = load_file(folder / "model.safetensors")
    tensors["fc.weight"] = tensors["fc.weight"][:, :-1].contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="mismatched_keys.*fc.weight.*32, 63.*32, 64"):
        AutoModel.from_pretrained(folder)


@pytest.mark.parametrize("kept", [4, -100])
def test_a_truncated_file_raises(saved, kept):
    _, folder = saved
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ValueError, match=f"The weights of {folder} cannot be read .*header"):
        AutoModel.from_pretrained(folder)


def test_a_missing_shard_raises(tmp_path):
    make_drafter().save_pretrained(tmp_path, max_shard_size="8KB")
    next(tmp_path.glob("model-00002-*")).unlink()
    with pytest.raises(OSError, match="model-00002"):
        AutoModel.from_pretrained(tmp_path)


def test_loading_info_is_given_when_asked_for(saved):
    loaded, info = CoralDrafter.from_pretrained(saved[1], output_loading_info=True)
    assert isinstance(loaded, CoralDrafter) and not info["missing_keys"]


def test_a_checkpoint_with_an_unknown_tensor_is_refused(saved):
    _, folder = saved
    tensors = load_file(folder / "model.safetensors") | {"lm_head.weight": torch.zeros(3)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="not fit its config: .*unexpected_keys.*lm_head.weight"):
        AutoModel.from_pretrained(folder)


def test_the_record_of_training_runs_lies_beside_the_weights_and_goes_with_its_drafter(tmp_path):
    drafter = make_drafter()
    drafter.training_record = [{"stage": "drafter", "seconds": 1.5}]
    drafter.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "training_record.json").read_text()) == drafter.training_record
    assert AutoModel.from_pretrained(tmp_path).training_record == drafter.training_record
    make_drafter().save_pretrained(tmp_path)
    assert AutoModel.from_pretrained(tmp_path).training_record == []


# ---- the router


def test_an_added_router_is_fresh_and_travels_with_the_drafter(tmp_path):
    drafter = make_drafter().to(torch.bfloat16)
    drafter.heads.add_router(num_groups=5, num_active_groups=3)
    assert (drafter.config.num_groups, drafter.config.num_active_groups) == (5, 3)
    assert (drafter.config.is_router_trained, drafter.config.draft_head) == (False, "full")
    assert drafter.heads.router.groups.weight.shape == (5, HIDDEN)
    assert drafter.heads.router.groups.weight.dtype == torch.bfloat16
    drafter.save_pretrained(tmp_path)
    assert AutoModel.from_pretrained(tmp_path).heads.router.fc.weight.equal(
        drafter.heads.router.fc.weight
    )
