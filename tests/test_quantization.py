"""Quantized targets: exact where rows are independent, else it is said that texts only agree."""

import pytest
import torch
from conftest import tiny_target
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from coral_hf import CoralDrafter
from coral_hf.decoding.guard import REFUSED, TREE, judge_target
from coral_hf.decoding.guard.entries import TABLES

QUANTIZATION = TABLES["Quantization"]
AGREEMENT = "its text agrees with plain `generate` but for near ties"
DYNAMIC = {"dynamic": True, "strategy": "tensor"}
PER_TOKEN = {"dynamic": True, "strategy": "token"}
INT8 = {"quant_method": "bitsandbytes", "load_in_8bit": True}
# config of a target → the kind that it is
CONFIGS = [
    (INT8, "bitsandbytes_8bit"),
    ({**INT8, "llm_int8_threshold": 0.0}, "bitsandbytes_8bit without outliers"),
    ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes_4bit"),
    ({"quant_method": "fp8", "activation_scheme": "dynamic"}, "fp8"),
    ({"quant_method": "fp8", "activation_scheme": "static"}, "fp8 static"),
    ({"quant_method": "fp_quant", "forward_dtype": "mxfp4"}, "fp_quant mxfp4"),
    ({"quant_method": "quanto", "activations": "int8"}, "quanto of activations"),
    *(
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"a": {"input_activations": inputs}},
            },
            f"compressed-tensors{kind}",
        )
        for inputs, kind in ((DYNAMIC, " of dynamic tensors"), (PER_TOKEN, ""), (None, ""))
    ),
]
OF_ONE_KIND = [
    ({"quant_method": name}, name)
    for name in QUANTIZATION
    if " " not in name and not name.startswith(("bitsandbytes", "torchao"))
]


@pytest.mark.parametrize(("config", "kind"), [*CONFIGS, *OF_ONE_KIND])
def test_a_kind_of_quantization_is_exact_agrees_or_is_refused(config, kind):
    target = tiny_target("llama")
    target.config.quantization_config = config
    judgement, entry = judge_target(target), QUANTIZATION[kind]
    assert judgement.way == entry.way == TREE
    assert [note.endswith(AGREEMENT) for note in judgement.notes] == [True] * bool(entry.note)


def test_every_method_of_transformers_is_known():
    assert set(AUTO_QUANTIZATION_CONFIG_MAPPING) <= QUANTIZATION.keys()


def test_a_method_that_nobody_knows_is_refused():
    target = tiny_target("llama")
    target.config.quantization_config = {"quant_method": "of tomorrow"}
    assert judge_target(target).way == REFUSED
    with pytest.raises(ValueError, match="quantized by 'of tomorrow'.*dequantize the target"):
        CoralDrafter.from_target(target)


def test_that_texts_only_agree_is_said_once(caplog, monkeypatch):
    said = []
    monkeypatch.setattr("coral_hf.decoding.guard.target.logger.warning_once", said.append)
    target = tiny_target("llama")
    target.config.quantization_config = INT8
    CoralDrafter.from_target(target)
    assert len(said) == 1 and "outlier columns" in said[0] and AGREEMENT in said[0]


def test_experts_of_bounded_capacity_are_refused():
    target = tiny_target("mixtral")
    target.config.expert_capacity = 4
    assert "experts drop tokens beyond a capacity" in judge_target(target).obstacle


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("Int8WeightOnlyConfig", {}),
        ("Int8DynamicActivationInt8WeightConfig", {}),
        ("Float8WeightOnlyConfig", {}),
    ],
)
def test_a_torchao_layer_has_independent_rows_unless_it_is_said(name, fields):
    quantization = pytest.importorskip("torchao.quantization")
    target = tiny_target("llama", torch.float32)
    quantization.quantize_(target, getattr(quantization, name)(**fields))
    layer = target.model.layers[0].mlp.up_proj
    torch.manual_seed(0)
    rows = torch.randn(6, 32) * torch.logspace(-2, 2, 6)[:, None]
    with torch.no_grad():
        together, alone = layer(rows), torch.cat([layer(row[None]) for row in rows])
    off = (together - alone).abs().amax(1) / alone.abs().amax(1)  # (rows,)
    is_exact = float(off.max()) < 1e-4
    judgement = judge_target(target)
    assert judgement.way == TREE and is_exact == (not judgement.notes)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_torchao_layer_scaled_over_a_pass_is_said_to_agree():
    quantization = pytest.importorskip("torchao.quantization")
    config = quantization.Int8DynamicActivationInt8WeightConfig(
        granularity=quantization.PerTensor()
    )
    target = tiny_target("llama", torch.float32)
    quantization.quantize_(target, config)
    assert judge_target(target).notes[0].endswith(AGREEMENT)
