"""Targets that are quantised, or lie partly in memory and partly on the disk, train a drafter."""

import copy

import launched
import pytest
import torch
from conftest import tiny_target
from transformers import AutoModelForCausalLM, TorchAoConfig

from coral_hf import CoralDrafter
from coral_hf.target import read_features

WIDE = {"hidden_size": 64, "intermediate_size": 64}  # groups of int4 weights are 32 wide
OFFLOADED = {
    "model.embed_tokens": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "disk",
}
# of the libraries at their first import
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


@pytest.fixture(scope="module")
def plain():
    return tiny_target("llama", torch.float32, **WIDE)


@pytest.fixture(scope="module")
def folder(plain, tmp_path_factory):
    folder = tmp_path_factory.mktemp("target")
    plain.save_pretrained(folder)
    return folder


def features_of(target) -> torch.Tensor:
    ids = torch.randint(2, 40, (4, 14), generator=torch.Generator().manual_seed(1))
    return read_features(target, ids, torch.ones_like(ids)).float()


def losses_of(target, folder, **settings) -> list[float]:
    torch.manual_seed(0)
    drafter = CoralDrafter.from_target(target).float()
    trainer = launched.make_trainer(folder, target, drafter=drafter, **settings)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("device_map", [OFFLOADED, "auto"])
def test_an_offloaded_target_trains_as_a_whole_one(plain, folder, tmp_path, device_map):
    target = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        device_map=device_map,
        max_memory={"cpu": "100KB"} if device_map == "auto" else None,
        offload_folder=tmp_path / "offload",
    )
    assert target.lm_head.weight.is_meta  # so that there is something to test
    assert torch.equal(features_of(target), features_of(plain))
    assert losses_of(target, tmp_path / "a") == losses_of(plain, tmp_path / "b")
    assert target.lm_head.weight.is_meta


def int8(plain, folder):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    target = copy.deepcopy(plain)
    quantize_(target, Int8WeightOnlyConfig())
    return target


def int8_when_loaded(plain, folder):
    from torchao.quantization import Int8WeightOnlyConfig

    config = TorchAoConfig(Int8WeightOnlyConfig())
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.float32
    )


def int4(plain, folder):
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quantize_

    target = copy.deepcopy(plain)
    quantize_(target, IntxWeightOnlyConfig(torch.int4, PerGroup(32)))
    return target


@pytest.mark.parametrize(
    ("quantise", "least"), [(int8, 0.99), (int8_when_loaded, 0.99), (int4, 0.8)]
)
def test_a_quantised_target_trains_a_drafter(plain, folder, tmp_path, quantise, least):
    pytest.importorskip("torchao")
    target = quantise(plain, folder)
    weight = target.model.layers[0].mlp.up_proj.weight
    assert type(weight) is not torch.nn.Parameter and not weight.requires_grad
    found, expected = features_of(target), features_of(plain)
    assert not torch.equal(found, expected)
    similarity = torch.nn.functional.cosine_similarity(found, expected, dim=-1)
    assert similarity.mean() > least
    losses = losses_of(target, tmp_path, max_steps=12)
    assert losses[-1] < 0.9 * losses[0]


def test_a_target_that_was_never_loaded_is_refused(tmp_path):
    with torch.device("meta"):
        target = tiny_target("llama", torch.float32)
    with pytest.raises(ValueError, match="weights on the meta device"):
        launched.make_trainer(tmp_path, target)
