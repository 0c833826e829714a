"""The check of a dataset: counted as training reads it, with its strangest rows."""

import bz2
import json
import lzma

import datasets
import pytest
from conftest import invoke
from test_data import CHAT, PLAIN_TEMPLATE, fresh_cache, tiny_tokenizer  # noqa: F401

from coral_hf.training.data import (
    check_dataset,
    describe,
    load_conversations,
    prepare_dataset,
    with_weight,
)
from coral_hf.training.data.show import kinds_of

QUESTION = {"role": "user", "content": "hi"}


def chat(answer):
    return {"messages": [QUESTION, {"role": "assistant", "content": answer}]}


@pytest.mark.parametrize("num_proc", [None, 2])
def test_numbers_are_those_of_the_rows_that_training_reads(num_proc):
    rows = [{"messages": CHAT}, chat("x" * 90), chat("y\x07\ufffd"), {"messages": []}, chat("z")]
    tokenizer, dataset = tiny_tokenizer(PLAIN_TEMPLATE), datasets.Dataset.from_list(rows)
    found = check_dataset(dataset, tokenizer, 64, num_proc=num_proc)
    readable = dataset.select([0, 1, 2, 4])
    trained = prepare_dataset(readable, tokenizer, 64)
    assert found["num_training_rows"] == len(trained)
    assert found["num_tokens"] == sum(map(len, trained["input_ids"]))
    labels = [label for row in trained["labels"] for label in row]
    assert found["num_trained"] == sum(label != -100 for label in labels)
    assert (found["num_cut_rows"], found["num_dropped"], found["num_rows"]) == (1, 0, 5)
    assert (found["num_turns"], found["num_assistant_turns"]) == (len(CHAT) + 6, 5)
    (why,) = found["unread"]
    assert why.startswith("`messages` has no turns") and found["unread_rows"][why] == 3
    first = {one["reason"].split(",")[0]: one["row"] for one in reversed(found["strangest"])}
    assert first["most tokens"] == 1 and first["shortest answer"] == 4
    assert {type(one["row"]) for one in found["strangest"]} == {int}
    assert json.loads(json.dumps(found))["lengths"]["longest"] == 64
    assert "not read   1 rows" in str(found)


def test_rows_that_are_cut_before_their_answer_are_dropped():
    long = [{"role": "user", "content": "q" * 90}, {"role": "assistant", "content": "a"}]
    dataset = datasets.Dataset.from_list([{"messages": long}, {"messages": CHAT}])
    found = check_dataset(dataset, tiny_tokenizer(PLAIN_TEMPLATE), 64)
    assert (found["num_dropped"], found["num_training_rows"], found["num_cut_rows"]) == (1, 1, 1)


def test_the_behaviour_of_the_template_is_counted():
    opened = PLAIN_TEMPLATE.replace("%}<bot>{% endif", "%}<bot><think>{% endif")
    dataset = datasets.Dataset.from_list([{"messages": CHAT}] * 2)
    counts = check_dataset(dataset, tiny_tokenizer(opened), 64)["behaviour"]
    assert counts["an empty thought is read before answers, not trained"] == 2
    assert counts["a training row an answer, as turns are rendered otherwise later"] == 2
    plain = check_dataset(dataset, tiny_tokenizer(PLAIN_TEMPLATE), 64)["behaviour"]
    assert plain == {"one rendering holds every prompt and answer": 2}


@pytest.mark.parametrize(
    ("texts", "kinds"),
    [
        (["<think>", "hm", "</think>", "yes"], ["thought"] * 3 + ["answer"]),
        (["hm", "</think>", "yes"], ["thought"] * 2 + ["answer"]),
        (["<think>", "cut"], ["thought"] * 2),
        (["So:", "<tool_call>", "{}", "</tool_call>", "<end>"], "answer call call call answer"),
        (["[TOOL_CALLS]", "[…]"], "call call"),
        (["a < b", " > c"], "answer answer"),
    ],
)
def test_thoughts_and_calls_are_found_by_their_marks(texts, kinds):
    names = kinds.replace("call", "tool_call").split() if isinstance(kinds, str) else kinds
    assert kinds_of(texts) == names


