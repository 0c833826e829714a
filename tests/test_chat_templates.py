"""Chat templates as they are shipped: a row is the prompt of a target, and then its answer.

Templates: those in the code of transformers, of TRL where it is installed, of the shared
tokenizers, of a folder that is named, and of a table. Each is rendered over twelve conversations,
and compared token by token with `apply_chat_template(add_generation_prompt=True)`.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import transformers
from conftest import SHARED
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from coral_hf.measure.chat import with_fixed_day
from coral_hf.training.data import tokenize, turns

IGNORED = -100
# marks that these templates write, each a token
MARK = re.compile(r"<\|[^|<>]{1,40}\|>|<｜[^｜<>]{1,40}｜>|</?[a-z_]{1,20}>|\[/?[A-Z_]{2,20}\]")


def turn(role: str, content: str | None, **others: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **others}


HI, HELLO = turn("user", "Two and two?"), turn("assistant", "Four.")
BRIEF = turn("system", "Answer in one word.")
THOUGHT = turn("assistant", "Four.", reasoning_content="Easy: 2 + 2.")
CALL = {
    "id": "call00001",
    "type": "function",
    "function": {"name": "add", "arguments": {"a": 2, "b": "two"}},
}
TEXT_CALL = {**CALL, "function": {"name": "add", "arguments": json.dumps({"a": 2, "b": "two"})}}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Add two numbers.",
            "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
        },
    }
]
RESULT = turn("tool", "4", tool_call_id="call00001", name="add")

CONVERSATIONS: dict[str, dict[str, Any]] = {
    "one turn": {"messages": [HI, HELLO]},
    "two turns": {"messages": [HI, HELLO, turn("user", "Sure?"), turn("assistant", "Yes.")]},
    "three turns": {"messages": [HI, HELLO] * 3},
    "system": {"messages": [BRIEF, HI, HELLO]},
    "developer": {"messages": [turn("developer", "Answer in one word."), HI, HELLO]},
    "a thought": {"messages": [HI, THOUGHT]},
    "two thoughts": {"messages": [HI, THOUGHT, turn("user", "Sure?"), THOUGHT]},
    "a thought within": {"messages": [HI, turn("assistant", "<think>\nEasy.\n</think>\n\nFour.")]},
    "a call": {
        "messages": [HI, turn("assistant", "", tool_calls=[CALL]), RESULT, HELLO],
        "tools": TOOLS,
    },
    "a call as text": {
        "messages": [HI, turn("assistant", "", tool_calls=[TEXT_CALL]), RESULT, HELLO],
        "tools": TOOLS,
    },
    "two users": {"messages": [HI, turn("user", "Quick!"), HELLO]},
    "odd spaces": {"messages": [turn("user", " Hm?\n"), turn("assistant", "\n Well,\n\n yes! ")]},
}
TURN = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
PROMPT = "{% if add_generation_prompt %}<|assistant|>"
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
# thoughts that a prompt opens: always, as DeepSeek-R1's, or unless the switch asks for none
LAST_PART = "<|{{ m.role }}|>{{ empty }}{{ m.content.split('</think>')[-1] }}<|end|>"
OPENED = LAST_PART.replace("{{ empty }}", "").join(["{% for m in messages %}", "{% endfor %}"])
OPENED += PROMPT + "<think>\n{% endif %}"
SWITCHED = "{% set empty = '<think></think>' if m.role == 'assistant' else '' %}" + LAST_PART
SWITCHED = SWITCHED.join(["{% for m in messages %}", "{% endfor %}"]) + PROMPT
SWITCHED += "{{ '<think>\n' if enable_thinking is not defined or enable_thinking"
SWITCHED += " else '<think></think>' }}{% endif %}"
# reasons for which a conversation may be refused
REASONS = re.compile("cannot render|leaves out|does not render turn|prints the arguments")


def shipped() -> dict[str, str]:
    """Chat templates by name."""
    plain = f"{TURN}<|end|>{{% endfor %}}{PROMPT}{{% endif %}}"
    found = {
        "phi-3": TURN + "<|end|>\n{% endfor %}" + PROMPT + "\n{% else %}<|endoftext|>{% endif %}",
        "gpt-oss, in short": TURN
        + "{{ '<|return|>' if loop.last and m.role == 'assistant' else '<|end|>' }}{% endfor %}"
        + PROMPT
        + "{% endif %}",
        "dated": "{{ strftime_now('%d %B %Y') }}" + plain,
        "no system": NO_SYSTEM + plain,
        "opened thought": OPENED,
        "switched thought": SWITCHED,
    }
    root = Path(transformers.__file__).parent
    for file in sorted(root.rglob("*.py")):
        text = file.read_text(encoding="utf-8")
        if "{%" in text and "add_generation_prompt" in text:
            for node in ast.walk(ast.parse(text)):
                value = node.value if isinstance(node, ast.Constant) else None
                if (
                    isinstance(value, str)
                    and "endfor %}" in value
                    and "add_generation_prompt" in value
                ):
                    found[f"{file.stem}:{node.lineno}"] = value
    trl = importlib.util.find_spec("trl")
    folders = [Path(trl.origin).parent / "chat_templates"] if trl and trl.origin else []
    folders += [Path(name) for name in [os.environ.get("CORAL_HF_TEST_TEMPLATES")] if name]
    for file in (file for folder in folders for file in sorted(folder.glob("*.jinja"))):
        found[file.stem] = file.read_text(encoding="utf-8")
    for file in sorted(SHARED.glob("*/*/chat_template.jinja")):
        found[file.parent.name] = file.read_text(encoding="utf-8")
    for file in sorted(SHARED.glob("tokenizers/*/tokenizer_config.json")):
        template = json.loads(file.read_text(encoding="utf-8")).get("chat_template")
        found |= {file.parent.name: template} if isinstance(template, str) else {}
    return found


TEMPLATES = shipped()


def tokenizer_of(template: str) -> PreTrainedTokenizerFast:
    """Bytes and the marks of a template as tokens, and a few merges across spaces and lines."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ċ", "Ċ"), ("Ġ", "Y"), ("Ġ", "F"), ("Ċ", "Ġ"), (">", "Ċ")]
    marks = ["<s>", "</s>", *sorted({*MARK.findall(template)} - {"<s>", "</s>"})]
    tokens = [*marks, *alphabet, *map("".join, merges)]
    core = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", extra_special_tokens=marks
    )
    tokenizer.chat_template = with_fixed_day(template)
    return tokenizer


