"""Every layout becomes the same messages; labels stand on what the target writes, only there."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from conftest import SHARED
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from coral_hf.training.data import (
    CoralCollator,
    load_conversations,
    prepare_dataset,
    to_messages,
    tokenize,
)
from coral_hf.training.data.loading import DOCUMENT_CHARACTERS

TRAIN_FILES = [file.relative_to(SHARED).as_posix() for file in sorted(SHARED.glob("train/*/*"))]
needs_shared = pytest.mark.skipif(not TRAIN_FILES, reason=f"real conversations are not in {SHARED}")

SPECIAL = ["<s>", "<end>", "<user>", "<bot>"]
BLOCK, END = "{% generation %}", "{% endgeneration %}"
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'assistant' %}<bot>{% generation %}{{ m.content }}<end>{% endgeneration %}"
    "{% else %}<user>{{ m.content }}<end>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
)
PLAIN_TEMPLATE = TEMPLATE.replace(BLOCK, "").replace(END, "")
# as Qwen3's: the thinking of a turn is rendered until the user speaks again
THINKING_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<bot>"
    "{% if loop.last %}{{ m.content }}{% else %}{{ m.content.split('/think')[-1] }}{% endif %}<end>"
    "{% else %}<user>{{ m.content }}<end>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
)
CHAT = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "so?"},
    {"role": "assistant", "content": "no"},
]
RENDERED = "<s><user>hi<end><bot>yes<end><user>so?<end><bot>no<end>"


def tiny_tokenizer(
    template: str | None = TEMPLATE, eos_token: str | None = "<end>"
) -> PreTrainedTokenizerFast:
    """Bytes as tokens, and one merge: a space and the y after it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*SPECIAL, *alphabet, "Ġy"])}
    core = Tokenizer(models.BPE(vocab, [("Ġ", "y")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token=eos_token, extra_special_tokens=SPECIAL
    )
    tokenizer.chat_template = template
    return tokenizer


def tokenize_one(row: dict[str, Any], tokenizer: Any, max_length: int) -> dict[str, list[int]]:
    """The only training row of a row."""
    (found,) = tokenize(row, tokenizer, max_length)
    return found


def trained_text(row: dict[str, list[int]], tokenizer: Any) -> str:
    """Write the trained tokens, and a dot for each that is not."""
    return "".join("." if label == -100 else tokenizer.decode([label]) for label in row["labels"])


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


# Layouts


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        {"messages": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "chatgpt", "value": "a"}]},
        {
            "conversations": [{"role": "user", "content": "q"}, {"role": "model", "content": "a"}],
            "messages": None,
        },
        {
            "conversations": [{"from": "user", "value": "q"}],
            "chosen": {"from": "gpt", "value": "a"},
            "rejected": {"from": "gpt", "value": "b"},
        },
        {"instruction": "q", "input": "", "output": "a"},
        {"instruction": "q", "input": None, "response": "a", "output": None},
        {"instruction": "q", "response": "a", "text": "q and a"},
    ],
)
def test_every_layout_becomes_the_same_messages(row: dict[str, Any]) -> None:
    assert to_messages(row) == [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
    ]


def test_the_input_of_an_instruction_follows_it() -> None:
    row = {"instruction": "Add.", "input": "1 and 2", "output": "3"}
    assert to_messages(row)[0]["content"] == "Add.\n\n1 and 2"


def test_a_system_column_opens_the_conversation() -> None:
    messages = to_messages({"system": "Be brief.", "messages": CHAT})
    assert messages == [{"role": "system", "content": "Be brief."}, *CHAT]


def test_a_function_call_is_the_assistants_and_its_result_is_not() -> None:
    turns = [
        {"from": "human", "value": "time?"},
        {"from": "function_call", "value": "clock()"},
        {"from": "observation", "value": "12:00"},
        {"from": "gpt", "value": "noon"},
    ]
    roles = [message["role"] for message in to_messages({"conversations": turns})]
    assert roles == ["user", "assistant", "tool", "assistant"]


