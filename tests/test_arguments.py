"""Settings of a training run that contradict each other raise before anything is loaded."""

import dataclasses
import json

import pytest

from coral_hf import CoralTrainingArguments


def make_arguments(tmp_path, **settings) -> CoralTrainingArguments:
    return CoralTrainingArguments(output_dir=str(tmp_path), report_to=[], **settings)


def test_the_default_is_the_recipe_that_led_in_our_comparisons(tmp_path):
    args = make_arguments(tmp_path)
    assert (args.stage, args.recipe) == ("drafter", "one_step_first")
    assert args.resolved == (3, 1.0, 0.1, 1.0, 0.0, 1.0, 0.3)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"stage": "head"}, "`stage` is 'head'; use one of"),
        ({"num_steps": 0, "csra_weight": 0.0}, "`num_steps` is 0; use a whole number, 1 or more"),
        ({"num_steps": 2.5}, "`num_steps` is 2.5; use a whole number, 1 or more"),
        ({"csra_weight": float("nan")}, "`csra_weight` is nan; use 0 or more"),
        ({"top_k_weight": float("inf")}, "`top_k_weight` is inf; use 0 or more"),
        ({"step_decay": "0.8"}, "`step_decay` is '0.8'; use 0 or more"),
        ({"recipe": "coral", "num_steps": 1}, "`csra_weight` is 0.1, but `num_steps` 1"),
        ({"csra_temperature": 0.0}, "`csra_temperature` is 0.0; use 0.001 or more"),
        ({"regression_weight": -1.0}, "`regression_weight` is -1.0; use 0 or more"),
        ({"classification_weight": -0.1}, "`classification_weight` is -0.1"),
        ({"csra_negatives": "all"}, "`csra_negatives` is 'all'; use one of"),
        ({"csra_weight": -0.1}, "`csra_weight` is -0.1"),
        (
            {"recipe": "eagle4"},
            "`recipe` is 'eagle4'; use one of \\('one_step_first', 'eagle', 'h",
        ),
        ({"recipe": "hass", "top_k": 0}, "`top_k` is 0; use a whole number, 1 or more"),
        ({"csra_positives": "target"}, "`csra_positives` is 'target'"),
        ({"csra_gradient": "none"}, "`csra_gradient` is 'none'"),
        ({"feature_noise": -1.0}, "`feature_noise` is -1.0; use 0 or more"),
        ({"single_step_share": 1.5}, "`single_step_share` is 1.5; use 0 to 1"),
        ({"single_step_share": float("nan")}, "`single_step_share` is nan; use 0 to 1"),
        ({"recipe": "coral", "single_step_share": 1}, "is 0.1, but `single_step_share` 1: use le"),
        ({"max_length": -100}, "`max_length` is -100; use a whole number, 3 or more"),
        (
            {"recipe": "coral", "regression_weight": 0.0, "classification_weight": 0.0},
            "the drafter would not learn",
        ),
    ],
)
def test_a_contradiction_raises_and_names_the_setting(tmp_path, settings, said):
    with pytest.raises(ValueError, match=said):
        make_arguments(tmp_path, **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_steps": 1, "csra_weight": 0.0},
        {"num_steps": 1, "stage": "router"},
        {"num_steps": 5},
        {"num_groups": 8, "num_active_groups": 8},
    ],
)
def test_consistent_settings_are_accepted(tmp_path, settings):
    args = make_arguments(tmp_path, **settings)
    assert {name: getattr(args, name) for name in settings} == settings


def test_settings_are_part_of_to_dict(tmp_path):
    args = make_arguments(tmp_path, csra_weight=0.5, num_steps=4)
    assert args.to_dict()["csra_weight"] == 0.5
    assert args.to_dict()["num_steps"] == 4


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ("eagle", (1, 1.0, 0.1, 0.0, 0.0, 1.0, 0.0)),
        ("hass", (3, 1.0, 0.1, 1.0, 0.0, 1.0, 0.0)),
        ("coral", (3, 1.0, 0.1, 0.0, 0.1, 1.0, 0.0)),
        ("eagle3", (7, 0.0, 1.0, 0.0, 0.0, 0.8, 0.0)),
        ("parallel", (8, 0.0, 1.0, 0.0, 0.0, 1.0, 0.0)),
        ("recurrent", (5, 0.0, 1.0, 0.0, 0.0, 1.0, 0.0)),
    ],
)
def test_a_recipe_sets_what_is_not_set(tmp_path, recipe, expected):
    assert make_arguments(tmp_path, recipe=recipe).resolved == expected
    own = make_arguments(tmp_path, recipe=recipe, num_steps=4, classification_weight=1.0)
    assert own.resolved == (4, expected[1], 1.0, *expected[3:])


def weights(args: CoralTrainingArguments) -> tuple:
    return tuple(args.resolved)


def test_another_recipe_changes_only_what_is_not_set(tmp_path):
    coral = make_arguments(tmp_path, recipe="coral", classification_weight=1.0)
    assert weights(dataclasses.replace(coral, recipe="hass")) == (3, 1.0, 1.0, 1.0, 0.0, 1.0, 0.0)
    assert weights(dataclasses.replace(coral, recipe="eagle")) == (1, 1.0, 1.0, 0.0, 0.0, 1.0, 0.0)
    # 0.1 is what CORAL's recipe gave, but here it is given
    own = dataclasses.replace(coral, recipe="hass", csra_weight=0.1)
    assert weights(own) == (3, 1.0, 1.0, 1.0, 0.1, 1.0, 0.0)
    assert weights(dataclasses.replace(own, recipe="coral")) == (3, 1.0, 1.0, 0.0, 0.1, 1.0, 0.0)
    assert weights(dataclasses.replace(own, recipe="hass")) == weights(own)
    back = dataclasses.replace(dataclasses.replace(coral, recipe="eagle"), recipe="coral")
    assert weights(back) == weights(coral)
    with pytest.raises(ValueError, match="`csra_weight` is 0.1, but `num_steps` 1"):
        dataclasses.replace(own, recipe="eagle")


def test_the_values_of_a_recipe_are_logged(tmp_path):
    args = make_arguments(tmp_path, recipe="coral")
    for fields in (args.to_dict(), args.to_sanitized_dict(), json.loads(args.to_json_string())):
        assert type(fields["num_steps"]) is int and fields["num_steps"] == 3
        assert type(fields["csra_weight"]) is float and fields["csra_weight"] == 0.1