def test_a_row_is_described_by_spans_of_one_kind():
    (found,) = describe([(7, chat("<think>hm</think>yes"))], tiny_tokenizer(PLAIN_TEMPLATE), 40)
    assert (found["row"], found["num_cut"]) == (7, 0)
    assert found["source"] == "`messages`: user, assistant"
    kinds = {one["kind"]: one["text"] for one in found["spans"]}
    assert kinds["thought"] == "<think>hm</think>" and kinds["answer"] == "yes<end>"
    places = [one["tokens"] for one in found["spans"]]
    assert [start for start, _ in places] == [0, *(stop for _, stop in places[:-1])]
    (cut,) = describe([(7, chat("x" * 90))], tiny_tokenizer(PLAIN_TEMPLATE), 40)
    assert cut["num_tokens"] == 40 and cut["spans"][-1]["kind"] == "cut"
    assert len(cut["spans"][-1]["text"].removesuffix("<end>")) == cut["num_cut"] - 1


def test_a_dataset_counts_by_its_weight():
    rows = datasets.Dataset.from_dict({"text": [*"abcd"]})
    assert with_weight(rows, 2)["text"] == [*"abcdabcd"]
    half = with_weight(rows, 1.5)["text"]
    assert half[:4] == [*"abcd"] and len({*half[4:]}) == 2
    assert with_weight(rows, 1.5)["text"] == half
    with pytest.raises(ValueError, match="weight of a dataset is 0"):
        with_weight(rows, 0)


def test_the_command_checks_files_and_fails_where_training_would(tmp_path):
    tiny_tokenizer(PLAIN_TEMPLATE).save_pretrained(tmp_path / "target")
    good, bad = tmp_path / "good.jsonl", tmp_path / "bad.jsonl"
    good.write_text(json.dumps({"messages": CHAT}))
    bad.write_text(json.dumps({"messages": CHAT}) + "\n" + json.dumps({"messages": CHAT[:1]}))
    result = invoke("data", "check", good, "--target", tmp_path / "target", "--json")
    assert result.exit_code == 0, result.output
    shown = json.loads(result.output[result.output.index('{"num_rows"') :])
    assert shown["num_rows"] == 1 and shown["max_length"] == 2048
    result = invoke("data", "check", "--target", tmp_path / "target", good, bad)
    assert result.exit_code == 1 and "not read   1 rows" in result.output
    result = invoke("data", "show", good, "--target", tmp_path / "target", "--json")
    assert '"kind": "answer"' in result.output
    result = invoke("data", "check", "--target", tmp_path / "target")
    assert result.exit_code == 1 and "coral-hf data check FILE" in result.output


def test_a_configuration_and_a_split_of_a_dataset_are_chosen(tmp_path):
    for name in ("short", "long"):
        for split in ("train", "test"):
            (tmp_path / f"{name}_{split}.jsonl").write_text(json.dumps({"text": f"{name} {split}"}))
    card = "---\nconfigs:\n" + "".join(
        f"- config_name: {name}\n  data_files:\n"
        f"  - {{split: train, path: {name}_train.jsonl}}\n"
        f"  - {{split: test, path: {name}_test.jsonl}}\n"
        for name in ("short", "long")
    )
    (tmp_path / "README.md").write_text(f"{card}---\n")
    assert load_conversations(tmp_path, "test", config="long")["text"] == ["long test"]
    with pytest.raises(ValueError, match="short"):
        load_conversations(tmp_path)


@pytest.mark.parametrize("ending", ["jsonl.bz2", "jsonl.xz", "tsv", "arrow"])
def test_files_of_other_kinds_are_read(ending, tmp_path):
    lines = "\n".join(json.dumps({"text": text}) for text in "abc").encode()
    file = tmp_path / f"a.{ending}"
    if ending == "arrow":
        datasets.Dataset.from_dict({"text": [*"abc"]}).save_to_disk(tmp_path / "saved")
        next((tmp_path / "saved").glob("*.arrow")).rename(file)
    else:
        written = {"bz2": bz2.compress, "xz": lzma.compress, "tsv": lambda _: b"text\na\nb\nc\n"}
        file.write_bytes(written[ending.split(".")[-1]](lines))
    assert load_conversations(file)["text"] == [*"abc"]
    if ending.startswith("jsonl"):
        file.write_bytes(file.read_bytes()[:-9])
        with pytest.raises(ValueError, match=f"not a whole {ending.split('.')[-1]} file"):
            load_conversations(file)
