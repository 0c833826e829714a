"""What a terminal shows: coloured tokens, a line behind the answer."""

import io
import logging
import re

import pytest
import torch
from conftest import invoke, printed, tiny_target
from rich.console import Console
from test_data import tiny_tokenizer
from test_examples import folder  # noqa: F401  a saved target and its conversations
from transformers import TextStreamer

from coral_hf import CoralDrafter
from coral_hf.decoding import DecodingStats, DraftStreamer
from coral_hf.measure.terminal import (
    COLOURS,
    ColouredStreamer,
    call_line,
    coloured_text,
    drafted_depths,
    print_coloured,
    unlogged,
)

TEXT = "a yb é\n\té🙂 ok, b.\n"  # characters of several tokens, a tab, symbols that wait


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def streamed(streamer, ids) -> None:
    """Hand a prompt and some tokens to a streamer, as `generate` does."""
    streamer.put(torch.tensor([[1, 2]]))
    for token in ids:
        streamer.put(torch.tensor([token]))
    streamer.end()


@pytest.mark.parametrize("skip_prompt", [True, False])
def test_the_text_of_a_pipe_is_that_of_transformers_streamer(tokenizer, capsys, skip_prompt):
    ids = tokenizer.encode(TEXT) + [tokenizer.eos_token_id]
    shown = []
    for kind in (TextStreamer, ColouredStreamer):
        streamed(kind(tokenizer, skip_prompt, skip_special_tokens=True), ids)
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1] and "é🙂" in shown[0] and "\t" in shown[0]


def test_each_token_has_the_colour_of_its_depth(tokenizer):
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    parts: list[tuple[str, str]] = []
    streamer = ColouredStreamer(tokenizer, write=parts.extend, skip_special_tokens=True)
    for number, token in enumerate(ids):
        streamer.depth = number % 3
        streamer.put(torch.tensor([token]))
    streamer.end()
    shades, expected = ["", *COLOURS], []
    for number in range(len(ids)):
        before, after = (
            tokenizer.decode(ids[:end]).rstrip("\ufffd") for end in (number, number + 1)
        )
        expected += [(char, shades[number % 3]) for char in after[len(before) :]]
    assert parts == [*expected, ("\n", "")]


@pytest.mark.parametrize("has_colours", [True, False])
def test_a_terminal_gets_the_text_as_it_stands_in_colours_unless_it_has_none(has_colours):
    options = {"force_terminal": True, "color_system": "256", "no_color": not has_colours}
    console = Console(file=io.StringIO(), width=20, **options)
    long = "x" * 50
    print_coloured(console, [("a", "green"), ("b", "green"), ("\t", ""), (f"[b]{long}\n", "cyan")])
    shown = console.file.getvalue()
    colours = ["\x1b[32m", "\x1b[36m"]
    assert [one in shown for one in colours] == [has_colours] * 2
    assert re.sub(r"\x1b\[\d*m", "", shown) == f"ab\t[b]{long}\n"


def test_the_last_token_of_a_round_is_the_targets():
    assert drafted_depths([3, 1, 2]) == [0, 1, 2, 0, 0, 1, 0]


class Depths(DraftStreamer):
    """Notes the depth of each token."""

    def __init__(self):
        self.found = []

    def put(self, value):
        self.found += [self.depth] * value.numel()

    def end(self):
        self.found = self.found[PROMPT:]


PROMPT = 3
CALLS = {
    "greedy": {"do_sample": False},
    "in order": {"do_sample": False, "repetition_penalty": 1.1},
    "whole tree": {"do_sample": True, "verification": "traversal"},
    "static": {"do_sample": False, "cache_implementation": "static"},
    "chain": {"do_sample": False, "tree_top_k": 1},
}


@pytest.fixture(scope="module")
def pair():
    """A target and a drafter in float64: wide trees guess some of its tokens."""
    target = tiny_target("llama", torch.float64)
    torch.manual_seed(0)
    return target, CoralDrafter.from_target(target).to(torch.float64)


@pytest.mark.parametrize("name", CALLS)
def test_a_streamer_is_told_the_depth_of_each_token(pair, name):
    target, drafter = pair
    streamer = Depths()
    torch.manual_seed(0)
    output = target.generate(
        torch.tensor([[1, 5, 7]]),
        assistant_model=drafter,
        streamer=streamer,
        speculation="always",
        max_new_tokens=24,
        return_dict_in_generate=True,
        tree_depth=3,
        **{"tree_top_k": 16, "tree_nodes": 40, **CALLS[name]},
    )
    stats = output.stats
    expected = drafted_depths(stats.round_lengths)
    assert streamer.found[:-1] == expected[:-1]  # the end may cut a round
    assert max(expected) > 0 or name == "chain"
    assert stats.is_chain == (name == "chain")
    assert stats.way == ("static" if name == "static" else "growing")


def test_tokens_that_are_not_drafted_have_no_depth(pair):
    target, drafter = pair
    streamer = Depths()
    target.generate(
        torch.tensor([[1, 5, 7]]),
        assistant_model=drafter,
        streamer=streamer,
        speculation="never",
        max_new_tokens=6,
    )
    assert streamer.found == [0] * 6


def test_a_line_says_how_a_call_went():
    stats = DecodingStats(round_lengths=[3, 1], num_rounds=2, num_levels=4, num_nodes=20)
    stats.prefill_seconds, stats.verify_seconds = 0.5, 1.5
    line = "5 tokens, 2.5 tokens/s, τ 2.00, 2 rounds"
    assert call_line(stats, 5, "full") == f"{line}, full head, growing trees"
    stats.num_nodes, stats.way, stats.warm_up_seconds = 6, "compiled", 7.0
    stats.is_stepped_back = True
    rest = "stepped back: drafting did not pay (autotune finds the tree that pays best)"
    assert call_line(stats, 5) == f"{line}, compiled chains, {rest}, compiled in 7 s before"


def test_a_finished_call_has_the_colours_that_it_is_streamed_in(tokenizer):
    ids = tokenizer.encode("a y b", add_special_tokens=False)
    text = coloured_text(tokenizer, ids, [len(ids) - 1])
    assert text.plain == tokenizer.decode(ids)
    assert [str(span.style) for span in text.spans if str(span.style)]
    assert not any(str(span.style) for span in coloured_text(tokenizer, ids).spans)


def test_the_benchmark_says_what_was_read_before_anything_is_loaded(folder, tmp_path, caplog):  # noqa: F811
    path = tmp_path / "asked.txt"
    path.write_text("Hello there\nTell me more\n")
    names = ["--target", tmp_path / "absent", "--prompts", path, "--output", tmp_path / "out"]
    caplog.set_level("INFO", "coral_hf")
    assert invoke("benchmark", *names).exit_code == 1
    assert f"2 of 2 prompts from {path}, one a line." in caplog.text
    assert "Only 2 of 10 or more prompts: figures are a first look." in caplog.text
    refused = printed(invoke("benchmark", *names, "--limit", 0))
    assert "`limit` is 0; use 1 or more" in refused


def test_an_answer_is_not_cut_by_what_is_logged_meanwhile(caplog):
    for name in ("decoding.plain.draft_policy", "target"):
        with unlogged("decoding.plain.draft_policy"):
            logging.getLogger(f"coral_hf.{name}").warning(name)
    logging.getLogger("coral_hf.decoding.plain.draft_policy").warning("afterwards")
    assert caplog.messages == ["target", "afterwards"]
