"""The demo in three steps on a few stories, in seconds."""

import io
from contextlib import nullcontext, redirect_stdout
from dataclasses import replace

import pytest
from rich.progress import Progress
from transformers import AutoModel, PreTrainedTokenizerBase

from coral_hf.demo import Budget, DemoSettings
from coral_hf.demo.models import RECORD, BudgetCallback, bf16_pays, kept, train_tokenizer
from coral_hf.demo.run import run_demo
from coral_hf.demo.stories import held_out_prompts, opening, stories, story_rows, told

STEPS = Budget(max_steps=3, max_seconds=60)
TINY = {
    "num_stories": 60,
    "target_budget": STEPS,
    "drafter_budget": STEPS,
    "router_budget": STEPS,
    "max_length": 64,
    "pad_layers": 3,
    "compile": False,
    "num_prompts": 2,
    "max_new_tokens": 8,
}


def shown_by(settings: DemoSettings):
    """The reports of a demo and what the terminal shows."""
    with redirect_stdout(io.StringIO()) as shown:
        reports = run_demo(settings)
    return reports, " ".join(shown.getvalue().split())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def settings(folder) -> DemoSettings:
    return DemoSettings(output=folder, **TINY)


@pytest.fixture(scope="module")
def first_run(settings):
    return shown_by(settings)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer(stories(0, 60, 0)[0], 400)


def test_the_demo_shows_both_depths_and_leaves_its_files(first_run, settings):
    reports, shown = first_run
    assert "Training the target" in shown and "Training the drafter" in shown
    assert shown.count("the same 16 of 16 tokens") == len(reports) == 2
    assert shown.index("(3 layers, 1 of them padding") < shown.index("tokens (2 layers)")
    assert shown.endswith('--target MODEL --drafter my-drafter "Tell me a story."')
    assert shown.count("┃ alone ┃ with the drafter ┃") == 2
    slower = [report for report in reports if report.numbers["rows"][-1].speedup < 1]
    assert shown.count('with speculation="never" they decode at their own speed') == len(slower)
    here = settings.output
    names = f"--target {here}/target --drafter {here}/drafter --pad-layers 3"
    assert f"coral-hf playground {names} Next, with a model of your own" in shown
    assert (settings.output / "drafter" / "tokenizer.json").is_file()
    for depth in ("2-layers", "3-layers"):
        assert (settings.output / depth / "report.json").is_file()
        assert (settings.output / depth / "report.md").is_file()


def test_the_answers_are_the_targets_own_at_both_depths(first_run):
    reports, _ = first_run
    rows = [row for report in reports for row in report.numbers["rows"] if row.method == "coral"]
    assert {row.exact_match for row in rows} == {1.0}
    assert len({row.tau_per_token for row in rows}) == 1


def test_the_drafter_loads_with_a_trained_router(first_run, settings):
    drafter = AutoModel.from_pretrained(settings.output / "drafter")
    assert drafter.config.is_router_trained and drafter.config.tokenizer_hash is not None


def test_the_second_run_trains_nothing_and_logs_nothing_into_its_bars(first_run, settings, caplog):
    caplog.set_level("INFO", "coral_hf")
    _, shown = shown_by(settings)
    assert "Training" in first_run[1] and "Training" not in shown
    assert not [record for record in caplog.records if record.name.startswith("coral_hf.measure")]


@pytest.mark.slow
def test_rounds_of_the_padded_target_are_compiled_and_the_seconds_are_shown(first_run, settings):
    (own, padded), shown = shown_by(replace(settings, compile=True))
    assert shown.count("Its rounds were compiled ahead, in") == 1
    assert own.environment.compile_seconds is None and padded.environment.compile_seconds > 0
    for report in (own, padded):
        assert {row.exact_match for row in report.numbers["rows"][-2:]} == {1.0}


def test_an_interrupted_training_run_leaves_no_model(tmp_path):
    def interrupted(folder):
        (folder / "half").write_text("")
        raise KeyboardInterrupt

    here = DemoSettings(output=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        kept(here, "model", interrupted)
    folder = kept(here, "model", lambda folder: (folder / "whole").touch())
    assert {file.name for file in folder.iterdir()} == {"whole", RECORD}
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize(
    ("changed", "read", "said"),
    [
        ({"seed": 5}, "weights", "was written with seed = 0, now it is 5"),
        ({}, "other weights", "was written with target = 'weights', now it is 'other weights'"),
        ({"max_new_tokens": 5}, "weights", None),
    ],
)
def test_a_model_is_kept_for_what_it_was_trained_with(tmp_path, changed, read, said):
    here = DemoSettings(output=tmp_path)
    trained = []
    kept(here, "model", trained.append, target="weights")
    with nullcontext() if said is None else pytest.raises(ValueError, match=said):
        kept(replace(here, **changed), "model", trained.append, target=read)
    assert len(trained) == 1


def test_prompts_begin_no_story_that_is_trained_on():
    settings = DemoSettings()
    texts = {prompt.text for part in (0, 1) for prompt in held_out_prompts(settings, part)}
    assert len(texts) == 2 * settings.num_prompts
    trained = told(settings)[0]
    assert len(trained) > 0.9 * settings.num_stories
    assert not texts & {opening(story) for story in trained}


def test_stories_are_the_same_for_a_seed_and_leave_no_phrase_open():
    told = stories(3, 500, 0)[0]
    assert told == stories(3, 500, 0)[0] != stories(4, 500, 0)[0]
    assert len({*told}) == 500
    assert not any(sign in story for story in told for sign in "{}")
    assert {story.count("\n") for story in told} == {3}


def test_rows_hold_a_story_each(tokenizer):
    texts = stories(1, 3, 0)[0]
    rows = story_rows(texts, tokenizer)["input_ids"]
    assert {(row[0], row[-1]) for row in rows} == {(tokenizer.bos_token_id, tokenizer.eos_token_id)}
    assert [tokenizer.decode(row[1:-1]) for row in rows] == texts


def test_the_learning_rate_falls_by_the_nearer_limit():
    with Progress(disable=True) as progress:
        callback = BudgetCallback(Budget(max_steps=10, max_seconds=1000), progress, "Training")
    callback.on_train_begin(None, None, None)
    assert callback.spent(5) == pytest.approx(0.5)
    callback.start -= 900
    assert callback.spent(5) == pytest.approx(0.9, abs=0.01)


def test_the_faster_precision_is_measured():
    assert bf16_pays() in (True, False)
