"""Benchmark files become prompts, and prompts become token ids."""

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import tiny_target
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from coral_hf.measure import Prompt, encode, read_prompts
from coral_hf.measure.prompts import fitting

DATA = Path(__file__).parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.exists(), reason=f"the published files are not at {DATA}")

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}"
)
DIALOGUE = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "hi"},
    {"role": "user", "content": "name"},
    {"role": "assistant", "content": "coral"},
]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<s>", "[UNK]", "user", "assistant", "hello", "hi", "name", "coral"]
    model = models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    fast = Tokenizer(model)
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=fast, unk_token="[UNK]", bos_token="<s>")


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


@needs_data
@pytest.mark.parametrize(
    ("file", "tasks"),
    [
        ("benchmarks/mt_bench/question.jsonl", {"mt_bench": 80}),
        ("benchmarks/gsm8k/test.jsonl", {"gsm8k": 1319}),
        ("benchmarks/gsm8k/question_eagle.jsonl", {"gsm8k": 80}),
        ("benchmarks/humaneval/HumanEval.jsonl.gz", {"humaneval": 164}),
        ("benchmarks/humaneval/question_eagle.jsonl", {"humaneval": 80}),
        (
            "benchmarks/spec_bench/question.jsonl",
            dict.fromkeys(
                ["mt_bench", "translation", "summarization", "qa", "math_reasoning", "rag"], 80
            ),
        ),
    ],
)
def test_published_files_are_read_task_by_task(file, tasks):
    prompts = read_prompts(DATA / file)
    assert Counter(prompt.task for prompt in prompts) == tasks
    assert len({(prompt.task, prompt.id) for prompt in prompts}) == len(prompts)
    assert all(prompt.messages[-1]["role"] == "user" for prompt in prompts)


@needs_data
def test_the_held_out_dialogues_are_the_last_rows_of_their_file():
    file = DATA / "train" / "sgd" / "sgd_train.jsonl.gz"
    prompts = read_prompts(file, last=2, limit=5)
    rows = [json.loads(line) for line in gzip.open(file, "rt").readlines()[-2:]]
    assert [prompt.id for prompt in prompts] == [row["id"] for row in rows]
    assert list(prompts[1].messages) == rows[1]["messages"][:-1]


@needs_data
def test_stories_are_cut_into_prompts_of_equal_length():
    prompts = read_prompts(DATA / "train" / "tinystories" / "tinystories_val.txt", num_words=8)
    assert {len(prompt.text.split()) for prompt in prompts} == {8}


@pytest.mark.parametrize(("user_turn", "length"), [(-1, 3), (-2, 1), (0, 1), (1, 3), (9, 3)])
def test_a_dialogue_is_asked_at_an_answered_user_turn(tmp_path, user_turn, length):
    path = write_lines(tmp_path / "chat.jsonl", [{"messages": DIALOGUE}])
    (prompt,) = read_prompts(path, user_turn=user_turn)
    assert prompt == Prompt("chat", "0", tuple(DIALOGUE[:length]))


def test_an_unanswered_dialogue_is_asked_whole(tmp_path):
    path = write_lines(tmp_path / "chat.jsonl", [{"messages": DIALOGUE[:1]}])
    assert read_prompts(path)[0].messages == tuple(DIALOGUE[:1])


def test_documents_are_separated_by_the_end_of_text_mark_or_blank_lines(tmp_path):
    path = tmp_path / "stories.txt"
    path.write_text("one two three four\n\nfive six\n<|endoftext|>\nseven eight nine")
    texts = [prompt.text for prompt in read_prompts(path, num_words=2)]
    assert texts == ["one two", "seven eight"]
    path.write_text("one two three\n\nfive six")
    assert [prompt.text for prompt in read_prompts(path, num_words=2)] == ["one two"]


