"""Import of EAGLE-3 drafters of four layouts: predictions stay, and what does not fit is named."""

import json
import logging

import pytest
import torch
from conftest import shared_file, tiny_target
from eagle3_checkpoint import (
    DEPTH,
    DRAFT,
    LAYOUTS,
    SAFEAI,
    eagle3_fuse,
    eagle3_step,
    eagle3_tensors,
)
from eagle_checkpoint import HIDDEN, VOCAB, write_checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from coral_hf import Eagle3Drafter, ParallelDrafter, import_drafter
from coral_hf.checkpoints import read_shape
from coral_hf.checkpoints.eagle3 import fitted_shape
from coral_hf.decoding.drafting import TreeShape
from coral_hf.drafters.eagle3 import Eagle3Drafting
from coral_hf.target import read_target

LENGTH, STEPS = 9, 3


@pytest.fixture(scope="module")
def target():
    return tiny_target("llama", num_hidden_layers=DEPTH)


def written(folder, name="SafeAILab", changes=None, config=None, **options):
    """A checkpoint of a layout in `folder`; its config, the prefix of its layer, its tensors."""
    own, first, _, theta = LAYOUTS[name]
    tensors = eagle3_tensors(own, first, **options)
    tensors |= changes or {}
    write_checkpoint(folder, {**own, **(config or {})}, tensors)
    return own, first, theta, tensors


@torch.no_grad()
def from_raw_tensors(target, layers, config, first, theta, tensors, ids):
    """Logits of `STEPS` greedy steps after a prompt, (STEPS, draft_vocab), and its tokens."""
    states = target(ids[None, :-1], output_hidden_states=True).hidden_states
    features = torch.cat([states[layer][0] for layer in layers], -1)  # (length, 3 · hidden)
    hidden, text = eagle3_fuse(config, tensors, features), ids[1:]
    rows = tensors.get("embed_tokens.weight", target.model.embed_tokens.weight.detach()).double()
    steps = []
    for _ in range(STEPS):
        out, logits = eagle3_step(config, first, theta, tensors, rows[text], hidden)
        steps.append(logits[-1])
        place = int(logits[-1].argmax())
        text = torch.cat([text, (place + tensors["d2t"][place])[None]])
        hidden = torch.cat([hidden, out[-1:]])
    return torch.stack(steps), text[-STEPS:]


@torch.no_grad()
def from_the_drafting(target, drafter, ids, monkeypatch):
    """The same from the drafting side of a call."""
    steps, plain = [], Eagle3Drafter.normed

    def normed(own, hidden):  # what its LM head reads, quantized or not
        found = plain(own, hidden)
        steps.append(own.lm_head(found))
        return found

    monkeypatch.setattr(Eagle3Drafter, "normed", normed)
    drafting = Eagle3Drafting(drafter, read_target(target))
    states = target(ids[None, :-1], output_hidden_states=True).hidden_states
    features = torch.cat([states[layer] for layer in drafting.layers], -1)
    drafting.begin(ids[None], features, torch.arange(LENGTH)[None])
    tree = drafting.propose(ids[-1:], TreeShape(STEPS, 1, STEPS + 1))
    return torch.cat(steps)[:, 0], tree.tokens[0, 1:]


BIASES = ("fc", *(f"first.self_attn.{name}_proj" for name in "qkvo"))
BIASES += tuple(f"first.mlp.{name}_proj" for name in ("gate", "up", "down"))


@pytest.mark.parametrize(
    ("name", "biases"), [*((name, ()) for name in LAYOUTS), ("SafeAILab", BIASES)]
)
def test_steps_are_what_the_raw_tensors_and_the_formulas_give(
    target, tmp_path, name, biases, monkeypatch
):
    raw = written(tmp_path, name, biases=biases)
    drafter = import_drafter(target, tmp_path)
    assert type(drafter) is Eagle3Drafter
    assert list(drafter.config.target_layers) == LAYOUTS[name][2]
    ids = torch.randint(VOCAB, (LENGTH + 1,), generator=torch.Generator().manual_seed(1))
    expected, text = from_raw_tensors(target, LAYOUTS[name][2], *raw[:2], *raw[2:], ids)
    found, drafted = from_the_drafting(target, drafter, ids, monkeypatch)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert drafted.equal(text)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_target_writes_the_same_tokens_with_an_imported_drafter(target, tmp_path, name):
    written(tmp_path, name)
    drafter = import_drafter(target, tmp_path)
    ids = torch.tensor([[5, 9, 3, 17], [0, 7, 22, 8]])
    settings = {"attention_mask": (ids != 0).long(), "max_new_tokens": 16, "pad_token_id": 0}
    plain = target.generate(ids, do_sample=False, **settings)
    settings |= {"assistant_model": drafter, "speculation": "always", "do_sample": False}
    assert target.generate(ids, **settings).equal(plain)


