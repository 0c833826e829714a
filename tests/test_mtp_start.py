"""Warm starts from MTP layers that a target ships: the same predictions, by each layout."""

from copy import deepcopy

import pytest
import torch
from conftest import invoke, printed, scatter_weights, tiny_target
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from coral_hf import CoralDrafter
from coral_hf.target import read_features
from coral_hf.training.layer_start import LAYOUTS
from coral_hf.training.warm_start import warm_start

HIDDEN, GAIN = 32, 1.3
IDS = torch.arange(3, 15)[None]
NAMES = ["MiMo", "DeepSeek-V3", "Qwen3-Next"]


def orthogonal() -> torch.Tensor:
    return torch.linalg.qr(torch.randn(HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(1)))[
        0
    ]


def shipping(folder, layout, reads, **changes):
    """A target whose files hold an MTP layer that reads the token or the feature; its tensors.

    Sizes are the same at all positions, so that norms are what a drafter makes of them.
    """
    target = tiny_target("qwen2", torch.float32)
    with torch.no_grad():
        target.model.norm.weight.fill_(0.7)
        table = target.model.embed_tokens.weight
        table /= table.square().mean(-1, keepdim=True).sqrt() / 0.2
    layer = deepcopy(target.model.layers[-1])
    scatter_weights(layer, seed=3)
    half, none = orthogonal(), torch.zeros(HIDDEN, HIDDEN)
    is_first = (reads == "feature") == layout.is_feature_first
    projection = torch.cat([half, none] if is_first else [none, half], dim=1)
    norms = layout.embedding_norm, layout.feature_norm, layout.output_norm
    tensors = {f"{name}.weight": torch.full((HIDDEN,), GAIN) for name in norms}
    tensors[f"{layout.projection}.weight"] = projection
    tensors |= {layout.layer + name: tensor for name, tensor in layer.state_dict().items()}
    if layout.projection == "eh_proj":  # copies of the target's, which are left out
        tensors |= {
            "embed_tokens.weight": table.detach(),
            "shared_head.head.weight": table.detach(),
        }
    tensors |= changes
    target.save_pretrained(folder)
    beginning = layout.beginning.format(depth=target.config.num_hidden_layers)
    whole = load_file(folder / "model.safetensors")
    whole |= {beginning + name: tensor.clone() for name, tensor in tensors.items()}
    save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})
    return AutoModelForCausalLM.from_pretrained(folder).eval(), layer, half


@torch.no_grad()
def predicted(target, layer, half, reads) -> torch.Tensor:
    """What the MTP layer hands to the LM head, by its formula: (1, length - 1, hidden)."""
    features = read_features(target, IDS, torch.ones_like(IDS))[:, :-1]
    read = features if reads == "feature" else target.model.embed_tokens(IDS[:, 1:])
    stream = GAIN * read / read.square().mean(-1, keepdim=True).sqrt() @ half.T
    length = stream.shape[1]
    mask = torch.full((length, length), float("-inf")).triu(1)[None, None]
    rotary = target.model.rotary_emb(stream, torch.arange(length)[None])
    out = layer(stream, attention_mask=mask, position_embeddings=rotary)
    return GAIN * out / out.square().mean(-1, keepdim=True).sqrt()


@pytest.mark.parametrize("reads", ["feature", "token"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=NAMES)
@torch.no_grad()
def test_the_drafter_predicts_what_the_mtp_layer_predicts(tmp_path, layout, reads):
    target, layer, half = shipping(tmp_path, layout, reads)
    drafter = warm_start(target, "mtp")
    assert type(drafter) is CoralDrafter and drafter.dtype == torch.float32
    features = read_features(target, IDS, torch.ones_like(IDS))[:, :-1]
    found = drafter(target.model.embed_tokens(IDS[:, 1:]), features)
    expected = predicted(target, layer, half, reads)
    # the final norm is of the drafter's own size on average only: directions are compared
    cosine = torch.nn.functional.cosine_similarity(found, expected, dim=-1)
    assert cosine.min() > 0.9999
    found, expected = (target.lm_head(one).argmax(-1) for one in (found, expected))
    assert found.equal(expected) and len(found.unique()) > 3
    ratio = drafter(target.model.embed_tokens(IDS[:, 1:]), features).norm() / HIDDEN**0.5
    assert 0.2 < ratio / (GAIN * (IDS.shape[1] - 1) ** 0.5) < 20  # in the units of features


def test_the_output_stays_the_targets_own(tmp_path):
    target, *_ = shipping(tmp_path, LAYOUTS[0], "token")
    settings = {"attention_mask": torch.ones_like(IDS), "do_sample": False, "max_new_tokens": 16}
    plain = target.generate(IDS, **settings, pad_token_id=0)
    settings |= {"assistant_model": warm_start(target, "mtp"), "speculation": "always"}
    assert target.generate(IDS, **settings, pad_token_id=0).equal(plain)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"self_attn.q_norm.weight": torch.ones(8)}, "unknown: self_attn.q_norm.weight"),
        ({"mlp.experts.0.up_proj.weight": torch.ones(2, 2)}, "unknown: mlp.experts.0.up_proj"),
        ({"input_proj.weight": torch.ones(2, 2)}, r"of another shape: input_proj.weight \(2, 2\)"),
    ],
)
def test_a_layer_of_another_kind_is_refused(tmp_path, changes, said):
    target, *_ = shipping(tmp_path, LAYOUTS[0], "token", **changes)
    with pytest.raises(ValueError, match=f"The MTP layer of {tmp_path}.*{said}"):
        warm_start(target, "mtp")


def test_a_target_that_ships_none_is_told_so(tmp_path):
    target = tiny_target("qwen2", torch.float32)
    with pytest.raises(ValueError, match="loaded from none.*ships no MTP layer: expected tensors"):
        warm_start(target, "mtp")
    target.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"begin with one of model.mtp_layers.0., model.layers.2"):
        warm_start(AutoModelForCausalLM.from_pretrained(tmp_path), "mtp")


def test_the_command_knows_the_name(tmp_path):
    words = ["--target", tmp_path / "none", "--dataset", tmp_path / "x.jsonl", "--output", tmp_path]
    assert "mtp" not in printed(invoke("train", *words, "--from", "mtp"))
    assert "'layer' or 'mtp'" in printed(invoke("train", "--help"))
