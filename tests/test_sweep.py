"""Arithmetic of a sweep on literal calls, its batches and contexts, and one complete run."""

# ruff: noqa: F811  fixtures are imported

import json
import runpy
from dataclasses import replace
from operator import itemgetter

import pytest
import torch
from conftest import VOCAB, scatter_weights, tiny_target
from test_benchmark import tokenizer  # noqa: F401
from test_cli import drafter  # noqa: F401  a trained drafter
from test_examples import (  # noqa: F401  a saved target and its conversations
    EXAMPLES,
    folder,
    run,
)

from coral_hf import CoralDrafter
from coral_hf.measure import Call, Prompt, call_generate, left_padded
from coral_hf.measure.summary import summarise

run_sweep, SweepSettings, Size = itemgetter("run_sweep", "SweepSettings", "Size")(
    runpy.run_path(str(EXAMPLES / "sweep.py"))
)
TREE = {"tree_depth": 3, "tree_top_k": 3, "tree_nodes": 8}
SENTENCES = ["w5 w6 w7", "w9", "w3 w3 w4 w8 w9", "w11 w2", "w7 w7", "w30 w31", "w20 w4"]


@pytest.fixture(scope="module")
def target():
    target = tiny_target("llama", torch.float64)
    target.generation_config.eos_token_id = [1, 2]
    return target


@pytest.fixture(scope="module")
def own_drafter(target):
    torch.manual_seed(0)
    own_drafter = CoralDrafter.from_target(target).eval()
    scatter_weights(own_drafter, seed=1)
    return own_drafter


def prompts_of(*texts):
    return [Prompt("text", str(index), text=text) for index, text in enumerate(texts)]


@pytest.fixture(scope="module")
def report(target, own_drafter, tokenizer):
    settings = SweepSettings(
        batch_sizes=[1, 3], contexts=[5, 40], max_new_tokens=10, repeats=2, **TREE
    )
    return run_sweep(target, own_drafter, tokenizer, prompts_of(*SENTENCES), settings)


def literal_call(method: str, seconds: float, **other) -> Call:
    stages = {"prefill": 1.0, "draft": 0.5, "verify": 1.0, "other": 0.25}
    call = Call(
        tokens=[[7] * 7, [7] * 2],
        round_lengths=[1] * 7,
        num_rounds=6,
        method=method,
        seconds=seconds,
        stage_seconds={"prefill": 1.0} if method == "plain" else stages,
        num_equal_rows=2,
    )
    return replace(call, **other)


def batch_rows(calls: list[Call]) -> list:
    return [Size(**vars(row)) for row in summarise(calls, "num_rows")]


# the batch of calls.py's drawing: rows of 7 and 2 tokens
STORY = [
    literal_call("plain", 10.0),
    literal_call("coral", 4.0, num_rounds=3, round_lengths=[2, 1, 3, 1], num_equal_rows=1),
]


def test_a_row_of_a_batch_counts_in_the_rounds_that_it_took_part_in():
    plain, coral = batch_rows(STORY)
    assert (plain.tau_per_token, coral.tau_per_token) == (1.0, 7 / 4)
    assert (plain.tokens_per_second, coral.tokens_per_second) == (9 / 10, 9 / 4)
    assert (plain.speedup, coral.speedup) == pytest.approx((1.0, 2.5))
    assert coral.decoding_speedup == pytest.approx(3.0)
    assert coral.exact_match == 0.5


def test_the_speedup_is_the_median_over_batches_of_the_medians_of_their_repeats():
    calls = [
        *(literal_call("plain", 8.0, item=item) for item in range(3)),
        *(literal_call("coral", 4.0, repeat=repeat) for repeat in range(2)),
        literal_call("coral", 40.0, repeat=2),  # a repeat that was disturbed
        literal_call("coral", 2.0, item=1),
        literal_call("coral", 8.0, item=2),
    ]
    _, coral = batch_rows(calls)
    assert coral.speedup == 2.0
    assert (coral.num_items, coral.num_tokens) == (3, 27)


def test_a_batch_without_rounds_has_no_tau():
    calls = [
        literal_call(method, 2.0, tokens=[[7], [7]], num_rounds=0, round_lengths=[])
        for method in ("plain", "coral")
    ]
    for row in batch_rows(calls):
        assert row.tau_per_token is row.decoding_speedup is None
        assert row.speedup == 1.0


def test_the_cost_of_a_round_is_compared_with_a_plain_token():
    one_row = {"tokens": [[7] * 11]}
    plain, coral = batch_rows(
        [
            literal_call("plain", 6.0, **one_row, num_rounds=10, round_lengths=[1] * 10),
            literal_call("coral", 4.5, **one_row, num_rounds=5, round_lengths=[2] * 5),
        ]
    )
    assert (plain.break_even, coral.tau_per_token) == (1.0, 2.0)
    assert coral.break_even == pytest.approx(1.4)  # 0.7 s a round, 0.5 s a plain token