def test_a_tool_call_needs_no_content_and_empty_keys_are_left_out() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "clock"}], "name": None}
    assert to_messages({"messages": [CHAT[0], call]})[1] == {
        "role": "assistant",
        "tool_calls": [{"name": "clock"}],
    }


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"conversations": [{"from": "wizard", "value": "q"}]}, "Turn 0 has role 'wizard'; known"),
        ({"messages": [CHAT[0], {"content": "a"}]}, "Turn 1 has role None"),
        ({"messages": [CHAT[0], {"role": "assistant"}]}, r"Turn 1 \(assistant\) has no content"),
        ({"messages": []}, "`messages` has no turns"),
        ({"text": "a story"}, "`text` is no conversation"),
        ({"question": "q"}, r"Found the columns \['question'\]; rename"),
        ({"instruction": "q"}, r"Found the columns \['instruction'\]; rename"),
    ],
)
def test_a_row_other_than_a_conversation_is_refused(row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        to_messages(row)


# Labels


@pytest.mark.parametrize("template", [TEMPLATE, PLAIN_TEMPLATE])
def test_the_assistants_tokens_are_trained_and_no_others(template: str) -> None:
    tokenizer = tiny_tokenizer(template)
    row = tokenize_one({"messages": CHAT}, tokenizer, 100)
    assert tokenizer.decode(row["input_ids"]) == RENDERED
    assert trained_text(row, tokenizer) == "......yes<end>......no<end>"
    assert row["attention_mask"] == [1] * len(row["input_ids"])


@pytest.mark.parametrize("answer", ["", " ", "\n\nyes ", "naïve 🤖", "<bot>", "<user>hi<end>"])
def test_both_ways_to_the_mask_agree(answer: str) -> None:
    row = {"messages": [*CHAT, CHAT[0], {"role": "assistant", "content": answer}, *CHAT]}
    by_blocks = tokenize_one(row, tiny_tokenizer(TEMPLATE), 200)
    by_prefixes = tokenize_one(row, tiny_tokenizer(PLAIN_TEMPLATE), 200)
    assert by_blocks == by_prefixes


@pytest.mark.parametrize("markers", [(BLOCK, END), ("", "")])
def test_no_token_spans_a_prompt_and_its_answer(markers: tuple[str, str]) -> None:
    opening, closing = markers
    tokenizer = tiny_tokenizer(
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }} {% else %}"
        f"{opening}{{{{ m.content }}}}<end>{closing}"
        "{% endif %}{% endfor %}"
    )
    row = tokenize_one({"messages": CHAT[:2]}, tokenizer, 100)
    assert tokenizer.convert_ids_to_tokens(row["input_ids"])[2:4] == ["Ġ", "y"]
    assert trained_text(row, tokenizer) == "...yes<end>"


@pytest.mark.parametrize("template", [TEMPLATE, PLAIN_TEMPLATE])
def test_a_conversation_gets_no_special_token_beyond_its_templates(template: str) -> None:
    tokenizer = tiny_tokenizer(template)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    assert tokenizer.decode(tokenizer("hi")["input_ids"]) == "<s>hi"
    assert (
        tokenizer.decode(tokenize_one({"messages": CHAT}, tokenizer, 100)["input_ids"]) == RENDERED
    )


def test_an_empty_answer_trains_its_end() -> None:
    for template in (TEMPLATE, PLAIN_TEMPLATE):
        row = {"messages": [CHAT[0], {"role": "assistant", "content": ""}]}
        tokenizer = tiny_tokenizer(template)
        assert trained_text(tokenize_one(row, tokenizer, 100), tokenizer) == "......<end>"


def test_an_empty_answer_that_renders_to_nothing_trains_nothing() -> None:
    tokenizer = tiny_tokenizer(PLAIN_TEMPLATE.replace("<end>", ""))
    row = {"messages": [CHAT[0], {"role": "assistant", "content": ""}, *CHAT[:2]]}
    assert trained_text(tokenize_one(row, tokenizer, 100), tokenizer) == ".........yes"


def rows_of(messages: list[dict[str, Any]], template: str) -> list[str]:
    """Each training row, with a bar before what is trained."""
    tokenizer, found = tiny_tokenizer(template), []
    for row in tokenize({"messages": messages}, tokenizer, 100):
        number = sum(label == -100 for label in row["labels"])
        parts = row["input_ids"][:number], row["input_ids"][number:]
        assert row["labels"][number:] == parts[1]
        found.append("|".join(map(tokenizer.decode, parts)))
    return found


def test_thoughts_that_the_template_drops_later_make_a_row_an_answer() -> None:
    turns = [
        CHAT[0],
        {"role": "assistant", "content": "hm/thinkyes"},
        CHAT[2],
        {"role": "assistant", "content": "ah/thinkno"},
    ]
    assert rows_of(turns, THINKING_TEMPLATE) == [
        "<user>hi<end><bot>|hm/thinkyes<end>",
        "<user>hi<end><bot>yes<end><user>so?<end><bot>|ah/thinkno<end>",
    ]
    assert len(tokenize({"messages": CHAT}, tiny_tokenizer(THINKING_TEMPLATE), 100)) == 1