def expected(
    messages: list[dict[str, Any]], tools: Any, tokenizer: Any
) -> list[tuple[list[int], str, str]]:
    """The prompt of each answer as ids, what is read after it, and what the target writes then."""
    found = []
    for position, message in enumerate(messages):
        if message["role"] == "assistant":
            found.append(asked(messages[:position], message, tools, tokenizer))
    return found


def asked(
    before: list[dict[str, Any]], message: dict[str, Any], tools: Any, tokenizer: Any
) -> tuple[list[int], str, str]:
    """One of `expected`: as the template renders it, with its switch if that is what it takes."""
    thought, content = message.get("reasoning_content") or "", message["content"]
    for switch in ({}, {"enable_thinking": bool(thought) or "</think>" in content}):
        options = {"tools": tools, "add_generation_prompt": True, **switch}
        ids = tokenizer.apply_chat_template(before, return_dict=False, **options)
        prompt = tokenizer.apply_chat_template(before, tokenize=False, **options)
        options["add_generation_prompt"] = False
        text = tokenizer.apply_chat_template([*before, message], tokenize=False, **options)
        if text.startswith(prompt) and thought in text:
            return ids, "", text[len(prompt) :]
    options = {"tools": tools, "add_generation_prompt": True}
    ids = tokenizer.apply_chat_template(before, return_dict=False, **options)
    opened = tokenizer.decode(ids).endswith("<think>\n")
    if opened and not thought and "</think>" not in content:
        return ids, "\n</think>\n\n", content
    if opened and not thought:
        content = content.removeprefix("<think>\n")
    return ids, "", f"{thought}\n</think>\n\n{content}" if thought else content


def spans(row: dict[str, list[int]]) -> list[tuple[int, int]]:
    """Where the trained parts of a row begin and end."""
    kept = [label != IGNORED for label in row["labels"]]
    edges = [
        i for i, (a, b) in enumerate(zip([False, *kept], [*kept, False], strict=True)) if a != b
    ]
    return [*zip(edges[::2], edges[1::2], strict=True)]


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_rows_are_the_targets_prompts_and_answers(template, name, monkeypatch):
    forms = []
    choose = turns.rendered_form

    def noted(*given):
        forms.append(choose(*given))
        return forms[-1]

    monkeypatch.setattr(turns, "rendered_form", noted)
    tokenizer, row = tokenizer_of(TEMPLATES[template]), CONVERSATIONS[name]
    try:
        rows = tokenize(row, tokenizer, 100_000)
    except ValueError as error:
        assert REASONS.search(str(error)), error
        pytest.skip(str(error)[:200])
    pairs = expected(forms[0], row.get("tools"), tokenizer)
    read = [(one, start, stop) for one in rows for start, stop in spans(one)]
    has_blocks = "generation %}" in TEMPLATES[template] or "generation -%}" in TEMPLATES[template]
    assert len(read) == len(pairs)
    for (one, start, stop), (prompt, empty, answer) in zip(read, pairs, strict=True):
        ids = one["input_ids"]
        assert ids[: len(prompt)] == prompt
        written = tokenizer.decode(ids[len(prompt) : stop])
        assert written.startswith(empty)
        written = written.removeprefix(empty)
        if not has_blocks:
            assert tokenizer.decode(ids[len(prompt) : start]) == empty
        assert written.startswith(answer) or (has_blocks and answer.startswith(written))
