"""The viewer of the loss mask: every token, trained or not, with and without colour."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

from conftest import invoke
from rich.console import Console
from test_data import CHAT, PLAIN_TEMPLATE, fresh_cache, tiny_tokenizer  # noqa: F401
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from coral_hf.training.data import show
from coral_hf.training.data.encoding import encode
from coral_hf.training.data.show import SHADES, pieces, render

ROW = {"messages": [{"role": "user", "content": "a yb"}, {"role": "assistant", "content": "é\n"}]}


def printed(rows: list[dict[str, Any]], **options: Any) -> str:
    console = Console(file=io.StringIO(), width=80, highlight=False, **options)
    show(enumerate(rows), tiny_tokenizer(), console=console)
    return console.file.getvalue()


def rendered(row: dict[str, Any], tokenizer: Any, has_marks: bool = False) -> Any:
    (whole,) = encode(row, tokenizer)
    return render(pieces(whole, tokenizer), has_marks)


def test_marks_stand_around_trained_tokens_and_between_all() -> None:
    text = rendered(ROW, tiny_tokenizer(), has_marks=True)
    assert text.plain == "<s>│<user>│a│ y│b│<end>│<bot>⟦…│é│↵\n│<end>⟧"


def test_colours_tell_trained_tokens_from_others() -> None:
    tokenizer = tiny_tokenizer()
    text = rendered(ROW, tokenizer)
    spans = [(text.plain[span.start : span.end], str(span.style)) for span in text.spans]
    labels = encode(ROW, tokenizer)[0]["labels"]
    assert len(spans) == len(labels) and "│" not in text.plain
    for index, ((_, style), label) in enumerate(zip(spans, labels, strict=True)):
        assert style.endswith(SHADES[label != -100][index % 2])
    special = [word for word, style in spans if "underline" in style]
    assert special == ["<s>", "<user>", "<end>", "<bot>", "<end>"]


def test_without_colour_marks_show_what_is_trained() -> None:
    for options in ({}, {"force_terminal": True, "no_color": True}):
        text = printed([ROW], **options)
        text = re.sub("\x1b[^m]*m", "", text)  # bold and underlined stay
        assert text.startswith("⟦trained⟧ not trained") and "⟦…│é│↵\n│<end>⟧" in text
        assert "Row 0: 11 tokens, 4 trained (36.4%)" in text
    text = printed([ROW], force_terminal=True, color_system="truecolor")
    assert "\x1b[" in text and "⟦" not in text


def test_a_bad_row_is_named_and_the_next_one_follows() -> None:
    text = printed([ROW, {"messages": []}, ROW])
    assert "Row 1 cannot be read: `messages` has no turns" in text
    assert text.count("Row 0: 11 tokens, 4 trained") == text.count("Row 2: 11 tokens") == 1


def test_the_tokens_cut_from_a_row_are_counted() -> None:
    console = Console(file=io.StringIO(), width=80)
    show([(7, ROW)], tiny_tokenizer(), max_length=9, console=console)
    assert "Row 7: 9 tokens, 2 trained (22.2%); 2 more are cut" in console.file.getvalue()


def test_control_characters_are_written_out() -> None:
    row = {"text": "ab\x1b[31m\tc"}
    assert "\x1b" not in rendered(row, tiny_tokenizer()).plain
    assert "\\x1b" in rendered(row, tiny_tokenizer()).plain


def test_spaces_that_a_decoder_strips_are_shown() -> None:
    core = Tokenizer(models.WordLevel({"▁a": 0, "▁b": 1, "?": 2}, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    text = rendered({"text": "a b b"}, tokenizer, has_marks=True)
    assert text.plain == " a│ b⟦ b⟧"


def test_the_command_shows_rows_of_a_file(tmp_path: Path) -> None:
    tiny_tokenizer(PLAIN_TEMPLATE).save_pretrained(tmp_path / "target")
    rows = [{"messages": CHAT}, ROW, ROW]
    (tmp_path / "talk.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = ["data", "show", "--dataset", str(tmp_path / "talk.jsonl")]
    result = invoke(*command, "--target", str(tmp_path / "target"), "--row", "-1")
    assert result.exit_code == 0, result.output
    assert "Row 2: 11 tokens, 4 trained" in result.output
    result = invoke(*command, "--target", str(tmp_path / "target"), "--row", "1", "--limit", "9")
    assert "Row 1:" in result.output and "Row 2:" in result.output and "Row 0" not in result.output


def test_the_command_refuses_a_row_that_the_dataset_does_not_have(tmp_path: Path) -> None:
    (tmp_path / "talk.jsonl").write_text(json.dumps(ROW))
    command = ["data", "show", "--dataset", str(tmp_path / "talk.jsonl"), "--target", "x"]
    result = invoke(*command, "--row", "9")
    assert result.exit_code == 1 and "--row is 9, but the dataset has 1 rows" in result.output