@pytest.mark.parametrize(
    ("template", "rows"),
    [
        # the prompt of an answer holds more than its rendering keeps
        (
            PLAIN_TEMPLATE.replace("%}<bot>{% endif", "%}<bot>fine {% endif"),
            [
                "<s><user>hi<end><bot>fine |yes<end>",
                "<s><user>hi<end><bot>yes<end><user>so?<end><bot>fine |no<end>",
            ],
        ),
        # only the last turn is rendered
        (
            "{{ messages[-1].content }}{% if add_generation_prompt %}<bot>{% endif %}",
            ["hi<bot>|yes", "so?<bot>|no"],
        ),
        # the opening changes with the number of turns
        (
            "{% if messages | length > 2 %}a{% else %}b{% endif %}" + PLAIN_TEMPLATE,
            [f"b{RENDERED[:21]}|yes<end>", f"a{RENDERED[:-7]}|no<end>"],
        ),
        # the last answer is rendered without its prompt
        (
            PLAIN_TEMPLATE.replace("<bot>{{", "{% if not loop.last %}<bot>{% endif %}{{"),
            [f"{RENDERED[:21]}|yes<end>", f"{RENDERED[:-7]}|no<end>"],
        ),
        # earlier answers become a summary
        (
            THINKING_TEMPLATE.replace("m.content.split('/think')[-1]", "'...'"),
            [
                "<user>hi<end><bot>|yes<end>",
                "<user>hi<end><bot>...<end><user>so?<end><bot>|no<end>",
            ],
        ),
    ],
)
def test_a_template_that_rewrites_turns_makes_a_row_an_answer(template, rows) -> None:
    assert rows_of(CHAT, template) == rows


def test_a_thought_that_only_the_prompt_opens_is_read_where_it_is_empty() -> None:
    template = PLAIN_TEMPLATE.replace("%}<bot>{% endif", "%}<bot><think>{% endif")
    asked = "<s><user>hi<end><bot><think>"
    assert rows_of(CHAT[:2], template) == [f"{asked}\n\n</think>\n\n|yes<end>"]
    for content in ("hm</think>yes", "<think>hm</think>yes"):
        thought = [CHAT[0], {"role": "assistant", "content": content}]
        assert rows_of(thought, template) == [f"{asked}|hm</think>yes<end>"]
    kept = {"role": "assistant", "content": "yes", "reasoning": "hm"}
    assert rows_of([CHAT[0], kept], template) == [f"{asked}|hm\n</think>\n\nyes<end>"]
    with pytest.raises(ValueError, match="does not render turn 1, with its calls or its thought"):
        rows_of([CHAT[0], kept], PLAIN_TEMPLATE)


def test_an_answer_without_prompt_is_trained_only_where_the_template_marks_it() -> None:
    row = {"messages": CHAT[1:]}
    for template, trained in [
        (TEMPLATE, "..yes<end>......no<end>"),
        (PLAIN_TEMPLATE, "............no<end>"),
    ]:
        tokenizer = tiny_tokenizer(template)
        assert trained_text(tokenize_one(row, tokenizer, 100), tokenizer) == trained


def test_tools_reach_the_template() -> None:
    tokenizer = tiny_tokenizer("{% for t in tools or [] %}{{ t.name }}{% endfor %}" + TEMPLATE)
    for tools in ('[{"name": "clock"}]', [{"name": "clock"}]):
        row = tokenize_one({"messages": CHAT, "tools": tools}, tokenizer, 100)
        assert tokenizer.decode(row["input_ids"]) == "clock" + RENDERED
    for tools in ("", "[]", None):
        row = tokenize_one({"messages": CHAT, "tools": tools}, tokenizer, 100)
        assert tokenizer.decode(row["input_ids"]) == RENDERED


@pytest.mark.parametrize("template", [TEMPLATE, PLAIN_TEMPLATE])
def test_a_cut_row_is_the_start_of_the_whole_row(template: str) -> None:
    tokenizer = tiny_tokenizer(template)
    whole = tokenize_one({"messages": CHAT}, tokenizer, 100)
    for max_length in (1, 2, 7, 8, 12, 20):
        cut = tokenize_one({"messages": CHAT}, tokenizer, max_length)
        assert cut == {name: values[:max_length] for name, values in whole.items()}