def test_a_text_without_documents_is_a_prompt_a_line(tmp_path, caplog):
    caplog.set_level("INFO", "coral_hf")
    path = tmp_path / "asked.txt"
    lines = [f"What is {number} and one?" for number in range(39)]
    lines.append("Count to forty: " + "and on " * 30 + "please.")
    for between in ("\n", "\n\n"):
        path.write_text(between.join(lines), encoding="utf-8-sig")  # as some editors do
        prompts = read_prompts(path)
        assert [prompt.messages[0]["content"] for prompt in prompts] == lines
    assert caplog.messages == [f"40 of 40 prompts from {path}, one a line."] * 2


def test_what_is_left_out_of_a_file_is_said(tmp_path, caplog):
    caplog.set_level("INFO", "coral_hf")
    path = tmp_path / "stories.txt"
    path.write_text("one two three\n\nfour five\n\nsix seven eight\n")
    assert len(read_prompts(path, num_words=2, limit=1)) == 1
    assert caplog.messages == [
        f"1 of 2 prompts from {path}, the first 2 words of documents between blank lines;"
        " left out: 1 of no more than 2 words."
    ]


def test_a_line_that_is_no_object_or_no_text_is_named(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"question": "a"}\n\n{"question"\n')
    with pytest.raises(ValueError, match="Line 3 of .*x.jsonl is no JSON object"):
        read_prompts(path)
    path.write_text("3\n")
    with pytest.raises(ValueError, match="Line 1 of .*x.jsonl is no JSON object"):
        read_prompts(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="x.jsonl is no text in UTF-8"):
        read_prompts(path)
    with pytest.raises(ValueError, match="Prompts 1 of .* are empty"):
        read_prompts(write_lines(path, [{"question": "a"}, {"question": " "}]))


def test_a_follow_up_holds_the_answer_and_the_next_question():
    prompt = Prompt("mt_bench", "81", tuple(DIALOGUE[:1]), turns=("name", "more"))
    assert prompt.follow_up("hi") == Prompt("mt_bench", "81", tuple(DIALOGUE[:3]), turns=("more",))


def test_messages_go_through_the_chat_template(tokenizer):
    tokenizer.chat_template = TEMPLATE
    ids = encode(Prompt("chat", "0", tuple(DIALOGUE[:1])), tokenizer)
    assert ids.tolist() == [[2, 4, 3]]  # user hello assistant


def test_text_and_untemplated_messages_begin_with_bos_once(tokenizer):
    expected = torch.tensor([[0, 4, 6]])
    assert torch.equal(encode(Prompt("text", "0", text="hello name"), tokenizer), expected)
    assert torch.equal(encode(Prompt("text", "0", text="<s> hello name"), tokenizer), expected)
    chat = Prompt("chat", "0", (DIALOGUE[0], DIALOGUE[2]))
    assert torch.equal(encode(chat, tokenizer), expected)


def test_unknown_formats_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"row 0 of x.jsonl has the fields \['input'\]"):
        read_prompts(write_lines(tmp_path / "x.jsonl", [{"input": "a"}]))
    with pytest.raises(ValueError, match="expected .jsonl, .jsonl.gz or .txt"):
        read_prompts(tmp_path / "x.csv")
    with pytest.raises(ValueError, match="holds no prompt"):
        read_prompts(write_lines(tmp_path / "empty.jsonl", []))
    with pytest.raises(ValueError, match=r"roles \['assistant'\]; give one with a user turn"):
        read_prompts(write_lines(tmp_path / "chat.jsonl", [{"messages": DIALOGUE[1:2]}]))


def test_prompts_beyond_the_context_are_left_out_and_named(tokenizer, caplog):
    target = tiny_target("llama")
    short, long = (
        Prompt("chat", name, text="hello " * size) for name, size in [("a", 2), ("b", 99)]
    )
    assert fitting([short, long], tokenizer, target, 64) == [short]
    assert caplog.messages == ["Left out, since of more than 64 tokens: chat/b."]
    with pytest.raises(ValueError, match="none of the 1 `prompts` fits"):
        fitting([long], tokenizer, target, 64)
