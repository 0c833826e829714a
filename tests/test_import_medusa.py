"""Import and export of Medusa heads: predictions stay, and what does not fit is named."""

import json

import pytest
import torch
from conftest import invoke, printed, tiny_target
from eagle_checkpoint import HIDDEN, VOCAB, write_checkpoint
from medusa_checkpoint import PUBLISHED, VLLM, medusa_logits, medusa_tensors
from safetensors.torch import load_file, save_file
from test_examples import folder  # noqa: F401  a saved target and its conversations
from test_medusa import made
from transformers import AutoModel, AutoModelForCausalLM

from coral_hf import MedusaDrafter, import_drafter
from coral_hf.checkpoints import export_drafter
from coral_hf.target import read_target
from coral_hf.training.warm_start import kind_of_source, warm_start

BLOCKS = {"{}.{}.linear": "blocks.{}.layers.{}", "{}.{}": "lm_heads.{}"}


@pytest.fixture(scope="module")
def target():
    return tiny_target("llama")


def written(place, tensors, name="medusa_lm_head.pt", config=PUBLISHED):
    place.mkdir(exist_ok=True)
    (place / "config.json").write_text(json.dumps(config))
    (torch.save if name.endswith((".pt", ".bin")) else save_file)(tensors, place / name)
    return place


def as_vllm(tensors: dict, depth: int) -> dict:
    """The same tensors under vLLM's names."""
    found = {}
    for name, tensor in tensors.items():
        head, block, *rest = name.split(".")
        own = f"lm_heads.{head}" if int(block) == depth else f"blocks.{head}.layers.{block}"
        found[f"{own}.{rest[-1]}"] = tensor
    return found


def as_published(tensors: dict, depth: int) -> dict:
    return tensors


def of_a_whole_model(tensors: dict, depth: int) -> dict:
    model = tiny_target("llama").state_dict()
    return {**model, **{f"medusa_head.{name}": tensor for name, tensor in tensors.items()}}


LAYOUTS = {
    "pickle": ("medusa_lm_head.pt", PUBLISHED, as_published),
    "safetensors": ("medusa_lm_head.safetensors", PUBLISHED, as_published),
    "whole": ("pytorch_model.bin", {**PUBLISHED, "model_type": "llama"}, of_a_whole_model),
    "vLLM": ("model.safetensors", VLLM, as_vllm),
}


@pytest.mark.parametrize(
    ("layout", "blocks", "own"),
    [
        *((layout, 1, True) for layout in LAYOUTS),
        ("pickle", 2, True),
        ("safetensors", 1, False),
        ("vLLM", 2, False),
    ],
)
@torch.no_grad()
def test_heads_say_what_the_raw_tensors_and_the_formula_give(target, tmp_path, layout, blocks, own):
    name, config, rename = LAYOUTS[layout]
    tensors = medusa_tensors(3, blocks, own=own)
    written(tmp_path, rename(tensors, blocks), name, config)
    drafter = import_drafter(target, tmp_path)
    assert drafter.config.num_heads == 3 and drafter.config.has_lm_heads == own
    features = torch.randn(5, HIDDEN, dtype=target.dtype)
    expected = medusa_logits(tensors, 3, blocks, features, target.lm_head.weight)
    found = drafter.logits(drafter(features), read_target(target).head)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert drafter.training_record == [{"stage": "import", "source": None, "revision": None}]


def test_a_target_writes_the_same_tokens_with_imported_heads(target, tmp_path):
    drafter = import_drafter(target, written(tmp_path, medusa_tensors()), dtype=torch.float64)
    ids = torch.tensor([[5, 9, 3, 17], [0, 7, 22, 8]])
    settings = {"attention_mask": (ids != 0).long(), "max_new_tokens": 16, "pad_token_id": 0}
    plain = target.generate(ids, do_sample=False, **settings)
    settings |= {"assistant_model": drafter, "speculation": "always", "do_sample": False}
    assert target.generate(ids, **settings).equal(plain)


def test_heads_of_vllm_may_have_no_biases_or_a_copy_of_the_targets_lm_head(target, tmp_path):
    tensors = {name: t for name, t in as_vllm(medusa_tensors(), 1).items() if "bias" not in name}
    drafter = import_drafter(target, written(tmp_path, tensors, "model.safetensors", VLLM))
    assert not drafter.blocks[1][0].linear.bias.any()
    shared = as_vllm(medusa_tensors(own=False), 1)
    shared["lm_heads.0.weight"] = target.lm_head.weight.detach().clone()
    config = {**VLLM, "original_lm_head": True}
    drafter = import_drafter(target, written(tmp_path, shared, "model.safetensors", config))
    assert not drafter.config.has_lm_heads