def test_the_first_two_tokens_are_never_trained() -> None:
    tokenizer = tiny_tokenizer()
    row = tokenize_one({"text": "abc"}, tokenizer, 100)
    assert tokenizer.decode(row["input_ids"]) == "<s>abc<end>"
    assert trained_text(row, tokenizer) == "..bc<end>"
    assert tokenize_one({"text": ""}, tokenizer, 100)["labels"] == [-100, -100]


def test_a_text_gets_no_second_start_or_end() -> None:
    tokenizer = tiny_tokenizer()
    row = tokenize_one({"text": "<s>abc<end>"}, tokenizer, 100)
    assert tokenizer.decode(row["input_ids"]) == "<s>abc<end>"


def test_a_text_gets_only_the_special_tokens_that_exist() -> None:
    tokenizer = tiny_tokenizer(eos_token=None)
    assert tokenizer.decode(tokenize_one({"text": "ab"}, tokenizer, 100)["input_ids"]) == "<s>ab"


@pytest.mark.parametrize("eos_token", ["<end>", None])
@pytest.mark.parametrize("has_bos", [True, False])
def test_a_long_text_is_split_into_rows_that_train_each_token_once(eos_token, has_bos) -> None:
    tokenizer = tiny_tokenizer(eos_token=eos_token)
    tokenizer.bos_token = "<s>" if has_bos else None
    row = {"text": "abcdefghijklmnopqrstuvwxyz"}
    (whole,) = tokenize(row, tokenizer, 100)
    for max_length in (3, 4, 5, 12, 26, 27, 28):
        rows = tokenize(row, tokenizer, max_length)
        trained = [i for one in rows for i in one["labels"] if i != -100]
        assert trained == [i for i in whole["labels"] if i != -100]
        assert max(len(one["input_ids"]) for one in rows) <= max_length
        if has_bos:
            assert {one["input_ids"][0] for one in rows} == {0}
    assert len(prepare([row, row], max_length=14)) == 2 * len(tokenize(row, tiny_tokenizer(), 14))


def test_token_ids_without_labels_are_trained_except_for_padding() -> None:
    row = {"input_ids": [0, 5, 6, 7, 8], "attention_mask": [0, 1, 1, 1, 1]}
    assert tokenize_one(row, tiny_tokenizer(), 3) == {
        "input_ids": [5, 6, 7],
        "attention_mask": [1, 1, 1],
        "labels": [-100, -100, 7],
    }


def test_ids_keep_their_labels() -> None:
    row = {"input_ids": [5, 6, 7, 8], "labels": [5, 6, -100, 8]}
    assert tokenize_one(row, tiny_tokenizer(), 9)["labels"] == [-100, -100, -100, 8]


@pytest.mark.parametrize("labels", [[6, 7, 8], [6, 7, 8, -100]])
def test_labels_that_are_shifted_or_too_short_are_refused(labels: list[int]) -> None:
    with pytest.raises(ValueError, match=r"each\s+needs one, and a label is its own token"):
        tokenize_one({"input_ids": [5, 6, 7, 8], "labels": labels}, tiny_tokenizer(), 9)


# Datasets


def prepare(rows: list[dict[str, Any]], template: str | None = TEMPLATE, max_length: int = 100):
    return prepare_dataset(datasets.Dataset.from_list(rows), tiny_tokenizer(template), max_length)


def test_a_prepared_dataset_has_the_three_columns_of_tokenize() -> None:
    row = {"id": 1, "messages": CHAT}
    prepared = prepare([row, row])
    assert prepared.column_names == ["input_ids", "attention_mask", "labels"]
    assert prepared[1] == tokenize_one(row, tiny_tokenizer(), 100)


def test_a_prepared_dataset_can_be_prepared_again() -> None:
    once = prepare([{"messages": CHAT}])
    twice = prepare_dataset(once.with_format("torch"), tiny_tokenizer(), 100)
    assert once[:] == twice[:]


