"""`autotune` measures trees and keeps the best one with its costs."""

import pytest
import torch
from conftest import any_target, scatter_weights, tiny_target
from transformers import AutoModel
from transformers.utils import logging

from coral_hf import CoralDrafter, autotune
from coral_hf.measure import Call
from coral_hf.measure.autotune import CANDIDATES, Trial, fit_costs

PROMPT = torch.tensor([[5, 9, 3, 17, 22, 8]])


@pytest.fixture(scope="module")
def target():
    return tiny_target("llama", torch.float32)


@pytest.fixture
def drafter(target):
    drafter = CoralDrafter.from_target(target).eval()
    scatter_weights(drafter, seed=1)
    return drafter


@pytest.fixture(autouse=True)
def _no_bar():
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


def test_the_tree_and_its_costs_are_saved_with_the_drafter(target, drafter, tmp_path):
    tuning = autotune(drafter, target, [PROMPT], max_seconds=0.5)
    drafter.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path).generation_config
    assert {name: getattr(loaded, name) for name in tuning.tree} == tuning.tree
    assert loaded.draft_costs == tuning.costs
    assert set(tuning.costs) == {"base", "level", "node"} and min(tuning.costs.values()) > 0


def test_only_the_depth_is_tuned_for_a_target_that_takes_chains(target):
    bloom = any_target("bloom", torch.float32)
    drafter = CoralDrafter.from_target(bloom).eval()
    tuning = autotune(drafter, bloom, [PROMPT], max_seconds=0.5)
    assert [*tuning.tree] == ["tree_depth"]
    assert drafter.generation_config.tree_depth == tuning.tree["tree_depth"]
    assert set(tuning.costs) == {"base", "level", "node"}


def test_no_call_begins_after_the_time_limit(target, drafter):
    before = {"tree_depth": 6, "tree_top_k": 10, "tree_nodes": 60}
    assert autotune(drafter, target, [PROMPT] * 3, max_seconds=0).tree == before


def test_unusable_prompts_are_refused(target, drafter):
    with pytest.raises(ValueError, match="`prompts` is empty"):
        autotune(drafter, target, [])
    with pytest.raises(ValueError, match="`tokenizer` is None"):
        autotune(drafter, target, ["once upon a time"])


def test_costs_are_fitted_in_plain_passes():
    trials = [
        Trial(
            {},
            plain=0.01,
            call=Call(
                tokens=[[7] * 21],
                round_lengths=[2] * 10,
                num_rounds=10,
                num_levels=10 * levels,
                num_nodes=10 * (nodes + 1),
                stage_seconds={
                    "prefill": 9.0,
                    "draft": 10 * levels * 0.001,
                    "verify": 10 * (0.01 + 0.0002 * nodes),
                    "other": 10 * 0.002,
                },
            ),
        )
        for nodes, levels in ((5, 2), (30, 4), (59, 6))
    ]
    assert fit_costs(trials) == pytest.approx({"base": 1.2, "level": 0.1, "node": 0.02}, rel=1e-3)


def test_the_search_covers_chains_and_trees():
    assert 1 in CANDIDATES["tree_top_k"] and max(CANDIDATES["tree_nodes"]) >= 60