@pytest.mark.parametrize(
    ("changes", "config", "said"),
    [
        ({"1.0.linear.bias": None}, {}, "missing: blocks.1.0.linear.bias"),
        ({"1.1.weight": None}, {}, "missing: lm_heads.1.weight"),
        ({"3.1.weight": torch.ones(VOCAB, HIDDEN)}, {}, "unknown: lm_heads.3.weight"),
        ({"token_map": torch.ones(4)}, {}, "unknown: token_map"),
        ({"2.1.weight": torch.ones(VOCAB, 8)}, {}, r"lm_heads.2.weight \(40, 8\), not \(40, 32\)"),
        (
            {"0.0.linear.weight": torch.ones(64, 64)},
            {},
            "`hidden_size` of the target is 32, but .* with 64 .lmsys/vicuna-7b-v1.3.",
        ),
        (
            {"0.1.weight": torch.ones(48, HIDDEN)},
            {},
            "`vocab_size` of the target is 40, but .* with 48 .lmsys/vicuna-7b-v1.3.",
        ),
        ({}, {"base_model_name_or_path": 7}, "config.json lacks a field, or .*StrictDataclass"),
        ({"0.0.linear.bias": torch.full((32,), float("inf"))}, {}, "not finite: blocks.0.0.lin"),
    ],
)
def test_what_does_not_fit_is_named(target, tmp_path, changes, config, said):
    tensors = {k: t for k, t in {**medusa_tensors(), **changes}.items() if t is not None}
    written(tmp_path, tensors, config={**PUBLISHED, **config})
    with pytest.raises(ValueError, match=said):
        import_drafter(target, tmp_path)


def test_what_holds_no_heads_is_refused(target, tmp_path):
    written(tmp_path, {"fc.weight": torch.ones(4, 4)})
    with pytest.raises(ValueError, match="no Medusa heads: expected .* found fc.weight. Give the"):
        import_drafter(target, tmp_path)
    torch.save([1, 2], tmp_path / "medusa_lm_head.pt")
    with pytest.raises(ValueError, match="medusa_lm_head.pt is not a state dict"):
        import_drafter(target, tmp_path)
    torch.save(torch.nn.Linear(2, 2), tmp_path / "medusa_lm_head.pt")  # code would run
    with pytest.raises(ValueError, match="medusa_lm_head.pt is damaged, or holds more than tensor"):
        import_drafter(target, tmp_path)
    (tmp_path / "medusa_lm_head.pt").unlink()
    with pytest.raises(ValueError, match="has none of medusa_lm_head.safetensors, medusa_lm_head"):
        import_drafter(target, tmp_path)


def test_a_checkpoint_of_a_family_that_is_not_read_is_named(target, tmp_path):
    write_checkpoint(tmp_path, {**PUBLISHED, "model_type": "dflash"}, {})
    with pytest.raises(ValueError, match="another kind, dflash; import one of EAGLE-1, .*Medusa"):
        import_drafter(target, tmp_path)


# ---- export


@pytest.mark.parametrize("overrides", [{"num_hidden_layers": 2}, {}, {"has_lm_heads": False}])
def test_import_gives_back_what_was_exported(target, tmp_path, overrides):
    drafter = made(target, **overrides)
    done = export_drafter(drafter, "vllm", tmp_path / "out", target)
    assert done.notes == []
    back = import_drafter(target, tmp_path / "out")
    assert back.state_dict().keys() == drafter.state_dict().keys()
    for name, tensor in drafter.state_dict().items():
        assert back.state_dict()[name].equal(tensor), name
    ours, theirs = drafter.config.to_dict(), back.config.to_dict()
    assert {name for name in ours if ours[name] != theirs[name]} <= {"dtype"}


def test_what_an_engine_cannot_express_is_refused(target, tmp_path):
    with pytest.raises(ValueError, match="sglang drafts with no Medusa heads; use 'vllm'"):
        export_drafter(made(target), "sglang", tmp_path / "out", target)
    wider = tiny_target("llama", vocab_size=48)
    with pytest.raises(ValueError, match="its heads have 40 tokens, and the target 48"):
        export_drafter(made(target), "vllm", tmp_path / "out", wider)
    assert not (tmp_path / "out").exists()
    done = export_drafter(made(target), "vllm", tmp_path / "out", target)
    assert '"method": "medusa"' in done.command and '"num_speculative_tokens": 3' in done.command
    assert {*load_file(tmp_path / "out" / "medusa_lm_head.safetensors")} == {*medusa_tensors()}


def test_the_commands_import_and_export_heads(folder, tmp_path):  # noqa: F811
    own = AutoModelForCausalLM.from_pretrained(folder / "target")
    MedusaDrafter.from_target(own, num_heads=2).save_pretrained(tmp_path / "drafter")
    names = ["--target", folder / "target", "--output"]
    made = invoke("export", tmp_path / "drafter", "--to", "vllm", *names, tmp_path / "heads")
    assert '"method": "medusa"' in printed(made)
    back = invoke("import", tmp_path / "heads", *names, tmp_path / "back")
    assert "The drafter is in" in printed(back)
    back = AutoModel.from_pretrained(tmp_path / "back")
    assert type(back) is MedusaDrafter and back.lm_heads[1].weight.equal(own.lm_head.weight)


def test_published_heads_are_a_warm_start(target, tmp_path):
    written(tmp_path, medusa_tensors())
    assert kind_of_source(tmp_path).drafter is MedusaDrafter
    started = warm_start(target, tmp_path)
    assert type(started) is MedusaDrafter and started.dtype == torch.float32
