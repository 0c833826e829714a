"""Bad rows, files and tokenizers: an error that says where, or a warning that counts."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from conftest import tiny_target
from test_data import (  # noqa: F401  the cache is a fixture
    CHAT,
    PLAIN_TEMPLATE,
    TEMPLATE,
    fresh_cache,
    prepare,
    tiny_tokenizer,
    tokenize_one,
)

from coral_hf import CoralDrafter, CoralTrainer, CoralTrainingArguments
from coral_hf.cli.options import DatasetOptions
from coral_hf.training.data import dataset as dataset_module
from coral_hf.training.data import load_conversations, prepare_dataset, to_messages, tokenize
from coral_hf.training.data.dataset import warn_of_other_ends

TOOL_TEMPLATE = (
    "{% for m in messages %}<{{ 'bot' if m.role == 'assistant' else 'user' }}>"
    "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% else %}{{ m.content }}{% endif %}<end>"
    "{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
)
CALL = {"type": "function", "function": {"name": "clock", "arguments": {"zone": "CET"}}}
TOOL_CHAT = [
    CHAT[0],
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "noon"},
    CHAT[1],
]
LINE = json.dumps({"messages": CHAT}).encode()


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    monkeypatch.setattr("coral_hf.training.data.dataset.logger.warning", found.append)
    return found


# Rows


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ("hello", "`messages` is 'hello', not a list of turns"),
        (["hello"], "Turn 0 is 'hello'; expected `role` and `content`"),
        ([{"role": "user", "content": 3}], r"content of turn 0 \(user\) is 3; expected"),
        ([CHAT[0], {"role": "assistant", "content": None}], r"Turn 1 \(assistant\) has no content"),
        ([{"role": "assistant", "tool_calls": []}], r"Turn 0 \(assistant\) has no content"),
    ],
)
def test_turns_of_a_wrong_kind_are_refused(turns: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        to_messages({"messages": turns})


def test_bad_rows_are_counted_and_the_first_is_named() -> None:
    bad = [{"messages": CHAT}, {"messages": []}, {"messages": CHAT}, {"messages": CHAT[:1]}]
    with pytest.raises(ValueError, match="^Row 1: `messages` has no turns.* Of 4 rows, 2 cannot"):
        prepare(bad)


def test_bad_rows_are_dropped_by_a_filter_over_tokenize() -> None:
    tokenizer = tiny_tokenizer()

    def is_readable(row: dict[str, Any]) -> bool:
        try:
            return bool(tokenize(row, tokenizer, 100))
        except ValueError:
            return False

    rows = [{"messages": []}, {"messages": CHAT}, {"messages": CHAT[1:2]}, {"messages": CHAT[:1]}]
    kept = datasets.Dataset.from_list(rows).filter(is_readable)
    assert kept.to_list() == [{"messages": CHAT}, {"messages": CHAT[1:2]}]
    assert len(prepare_dataset(kept, tokenizer, 100)) == 2


def test_empty_turns_are_trained_and_an_empty_text_is_dropped(warnings: list[str]) -> None:
    silent = {"messages": [CHAT[0], {"role": "assistant", "content": " "}]}
    assert len(prepare([{"messages": CHAT}, silent, silent])) == 3 and not warnings
    assert len(prepare([{"text": "abc"}, {"text": ""}])) == 1
    assert warnings[0].startswith("1 of 2 rows have no trained token")


def test_a_row_of_100k_tokens_is_cut_with_one_warning(warnings: list[str]) -> None:
    long = [CHAT[0], {"role": "assistant", "content": "x" * 100_000}]
    prepared = prepare([{"messages": CHAT}, {"messages": long}], PLAIN_TEMPLATE, max_length=64)
    assert [len(row) for row in prepared["input_ids"]] == [19, 64]
    assert warnings == [
        "Cut to `max_length` = 64: 1 of 2 rows; 99943 tokens are lost, 99943 of one row."
    ]


def test_columns_may_have_the_names_of_internal_ones() -> None:
    assert len(prepare([{"problem": "1 + 1", "num_lost": "x", "messages": CHAT}])) == 1


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


@pytest.mark.parametrize("template", [TEMPLATE, PLAIN_TEMPLATE])
def test_parts_of_text_are_trained_as_their_text(template: str) -> None:
    row = {"messages": [CHAT[0], {"role": "assistant", "content": parts("y", "es")}, *CHAT[2:]]}
    assert tokenize_one(row, tiny_tokenizer(template), 100) == tokenize_one(
        {"messages": CHAT}, tiny_tokenizer(template), 100
    )
    assert to_messages({"messages": [{"role": "user", "content": []}]})[0]["content"] == ""


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"type": "image_url", "image_url": {"url": "x.png"}}, "{'image_url': .*}"),
        ({"type": "text", "text": None}, "{'text': None, 'type': 'text'}"),
        ("hi", "'hi'"),
    ],
)
def test_content_other_than_text_is_refused_by_row_and_turn(
    tmp_path: Path, part: Any, message: str
) -> None:
    bad = [CHAT[0], {"role": "assistant", "content": [part]}]
    lines = [LINE, json.dumps({"messages": bad}).encode()]
    rows = load_conversations(write(tmp_path / "a.jsonl", b"\n".join(lines)))
    with pytest.raises(ValueError, match=rf"^Row 1: .* turn 1 \(assistant\) is \[{message}\]; "):
        prepare_dataset(rows, tiny_tokenizer(), 100)


# Tools


@pytest.mark.parametrize("call", [CALL, CALL["function"]])
def test_tool_calls_are_trained_and_their_results_are_not(call: dict[str, Any]) -> None:
    tokenizer = tiny_tokenizer(TOOL_TEMPLATE)
    chat = [CHAT[0], {"role": "assistant", "tool_calls": [call]}, *TOOL_CHAT[2:]]
    row = tokenize_one({"messages": chat}, tokenizer, 1000)
    trained = tokenizer.decode([label for label in row["labels"] if label != -100])
    assert json.loads(trained.split("<end>")[0]) == [call]
    assert trained.split("<end>")[1:] == ["yes", ""]


@pytest.mark.parametrize(
    ("template", "what"),
    [
        (PLAIN_TEMPLATE, "leaves out `tool_calls`"),
        (
            TOOL_TEMPLATE.replace("{{ m.content }}", "{{ m.content if m.role != 'tool' }}"),
            "leaves out the content of `tool` turns",
        ),
        (TOOL_TEMPLATE.replace("m.tool_calls |", "m.tool_calls[0].name + 1 |"), "cannot render"),
        (PLAIN_TEMPLATE.replace("m.content", "m.content.strip()"), "cannot render .*content"),
    ],
)
def test_a_template_that_leaves_out_tools_is_refused(template: str, what: str) -> None:
    with pytest.raises(ValueError, match=f"Row 1: The chat template {what}"):
        prepare([{"messages": CHAT}, {"messages": TOOL_CHAT}], template)


def test_null_arguments_added_by_a_table_are_left_out() -> None:
    calls = [{"name": "clock", "arguments": arguments} for arguments in ({"a": 1}, {"b": "x"})]
    chats = [[CHAT[0], {"role": "assistant", "tool_calls": [call]}] for call in calls]
    rows = datasets.Dataset.from_list([{"messages": chat} for chat in chats])
    assert [to_messages(row)[1]["tool_calls"] for row in rows] == [[call] for call in calls]


def test_tools_other_than_a_list_are_refused() -> None:
    for tools in ("{oops", '{"name": "clock"}'):
        with pytest.raises(ValueError, match="Tools should either be a JSON schema"):
            tokenize_one({"messages": CHAT, "tools": tools}, tiny_tokenizer(), 100)


# Files


def write(file: Path, data: bytes) -> Path:
    file.write_bytes(gzip.compress(data) if file.suffix == ".gz" else data)
    return file


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "json", "txt", "txt.gz", "csv"])
def test_bytes_that_are_not_utf8_are_named_by_file_line_and_byte(
    tmp_path: Path, suffix: str
) -> None:
    bad = LINE.replace(b"yes", "né".encode("latin-1"))
    file = write(tmp_path / f"chats.{suffix}", b"\n".join([LINE, bad, LINE, bad]))
    found = rf"decode byte 0xe9 in position {bad.index(0xE9)}"
    with pytest.raises(ValueError, match=f"chats.{suffix}, line 2: 'utf-8' .* {found}"):
        load_conversations(file)


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        ("a.jsonl", b"{oops", "Expecting property name .* column 2"),
        ("a.jsonl.gz", LINE[:-5], "Invalid control character"),
        ("a.jsonl", b"12", "a row is an object, not a int"),
        ("a.jsonl", '{"é": oops}'.encode(), "Expecting value: .* column 7"),
        ("a.json", b"{oops", "Expecting property name .* column 2"),
    ],
)
def test_lines_that_are_not_json_are_named(
    tmp_path: Path, name: str, line: bytes, message: str
) -> None:
    file = write(tmp_path / name, b"\n".join([LINE, b"", line, LINE]))
    with pytest.raises(ValueError, match=f"{name}, line 3: ({message})"):
        load_conversations(file)


def test_a_bad_array_is_named_by_its_line(tmp_path: Path) -> None:
    file = write(tmp_path / "a.json", b"[" + LINE + b",\n" + LINE + b",\n{oops}]")
    with pytest.raises(
        ValueError, match="a.json, line 1: Expecting property name .* line 3 column 2"
    ):
        load_conversations(file)


def test_an_invalid_csv_file_is_named(tmp_path: Path) -> None:
    file = write(tmp_path / "a.csv", b"text\na\nb,c,d\n")
    with pytest.raises(ValueError, match="a.csv cannot be read: .*line 3"):
        load_conversations(file)


def test_a_truncated_gzip_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(LINE * 9)[:-20])
    with pytest.raises(ValueError, match="a.jsonl.gz is not a whole gz file"):
        load_conversations(tmp_path / "a.jsonl.gz")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt", "a.txt.gz", "a.csv"])
def test_an_empty_file_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is empty"):
        load_conversations(write(tmp_path / name, b"\n"))


def test_a_byte_order_mark_is_not_part_of_the_text(tmp_path: Path) -> None:
    bom = b"\xef\xbb\xbf"
    assert load_conversations(write(tmp_path / "a.txt", bom + b"One."))["text"][:] == ["One."]
    chats = load_conversations(write(tmp_path / "a.jsonl", bom + LINE))
    assert chats.to_list() == [{"messages": CHAT}]


# Folders, endings, several files


def test_files_of_a_folder_are_checked_by_line(tmp_path: Path) -> None:
    folder = tmp_path / "chats"
    (folder / "more").mkdir(parents=True)
    write(folder / "a.jsonl", LINE)
    write(folder / ".notes.jsonl", b"\xe9")
    last = folder / "more" / "b.jsonl"
    for line, message in (
        (LINE.replace(b"yes", b"n\xe9"), "b.jsonl, line 2: 'utf-8' codec can't decode byte 0xe9"),
        (b"{oops", "b.jsonl, line 2: Expecting property name"),
    ):
        write(last, LINE + b"\n" + line)
        with pytest.raises(ValueError, match=message):
            load_conversations(folder)
    write(last, LINE)
    assert load_conversations(folder).to_list() == 2 * [{"messages": CHAT}]
    write(folder / "LICENSE.txt", b"\xa9 somebody\n")  # that no split reads
    assert len(load_conversations(folder)) == 2


@pytest.mark.parametrize("name", ["a.yaml", "a.jsonl.zst", "a"])
def test_an_unknown_file_type_is_refused_with_the_known_ones(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} has the ending .* expected one of \.json, "):
        load_conversations(write(tmp_path / name, LINE))


@pytest.mark.parametrize("name", ["a.ndjson", "a.ndjson.gz"])
def test_ndjson_is_jsonl(tmp_path: Path, name: str) -> None:
    file = write(tmp_path / name, LINE + b"\n" + LINE)
    assert load_conversations(file).to_list() == 2 * [{"messages": CHAT}]
    with pytest.raises(ValueError, match=f"{name}, line 2: Expecting property name"):
        load_conversations(write(tmp_path / name, LINE + b"\n{oops"))


def test_files_whose_turns_have_different_keys_are_joined(tmp_path: Path) -> None:
    named = [{**CHAT[0], "name": "Ada"}, {**CHAT[1], "tool_calls": [{"name": "clock"}]}]
    chats = {"a": {"messages": CHAT}, "b": {"id": 3, "messages": named}, "c": {"text": "abc"}}
    paths = [str(tmp_path / f"{name}.jsonl") for name in chats]
    for path, row in zip(paths, chats.values(), strict=True):
        write(Path(path), json.dumps(row).encode())
    rows = DatasetOptions(
        dataset=paths
    ).rows()  # those of the second are free JSON in newer versions
    assert [to_messages(row) for row in rows.select([0, 1])] == [CHAT, named]
    assert rows[2]["text"] == "abc"


def test_files_with_different_types_under_a_key_are_named(tmp_path: Path) -> None:
    one = write(tmp_path / "a.jsonl", LINE)
    other = write(tmp_path / "b.jsonl", json.dumps({"messages": [{"content": 3}]}).encode())
    message = r"a.jsonl, .*b.jsonl hold different kinds .* content .* string vs int64"
    with pytest.raises(ValueError, match=message):
        DatasetOptions(dataset=[str(one), str(other)]).rows()


# Tokenizer and target


def make_trainer(folder: Path, rows: list[dict[str, Any]], tokenizer: Any, vocab_size: int):
    target = tiny_target("llama", torch.float32, vocab_size=vocab_size)
    args = CoralTrainingArguments(output_dir=str(folder), report_to="none", use_cpu=True)
    return CoralTrainer(
        model=CoralDrafter.from_target(target),
        target_model=target,
        args=args,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )


def test_of_a_tokenizer_larger_than_its_target_rows_that_use_it_are_refused(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    size = len(tokenizer) - 2
    make_trainer(tmp_path, [{"messages": CHAT}], tokenizer, size)
    tokenizer.add_tokens(["<more>"])
    rows = [{"messages": CHAT}, {"messages": [CHAT[0], {**CHAT[1], "content": "<more>"}]}]
    with pytest.raises(ValueError, match=rf"Row 1: `input_ids` has {len(tokenizer) - 1}, outside"):
        make_trainer(tmp_path, rows, tokenizer, size)


def test_a_tokenizer_smaller_than_its_target_is_accepted(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, [{"messages": CHAT}], tiny_tokenizer(), 300)
    assert len(trainer.train_dataset) == 1


def test_a_bos_or_eos_other_than_the_targets_is_a_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found: list[str] = []
    monkeypatch.setattr("coral_hf.training.data.dataset.logger.warning", found.append)
    tokenizer = tiny_tokenizer()  # <s> is 0, <end> is 1
    target = tiny_target("llama", torch.float32, bos_token_id=0, eos_token_id=3)
    warn_of_other_ends(tokenizer, target)
    assert found == [
        "The tokenizer's EOS is token 1, the target's 3: it may be another target's. Pass the"
        " target's own."
    ]
    target.generation_config.eos_token_id = [1, 2]  # as chat models have several ends
    warn_of_other_ends(tokenizer, target)
    warn_of_other_ends(tiny_tokenizer(eos_token=None), target)
    warn_of_other_ends(tokenizer, tiny_target("llama", torch.float32, bos_token_id=None))
    assert len(found) == 1


@pytest.mark.parametrize("worst", [40, -1])
def test_ids_outside_the_vocabulary_are_refused_when_a_trainer_is_made(
    tmp_path: Path, worst: int
) -> None:
    ids = [[5, 6, 7], [], [5, worst, 7], [5, 6, 39], [8, worst]]
    rows = [{"input_ids": row, "attention_mask": [1] * len(row), "labels": row} for row in ids]
    with pytest.raises(ValueError, match=rf"Row 2: `input_ids` has {worst}, outside"):
        make_trainer(tmp_path, rows, None, 40)
    make_trainer(tmp_path, [rows[0], rows[3]], None, 40)


def test_ids_outside_the_vocabulary_are_refused_with_a_tokenizer_too(tmp_path: Path) -> None:
    rows = [{"input_ids": [5, 6, 7, 8]}, {"input_ids": [5, 6, 300, 8]}]
    with pytest.raises(ValueError, match="Row 1: `input_ids` has 300, outside the target's"):
        make_trainer(tmp_path, rows, tiny_tokenizer(), 300)
    stream = datasets.Dataset.from_list(rows).to_iterable_dataset()
    with pytest.raises(ValueError, match="Row 1: `input_ids` has 300"):
        list(prepare_dataset(stream, tiny_tokenizer(), 100, vocab_size=300))


# Cache


def test_tokens_are_cached_until_the_code_that_makes_them_changes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINE)
    calls: list[int] = []
    encode = dataset_module.encode

    def counted(*given: Any) -> Any:
        calls.append(1)
        return encode(*given)

    monkeypatch.setattr(dataset_module, "encode", counted)
    tokenizer, seen = tiny_tokenizer(TEMPLATE), []
    for version in ("one", "one", "two"):
        monkeypatch.setattr(dataset_module, "code_version", lambda version=version: version)
        prepare_dataset(load_conversations(tmp_path / "a.jsonl"), tokenizer, 100)
        seen.append(len(calls))
    assert seen == [2, 3, 5]  # the first row is always tried; the rest, only what is not cached