def test_both_methods_give_the_same_tokens_and_each_row_ends_at_its_own_stop(target, own_drafter):
    batch = left_padded([torch.tensor([5, 6, 7]), torch.tensor([9])], 0)
    arguments = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0}
    free = call_generate(target, batch, {**arguments, "eos_token_id": VOCAB})
    stop = free.tokens[0][4]
    own = {**arguments, "eos_token_id": stop}
    plain = call_generate(target, batch, own)
    coral = call_generate(target, batch, {**own, **TREE, "assistant_model": own_drafter})
    assert plain.tokens == coral.tokens
    assert plain.tokens[0][-1] == stop and len(plain.tokens[0]) <= 5
    assert plain.num_rounds == max(map(len, plain.tokens)) - 1
    rounds = len(plain.round_lengths), len(coral.round_lengths), coral.num_rounds
    assert rounds[0] == plain.num_tokens - 2 >= rounds[1] >= rounds[2]
    assert sum(coral.round_lengths) == coral.num_tokens - 2


def test_every_size_is_measured_with_both_methods_in_turn(report):
    rows = report.numbers["rows"]
    sizes = ["batch of 1", "batch of 3", "context of 5", "context of 40"]
    assert [(row.task, row.method) for row in rows] == [
        (size, method) for size in sizes for method in ("plain", "coral")
    ]
    # the seventh prompt does not fill a third batch of three
    assert [row.num_items for row in rows] == [7, 7, 2, 2, 1, 1, 1, 1]
    assert {row.exact_match for row in rows} == {1.0}
    assert all(row.break_even > 0 for row in rows)
    first = [call.method for call in report.calls if call.task == "context of 5"]
    assert first == ["plain", "coral", "coral", "plain"]


def test_no_stop_token_ends_the_answer_after_a_context(report):
    calls = [call for call in report.calls if call.task.startswith("context")]
    assert [call.prompt_length for call in calls] == [5] * 4 + [40] * 4
    assert {(call.num_tokens, call.num_equal_rows) for call in calls} == {(10, 1)}


def test_a_sweep_writes_json_markdown_and_a_plot(report, tmp_path):
    report.write(tmp_path / "new")
    files = {path.name: path.read_bytes() for path in (tmp_path / "new").iterdir()}
    assert set(files) == {"report.json", "report.md", "speed.png"}
    assert files["speed.png"].startswith(b"\x89PNG")
    text = report.to_markdown()
    for part in ("| batch of 3 | coral | 2 |", "| context of 40 | plain | 1 |", "break-even"):
        assert part in text


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "both empty"),
        ({"batch_sizes": [2, 0]}, "`batch_sizes` is .2, 0."),
        ({"contexts": [0]}, "`contexts` is"),
        ({"contexts": [8], "max_new_tokens": 1}, "`max_new_tokens` is 1; use 2 or more"),
        ({"contexts": [8], "repeats": 0}, "`repeats` is 0"),
    ],
)
def test_invalid_sweep_settings_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        SweepSettings(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch_sizes": [8]}, "`batch_sizes` has 8, but 7 `prompts` fit"),
        ({"contexts": [121]}, "`contexts` has 121, .* room for 118"),
    ],
)
def test_sizes_without_prompts_or_room_are_refused(target, own_drafter, tokenizer, fields, message):
    settings = SweepSettings(**fields, max_new_tokens=10)
    with pytest.raises(ValueError, match=message):
        run_sweep(target, own_drafter, tokenizer, prompts_of(*SENTENCES), settings)


def test_the_example_writes_the_report_of_a_sweep(drafter, folder, monkeypatch, capsys):
    run(
        monkeypatch,
        "sweep.py",
        *("--target", folder / "target", "--drafter", drafter),
        *("--prompts", folder / "talk.jsonl", "--limit", 4, "--max-new-tokens", 6),
        *("--batch-size", 1, "--batch-size", 2, "--context", 16, "--repeats", 1),
        *("--output", folder / "sweep", "--tree-depth", 2, "--pad-layers", 3, "--last", 5),
    )
    report = json.loads((folder / "sweep" / "report.json").read_text())
    sizes = ["batch of 1", "batch of 2", "context of 16"]
    assert [row["task"] for row in report["rows"]][::2] == sizes
    assert report["settings"]["tree_depth"] == 2
    assert report["environment"]["num_target_layers"] == 3
    assert "Break-even" in capsys.readouterr().out
