"""Options of a chat template: given once, they reach training, the drafter and its benchmarks."""

import json
from typing import Any

import pytest
import torch
from conftest import invoke, tiny_target
from datasets import Dataset
from test_data import CHAT, PLAIN_TEMPLATE, fresh_cache, tiny_tokenizer  # noqa: F401
from transformers import AutoTokenizer

from coral_hf import CoralDrafter, CoralTrainer, CoralTrainingArguments
from coral_hf.cli.options import DrafterOptions
from coral_hf.measure.chat import (
    chat_options,
    render,
    restore_chat_options,
    set_chat_options,
    with_fixed_day,
)
from coral_hf.measure.prompts import Prompt, encode
from coral_hf.training.data import tokenize

LOUD = "{{ 'LOUD' if loud else '' }}" + PLAIN_TEMPLATE


def read(row: dict[str, Any], tokenizer: Any) -> str:
    (found,) = tokenize(row, tokenizer, 100)
    return tokenizer.decode(found["input_ids"])


def test_options_reach_every_rendering_and_are_saved_with_the_tokenizer(tmp_path):
    tokenizer = set_chat_options(tiny_tokenizer(LOUD), chat_template_kwargs='{"loud": true}')
    tokenizer.save_pretrained(tmp_path)
    prompt = Prompt("x", "0", tuple(CHAT[:1]))
    for one in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        assert read({"messages": CHAT}, one).startswith("LOUD<s><user>")
        assert one.decode(encode(prompt, one)[0]) == "LOUD<s><user>hi<end><bot>"
    assert read({"messages": CHAT, "chat_template_kwargs": {"loud": False}}, tokenizer)[:3] == "<s>"


def test_a_template_is_a_file_or_a_text(tmp_path):
    (tmp_path / "chat.jinja").write_text(LOUD)
    for template in (LOUD, tmp_path / "chat.jinja", str(tmp_path / "chat.jinja")):
        assert set_chat_options(tiny_tokenizer(None), template).chat_template == LOUD
    with pytest.raises(ValueError, match="`chat_template` is 'none.jinja', neither a file nor"):
        set_chat_options(tiny_tokenizer(None), "none.jinja")
    for options in ("{loud}", "3", [1]):
        with pytest.raises(ValueError, match="`chat_template_kwargs` is .*; give an object"):
            set_chat_options(tiny_tokenizer(), chat_template_kwargs=options)


@pytest.mark.parametrize("start", ["", "\n", "  ", "{{ 'x' }}", "{% set a = 1 %}\n"])
def test_a_fixed_day_changes_nothing_but_the_date(start):
    template = start + "{{ strftime_now('%d %b %Y, %-d') if strftime_now is defined }}." + LOUD
    tokenizer = tiny_tokenizer(template)
    dated = render(CHAT, tokenizer, tokenize=False)
    assert "01 Jan 2025, 1." in dated
    tokenizer.chat_template = start + "01 Jan 2025, 1." + LOUD
    assert render(CHAT, tokenizer, tokenize=False) == dated
    assert with_fixed_day(LOUD) == LOUD


def test_a_drafter_keeps_the_options_that_it_is_trained_with(tmp_path):
    target = tiny_target("llama", torch.float32, vocab_size=len(tiny_tokenizer()))
    tokenizer = set_chat_options(tiny_tokenizer(PLAIN_TEMPLATE), LOUD, {"loud": True})
    trainer = CoralTrainer(
        model=CoralDrafter.from_target(target),
        target_model=target,
        args=CoralTrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True),
        train_dataset=Dataset.from_list([{"messages": CHAT}]),
        processing_class=tokenizer,
    )
    trainer.save_model(tmp_path / "drafter")
    target.save_pretrained(tmp_path / "target")
    tiny_tokenizer(PLAIN_TEMPLATE).save_pretrained(tmp_path / "target")
    names = {"target": str(tmp_path / "target"), "drafter": str(tmp_path / "drafter")}
    _, drafter, found = DrafterOptions(**names).load_models()
    assert found.chat_template == LOUD and chat_options(found) == {"loud": True}
    _, _, found = DrafterOptions(**names, chat_template_kwargs='{"loud": false}').load_models()
    assert found.chat_template == LOUD and chat_options(found) == {"loud": False}
    plain = CoralDrafter.from_target(target)
    found = tiny_tokenizer(PLAIN_TEMPLATE)
    restore_chat_options(found, plain.config)
    assert found.chat_template == PLAIN_TEMPLATE and not chat_options(found)


def test_commands_take_the_options(tmp_path):
    tiny_tokenizer(LOUD).save_pretrained(tmp_path / "target")
    (tmp_path / "talk.jsonl").write_text(json.dumps({"messages": CHAT}))
    names = ["--dataset", tmp_path / "talk.jsonl", "--target", tmp_path / "target"]
    result = invoke("data", "show", *names, "--chat-template-kwargs", '{"loud": true}')
    assert result.exit_code == 0 and "L│O│U│D│<s>" in result.output, result.output
    result = invoke("data", "show", *names, "--chat-template", "<bot>{{ messages[1].content }}")
    assert result.exit_code == 0 and "L│O│U│D" not in result.output, result.output
