"""Which draft heads a drafter has, which it reads, and how they travel with it."""

import json

import pytest
import torch
from conftest import VOCAB, tiny_target
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from coral_hf import CoralDrafter
from coral_hf.heads.draft_heads import (
    FrequencyHead,
    FullHead,
    QuantizedHead,
    RoutedHead,
)
from coral_hf.heads.router import order_hash
from coral_hf.target import read_target

ORDER = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(0))
HOT = torch.tensor([5, 3, 9, 30])
KINDS = {
    "full": FullHead,
    "quantized": QuantizedHead,
    "routed": RoutedHead,
    "frequency": FrequencyHead,
}


@pytest.fixture(scope="module")
def target():
    return tiny_target("llama", torch.float32)


@pytest.fixture
def drafter(target):
    torch.manual_seed(0)
    return CoralDrafter.from_target(target).eval()


def head_of(target, drafter):
    return read_target(target).head


def with_all_heads(target, drafter, order=ORDER):
    drafter.heads.add_router(6, 2, order)
    drafter.config.is_router_trained = True
    drafter.heads.add_frequency_head(HOT)
    return drafter


def level(drafter):
    torch.manual_seed(1)
    return torch.randn(1, 3, drafter.config.hidden_size), torch.zeros(1, 3)


def test_one_drafter_switches_between_all_heads(target, drafter):
    with_all_heads(target, drafter)
    head = head_of(target, drafter)
    for name, kind in KINDS.items():
        assert type(drafter.heads.bind(head, name)) is kind
        drafter.config.draft_head = name
        assert type(drafter.heads.bind(head)) is kind


def test_heads_travel_with_the_drafter(target, drafter, tmp_path):
    with_all_heads(target, drafter).save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    head = head_of(target, drafter)
    assert loaded.config.draft_head == "frequency" and loaded.config.grouping == "custom"
    for name in KINDS:
        ours, theirs = (one.heads.bind(head, name) for one in (drafter, loaded))
        assert ours.logits(*level(drafter)).equal(theirs.logits(*level(drafter)))
    assert loaded.heads.router.order.equal(ORDER) and loaded.heads.router.order.dtype == torch.int64
    assert loaded.heads.hot_tokens.equal(HOT)


def test_order_and_tokens_stay_whole_numbers_in_any_dtype(target, drafter, tmp_path):
    with_all_heads(target, drafter).save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.heads.router.order.equal(ORDER) and loaded.heads.hot_tokens.equal(HOT)
    assert loaded.heads.router.fc.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["routed", "frequency"])
def test_a_head_that_is_not_there_says_how_to_get_it(target, drafter, name):
    with pytest.raises(ValueError, match=f"`draft_head` is '{name}', but this drafter .*full'"):
        drafter.heads.bind(head_of(target, drafter), name)


def test_an_untrained_router_is_not_read(target, drafter):
    drafter.heads.add_router(4, 2)
    with pytest.raises(ValueError, match="no trained router"):
        drafter.heads.bind(head_of(target, drafter), "routed")


def test_an_unknown_head_raises(target, drafter):
    with pytest.raises(ValueError, match="`draft_head` is 'half'; use one of .'full', 'quantized'"):
        drafter.heads.bind(head_of(target, drafter), "half")


@pytest.mark.parametrize("name", [name for name in KINDS if name != "full"])
def test_a_quantised_head_can_only_be_read_whole(target, drafter, name):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    with_all_heads(target, drafter)
    head = head_of(target, drafter)
    packed = torch.nn.Linear(*head.weight.shape[::-1], bias=False)
    quantize_(packed, Int8WeightOnlyConfig())
    assert type(drafter.heads.bind(head._replace(module=packed), "full")) is FullHead
    with pytest.raises(ValueError, match="quantised, offloaded or adapted"):
        drafter.heads.bind(head._replace(module=packed), name)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is dep:FutureWarning")
def test_a_head_that_an_adapter_adds_to_can_only_be_read_whole(drafter):
    target = get_peft_model(
        tiny_target("llama", torch.float32), LoraConfig(target_modules=["lm_head"])
    )
    with_all_heads(tiny_target("llama", torch.float32), drafter)
    head = head_of(target, drafter)
    assert type(drafter.heads.bind(head, "full")) is FullHead
    with pytest.raises(ValueError, match="quantised, offloaded or adapted"):
        drafter.heads.bind(head, "routed")


@pytest.mark.parametrize("name", [name for name in KINDS if name != "full"])
def test_two_targets_take_turns_with_one_drafter(drafter, name):
    targets = [tiny_target("llama", torch.float32) for _ in range(2)]
    with torch.no_grad():
        targets[1].lm_head.weight.mul_(2)
    with_all_heads(targets[0], drafter)
    first, second, again = (
        drafter.heads.bind(head_of(target, drafter), name).logits(*level(drafter))
        for target in (*targets, targets[0])
    )
    assert first.equal(again)
    torch.testing.assert_close(second, 2 * first)


