"""Data in the target's own words: whole, resumable, and never mixed."""

from __future__ import annotations

import copy
import json
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import invoke, scatter_weights, tiny_target
from datasets import Dataset
from test_bad_data import TOOL_CHAT, TOOL_TEMPLATE
from test_data import CHAT, PLAIN_TEMPLATE, TEMPLATE, fresh_cache, tiny_tokenizer  # noqa: F401

from coral_hf import CoralDrafter
from coral_hf.identity import seed_of
from coral_hf.training.data import load_conversations, tokenize
from coral_hf.training.regeneration.answer_file import open_answers
from coral_hf.training.regeneration.answers import GumbelNoise, Speaker
from coral_hf.training.regeneration.regenerate import RegenerationSettings, regenerate

WORDS = ["hi", "so?", "when and where", "tell me more", "no", "a longer question than most"]
END = 1  # <end>


@pytest.fixture(scope="module")
def target():
    """A target of which some answers end and some do not."""
    model = tiny_target("llama", torch.float64, seed=4, vocab_size=len(tiny_tokenizer()))
    model.generation_config.eos_token_id = END
    letters = tiny_tokenizer().convert_tokens_to_ids([*"abcdefghijklmnopqrstuvwxyz"])
    others = sorted({*range(model.config.vocab_size)} - {END, *letters})
    with torch.no_grad():  # bytes at random are no text: a letter always outweighs them
        weight = model.lm_head.weight
        weight[others] = weight[[letters[i % 26] for i in range(len(others))]] / 9
    return model


def chats(count: int = 6) -> Dataset:
    """Conversations of one, two or three answers."""
    turns = [
        [message for word in WORDS[: 1 + row % 3] for message in question(f"{row} {word}")]
        for row in range(count)
    ]
    return Dataset.from_list([{"id": f"x{row}", "messages": t} for row, t in enumerate(turns)])


def question(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}, {"role": "assistant", "content": "old"}]


def run(target: Any, output: Path, rows: Any = None, drafter: Any = None, **settings: Any):
    given = RegenerationSettings(**{"max_new_tokens": 10, "batch_size": 2, **settings})
    rows = chats() if rows is None else rows
    return regenerate(target, tiny_tokenizer(), rows, output, given, drafter)


def read(output: Path) -> dict[int, dict[str, Any]]:
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert len({row["row"] for row in rows}) == len(rows)
    return {row["row"]: row for row in rows}


def answer_alone(target: Any, messages: list[Any], max_new_tokens: int = 10):
    """What plain `generate` says, and whether it ended."""
    tokenizer = tiny_tokenizer()
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    mask = torch.ones_like(ids)
    settings = {"do_sample": False, "max_new_tokens": max_new_tokens, "pad_token_id": 0}
    new = target.generate(ids, attention_mask=mask, **settings)[0, ids.shape[1] :].tolist()
    return tokenizer.decode(new[: new.index(END)] if END in new else new), END in new


def test_every_answer_is_the_targets_own_and_follows_from_its_others(target, tmp_path):
    done = run(target, tmp_path / "out.jsonl")
    found, dataset = read(tmp_path / "out.jsonl"), chats()
    assert done.num_rows == len(found) == 6
    endings = [row["is_complete"] for row in found.values()]
    assert done.num_unfinished == endings.count(False) and set(endings) == {True, False}
    assert max(len(row["messages"]) for row in found.values()) > 2
    for number, row in found.items():
        assert row["id"] == f"x{number}"
        for position in range(1, len(row["messages"]), 2):
            before = row["messages"][:position]
            assert before[-1] == dataset[number]["messages"][position - 1]
            text, is_complete = answer_alone(target, before)
            assert row["messages"][position]["content"] == text
            is_last = position + 1 == len(row["messages"])
            assert is_complete or (is_last and not row["is_complete"])
        if row["is_complete"]:
            assert len(row["messages"]) == len(dataset[number]["messages"])


def test_the_output_is_read_by_training_without_an_end_that_nobody_wrote(target, tmp_path):
    run(target, tmp_path / "out.jsonl")
    for template in (TEMPLATE, PLAIN_TEMPLATE):
        tokenizer = tiny_tokenizer(template)
        for row in load_conversations(tmp_path / "out.jsonl"):
            encoded = tokenize(row, tokenizer, 1000)
            assert (encoded["labels"][-1] == END) == row["is_complete"]
            text = tokenizer.decode(encoded["input_ids"])
            assert text.removesuffix("<end>").endswith(row["messages"][-1]["content"])


