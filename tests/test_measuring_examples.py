"""Examples that measure speed, at tiny size."""

import json
import runpy

import pytest
from conftest import tiny_target
from test_examples import EXAMPLES, folder, run  # noqa: F401  a saved target and its conversations

from coral_hf import CoralDrafter


def test_modes_are_compared_at_each_setting_and_a_run_goes_on(
    folder,  # noqa: F811
    tmp_path,
    monkeypatch,
    capsys,
):
    CoralDrafter.from_target(tiny_target("llama", vocab_size=256)).save_pretrained(
        tmp_path / "drafter"
    )
    talks = tmp_path / "talks.jsonl"
    talks.write_text(f"{(folder / 'talk.jsonl').read_text()}\n" * 5)
    names = ["--target", folder / "target", "--drafter", tmp_path / "drafter", "--tune", 0.1]
    names += ["--prompts", talks, "--prompts", talks, "--rows", tmp_path / "rows.jsonl"]
    names += ["--num-prompts", 4, "--samples", 2, "--max-new-tokens", 6, "--batch-size", 2]
    names += ["--mode", "default", "--mode", "narrow tree_depth=2 tree_top_k=2"]
    for temperatures in ([0.0], [0.0, 1.0]):
        run(monkeypatch, "defaults.py", *names, "--temperature", *temperatures, "--top-p", 0.9)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [(row["temperature"], row["top_p"]) for row in rows] == [(0.0, 1.0), (1.0, 0.9)]
    for row in rows:
        assert {*row["modes"]} == {"default", "narrow", "tuned"}
        for mode in row["modes"].values():
            assert len(mode["tokens"]) == 2  # batches
            assert all(
                0 < rounds <= tokens <= 2 * 2 * 5
                for tokens, rounds in zip(mode["tokens"], mode["rounds"], strict=True)
            )
    assert capsys.readouterr().out.count("| narrow |") == 3


def test_a_comparison_of_modes_is_of_all_tokens_by_all_seconds():
    compare = runpy.run_path(str(EXAMPLES / "defaults.py"))["compare"]
    slow = {"tokens": [10, 30], "rounds": [10, 10], "seconds": [1.0, 3.0]}
    fast = {"tokens": [10, 30], "rounds": [10, 10], "seconds": [0.5, 1.5]}
    setting = {"dtype": "bfloat16", "layers": 8, "batch_size": 1, "temperature": 0.6, "top_p": 1.0}
    first, second = compare(setting | {"modes": {"a": slow, "b": fast}})
    assert first == ["bfloat16", "8", "1", "0.6", "1", "a", "2.00", "10", "1.00 (1.00 to 1.00)"]
    assert second[-3:] == ["2.00", "20", "2.00 (2.00 to 2.00)"]


@pytest.mark.slow
def test_training_speed_is_shown_beside_its_floor(tmp_path, monkeypatch, capsys):
    names = ["--rows", tmp_path / "rows.jsonl", "--vocab-size", 64, "--length", 16]
    names += ["--hidden-size", 64, "--layers", 1, "--repeats", 1]
    for _ in range(2):  # the second time nothing is left to do
        run(monkeypatch, "training_floor.py", *names)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    cases = [(row["features"], row["recipe"]) for row in rows]
    assert cases == [(f, r) for f in ("online", "cached") for r in ("eagle", "coral")]
    assert all(row["seconds"] > row["floor"] > 0 for row in rows)
    count = {(row["features"], row["recipe"]): row["teraflop"] for row in rows}
    # the target's forward pass alone is saved by a cache
    saved = {count["online", recipe] - count["cached", recipe] for recipe in ("eagle", "coral")}
    assert len({round(one, 12) for one in saved}) == 1 and min(saved) > 0
    assert "| 64 | 16 | online | coral |" in capsys.readouterr().out