@pytest.mark.parametrize(
    ("name", "vocab", "depth", "layers"),
    [
        ("eagle3/llama3_8B_eagle3", 32000, 32, [2, 16, 29]),
        ("specforge/llama3-8B-eagle3", 32000, 32, [2, 16, 29]),
        ("specforge/qwen2.5-7b-eagle3", 16000, 28, [2, 14, 25]),
        ("specforge/qwen3-8b-eagle3", 32000, 36, [2, 18, 33]),
        ("specforge/deepseek-v3-671b-eagle3", 32000, 61, [2, 30, 58]),
        ("specforge/qwen3-8b-peagle", 32000, 36, [2, 18, 33]),
    ],
)
def test_published_configs_are_read(tmp_path, name, vocab, depth, layers):
    path = shared_file(f"drafter_configs/{name}.json")
    (tmp_path / "config.json").write_text(path.read_text())
    _, config, fields, kind = read_shape(tmp_path)
    assert kind is (ParallelDrafter if "peagle" in name else Eagle3Drafter)
    assert fields["draft_vocab_size"] == vocab
    sizes = {name: fields[name] for name in ("hidden_size", "vocab_size", "num_attention_heads")}
    with torch.device("meta"):
        target = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=depth))
    assert fitted_shape(fields, config, target)["target_layers"] == layers


@pytest.mark.parametrize(
    ("fields", "family"),
    [
        ({"speculators_model_type": "dflash"}, "of another kind, dflash;"),
        ({"architectures": ["Qwen3DSparkModel"]}, "dspark"),
        ({"model_type": "coral_eagle3"}, r"of coral_hf already \(EAGLE-3\); load it"),
    ],
)
def test_a_drafter_of_another_family_is_named(target, tmp_path, fields, family):
    written(tmp_path, config=fields)
    with pytest.raises(ValueError, match=family):
        import_drafter(target, tmp_path)


def test_a_drafter_is_known_by_its_tensors_where_its_config_is_an_eagle1_ones(target, tmp_path):
    written(tmp_path, config={"draft_vocab_size": None})
    drafter = import_drafter(target, tmp_path)
    assert type(drafter) is Eagle3Drafter and drafter.config.draft_vocab_size == DRAFT


def embeddings(target) -> torch.Tensor:
    return target.model.embed_tokens.weight.detach().clone()


def test_the_targets_own_embeddings_are_dropped_and_trained_ones_kept(target, tmp_path):
    own = embeddings(target)
    written(tmp_path, changes={"embed_tokens.weight": own})
    assert import_drafter(target, tmp_path).embed_tokens is None
    trained = own + 0.01
    written(tmp_path, changes={"embed_tokens.weight": trained})
    assert import_drafter(target, tmp_path).embed_tokens.weight.equal(trained)


def test_a_drafter_reads_rows_of_the_table_where_the_target_scales_them(tmp_path):
    target = tiny_target("gemma3", num_hidden_layers=DEPTH, layer_types=["full_attention"] * DEPTH)
    written(tmp_path)
    drafter = import_drafter(target, tmp_path)
    assert drafter.embed_tokens.weight.equal(target.get_input_embeddings().weight)


def test_a_checkpoint_keeps_its_precision_or_takes_the_one_that_is_asked_for(target, tmp_path):
    _, _, _, tensors = written(tmp_path)
    drafter = import_drafter(target, tmp_path, dtype=torch.float32)
    assert drafter.lm_head.weight.equal(tensors["lm_head.weight"])
    assert drafter.d2t.dtype == torch.long and drafter.t2d.dtype == torch.bool