def test_unfinished_answers_are_dropped_with_all_that_follows(target, tmp_path):
    kept, dropped = tmp_path / "kept.jsonl", tmp_path / "dropped.jsonl"
    run(target, kept)
    done = run(target, dropped, unfinished="drop")
    expected = {}
    for number, row in read(kept).items():
        messages = row["messages"] if row["is_complete"] else row["messages"][:-2]
        if messages:
            expected[number] = {**row, "messages": messages, "is_complete": True}
    assert read(dropped) == expected
    assert done.num_left_out == 6 - len(expected) > 0
    left_out = read(tmp_path / "dropped.jsonl.left_out.jsonl")
    assert set(left_out) == set(range(6)) - set(expected)
    assert {row["reason"] for row in left_out.values()} == {"an answer that was cut off"}


class Killed(Exception):
    pass


def killed_after(target: Any, calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Break a run off in its n-th call of the target."""
    generate, left = target.generate, [calls]

    def counted(*args: Any, **kwargs: Any) -> Any:
        if not left[0]:
            raise Killed
        left[0] -= 1
        return generate(*args, **kwargs)

    monkeypatch.setattr(target, "generate", counted)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_run_that_was_broken_off_goes_on_to_the_same_rows(
    target, tmp_path, monkeypatch, temperature
):
    whole, broken = tmp_path / "whole.jsonl", tmp_path / "broken.jsonl"
    run(target, whole, temperature=temperature)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_after(target, 3, patch)
        run(target, broken, temperature=temperature)
    written = broken.read_bytes()
    assert 0 < len(read(broken)) < 6
    broken.write_bytes(written[:-9])  # the kill came in the middle of a line
    run(target, broken, temperature=temperature, batch_size=3)
    assert read(broken) == read(whole)
    assert broken.read_bytes().startswith(written[: written[:-9].rfind(b"\n") + 1])


def test_a_batch_of_which_a_row_is_lost_is_answered_as_a_whole(target, tmp_path, monkeypatch):
    output, sizes = tmp_path / "out.jsonl", []
    run(target, output, batch_size=3)
    output.write_bytes(output.read_bytes()[:-9])
    generate = target.generate

    def noted(**kwargs: Any) -> Any:
        sizes.append(len(kwargs["input_ids"]))
        return generate(**kwargs)

    monkeypatch.setattr(target, "generate", noted)
    run(target, output, batch_size=3)
    assert sizes[0] == 3 and set(read(output)) == set(range(6))


def test_a_target_without_chat_template_is_refused_before_the_first_answer(target, tmp_path):
    settings = RegenerationSettings(max_new_tokens=10)
    with pytest.raises(ValueError, match="Row 0: The tokenizer has no chat template"):
        regenerate(target, tiny_tokenizer(None), chats(), tmp_path / "out.jsonl", settings)
    assert not list(tmp_path.iterdir())


def test_a_finished_run_asks_the_target_nothing_more(target, tmp_path, monkeypatch):
    first = run(target, tmp_path / "out.jsonl", unfinished="drop")
    killed_after(target, 0, monkeypatch)
    assert run(target, tmp_path / "out.jsonl", unfinished="drop") == first


def test_answers_do_not_depend_on_their_batch(target, tmp_path):
    found = []
    for size in (1, 6):
        run(target, tmp_path / f"{size}.jsonl", temperature=0.8, top_p=0.9, batch_size=size)
        found.append(read(tmp_path / f"{size}.jsonl"))
    assert found[0] == found[1]
    run(target, tmp_path / "other.jsonl", temperature=0.8, top_p=0.9, seed=1)
    assert read(tmp_path / "other.jsonl") != found[0]


def test_draws_follow_the_targets_distribution():
    target = tiny_target("llama", torch.float64)
    prompt, count = [2, 7, 8, 3], 4000
    settings = {"ends": [], "pad_token_id": 0, "max_new_tokens": 1, "room": None}
    speaker = Speaker(target, **settings, temperature=1.5, top_p=0.9)
    seeds = [seed_of(0, row, 0) for row in range(count)]
    drawn = torch.tensor([a.tokens[0] for a in speaker.answer([prompt] * count, seeds)])
    probs = (target(torch.tensor([prompt])).logits[0, -1].float() / 1.5).softmax(-1)
    order = probs.argsort(descending=True)
    kept = order[: int((probs[order].cumsum(0) < 0.9).sum()) + 1]
    assert set(drawn.tolist()) <= set(kept.tolist())
    expected = probs[kept] / probs[kept].sum()
    shares = torch.stack([(drawn == token).float().mean() for token in kept])
    assert (shares - expected).abs().max() < 4 * (0.25 / count) ** 0.5


def test_noise_of_a_row_is_that_of_its_seed():
    noise = GumbelNoise([5, 6], torch.device("cpu"))(torch.zeros(2, 1), torch.zeros(2, 9))
    alone = GumbelNoise([6], torch.device("cpu"))(torch.zeros(1, 1), torch.zeros(1, 9))
    assert torch.equal(noise[1:], alone) and not torch.equal(noise[:1], alone)


def test_a_drafter_changes_no_greedy_answer(target, tmp_path):
    torch.manual_seed(0)
    drafter = CoralDrafter.from_target(target).eval()
    scatter_weights(drafter, seed=1)
    run(target, tmp_path / "plain.jsonl")
    run(target, tmp_path / "drafted.jsonl", drafter=drafter)
    assert read(tmp_path / "plain.jsonl") == read(tmp_path / "drafted.jsonl")
    for name in ("one", "two"):
        run(target, tmp_path / f"{name}.jsonl", drafter=drafter, temperature=1.0)
    assert read(tmp_path / "one.jsonl") == read(tmp_path / "two.jsonl")


def test_the_targets_own_generation_config_changes_nothing(target, tmp_path, monkeypatch):
    run(target, tmp_path / "plain.jsonl", temperature=0.7)
    own = {"do_sample": True, "temperature": 0.1, "top_k": 1, "repetition_penalty": 9.0}
    for name, value in own.items():
        monkeypatch.setattr(target.generation_config, name, value)
    run(target, tmp_path / "tuned.jsonl", temperature=0.7)
    assert read(tmp_path / "plain.jsonl") == read(tmp_path / "tuned.jsonl")


def test_plain_text_is_continued_from_its_start(target, tmp_path):
    rows = Dataset.from_dict({"text": ["once upon a time", "twice", ""]})
    run(target, tmp_path / "out.jsonl", rows, prompt_tokens=4, max_new_tokens=6)
    tokenizer, found = tiny_tokenizer(), read(tmp_path / "out.jsonl")
    assert found[0]["text"].startswith("once") and found[1]["text"].startswith("twic")
    assert not found[0]["text"].startswith("once upon a time")
    for row in found.values():
        ids = tokenize(row, tokenizer, 100)["input_ids"]
        assert ids[0] == 0 and (ids[-1] == END) == row["is_complete"]


def test_tools_and_system_turns_stay_and_an_open_question_is_answered(target, tmp_path):
    system = {"role": "system", "content": "Be brief."}
    tools = [{"name": "clock", "parameters": {"zone": "str"}}]
    rows = [
        {"messages": [system, *TOOL_CHAT, CHAT[2]], "tools": json.dumps(tools)},
        {"messages": [system, CHAT[0]], "tools": None},
    ]
    settings = RegenerationSettings(max_new_tokens=10, batch_size=2)
    tokenizer = tiny_tokenizer(TOOL_TEMPLATE)
    output = tmp_path / "out.jsonl"
    regenerate(target, tokenizer, Dataset.from_list(rows), output, settings)
    found = read(output)
    assert json.loads(found[0]["tools"]) == tools and "tools" not in found[1]
    call = {name: value for name, value in TOOL_CHAT[1].items() if value is not None}
    assert found[0]["messages"][:4] == [system, CHAT[0], call, TOOL_CHAT[2]]
    assert found[0]["messages"][4]["role"] == "assistant" and found[0]["messages"][4] != CHAT[1]
    assert [turn["role"] for turn in found[1]["messages"]] == ["system", "user", "assistant"]
    assert all(tokenize(row, tokenizer, 1000) for row in load_conversations(output))


def test_rows_without_room_or_answers_are_left_out_with_the_reason(target, tmp_path):
    long = {"messages": [{"role": "user", "content": "x" * 120}, CHAT[1]]}
    only = {"messages": [CHAT[1]]}
    later = {"messages": [*CHAT[:2], *long["messages"]]}
    rows = Dataset.from_list([long, only, later])
    done = run(target, tmp_path / "out.jsonl", rows)
    assert done.num_left_out == 2 and set(read(tmp_path / "out.jsonl")) == {2}
    assert len(read(tmp_path / "out.jsonl")[2]["messages"]) == 2
    left_out = read(tmp_path / "out.jsonl.left_out.jsonl")
    assert {row: entry["reason"] for row, entry in left_out.items()} == {
        0: "a prompt of 124 tokens; at most 118 leave room for an answer",
        1: "no turn to answer",
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.5}, "with temperature = the float 0.0, now it is the float 0.5"),
        ({"max_new_tokens": 9}, "with max_new_tokens = the int 10"),
        ({"rows": chats(5)}, "with dataset = the str"),
    ],
)
def test_an_output_of_other_settings_is_never_mixed(target, tmp_path, change, message):
    run(target, tmp_path / "out.jsonl")
    before = (tmp_path / "out.jsonl").read_bytes()
    with pytest.raises(ValueError, match=message):
        run(target, tmp_path / "out.jsonl", **change)
    assert (tmp_path / "out.jsonl").read_bytes() == before


def test_a_target_in_another_dtype_is_never_mixed(target, tmp_path):
    rounded = copy.deepcopy(target).bfloat16()
    run(rounded.float(), tmp_path / "out.jsonl")
    with pytest.raises(ValueError, match="with dtype = the str 'float32', now it is the str 'bfl"):
        run(rounded.bfloat16(), tmp_path / "out.jsonl")


def test_a_drafter_that_samples_is_never_mixed_with_another(target, tmp_path):
    torch.manual_seed(0)
    one, other = (CoralDrafter.from_target(target).eval() for _ in range(2))
    for temperature, output in ((0.0, tmp_path / "greedy.jsonl"), (1.0, tmp_path / "drawn.jsonl")):
        run(target, output, drafter=one, temperature=temperature)
    run(target, tmp_path / "greedy.jsonl", drafter=other)
    run(target, tmp_path / "greedy.jsonl")
    for drafter in (other, None):
        with pytest.raises(ValueError, match="with drafter = the str"):
            run(target, tmp_path / "drawn.jsonl", drafter=drafter, temperature=1.0)


def test_a_target_that_was_trained_in_one_place_is_never_mixed(target, tmp_path):
    run(target, tmp_path / "out.jsonl")
    other = copy.deepcopy(target)
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[5, 7] += 1
    with pytest.raises(ValueError, match="with target = the str"):
        run(other, tmp_path / "out.jsonl")


def test_settings_that_a_full_disk_cut_off_leave_nothing(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(OSError, match="File too large: .*settings.json"):
            with open_answers(tmp_path / "out.jsonl", {"chat_template": "x" * 1000}):
                pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.glob("*settings*"))


def test_another_target_or_file_is_never_mixed(target, tmp_path):
    run(target, tmp_path / "out.jsonl")
    other = tiny_target("llama", torch.float64, seed=5, vocab_size=len(tiny_tokenizer()))
    with pytest.raises(ValueError, match="with target = the str"):
        run(other, tmp_path / "out.jsonl")
    (tmp_path / "own.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="own.jsonl exists and was not written by `regenerate`"):
        run(target, tmp_path / "own.jsonl")
    with open_answers(tmp_path / "held.jsonl", {}):
        with pytest.raises(ValueError, match="Another run writes to `output`"):
            run(target, tmp_path / "held.jsonl")


def test_a_full_disk_leaves_what_was_written(tmp_path):
    path, rows = tmp_path / "out.jsonl", [{"row": 0}, {"row": 1, "text": "x" * 30_000}]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with open_answers(path, {}) as file:
        file.append(rows[:1], [])
        before = path.read_bytes()
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        try:
            with pytest.raises(OSError, match="File too large"):
                file.append(rows[1:], [])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert path.read_bytes() == before and file.done == {0}
        file.append(rows[1:], [])
    with open_answers(path, {}) as file:
        assert file.done == {0, 1}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "`temperature` is -1.0; use 0 or more"),
        ({"top_p": 0.0}, "`top_p` is 0.0; use a value above 0"),
        ({"unfinished": "mend"}, "`unfinished` is 'mend'; use 'keep' or 'drop'"),
        ({"batch_size": 0}, "`batch_size` is 0; use at least 1"),
        ({"max_new_tokens": 128}, "`max_new_tokens` is 128, but the target has 128 positions"),
    ],
)
def test_settings_out_of_range_are_refused(target, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        run(target, tmp_path / "out.jsonl", **settings)


def test_rows_that_cannot_be_read_are_counted_before_the_first_answer(target, tmp_path):
    rows = [{"messages": CHAT}, {"messages": []}, {"messages": []}]
    with pytest.raises(ValueError, match="Row 1: `messages` has no turns.* Of 3 rows, 2 cannot"):
        run(target, tmp_path / "out.jsonl", Dataset.from_list(rows))
    with pytest.raises(ValueError, match="Row 0: A row of `input_ids` has no turns"):
        run(target, tmp_path / "out.jsonl", Dataset.from_dict({"input_ids": [[5, 6]]}))
    assert not (tmp_path / "out.jsonl").exists()


def test_the_command_answers_a_file(target, tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path / "target")
    target.float().save_pretrained(tmp_path / "target")
    target.double()
    chats().to_json(tmp_path / "talk.jsonl")
    names = ["--target", tmp_path / "target", "--dataset", tmp_path / "talk.jsonl"]
    sizes = ["--max-new-tokens", 4, "--limit", 3, "--hold-out", 1]
    command = ["regenerate", *names, *sizes, "--output", tmp_path / "out.jsonl"]
    result = invoke(*command)
    assert result.exit_code == 0, result.output
    assert "3 rows are in" in result.output and len(read(tmp_path / "out.jsonl")) == 3
