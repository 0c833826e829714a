"""Adapters of PEFT by type: those that map each token alone keep their text, others are refused."""

from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_target
from peft import get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from coral_hf import CoralDrafter
from coral_hf.decoding.guard import judge_target
from coral_hf.decoding.guard.entries import REFUSED, TABLES, TREE

# PEFT asks for a property that newer versions of transformers have renamed
pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is dep:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning"),
]
IDS = torch.tensor([[5, 9, 14, 3, 22], [7, 7, 31, 12, 4]])
LAYERS = {"target_modules": ["q_proj", "v_proj"]}
# what a type's config takes, where it is not the two layers alone
CONFIGS = {
    "ADALORA": {"total_step": 10},
    "ADAPTION_PROMPT": {"adapter_len": 3, "adapter_layers": 1, "target_modules": None},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 4},
    "FOURIERFT": {"n_frequency": 20},
    "IA3": {"feedforward_modules": []},
    "LILY": {"num_B": 2},
    "LN_TUNING": {"target_modules": ["norm"]},
    "MISS": {"r": 4},
    "OFT": {"oft_block_size": 4},
    "POLY": {"n_tasks": 2, "r": 4},
    "PSOFT": {"r": 4},
    "ROAD": {"group_size": 16},
    "SHIRA": {"r": 4},
    "TRAINABLE_TOKENS": {"token_indices": [3, 5, 9], "target_modules": ["embed_tokens"]},
    "VBLORA": {"vector_length": 4, "num_vectors": 16, "topk": 2},
    "WAVEFT": {"n_frequency": 20},
}
TYPES = TABLES["Adapters of PEFT"]
FAST = ("LORA", "IA3", "OFT", "LN_TUNING", "TRAINABLE_TOKENS", "POLY", "ROAD")
INSTALLED = {getattr(one, "value", one) for one in PEFT_TYPE_TO_CONFIG_MAPPING}
KNOWN = [
    pytest.param(name, marks=() if name in FAST else pytest.mark.slow)
    for name, entry in TYPES.items()
    if entry.way == TREE
    and name in {getattr(one, "value", one) for one in PEFT_TYPE_TO_CONFIG_MAPPING}
]


def adapted(target, name: str):
    """A target with an adapter of a type, whose weights are not those that it starts with."""
    kind = next(kind for one, kind in PEFT_TYPE_TO_CONFIG_MAPPING.items() if one.value == name)
    config = kind(**{**LAYERS, "task_type": "CAUSAL_LM", **CONFIGS.get(name, {})})
    if name == "PSOFT":  # made in single precision alone
        target = target.float()
    model = get_peft_model(target, config).double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                noise = torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
                weight.add_(noise, alpha=0.3)
    return model


@pytest.mark.parametrize("name", KNOWN)
def test_an_adapter_of_each_type_keeps_its_text(name):
    target = tiny_target("llama")
    drafter = CoralDrafter.from_target(target).eval()
    given = {"input_ids": IDS, "do_sample": False, "max_new_tokens": 12}
    before = target.generate(**given)
    model = adapted(target, name)
    if name == "POLY":  # a task of its own for each row
        given["task_ids"] = torch.tensor([0, 1])
    plain = model.generate(**given)
    given["eos_token_id"] = int(plain[0, 8])
    plain = model.generate(**given)
    drafted = model.generate(**given, assistant_model=drafter, speculation="always", tree_depth=3)
    assert drafted.equal(plain)
    assert not plain[:, : before.shape[1]].equal(before[:, : plain.shape[1]])


def test_an_adapter_that_mixes_the_tokens_of_a_pass_is_refused():
    target = tiny_target("llama")
    drafter = CoralDrafter.from_target(target).eval()
    if "LILY" in {one.value for one in PEFT_TYPE_TO_CONFIG_MAPPING}:
        model = adapted(target, "LILY")
        with pytest.raises(ValueError, match="routes by the mean over all tokens"):
            model.generate(input_ids=IDS, max_new_tokens=4, assistant_model=drafter)
        with pytest.raises(ValueError, match="routes by the mean over all tokens"):
            CoralDrafter.from_target(model)
    assert all(TYPES[name].way == REFUSED for name in ("LILY", "XLORA", "SHADOW"))


def test_an_adapter_of_an_unknown_type_is_refused():
    target = tiny_target("llama")
    target.peft_config = {"default": SimpleNamespace(peft_type="NEWEST", is_prompt_learning=False)}
    judgement = judge_target(target)
    assert judgement.way == REFUSED
    assert "of type NEWEST, which is not known to map each token alone" in judgement.reasons[0]