def test_rows_cut_before_their_first_label_are_dropped_and_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    warnings: list[str] = []
    monkeypatch.setattr("coral_hf.training.data.dataset.logger.warning", warnings.append)
    long = {"messages": [{"role": "user", "content": "long" * 9}, CHAT[1]]}
    assert len(prepare([long, {"messages": CHAT}, long], max_length=20)) == 1
    assert warnings == [
        "Cut to `max_length` = 20: 2 of 3 rows; 48 tokens are lost, 24 of one row.",
        "2 of 3 rows have no trained token in their first 20 and are dropped; raise `max_length`"
        " to keep more.",
    ]
    with pytest.raises(ValueError, match="2 of 2 rows .* nothing is left; raise `max_length`"):
        prepare([long, long], max_length=20)


@pytest.mark.parametrize("template", [TEMPLATE, PLAIN_TEMPLATE])
def test_a_conversation_without_answers_is_refused(template: str) -> None:
    with pytest.raises(ValueError, match=r"Row 1: No token of \['user'\] is trained; .*filter"):
        prepare([{"messages": CHAT}, {"messages": CHAT[:1]}], template)


def test_a_template_with_an_empty_generation_block_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Row 0: No token of \['user', 'assistant', "):
        prepare([{"messages": CHAT}], PLAIN_TEMPLATE.replace("<user>", f"<user>{BLOCK}{END}"))


def test_a_conversation_of_trained_tokens_alone_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Row 0: Every token of \['user', 'assistant', "):
        prepare([{"messages": CHAT}], f"{BLOCK}{PLAIN_TEMPLATE}{END}")


def test_conversations_without_a_chat_template_are_refused() -> None:
    with pytest.raises(ValueError, match="Row 0: .*chat_template is not set"):
        prepare([{"messages": CHAT}], template=None)


def test_plain_text_needs_no_chat_template() -> None:
    assert len(prepare([{"text": "abc"}], template=None)) == 1


def test_an_error_of_the_template_names_the_row() -> None:
    picky = "{% if messages[0].role != 'user' %}{{ raise_exception('users first') }}{% endif %}"
    with pytest.raises(ValueError, match=r"Row 1: The chat template cannot .*: users first"):
        prepare([{"messages": CHAT}, {"messages": CHAT[1:]}], picky + TEMPLATE)


def test_an_unknown_role_is_refused_with_its_row() -> None:
    with pytest.raises(ValueError, match="Row 1: Turn 0 has role 'wizard'"):
        prepare([{"messages": CHAT}, {"messages": [{"role": "wizard", "content": "q"}]}])


def test_unknown_columns_are_listed() -> None:
    with pytest.raises(ValueError, match=r"Found the columns \['question', 'id'\]; rename yours"):
        prepare([{"question": "q", "id": 1}])


@pytest.mark.parametrize("rows", [{}, {"text": []}])
def test_an_empty_dataset_is_refused(rows: dict[str, list[str]]) -> None:
    with pytest.raises(ValueError, match="`dataset` has no rows"):
        prepare_dataset(datasets.Dataset.from_dict(rows), tiny_tokenizer(), 100)


def test_a_stream_is_prepared_lazily_to_the_same_rows() -> None:
    rows = [{"messages": CHAT}, {"messages": [*CHAT[2:], *CHAT]}]
    dataset = datasets.Dataset.from_list(rows)
    stream = prepare_dataset(dataset.to_iterable_dataset(), tiny_tokenizer(), 100)
    assert list(stream) == list(prepare(rows))


def test_a_stream_that_does_not_know_its_columns_is_prepared() -> None:
    stream = datasets.IterableDataset.from_generator(lambda: iter([{"id": 1, "messages": CHAT}]))
    prepared = prepare_dataset(stream, tiny_tokenizer(), 100)
    assert list(prepared) == [tokenize_one({"messages": CHAT}, tiny_tokenizer(), 100)]


def test_an_error_of_a_stream_names_the_row() -> None:
    rows = [{"messages": CHAT}, {"messages": CHAT[:1]}]
    stream = datasets.Dataset.from_list(rows).to_iterable_dataset()
    with pytest.raises(ValueError, match="Row 1: No token"):
        list(prepare_dataset(stream, tiny_tokenizer(), 100))


# Files


@pytest.mark.parametrize("name", ["chats.json", "chats.jsonl", "chats.json.gz", "chats.jsonl.gz"])
def test_json_files_load(tmp_path: Path, name: str) -> None:
    rows = [{"messages": CHAT}, {"messages": CHAT[:2]}]
    text = "\n".join(map(json.dumps, rows)) if "jsonl" in name else json.dumps(rows)
    data = gzip.compress(text.encode()) if name.endswith(".gz") else text.encode()
    (tmp_path / name).write_bytes(data)
    assert load_conversations(tmp_path / name).to_list() == rows
    assert load_conversations(str(tmp_path / name), split="train[:1]").to_list() == rows[:1]


def test_parquet_files_load(tmp_path: Path) -> None:
    dataset = datasets.Dataset.from_list([{"messages": CHAT}])
    dataset.to_parquet(tmp_path / "chats.parquet")
    assert load_conversations(tmp_path / "chats.parquet").to_list() == dataset.to_list()


def test_saved_folders_load(tmp_path: Path) -> None:
    dataset = datasets.Dataset.from_list([{"messages": CHAT}])
    dataset.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"test": dataset}).save_to_disk(str(tmp_path / "dict"))
    assert load_conversations(tmp_path / "one").to_list() == dataset.to_list()
    assert load_conversations(tmp_path / "dict", split="test").to_list() == dataset.to_list()


