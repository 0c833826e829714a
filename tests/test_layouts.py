"""Rows say what they mean: each layout is read, or what is not read is named."""

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict
from test_data import (  # noqa: F401  the cache is a fixture
    CHAT,
    PLAIN_TEMPLATE,
    fresh_cache,
    prepare,
    tiny_tokenizer,
    tokenize_one,
    trained_text,
)
from test_regenerate import run, target  # noqa: F401  a fixture

from coral_hf.cli.options import DatasetOptions
from coral_hf.training.data import load_conversations, prepare_dataset, to_messages, tokenize

Q, A = CHAT[:2]
IDS = [5, 6, 7, 8, 9]


def shown(row: dict[str, Any]) -> tuple[str, str]:
    """What is read of a row, and what is trained of it."""
    tokenizer = tiny_tokenizer(PLAIN_TEMPLATE)
    found = tokenize_one(row, tokenizer, 200)
    return tokenizer.decode(found["input_ids"]), trained_text(found, tokenizer).replace(".", "")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [Q], "completion": [A]},
        {"prompt": [Q], "completion": "yes"},
        {"prompt": [Q], "chosen": [A], "rejected": [{**A, "content": "no, never"}]},
        {"chosen": [Q, A], "rejected": [Q, {**A, "content": "no, never"}]},
        {"prompt": "hi", "chosen": [Q, A], "rejected": [Q, A], "score_chosen": 1.0},
        {"prompt": "hi", "completion": [A]},
        {"messages": [Q, A], "prompt": "hi", "prompt_id": "a b c"},
        {"conversations": [{"from": "human", "value": "hi"}], "chosen": A, "rejected": A},
    ],
)
def test_prompts_with_an_answer_are_a_conversation(row):
    assert to_messages(row) == [Q, A]
    assert shown(row) == ("<s><user>hi<end><bot>yes<end>", "yes<end>")


def test_only_the_completion_of_a_prompt_of_turns_is_trained():
    row = {"prompt": [*CHAT[:2], CHAT[2]], "completion": [CHAT[3]]}
    assert shown(row) == ("<s><user>hi<end><bot>yes<end><user>so?<end><bot>no<end>", "no<end>")


@pytest.mark.parametrize("name", ["completion", "chosen"])
def test_a_prompt_and_a_completion_of_plain_text_are_one_text(name):
    row = {"prompt": "one and", "rejected": "one and three", name: " two"}
    assert shown(row) == ("<s>one and two<end>", " two<end>")
    row = {"prompt": "<s>a ", name: "yb<end>"}  # a token would span both
    assert shown(row) == ("<s>a yb<end>", "yb<end>")
    with pytest.raises(ValueError, match=f"A row of `{name}` is no conversation"):
        to_messages(row)


def test_instructions_have_contexts_histories_and_systems():
    row = {"instruction": "q", "context": "It rains.", "response": "a", "category": "open_qa"}
    assert to_messages(row)[0]["content"] == "q\n\nIt rains."
    row = {"instruction": "q", "output": "a", "history": [["p", "b"]], "system_prompt": "Be good."}
    turns = [(turn["role"], turn["content"]) for turn in to_messages(row)]
    assert turns == [
        ("system", "Be good."),
        ("user", "p"),
        ("assistant", "b"),
        ("user", "q"),
        ("assistant", "a"),
    ]
    with pytest.raises(ValueError, match=r"`history` has 'p'; expected \[question, answer\]"):
        to_messages({**row, "history": ["p"]})


@pytest.mark.parametrize("key", ["weight", "train", "loss"])
@pytest.mark.parametrize("template", [PLAIN_TEMPLATE, None])
def test_turns_of_no_weight_are_not_trained(key, template):
    tokenizer = tiny_tokenizer(template) if template else tiny_tokenizer()
    turns = [Q, {**A, key: 0}, CHAT[2], {**CHAT[3], key: True}]
    found = tokenize_one({"messages": turns}, tokenizer, 100)
    assert trained_text(found, tokenizer).replace(".", "") == "no<end>"
    for bad in ({**A, key: 0.5}, {**A, "masked": True}):
        with pytest.raises(ValueError, match="Turn 1 has `(masked`|weight` 0.5|train` 0|loss` 0)"):
            tokenize({"messages": [Q, bad]}, tokenizer, 100)


def test_a_row_of_no_weight_is_dropped():
    rows = prepare([{"messages": CHAT}, {"messages": [Q, {**A, "weight": 0}]}], PLAIN_TEMPLATE)
    assert len(rows) == 1


