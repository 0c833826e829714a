"""The comparison of recipes: whole seeds, runs that repeat, statistics as textbooks have them."""

import json
import runpy
import time
from itertools import count

import numpy as np
import pytest
from scipy import stats
from test_examples import EXAMPLES, folder, run  # noqa: F401  a saved target
from transformers import AutoModel, PrinterCallback

from coral_hf import CoralDrafter

STORY = "Once there was a small {} who lived in a house by the sea."
FIRST, SECOND = [4.04, 4.08, 3.99, 4.11, 4.02], [3.98, 4.02, 4.01, 4.05, 3.97]


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(EXAMPLES / "recipes.py"))


def interrupt(monkeypatch, after):
    """Interrupt a training run when it has written a checkpoint."""

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == after:
            raise KeyboardInterrupt

    monkeypatch.setattr(PrinterCallback, "on_save", on_save)


@pytest.mark.slow
def test_a_comparison_goes_on_by_whole_seeds(folder, tmp_path, monkeypatch, capsys):  # noqa: F811
    heroes = ("cat", "dog", "hen", "fox", "dog", "cow", "cow")
    (tmp_path / "stories.txt").write_text("<|endoftext|>".join(map(STORY.format, heroes)))
    table, plot = tmp_path / "rows.jsonl", tmp_path / "tau.png"
    words = ["--target", folder / "target", "--dataset", tmp_path / "stories.txt", "--rows", table]
    words += ["--seeds", 2, "--steps", 4, "--hold-out", 3, "--prompts", 3, "--prompt-length", 26]
    words += ["--max-new-tokens", 6, "--max_length", 40]

    def rows(*more):
        run(monkeypatch, "recipes.py", *words, *more)
        return [json.loads(line) for line in table.read_text().splitlines()]

    table.touch()
    assert rows("--seconds", 0) == [] and "Time is up" in capsys.readouterr().out
    found = rows("--plot", plot)
    shown = capsys.readouterr().out
    assert "Time is up" not in shown and plot.is_file()
    assert "| coral − hass | 2 | " in shown and "| coral | 2 | " in shown
    order = [(seed, recipe) for seed in (0, 1) for recipe in ("eagle", "hass", "coral")]
    assert [(row["seed"], row["recipe"]) for row in found] == order
    for row in found:
        assert row["prompts"] == 1 and row["tokens"] == 5  # a dog was trained on, a cow asked twice
        assert row["tau"] == pytest.approx(row["tokens"] / sum(row["rounds"]))
        assert [each["steps"] for each in (*row["before"], row)] == [1, 2, 3, 4]
        assert len(row["similarity"]) == (0 if row["recipe"] == "eagle" else 2)
    assert found[2]["similarity"] != found[5]["similarity"]  # another seed
    table.write_text("".join(table.read_text().splitlines(keepends=True)[:-1]))
    again = rows()
    for row in (found[-1], again[-1]):
        row.pop("minutes"), row.pop("processor_minutes")
    assert again == found
    # the last run once more, interrupted after its second checkpoint
    table.write_text("".join(table.read_text().splitlines(keepends=True)[:-1]))
    interrupt(monkeypatch, after=2)
    with pytest.raises(KeyboardInterrupt):
        rows()
    monkeypatch.undo()
    assert len(table.read_text().splitlines()) == 5
    assert [path.name for path in tmp_path.glob("unfinished/*/checkpoint*")] == ["checkpoint-2"]
    again = rows("--keep", tmp_path / "kept")
    drafter = AutoModel.from_pretrained(tmp_path / "kept" / "coral-1")
    assert isinstance(drafter, CoralDrafter)
    assert again[-1].pop("minutes") > again[-1].pop("processor_minutes") > 0
    assert again[-1] == found[-1] and not [*tmp_path.glob("unfinished/*")]
    capsys.readouterr()
    trials = ("--trial", "eagle", "--trial", "hass single_step_share=0.5")
    assert len(rows(*trials)) == 8  # seeds of eagle are there
    assert "| hass single_step_share=0.5 − eagle | 2 | " in capsys.readouterr().out
    # each look at the clock takes a second: 60 steps look 30 times, 7 steps with 5 answers 12 times
    monkeypatch.setattr(time, "process_time", map(float, count()).__next__)
    for row in rows(*trials, "--minutes", 0.06)[8:]:
        assert row["steps"] == 7 and row["processor_minutes"] == pytest.approx(12 / 60)


def test_a_difference_has_the_interval_of_a_paired_t_test(script):
    found, test = script["difference"](FIRST, SECOND), stats.ttest_rel(FIRST, SECOND)
    low, high = test.confidence_interval(0.95)
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx((low, high))
    assert found.p == pytest.approx(test.pvalue) and found.pairs == 5
    same, constant = (script["difference"]([value] * 3, [1.0] * 3) for value in (1.0, 2.0))
    assert (same.p, same.half, constant.p, constant.mean) == (1.0, 0.0, 0.0, 1.0)


def test_four_of_five_experiments_would_find_the_smallest_difference(script):
    found = script["difference"](FIRST, SECOND)
    errors = found.smallest / (np.std(np.subtract(FIRST, SECOND), ddof=1) / 5**0.5)
    gaps = np.random.default_rng(0).normal(errors / 5**0.5, 1.0, (20_000, 5))
    power = (stats.ttest_1samp(gaps, 0.0, axis=1).pvalue < 0.05 / 3).mean()
    assert power == pytest.approx(0.8, abs=0.05)


@pytest.mark.parametrize(
    ("values", "adjusted"),
    [([0.01, 0.04, 0.03], [0.03, 0.06, 0.06]), ([0.9, 0.5], [1.0, 1.0]), ([], [])],
)
def test_p_values_are_adjusted_as_by_hand(script, values, adjusted):
    assert script["holm"](values) == pytest.approx(adjusted)


def test_a_pair_is_compared_over_the_seeds_that_both_have(script):
    rows = [{"recipe": "hass", "seed": seed, "tau": tau} for seed, tau in enumerate(FIRST)]
    rows += [{"recipe": "eagle", "seed": seed, "tau": tau} for seed, tau in enumerate(SECOND[:4])]
    (line,) = script["pair_table"](rows).rows
    test = stats.ttest_rel(FIRST[:4], SECOND[:4])
    low, high = test.confidence_interval(0.95)
    assert line[:3] == ["hass − eagle", "4", "+0.040"]
    assert line[3:5] == [f"{low:+.3f} to {high:+.3f}", f"{test.pvalue:.3g}"]
