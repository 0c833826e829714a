"""LM heads timed alone: a report's arithmetic on literal calls, and runs on tiny heads."""

import json

import pytest
import torch
from test_cli import invoke

from coral_hf.lm_head import LMHead
from coral_hf.measure import HeadShape, HeadTimingReport, HeadTimingSettings, time_heads
from coral_hf.measure.head_timing import _make_candidates
from coral_hf.measure.head_timing_report import HeadTimes, Spread, describe_machine

VOCAB, HIDDEN = 96, 8
TINY = {
    "shapes": [HeadShape("tiny", VOCAB, HIDDEN)],
    "rows": [1, 3],
    "groups": [4],
    "shares": [2, 4],
    "repeats": 2,
    "warmup": 1,
    "top_k": 3,
}


@pytest.fixture(scope="module")
def report():
    return time_heads(HeadTimingSettings(**TINY))


def test_each_head_is_timed_for_each_dtype_and_number_of_rows(report):
    heads = [(t.dtype, t.rows, t.num_active) for t in report.times]
    assert heads == [
        (dtype, rows, active)
        for dtype in ("bfloat16", "float32")
        for rows in (1, 3)
        for active in (None, 2, 1)
    ]
    assert all(len(t.seconds) == 2 and min(t.seconds) > 0 for t in report.times)


def test_what_a_head_reads_is_its_groups_and_its_router(report):
    full, half, quarter = [
        t.read_bytes for t in report.times if (t.dtype, t.rows) == ("float32", 1)
    ]
    assert full == VOCAB * HIDDEN * 4
    router = (HIDDEN + 4) * HIDDEN * 4
    assert half == full // 2 + router
    assert quarter == full // 4 + router


def test_speedup_is_the_median_over_turns():
    full = HeadTimes("tiny", "float32", 1, None, None, 4_000_000, [2.0, 4.0, 9.0])
    routed = HeadTimes("tiny", "float32", 1, 4, 1, 1_000_000, [1.0, 4.0, 3.0])
    machine = describe_machine(torch.device("cpu"))
    report = HeadTimingReport(HeadTimingSettings(**TINY), machine, [full, routed])
    assert report.rows[0].speedup == Spread(1.0, 1.0, 1.0)
    assert report.rows[1].speedup == Spread(2.0, 1.5, 2.5)  # of 2, 1 and 3
    assert report.rows[1].milliseconds == Spread(3000.0, 2000.0, 3500.0)
    assert report.rows[0].gigabytes_per_second == pytest.approx(0.001)
    assert (
        "| tiny | float32 | 1 | 1 of 4 | 1 | 3000.00 (2000.00 – 3500.00) | 2.00x (1.50 – 2.50)"
        in (report.to_markdown())
    )


def test_a_report_can_be_read_back(report):
    again = HeadTimingReport.from_json(report.to_json())
    assert again == report
    assert again.rows == report.rows


@pytest.mark.parametrize("grouping", ["contiguous", "random"])
def test_a_head_that_reads_all_groups_computes_what_the_full_one_does(grouping):
    settings = HeadTimingSettings(**{**TINY, "shares": [1], "grouping": grouping})
    torch.manual_seed(0)
    head = LMHead(torch.nn.Linear(HIDDEN, VOCAB, bias=False).requires_grad_(False))
    full, routed = _make_candidates(head, settings)
    features, log_path = torch.randn(1, 3, HIDDEN), torch.zeros(1, 3)
    with torch.no_grad():
        torch.testing.assert_close(
            routed.head.logits(features, log_path), full.head.logits(features, log_path)
        )
    assert (routed.head.groups.order is None) == (grouping == "contiguous")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rows": []}, "`rows` is empty"),
        ({"shares": [0]}, r"`shares` is \[0\]; use values of 1 or more"),
        ({"repeats": 0}, "`repeats` is 0; use 1 or more"),
        ({"warmup": -1}, "`warmup` is -1; use 0 or more"),
        ({"dtypes": ["int8"]}, "`dtypes` holds 'int8'; use some of"),
        ({"grouping": "kmeans"}, "`grouping` is 'kmeans'; use one of"),
        ({"groups": [6]}, "`groups` holds 6, of which 1/4 is no whole number"),
        ({"top_k": 100}, "`shapes` holds tiny, 96 tokens of 8 channels.*at least 100"),
    ],
)
def test_wrong_settings_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        HeadTimingSettings(**{**TINY, **wrong})


def test_the_command_writes_its_report(tmp_path):
    result = invoke(
        *("time-heads", "--output", tmp_path, "--vocab-size", VOCAB, "--hidden-size", HIDDEN),
        *("--dtype", "float32", "--rows", 2, "--groups", 8, "--share", 8, "--repeats", 1),
        *("--device", "cpu", "--grouping", "random"),
    )
    assert result.exit_code == 0, result.output
    assert "1 of 8" in result.output
    report = json.loads((tmp_path / "report.json").read_text())
    assert [times["num_active"] for times in report["times"]] == [None, 1]
    assert report["settings"]["shapes"] == [[f"{VOCAB} x {HIDDEN}", VOCAB, HIDDEN]]
    assert "Random weights" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shape", "Llama-4"], "Llama-4"),
        (["--vocab-size", 100], "--hidden-size"),
    ],
)
def test_the_command_refuses_shapes_that_it_cannot_know(options, message, tmp_path):
    result = invoke("time-heads", "--output", tmp_path, *options)
    assert result.exit_code == 2
    assert message in result.output


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_heads_are_timed_on_cuda():
    settings = HeadTimingSettings(**{**TINY, "device": "cuda", "grouping": "random"})
    assert all(min(times.seconds) > 0 for times in time_heads(settings).times)