def test_a_tied_head_is_read_like_any_other(drafter):
    tied = tiny_target("llama", torch.float32, tie_word_embeddings=True)
    with_all_heads(tied, drafter)
    head = head_of(tied, drafter)
    assert head.weight is tied.get_input_embeddings().weight
    for name in KINDS:
        logits = drafter.heads.bind(head, name).logits(*level(drafter))
        if name in ("full", "routed", "frequency"):
            is_read = logits.isfinite()
            expected = head.logits(level(drafter)[0])[is_read]
            torch.testing.assert_close(logits[is_read], expected)


def test_what_was_copied_follows_a_head_that_has_changed(drafter):
    target = tiny_target("llama", torch.float32)
    with_all_heads(target, drafter)
    head = head_of(target, drafter)
    for name in ("routed", "quantized", "frequency"):
        before = drafter.heads.bind(head, name).logits(*level(drafter))
        with torch.no_grad():
            head.weight.mul_(2)
        after = drafter.heads.bind(head, name).logits(*level(drafter))
        torch.testing.assert_close(after, 2 * before)


def test_the_head_is_copied_once_for_many_calls(target, drafter):
    with_all_heads(target, drafter)
    head = head_of(target, drafter)
    first, second = (drafter.heads.bind(head, "routed")._weight for _ in range(2))
    assert first is second


def test_groups_of_neighbours_copy_nothing(target, drafter):
    with_all_heads(target, drafter, order=None)
    head = head_of(target, drafter)
    weight = drafter.heads.bind(head, "routed")._weight  # (vocab, hidden)
    assert weight.data_ptr() == head.weight.data_ptr()


def test_a_quantized_copy_is_made_once_and_not_saved(target, drafter, tmp_path):
    drafter.heads.configure(draft_head="quantized")
    head = head_of(target, drafter)
    assert drafter.heads.bind(head).rows is drafter.heads.bind(head).rows
    assert drafter.heads.bind(head).rows.values.dtype == torch.int8
    drafter.save_pretrained(tmp_path)
    assert not any("heads" in name for name in load_file(tmp_path / "model.safetensors"))
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded.heads.bind(head)) is QuantizedHead


def test_a_fresh_drafter_may_read_the_quantized_head(target):
    assert CoralDrafter.from_target(target, draft_head="quantized").config.draft_head == "quantized"


# ---- bad input


def test_a_device_without_products_of_eight_bits_is_refused(target, drafter, monkeypatch):
    monkeypatch.setattr("coral_hf.heads.collection.DEVICES", ("cuda",))
    with_all_heads(target, drafter)
    with pytest.raises(ValueError, match="'quantized', but the target's LM head is on 'cpu'"):
        drafter.heads.bind(head_of(target, drafter), "quantized")


@pytest.mark.parametrize(
    "tokens", [HOT.new_tensor([]), HOT.new_tensor([1, 1]), HOT.new_tensor([VOCAB]), HOT[None]]
)
def test_frequent_tokens_are_different_ids_of_the_vocabulary(drafter, tokens):
    with pytest.raises(ValueError, match=f"expected some different ids from 0 to {VOCAB - 1}"):
        drafter.heads.add_frequency_head(tokens)
    assert drafter.config.num_hot_tokens is None


def test_groups_that_do_not_cover_the_vocabulary_are_refused(drafter):
    with pytest.raises(ValueError, match=f"`order` has .* expected {VOCAB} different ids"):
        drafter.heads.add_router(6, 2, ORDER.clamp(min=1))
    assert drafter.heads.router is None


def test_a_router_trained_for_other_groups_is_not_loaded(target, drafter, tmp_path):
    with_all_heads(target, drafter).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["heads.router.order"] = tensors["heads.router.order"].flip(0).contiguous()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"other groups .* `grouping_hash` is {order_hash(ORDER)}"):
        AutoModel.from_pretrained(tmp_path)


def test_a_checkpoint_whose_groups_miss_a_token_is_not_loaded(target, drafter, tmp_path):
    with_all_heads(target, drafter).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["heads.router.order"][0] = tensors["heads.router.order"][1]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"`order` has .* expected {VOCAB} different ids"):
        AutoModel.from_pretrained(tmp_path)


def test_a_config_that_names_another_grouping_than_the_checkpoint_is_refused(
    target, drafter, tmp_path
):
    with_all_heads(target, drafter, order=None).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"grouping": "kmeans"}))
    with pytest.raises(ValueError, match="`grouping` is 'kmeans' and `grouping_hash` None"):
        AutoModel.from_pretrained(tmp_path)


def test_hot_tokens_of_a_checkpoint_are_tokens(target, drafter, tmp_path):
    with_all_heads(target, drafter).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["heads.hot_tokens"][0] = VOCAB
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="`hot_tokens` has shape"):
        AutoModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_groups": 4, "grouping": "kmeans"}, "come with an order of the vocabulary"),
        ({"num_hot_tokens": 10}, "names a head that has learned nothing"),
        ({"num_groups": 4, "draft_head": "routed"}, "has learned nothing"),
    ],
)
def test_a_fresh_drafter_has_no_head_that_has_learned_nothing(target, fields, message):
    with pytest.raises(ValueError, match=message):
        CoralDrafter.from_target(target, **fields)
