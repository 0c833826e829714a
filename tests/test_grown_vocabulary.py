"""Training, export and import follow a target whose vocabulary has changed since."""

import json

import launched
import pytest
import torch
from conftest import VOCAB, tiny_target
from eagle_checkpoint import LLAMA2, eagle_tensors, write_checkpoint
from safetensors.torch import load_file

from coral_hf import CoralDrafter, import_drafter
from coral_hf.checkpoints import export_drafter
from coral_hf.target import read_target
from coral_hf.training.stages import follow_vocabulary

GROWN, PADDED, SHRUNK = VOCAB + 3, 64, VOCAB - 7
CALL = {"inputs": torch.tensor([[1, 2, 3], [4, 9, 5]]), "do_sample": False, "max_new_tokens": 12}


def resized(size: int):
    """A target whose embedding was resized to `size` rows after its drafter was made."""
    torch.manual_seed(0)
    target = tiny_target("llama", torch.float32)
    drafter = CoralDrafter.from_target(target).eval()
    target.resize_token_embeddings(size, mean_resizing=False)
    return target, drafter


# ---- training


@pytest.mark.parametrize("size", [GROWN, PADDED])
@pytest.mark.parametrize("stage", ["drafter", "router", "joint"])
def test_a_stage_is_trained_for_the_vocabulary_as_it_is_now(tmp_path, size, stage):
    target, drafter = resized(size)
    heads = {} if stage == "drafter" else {"num_groups": 4}
    trainer = launched.make_trainer(
        tmp_path, target, drafter=drafter, stage=stage, max_steps=1, **heads
    )
    trainer.train()
    assert trainer.drafter.config.vocab_size == size
    trainer.save_model(tmp_path / "saved")
    loaded = CoralDrafter.from_pretrained(tmp_path / "saved")
    assert target.generate(**CALL, assistant_model=loaded).equal(target.generate(**CALL))


def test_a_router_of_another_vocabulary_is_kept_or_refused_with_the_way_to_a_new_one(tmp_path):
    target, drafter = resized(GROWN)
    drafter.heads.add_router(5, 2)
    drafter.heads.configure(is_router_trained=True, draft_head="routed")
    settings = {"drafter": drafter, "max_steps": 1}
    for stage in ("router", "joint"):
        with pytest.raises(ValueError, match=f"of the target is {GROWN}, .*remove_router"):
            launched.make_trainer(tmp_path / stage, target, stage=stage, **settings)
    trainer = launched.make_trainer(tmp_path, target, **settings)
    trainer.train()
    assert trainer.drafter.config.vocab_size == VOCAB
    assert target.generate(**CALL, assistant_model=drafter).equal(target.generate(**CALL))
    drafter.heads.remove_router()
    launched.make_trainer(tmp_path / "new", target, stage="router", num_groups=4, **settings)
    assert drafter.config.vocab_size == GROWN and drafter.heads.router is not None


def test_frequent_tokens_that_a_target_has_lost_stay_with_the_vocabulary_before():
    target, drafter = resized(SHRUNK)
    for tokens, size in (([7, VOCAB - 1, 5], VOCAB), ([7, 5], SHRUNK)):
        drafter.heads.add_frequency_head(torch.tensor(tokens))
        follow_vocabulary(drafter, target, "drafter")
        assert drafter.config.vocab_size == size


# ---- export


@pytest.mark.parametrize("size", [GROWN, PADDED, SHRUNK])
@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_an_engine_gets_the_vocabulary_of_the_target_as_it_is_now(tmp_path, engine, size):
    target, drafter = resized(size)
    drafter.heads.add_frequency_head(torch.tensor([7, VOCAB - 1, 5]))
    export_drafter(drafter, engine, tmp_path / "out", target)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == size
    assert drafter.config.vocab_size == VOCAB
    if engine == "vllm":
        tensors = load_file(tmp_path / "out" / "model.safetensors")
        assert tensors["embed_tokens.weight"].equal(target.model.embed_tokens.weight)


# ---- import


def checkpoint(folder, target=None):
    """An EAGLE checkpoint, with copies of a target's embedding and LM head."""
    folder.mkdir()
    copies = {}
    if target is not None:
        copies["embed_tokens.weight"] = target.model.embed_tokens.weight.detach().clone()
        copies["lm_head.weight"] = read_target(target).head.weight.detach().clone()
    write_checkpoint(folder, LLAMA2, {**eagle_tensors(LLAMA2), **copies})
    return folder


@pytest.mark.parametrize("size", [GROWN, PADDED, SHRUNK])
def test_a_checkpoint_follows_a_target_whose_vocabulary_has_changed_since(tmp_path, size):
    target, _ = resized(VOCAB)
    folder = checkpoint(tmp_path / "eagle", target)
    before = import_drafter(target, folder)
    target.resize_token_embeddings(size, mean_resizing=False)
    drafter = import_drafter(target, folder)
    assert drafter.config.vocab_size == size
    for name, weight in drafter.state_dict().items():
        assert weight.equal(before.state_dict()[name])
    assert target.generate(**CALL, assistant_model=drafter).equal(target.generate(**CALL))


def test_a_checkpoint_of_another_target_is_refused_whatever_its_vocabulary(tmp_path):
    target, _ = resized(GROWN)
    other = tiny_target("llama", torch.float32)
    with torch.no_grad():
        other.model.embed_tokens.weight.mul_(-1)
    with pytest.raises(ValueError, match="(?s)embed_tokens.*made for another target"):
        import_drafter(target, checkpoint(tmp_path / "other", other))
    with pytest.raises(ValueError, match=f"is {GROWN}, but .* with {VOCAB}"):
        import_drafter(target, checkpoint(tmp_path / "without"))