def test_a_full_draft_vocabulary_needs_no_maps(target, tmp_path):
    head = torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(0))
    changes = {"lm_head.weight": head, "d2t": None, "t2d": None}
    written(tmp_path, changes=changes, config={"draft_vocab_size": VOCAB})
    drafter = import_drafter(target, tmp_path)
    assert drafter.draft_tokens.equal(torch.arange(VOCAB)) and drafter.t2d.all()


def test_a_target_whose_vocabulary_was_padded_takes_a_drafter_with_its_embeddings(tmp_path, caplog):
    target = tiny_target("llama", num_hidden_layers=DEPTH)
    written(tmp_path, changes={"embed_tokens.weight": embeddings(target) + 0.01})
    target.resize_token_embeddings(VOCAB + 8, mean_resizing=False)
    with caplog.at_level(logging.WARNING):
        drafter = import_drafter(target, tmp_path)
    ids = torch.tensor([[5, VOCAB + 3, 3, 17]])
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    plain = target.generate(ids, **settings)
    assert target.generate(ids, assistant_model=drafter, **settings).equal(plain)


def far(target):
    maps = torch.zeros(DRAFT, dtype=torch.long)
    maps[5] = VOCAB
    return {"d2t": maps}


BAD = {
    "a d2t that leaves the vocabulary": ({}, far, "names 15 different tokens; expected 16 diff"),
    "a d2t with a token twice": (
        {},
        lambda _: {"d2t": torch.arange(DRAFT).neg()},
        "names 1 different tokens; expected 16 different ids",
    ),
    "no d2t": ({}, lambda _: {"d2t": None}, "missing: d2t"),
    "no head": ({}, lambda _: {"lm_head.weight": None}, "missing: lm_head.weight"),
    "an unknown tensor": (
        {},
        lambda _: {"mask_tokens": torch.zeros(1, 1, 3 * HIDDEN)},
        "unknown: mask_tokens",
    ),
    "a norm that the config names": ({"fc_norm": True}, lambda _: {}, "missing: fc_norm.0.weight"),
    "no embeddings of another width": (
        {"hidden_size": 24, "target_hidden_size": 32, "head_dim": 8},
        lambda _: {},
        "missing: embed_tokens.weight",
    ),
    "another shape": (
        {},
        lambda _: {"fc.weight": torch.zeros(HIDDEN, 2 * HIDDEN)},
        r"of another shape: fc.weight \(32, 64\), not \(32, 96\)",
    ),
    "layers beyond the target": (
        {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [2, 5, 11]}},
        lambda _: {},
        "`target_layers` are .3, 6, 12., and the target has 8 layers",
    ),
    "the last layer before its norm": (
        {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [2, 5, 8]}},
        lambda _: {},
        "before the final norm",
    ),
    "another width": ({"hidden_size": 48}, lambda _: {}, "`hidden_size` of the target is 32, but"),
    "another vocabulary": (
        {"vocab_size": 48},
        lambda _: {},
        "`vocab_size` of the target is 40, but .* with 48",
    ),
    "another target": (
        {},
        lambda target: {"embed_tokens.weight": embeddings(target).flip(0)},
        "was made for another target",
    ),
    "a field that makes no sense": (
        {"draft_vocab_size": VOCAB + 1},
        lambda _: {},
        "config.json lacks a field, or has one that .*`draft_vocab_size` is 41",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_named(target, tmp_path, case):
    config, changes, said = BAD[case]
    written(tmp_path, changes=changes(target), config=config)
    with pytest.raises(ValueError, match=f"(?s){said}"):
        import_drafter(target, tmp_path)


def test_the_target_that_a_checkpoint_names_is_in_the_error(tmp_path):
    written(tmp_path, "speculators")
    target = tiny_target("llama", num_hidden_layers=DEPTH, hidden_size=48)
    with pytest.raises(ValueError, match=r"made for a target with 32 \(org/llama\)"):
        import_drafter(target, tmp_path)


def test_a_pickle_that_is_no_state_dict_is_refused(target, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SAFEAI))
    torch.save({"model": {}, "epoch": 3}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="is not a state dict; save drafter.state_dict"):
        import_drafter(target, tmp_path)