@pytest.mark.parametrize("mask", ["loss_mask", "completion_mask", "assistant_masks"])
def test_masks_of_tokens_are_read(mask):
    found = tokenize_one({"input_ids": IDS, mask: [1, 0, 0, 1, 1]}, tiny_tokenizer(), 9)
    assert found["labels"] == [-100, -100, -100, 8, 9]
    two = {"input_ids": IDS, mask: [0, 0, 0, 1, 1], "labels": [-100, -100, 7, 8, -100]}
    assert tokenize_one(two, tiny_tokenizer(), 9)["labels"] == [-100, -100, -100, 8, -100]
    with pytest.raises(ValueError, match=f"5 `input_ids` have 2 in `{mask}`"):
        tokenize({"input_ids": IDS, mask: [0, 1]}, tiny_tokenizer(), 9)


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"messages": CHAT, "persona": "a kind old pirate"}, "persona"),
        ({"messages": CHAT, "answer_mask": [0, 1]}, "answer_mask"),
        ({"messages": CHAT, "loss_weight": 0.5}, "loss_weight"),
        ({"input_ids": IDS, "my_mask": [0, 0, 0, 1, 1]}, "my_mask"),
        ({"text": "One two.", "prompt": "Another text."}, "prompt"),
        ({"instruction": "q", "output": "a", "question": "Is it another?"}, "question"),
    ],
)
def test_a_column_that_is_not_read_is_named_unless_it_is_removed(row, name):
    with pytest.raises(ValueError, match=f"Row 0: The column `{name}` is not read, but holds "):
        prepare([row])
    rows = Dataset.from_list([row]).remove_columns(name)
    assert len(prepare_dataset(rows, tiny_tokenizer(), 100)) == 1


def test_several_datasets_are_no_dataset():
    parts = DatasetDict(one=Dataset.from_list([{"messages": CHAT}]), other=Dataset.from_list([]))
    with pytest.raises(ValueError, match=r"`dataset` is a DatasetDict of \['one', 'other'\]; pass"):
        prepare_dataset(parts, tiny_tokenizer(), 100)


def test_columns_that_describe_a_row_or_repeat_it_are_no_news():
    described = {"source": "a web page", "turns": 2, "good": True, "label": 1, "n_id": "a b"}
    repeated = {"text": "hi yes so? no", "first": "so?", "url": "https://a b"}
    assert len(prepare([{"messages": CHAT, **described, **repeated}])) == 1


def test_a_dataset_command_leaves_out_columns(tmp_path: Path):
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"messages": CHAT, "persona": "a kind old pirate"}))
    rows = DatasetOptions(dataset=[str(file)], ignore_columns=["persona"]).rows()
    assert rows.column_names == ["messages"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_keys_that_only_late_rows_have_are_read(tmp_path: Path, name: str):
    first = {"messages": [{**Q, "content": "x" * 40_000}, A]}
    calls = [{"name": "f", "arguments": {"x": 1}}], [{"name": "f", "arguments": {"x": "1"}}]
    late = [{"messages": [Q, {**A, "weight": 0}, Q, A], "system": "Be brief."}]
    late += [{"messages": [Q, {**A, "tool_calls": call}]} for call in calls]
    rows = [first] * 600 + late  # more than `datasets` reads before it decides on columns
    text = json.dumps(rows) if name == "a.json" else "\n".join(map(json.dumps, rows))
    (tmp_path / name).write_text(text)
    found = load_conversations(tmp_path / name)
    assert len(found) == 603 and to_messages(found[600])[0]["role"] == "system"
    assert to_messages(found[600])[2]["weight"] == 0
    assert [to_messages(found[i])[1]["tool_calls"] for i in (601, 602)] == [*calls]


def test_a_value_of_another_kind_is_named_by_its_row(tmp_path: Path):
    row = {"messages": [{**Q, "content": "x" * 40_000}, A], "system": "Be brief."}
    rows = [row] * 600 + [{**row, "system": 3, "late": "x"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = load_conversations(tmp_path / "a.jsonl")
    assert to_messages(found[0])[0] == {"role": "system", "content": "Be brief."}
    with pytest.raises(ValueError, match=r"content of turn 0 \(system\) is 3; expected text"):
        to_messages(found[600])


def test_a_prompt_of_plain_text_is_answered_as_a_whole(target, tmp_path):  # noqa: F811
    rows = Dataset.from_list([{"prompt": "once upon a time", "completion": " there was"}])
    run(target, tmp_path / "out.jsonl", rows, prompt_tokens=2, max_new_tokens=6)
    (found,) = load_conversations(tmp_path / "out.jsonl")
    assert found["text"].startswith("once upon a time")
    written = tokenize_one(found, tiny_tokenizer(), 100)
    assert tiny_tokenizer().decode(written["input_ids"]).startswith("<s>once upon a time")
    assert written["labels"][:17] == [-100] * 17 and -100 not in written["labels"][17:]