@pytest.mark.parametrize("suffix", [".txt", ".txt.gz"])
def test_a_text_file_is_split_at_its_separators(tmp_path: Path, suffix: str) -> None:
    file, text = tmp_path / f"stories{suffix}", "\nOne.\n\nStill one.\n<|endoftext|>\nTwo.\n"
    file.write_bytes(gzip.compress(text.encode()) if suffix.endswith(".gz") else text.encode())
    assert load_conversations(file)["text"][:] == ["One.\n\nStill one.", "Two."]


def test_paragraphs_without_separators_are_joined_to_documents(tmp_path: Path) -> None:
    paragraphs = [f"{i} " + "x" * (DOCUMENT_CHARACTERS // 2) for i in range(5)]
    (tmp_path / "book.txt").write_text("\n \n".join(paragraphs) + "\n", encoding="utf-8")
    documents = load_conversations(tmp_path / "book.txt")["text"][:]
    assert documents == ["\n\n".join(paragraphs[i : i + 2]) for i in (0, 2, 4)]


def test_a_text_file_has_one_split(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("x")
    with pytest.raises(ValueError, match="`split` is 'test', but a text file has 'train' only"):
        load_conversations(tmp_path / "book.txt", split="test")


@pytest.mark.parametrize("name", ["none.jsonl", "none.txt"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(FileNotFoundError, match=name):
        load_conversations(tmp_path / name)


# Batches


def test_a_batch_is_padded_on_the_right_to_its_longest_row() -> None:
    rows = [
        {"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1], "labels": [-100, -100, 7]},
        {"input_ids": [8], "attention_mask": [1], "labels": [-100]},
    ]
    batch = CoralCollator(pad_token_id=3)(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 3, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 7], [-100, -100, -100]]


def test_rows_that_were_not_prepared_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Rows have \['input_ids'\], not .*use `prepare_dataset`"):
        CoralCollator()([{"input_ids": [5, 6, 7]}])


# Real conversations


@pytest.fixture(scope="module")
def bench_tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(SHARED / "targets" / "coral-bench")


@needs_shared
@pytest.mark.parametrize("name", TRAIN_FILES)
def test_real_files_are_trained_on_their_answers(name: str, bench_tokenizer: Any) -> None:
    dataset = load_conversations(SHARED / name)
    dataset = dataset.select(range(min(20, len(dataset))))
    prepared = prepare_dataset(dataset, bench_tokenizer, 4096)
    assert len(prepared) == len(dataset)
    for row, tokens in zip(dataset, prepared, strict=True):
        trained = bench_tokenizer.decode([label for label in tokens["labels"] if label != -100])
        if "text" in row:
            assert row["text"].endswith(trained.removesuffix("<|end|>"))
        else:
            turns = [turn for turn in to_messages(row) if turn["role"] == "assistant"]
            assert trained == "".join(f"{turn['content']}<|end|>" for turn in turns)


@needs_shared
@pytest.mark.parametrize("name", [name for name in TRAIN_FILES if ".json" in name])
def test_both_ways_to_the_mask_agree_on_real_files(name: str, bench_tokenizer: Any) -> None:
    plain = AutoTokenizer.from_pretrained(SHARED / "targets" / "coral-bench")
    # other blocks in their place, since a template's line breaks depend on where its blocks end
    plain.chat_template = bench_tokenizer.chat_template.replace(BLOCK, "{% if true %}").replace(
        END, "{% endif %}"
    )
    for row in load_conversations(SHARED / name, split="train[:20]"):
        assert tokenize_one(row, bench_tokenizer, 1024) == tokenize_one(row, plain, 1024)
