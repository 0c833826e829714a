"""The stages that train a draft head, and the metrics of a router."""

# ruff: noqa: F811  fixtures are imported

import pytest
import torch
from test_trainer import logged, make_trainer, rows, target  # noqa: F401  fixtures too
from transformers import AutoModel

from coral_hf.training.stages import default_groups

GROUPS = {"num_groups": 6, "num_active_groups": 2}


@pytest.fixture(scope="module")
def trained(target, rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("drafter")
    trainer = make_trainer(target, rows, folder, max_steps=30)
    trainer.train()
    return trainer.model


def copy_of(drafter):
    other = type(drafter)(drafter.config.__class__.from_dict(drafter.config.to_dict()))
    other.load_state_dict(drafter.state_dict())
    return other


@pytest.fixture
def drafter(trained):
    return copy_of(trained)


def test_the_joint_stage_trains_drafter_and_router(target, rows, tmp_path):
    trainer = make_trainer(target, rows, tmp_path, stage="joint", max_steps=30, **GROUPS)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.train()
    for name in ("router_loss", "regression_loss", "loss"):
        assert sum(logged(trainer, name)[-6:]) < sum(logged(trainer, name)[:6]), name
    after = trainer.model.state_dict()
    same = [name for name, tensor in before.items() if after[name].equal(tensor)]
    assert same == ["heads.router.order"]
    assert trainer.model.config.draft_head == "routed"


def test_the_joint_loss_is_the_drafters_and_the_routers(target, rows, tmp_path):
    def first_step(stage, **settings):
        torch.manual_seed(0)
        trainer = make_trainer(
            target, rows, tmp_path / stage, stage=stage, max_steps=1, **GROUPS, **settings
        )
        trainer.train()
        return trainer.state.log_history[0]

    alone, joint = first_step("drafter"), first_step("joint", router_weight=0.5)
    assert joint["loss"] == pytest.approx(alone["loss"] + 0.5 * joint["router_loss"], rel=1e-4)


def test_the_routers_stage_leaves_the_rest_frozen(target, rows, drafter, tmp_path):
    make_trainer(target, rows, tmp_path, drafter, stage="router", **GROUPS)
    for name, parameter in drafter.named_parameters():
        assert parameter.requires_grad == name.startswith("heads.router."), name


def test_further_training_of_a_drafter_keeps_its_heads(
    target,
    rows,
    drafter,
    tmp_path,
):
    drafter.heads.add_router(6, 2)
    make_trainer(target, rows, tmp_path, drafter, stage="drafter")
    for name, parameter in drafter.named_parameters():
        assert parameter.requires_grad != name.startswith("heads.router."), name


def test_settings_of_a_new_head_are_refused_where_the_drafter_has_one(
    target, rows, drafter, tmp_path
):
    drafter.heads.add_router(5, 1)
    for setting in ({"num_groups": 6}, {"grouping": "kmeans"}, {"num_active_groups": 2}):
        with pytest.raises(ValueError, match=f"`{[*setting][0]}` is .* drafter has a router with"):
            make_trainer(target, rows, tmp_path, drafter, stage="router", **setting)
    make_trainer(target, rows, tmp_path, drafter, stage="router")
    own = {"num_groups": 5, "num_active_groups": 1, "grouping": "contiguous"}
    make_trainer(target, rows, tmp_path, drafter, stage="joint", **own)
    assert drafter.config.num_groups == 5


def test_a_seed_determines_a_new_router(target, rows, trained, tmp_path):
    def router(seed):
        torch.rand(3)
        own = copy_of(trained)
        make_trainer(target, rows, tmp_path, own, stage="router", seed=seed, **GROUPS)
        return own.heads.router.fc.weight

    assert router(1).equal(router(1)) and not router(1).equal(router(2))


def test_a_failed_stage_does_not_mark_its_head_as_trained(target, rows, drafter, tmp_path):
    trainer = make_trainer(target, rows, tmp_path, drafter, stage="router", **GROUPS)
    with pytest.raises(ValueError, match="valid checkpoint"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "none"))
    assert not drafter.config.is_router_trained and drafter.config.draft_head == "full"


def test_a_router_resumes_only_with_the_same_groups(target, rows, trained, tmp_path):
    def trainer(seed, **settings):
        own = copy_of(trained)
        fields = {
            "stage": "router",
            "grouping": "kmeans",
            "save_strategy": "steps",
            "save_steps": 2,
        }
        return make_trainer(target, rows, tmp_path, own, seed=seed, **fields, **GROUPS, **settings)

    trainer(0).train()
    again = trainer(0, max_steps=6)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 6
    again.model.save_pretrained(tmp_path / "saved")
    assert AutoModel.from_pretrained(tmp_path / "saved").config.grouping == "kmeans"
    other = trainer(0, max_steps=8)
    other.model.heads.add_router(6, 2, torch.arange(40).flip(0), "kmeans")
    other.model.heads.router.requires_grad_(True)
    with pytest.raises(ValueError, match="`grouping_hash` was"):
        other.train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("vocab_size", "groups"), [(152_064, 64), (4096, 64), (4095, 63), (512, 8), (40, 8), (5, 5)]
)
def test_a_small_vocabulary_has_fewer_groups(vocab_size, groups):
    assert default_groups(vocab_size) == groups


def test_a_router_reads_an_eighth_by_default(target, rows, drafter, tmp_path):
    make_trainer(target, rows, tmp_path, drafter, stage="router")
    config = drafter.config
    assert (config.num_groups, config.num_active_groups, config.grouping) == (8, 1, "kmeans")
