"""Warm starts: initial weights from another drafter or an EAGLE checkpoint."""

import json

import pytest
import torch
from conftest import VOCAB, tiny_target
from peft import get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from coral_hf import CoralDrafter
from coral_hf.identity import tokenizer_hash
from coral_hf.training.stages import lora
from coral_hf.training.warm_start import from_drafter, warm_start

HIDDEN = 32


@pytest.fixture(scope="module")
def target():
    return tiny_target("llama", torch.float32)


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    words = {f"w{index}": index for index in range(VOCAB)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0")))


def assert_same(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name].float()) for name, tensor in ours.items())


# ---- a drafter of another target


@pytest.fixture(scope="module")
def other(tokenizer):
    """A trained drafter, as far as can be seen, of a deeper target of other layers."""
    torch.manual_seed(1)
    source = tiny_target("llama", torch.float32, num_hidden_layers=3)
    drafter = CoralDrafter.from_target(source, intermediate_size=40, fc_bias=True)
    drafter.heads.add_router(4, 2)
    drafter.config.is_router_trained = True
    drafter.config.draft_head = "routed"
    drafter.config.tokenizer_hash = tokenizer_hash(tokenizer)
    return drafter


def test_all_weights_of_another_drafter_are_kept_for_the_same_vocabulary(target, other, tokenizer):
    drafter = warm_start(target, other, tokenizer)
    assert_same(drafter.state_dict(), other.state_dict())
    assert drafter.config.draft_head == "routed" and drafter.config.is_router_trained


def test_a_router_is_dropped_for_another_vocabulary(other, tokenizer):
    target = tiny_target("llama", torch.float32, vocab_size=VOCAB + 8)
    drafter = from_drafter(target, other, tokenizer)
    assert drafter.heads.router is None and drafter.config.vocab_size == VOCAB + 8
    kept = {k: v for k, v in other.state_dict().items() if not k.startswith("heads.router.")}
    assert_same(drafter.state_dict(), kept)
    prompt = torch.tensor([[1, 5, 9]])
    settings = {"do_sample": False, "max_new_tokens": 6, "attention_mask": torch.ones_like(prompt)}
    drafted = target.generate(prompt, assistant_model=drafter.eval(), **settings)
    assert torch.equal(drafted, target.generate(prompt, **settings))


def test_a_router_is_dropped_without_a_tokenizer(target, other):
    assert from_drafter(target, other).heads.router is None


def test_a_drafter_starts_from_a_folder(target, other, tokenizer, tmp_path):
    other.save_pretrained(tmp_path)
    drafter = warm_start(target, tmp_path, tokenizer)
    assert_same(drafter.state_dict(), other.state_dict())
    assert drafter.config.intermediate_size == 40


def test_a_drafter_of_another_width_is_refused(other):
    target = tiny_target("llama", torch.float32, hidden_size=64)
    with pytest.raises(ValueError, match="`hidden_size` of the target is 64, but the.* with 32"):
        from_drafter(target, other)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is dep:FutureWarning")
def test_a_drafter_with_an_adapter_is_merged_first(target, tmp_path):
    CoralDrafter.from_target(target).save_pretrained(tmp_path)
    drafter = CoralDrafter.from_pretrained(tmp_path)
    get_peft_model(drafter, lora(2)).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="has no config.json.* An adapter is merged first"):
        warm_start(target, tmp_path / "adapter")
    with pytest.raises(ValueError, match="has an adapter; merge it by"):
        warm_start(target, CoralDrafter.from_pretrained(tmp_path / "adapter"))


def test_a_path_without_a_checkpoint_is_refused(target, tmp_path):
    with pytest.raises(ValueError, match="no folder .*absent"):
        warm_start(target, tmp_path / "absent")
    with pytest.raises(ValueError, match="has no config.json"):
        warm_start(target, tmp_path)


# ---- an EAGLE checkpoint


def eagle_folder(folder, target, bias=True, weights="pytorch_model.bin", **changes):
    """A checkpoint as EAGLE's training writes it; `changes` replace tensors, None drops one."""
    torch.manual_seed(2)
    sizes = {"intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    fields = {"model_type": "llama", "hidden_size": HIDDEN, "vocab_size": VOCAB, **sizes}
    config = {**fields, "num_hidden_layers": 1, "rope_theta": 20000.0, "bias": bias}
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {
        "self_attn.q_proj": (32, 32),
        "self_attn.k_proj": (16, 32),
        "self_attn.v_proj": (16, 32),
        "self_attn.o_proj": (32, 32),
        "mlp.gate_proj": (48, 32),
        "mlp.up_proj": (48, 32),
        "mlp.down_proj": (32, 48),
        "post_attention_layernorm": (32,),
    }
    state = {f"layers.0.{name}.weight": torch.randn(shape) for name, shape in shapes.items()}
    state |= {"fc.weight": torch.randn(32, 64), **({"fc.bias": torch.randn(32)} if bias else {})}
    state["embed_tokens.weight"] = target.model.embed_tokens.weight.detach().half()
    state = {k: v for k, v in {**state, **changes}.items() if v is not None}
    (torch.save if weights.endswith(".bin") else save_file)(state, folder / weights)
    return {k: v for k, v in state.items() if k != "embed_tokens.weight"}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("weights", ["pytorch_model.bin", "model.safetensors"])
def test_an_eagle_checkpoint_becomes_a_drafter(target, tmp_path, bias, weights):
    state = eagle_folder(tmp_path, target, bias, weights)
    drafter = warm_start(target, tmp_path)
    assert_same(drafter.state_dict(), state)
    assert drafter.config.fc_bias == bias
    assert drafter.config.rope_parameters["rope_theta"] == 20000.0
    assert drafter.config.vocab_size == VOCAB


def test_an_eagle_checkpoint_without_embeddings_becomes_a_drafter(target, tmp_path):
    state = eagle_folder(tmp_path, target, **{"embed_tokens.weight": None})
    assert_same(warm_start(target, tmp_path).state_dict(), state)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"norm.weight": torch.ones(32)}, "unknown: norm.weight"),
        ({"layers.0.mlp.up_proj.weight": None}, "missing: layers.0.mlp.up_proj.weight"),
        (
            {"layers.0.self_attn.o_proj.weight": torch.ones(32, 16)},
            r"of another shape: layers.0.self_attn.o_proj.weight \(32, 16\), not \(32, 32\)",
        ),
        ({"embed_tokens.weight": torch.ones(VOCAB, 32)}, "embed_tokens.*its rows are not near"),
        ({"embed_tokens.weight": torch.ones(9, 32)}, r"embed_tokens.*the shape \(9, 32\)"),
    ],
)
def test_an_eagle_checkpoint_that_does_not_fit_is_refused(target, tmp_path, changes, said):
    eagle_folder(tmp_path, target, **changes)
    with pytest.raises(ValueError, match=said):
        warm_start(target, tmp_path)


def test_the_folder_of_a_target_is_refused(target, tmp_path):
    target.save_pretrained(tmp_path)
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path), type(target))
    with pytest.raises(ValueError, match="missing: fc.weight.*unknown: model.embed"):
        warm_start(target, tmp_path)
