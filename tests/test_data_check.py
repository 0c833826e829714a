"""The check of a dataset: counted as training reads it, and its strangest rows."""

import bz2
import json
import lzma
import re

import datasets
import pytest
from conftest import invoke
from test_data import CHAT, PLAIN_TEMPLATE, fresh_cache, tiny_tokenizer  # noqa: F401

from coral_hf.training.data import (
    check_dataset,
    load_conversations,
    prepare_dataset,
    with_weight,
)

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
    assert found["num_trained_tokens"] == sum(label != -100 for label in labels)
    assert (found["num_cut_rows"], found["num_dropped_rows"], found["num_rows"]) == (1, 0, 5)
    (why,) = found["unread"]
    assert why.startswith("Row 3: `messages` has no turns") and found["num_unread_rows"] == 1
    strangest = [next(iter(found[f"rows_of_{name}"])) for name in ("most_tokens", "fewest_trained")]
    assert strangest == [1, 4]
    assert json.loads(json.dumps(found))["quantiles_of_length"]["1.0"] == 64


def test_rows_that_are_cut_before_their_answer_are_dropped():
    long = [{"role": "user", "content": "q" * 90}, {"role": "assistant", "content": "a"}]
    dataset = datasets.Dataset.from_list([{"messages": long}, {"messages": CHAT}])
    found = check_dataset(dataset, tiny_tokenizer(PLAIN_TEMPLATE), 64)
    assert (found["num_dropped_rows"], found["num_training_rows"], found["num_cut_rows"]) == (
        1,
        1,
        1,
    )


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
    names = ["--target", tmp_path / "target", "--dataset", good]
    result = invoke("data", "check", *names, "--json")
    assert result.exit_code == 0, result.output
    shown = json.loads(result.output[result.output.index('{"num_rows"') :])
    assert shown["num_rows"] == 1 and shown["max_length"] == 2048
    result = invoke("data", "check", *names, "--dataset", bad)
    assert result.exit_code == 1 and re.search(r"unread +Row 2: No token of .*: 1", result.output)


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
