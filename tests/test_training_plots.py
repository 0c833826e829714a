"""Plots of a training run, from its log, and its scalars in TensorBoard."""

from pathlib import Path

import pytest
import torch
from conftest import VOCAB, tiny_target
from datasets import Dataset

from coral_hf import CoralDrafter, CoralTrainer, CoralTrainingArguments
from coral_hf.training.evaluation.curves import curve, curves_by_step, figures

NAMES = {"losses", "feature_similarity", "acceptance_length", "acceptance_by_depth"}
FIGURES = {f"{name}.png" for name in NAMES}


@pytest.fixture(scope="module")
def target():
    return tiny_target("llama", torch.float32)


def run(target, folder, drafter=None, **settings):
    """Six steps with two evaluations, of two datasets."""
    torch.manual_seed(0)
    drafter = CoralDrafter.from_target(target) if drafter is None else drafter
    texts = torch.randint(2, VOCAB, (8, 20)).tolist()
    rows = Dataset.from_list(
        [{"input_ids": t, "attention_mask": [1] * 20, "labels": [-100] * 4 + t[4:]} for t in texts]
    )
    fields = {
        "output_dir": str(folder),
        "max_steps": 6,
        "logging_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "eval_prompts": 2,
        "eval_max_new_tokens": 8,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    trainer = CoralTrainer(
        model=drafter,
        target_model=target,
        args=CoralTrainingArguments(**{**fields, **settings}),
        train_dataset=rows,
        eval_dataset={"chat": rows, "code": rows},
    )
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def trainer(target, tmp_path_factory):
    return run(target, tmp_path_factory.mktemp("run"), save_strategy="steps", save_steps=6)


def test_a_training_run_writes_its_plots(trainer):
    from matplotlib.image import imread

    folder = Path(trainer.args.output_dir)
    assert {file.name for file in folder.glob("*.png")} == FIGURES
    for name in FIGURES:
        picture = imread(folder / name)
        assert picture.shape[0] > 400 and picture.std() > 0.01


def test_the_curves_are_what_was_logged(trainer):
    log = trainer.state.log_history
    drawn = figures(log)
    panels = {name: figure.axes for name, figure in drawn.items()}
    first = panels["losses"][0].lines[1]
    assert first.get_label() == "step 2" and list(first.get_xdata()) == [2, 4, 6]
    assert list(first.get_ydata()) == curve(log, "regression_loss_2")[1]
    assert [line.get_label() for line in panels["feature_similarity"][0].lines] == [
        "step 2",
        "step 3",
    ]
    lengths = {line.get_label(): line for line in panels["acceptance_length"][0].lines}
    assert set(lengths) == {
        f"eval_{part}, {way}" for part in ("chat", "code") for way in ("decoded", "simulated chain")
    }
    expected = curve(log, "eval_code_acceptance_length")
    assert list(lengths["eval_code, decoded"].get_xdata()) == expected[0] == [3, 6]
    assert list(lengths["eval_code, decoded"].get_ydata()) == expected[1]
    chat, _ = panels["acceptance_by_depth"]
    assert [line.get_label() for line in chat.lines] == ["step 3", "step 6"]
    assert chat.lines[1].get_ydata()[0] == curve(log, "eval_chat_acceptance_depth_1")[1][1]


def test_a_run_without_plots_leaves_no_file(target, tmp_path):
    run(target, tmp_path, plots=False, max_steps=3)
    assert not list(tmp_path.glob("*.png"))


def test_a_plot_that_cannot_be_written_gives_a_warning(target, tmp_path, caplog):
    (tmp_path / "losses.png").mkdir()
    with caplog.at_level("WARNING", "coral_hf"):
        trainer = run(target, tmp_path, max_steps=2, eval_steps=2)
    assert trainer.state.global_step == 2
    assert f"{tmp_path / 'losses.png'} could not be written ([Errno 21]" in caplog.text
    assert {file.name for file in tmp_path.glob("*.png")} == FIGURES
    assert (tmp_path / "acceptance_length.png").stat().st_size > 1000


def test_the_routers_stage_is_plotted_too(target, tmp_path):
    run(target, tmp_path, stage="router", num_groups=6, max_steps=2, eval_steps=2)
    expected = FIGURES - {"feature_similarity.png"}
    assert {file.name for file in tmp_path.glob("*.png")} == expected


def test_a_log_without_our_metrics_gives_no_plot():
    assert figures([{"loss": 1.0, "step": 1}, {"eval_loss": 2.0, "step": 1}]) == {}


def test_curves_are_ordered_by_step_of_the_unroll():
    log = [
        {"agreement_1": 0.5, "agreement_2": 0.4, "agreement": 9.0, "step": 10},
        {"agreement_1": 0.6, "agreement_12": 0.1, "step": 20},
    ]
    assert curves_by_step(log, "agreement") == {
        1: ([10, 20], [0.5, 0.6]),
        2: ([10], [0.4]),
        12: ([20], [0.1]),
    }


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of tensorboard itself
def test_tensorboard_gets_every_scalar(target, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    trainer = run(target, tmp_path, report_to="tensorboard")
    events = EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    scalars = set(events.Tags()["scalars"])
    for entry in trainer.state.log_history:
        for name in set(entry) - {"step"}:
            written = f"eval/{name[5:]}" if name.startswith("eval_") else f"train/{name}"
            assert written in scalars
    assert {"train/feature_similarity_2", "eval/chat_acceptance_depth_1"} <= scalars
    found = [event.value for event in events.Scalars("eval/code_acceptance_length")]
    assert found == pytest.approx(
        curve(trainer.state.log_history, "eval_code_acceptance_length")[1]
    )
