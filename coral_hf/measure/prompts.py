"""Prompts of a benchmark, read from the published files.

In: a question file of MT-bench, Spec-Bench or EAGLE (`turns`), HumanEval (`prompt`), GSM8K
(`question`), dialogues (`messages`), or plain text: documents, or a prompt a line; JSON lines may
be gzipped. Out: a list of Prompt, the token ids of one, a left-padded batch of several. What was
read, and what was left out, is logged.
"""

import gzip
import json
import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..target import max_positions, text_config
from .chat import render

logger = logging.getLogger(__name__)

Message = dict[str, str]

# Spec-Bench counts MT-bench's eight categories, the rows of two turns, as one of its six tasks
SPEC_BENCH_TASKS = ("translation", "summarization", "qa", "math_reasoning", "rag")
END_OF_DOCUMENT = "<|endoftext|>"


class Prompt(NamedTuple):
    """A prompt: messages of a conversation, or a text to continue."""

    task: str
    id: str
    messages: tuple[Message, ...] = ()
    text: str | None = None  # continued as it stands, never wrapped in a chat template
    turns: tuple[str, ...] = ()  # the user turns that follow once the first is answered

    def follow_up(self, answer: str) -> "Prompt":
        """Return the conversation with the answer and the next user turn appended."""
        asked = ({"role": "assistant", "content": answer}, user_message(self.turns[0]))
        return self._replace(messages=self.messages + asked, turns=self.turns[1:])


def user_message(content: str) -> Message:
    return {"role": "user", "content": content}


def read_prompts(
    path: str | Path,
    limit: int | None = None,
    last: int | None = None,
    user_turn: int = -1,
    num_words: int = 32,
) -> list[Prompt]:
    """Read the prompts of one benchmark file.

    A `.txt` file holds documents, which are continued, where end-of-text marks or blank lines part
    them. It holds a prompt a line, which a user says, where there are no such marks and no part has
    more than `num_words` words, or each part is a single line and most have not.

    Args:
        path: a `.jsonl`, `.jsonl.gz` or `.txt` file.
        limit: keep at most so many prompts.
        last: read only the last so many rows of the file (a held-out tail).
        user_turn: which of a dialogue's answered user turns is asked, as a Python index, the
            nearest one where the dialogue is shorter. The last one (-1) is often a goodbye.
        num_words: how many words of a plain-text document are the prompt; shorter documents leave
            nothing to continue and are left out.

    Raises:
        ValueError: for another format, naming the row, and a file without a prompt.
    """
    path, left_out = Path(path), ""
    try:
        if path.suffix == ".txt":
            prompts, form, left_out = read_text(path, num_words)
        else:
            rows, form = enumerate(read_rows(path)), "one a row"
            prompts = [prompt_from_row(row, index, path, user_turn) for index, row in rows]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {error}.") from error
    if not prompts:
        raise ValueError(f"`path` is {path}, which holds no prompt{left_out}; give another.")
    chosen = prompts[-(last or len(prompts)) :][:limit]
    said = {one.id: one.text or str(one.messages[-1]["content"]) for one in chosen}
    if empty := [name for name, text in said.items() if not text.strip()]:
        raise ValueError(f"Prompts {', '.join(empty)} of {path} are empty; fill or remove them.")
    counts = len(chosen), len(prompts)
    logger.info("%d of %d prompts from %s, %s%s.", *counts, path, form, left_out)
    return chosen


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read the JSON objects of a `.jsonl` or `.jsonl.gz` file, one a line.

    Raises:
        ValueError: for another ending, and a line that is no object, by its number.
    """
    if not path.name.endswith((".jsonl", ".jsonl.gz")):
        raise ValueError(f"`path` ends in {path.suffix!r}; expected .jsonl, .jsonl.gz or .txt.")
    opener: Callable[..., Any] = gzip.open if path.suffix == ".gz" else open
    rows = []
    with opener(path, "rt", encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                rows.append(dict(json.loads(line)))
            except (ValueError, TypeError) as error:
                raise ValueError(f"Line {number} of {path} is no JSON object: {error}.") from error
    return rows


def prompt_from_row(row: dict[str, Any], index: int, path: Path, user_turn: int = -1) -> Prompt:
    """Make a prompt of a row, whose format follows from the field that holds the question."""
    if "turns" in row:
        first, *later = row["turns"]
        task = "mt_bench" if len(later) == 1 else file_task(path)
        task = row["category"] if row.get("category") in SPEC_BENCH_TASKS else task
        id_ = str(row.get("question_id", index))
        return Prompt(task, id_, (user_message(first),), turns=tuple(later))
    if "messages" in row:
        asked = tuple(asked_messages(row["messages"], user_turn))
        return Prompt(file_task(path), str(row.get("id", index)), asked)
    if "task_id" in row and "prompt" in row:
        return Prompt("humaneval", row["task_id"], (user_message(row["prompt"]),))
    if "question" in row:
        return Prompt("gsm8k", str(index), (user_message(row["question"]),))
    known = "`turns`, `messages`, `task_id` with `prompt`, or `question`"
    raise ValueError(f"row {index} of {path.name} has the fields {sorted(row)}; expected {known}.")


def file_task(path: Path) -> str:
    """Return a file's name, or its folder's where it is only called `question`, `test`, `train`."""
    name = path.name.split(".")[0]
    return path.absolute().parent.name if re.match(r"(question|test|train)(_|$)", name) else name


def asked_messages(messages: Sequence[Message], user_turn: int = -1) -> list[Message]:
    """Cut a dialogue after an answered user turn, or after its last user turn if none is."""
    roles = [message["role"] for message in messages]
    users = [i for i, role in enumerate(roles) if role == "user"]
    if not users:
        raise ValueError(f"A dialogue has the roles {roles}; give one with a user turn.")
    answered = [i for i in users if roles[i + 1 : i + 2] == ["assistant"]] or users[-1:]
    nearest = min(max(user_turn, -len(answered)), len(answered) - 1)
    return list(messages[: answered[nearest] + 1])


def read_text(path: Path, num_words: int) -> tuple[list[Prompt], str, str]:
    """Read documents, or prompts of a line each; see `read_prompts`.

    Returns:
        the prompts; how they stand in the file, in words; and what was left out.
    """
    text, task, mark = path.read_text(encoding="utf-8-sig"), file_task(path), "blank lines"
    if END_OF_DOCUMENT in text:
        parts, mark = text.split(END_OF_DOCUMENT), END_OF_DOCUMENT
    else:
        parts = re.split(r"\n\s*\n", text.strip())
    heads = [re.match(rf"(\S+\s+){{{num_words - 1}}}\S+(?=\s+\S)", part.strip()) for part in parts]
    num_long = sum(map(bool, heads))
    is_list = all("\n" not in part for part in parts) and 2 * num_long < len(parts)
    if mark != END_OF_DOCUMENT and (len(parts) == 1 or not num_long or is_list):
        lines = [line.strip() for line in text.split("\n") if line.strip()]
        said = [Prompt(task, str(i), (user_message(line),)) for i, line in enumerate(lines)]
        return said, "one a line", ""
    found = [Prompt(task, str(i), text=head[0]) for i, head in enumerate(heads) if head]
    short = sum(bool(part.strip()) for part in parts) - len(found)
    left_out = f"; left out: {short} of no more than {num_words} words" if short else ""
    return found, f"the first {num_words} words of documents between {mark}", left_out


def fitting(
    prompts: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    target: PreTrainedModel,
    max_new_tokens: int,
) -> list[Prompt]:
    """Return the prompts that fit the target's context with their answers; the others are logged.

    Raises:
        ValueError: if none fits.
    """
    room = room_for_prompt(target, max_new_tokens)
    long = [prompt for prompt in prompts if encode(prompt, tokenizer).shape[1] > room]
    if len(long) == len(prompts):
        raise ValueError(f"none of the {len(prompts)} `prompts` fits the target; give others.")
    if long:
        names = ", ".join(f"{prompt.task}/{prompt.id}" for prompt in long)
        logger.warning("Left out, since of more than %d tokens: %s.", room, names)
    return [prompt for prompt in prompts if prompt not in long]


def encode(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Return the token ids of a prompt, (1, length), by the tokenizer's chat template.

    Without a template, and for plain text, they start with BOS if the tokenizer has one.
    """
    if prompt.messages and tokenizer.chat_template is not None:
        options: dict[str, Any] = {"add_generation_prompt": True, "return_tensors": "pt"}
        found = render(prompt.messages, tokenizer, today=True, return_dict=True, **options)
        return found["input_ids"]
    texts = [message["content"] for message in prompt.messages]
    text = "\n".join(texts) if prompt.text is None else prompt.text
    ids = tokenizer(text, return_tensors="pt")["input_ids"].long()  # (1, length)
    bos = tokenizer.bos_token_id
    if bos is None or (ids.shape[1] and ids[0, 0] == bos):
        return ids
    return torch.cat([torch.tensor([[bos]]), ids], dim=1)


def encode_said(
    text: str, tokenizer: PreTrainedTokenizerBase, target: PreTrainedModel, max_new_tokens: int
) -> Tensor:
    """Return the token ids of what a user says, (1, length), on the target's device.

    Raises:
        ValueError: if it is empty, or leaves no room in the context for so many new tokens.
    """
    if not text.strip():
        raise ValueError("The prompt is empty: write what the target is to answer or continue.")
    ids = encode(Prompt("prompt", "0", (user_message(text),)), tokenizer)
    if ids.shape[1] > (room := room_for_prompt(target, max_new_tokens)):
        raise ValueError(
            f"The prompt has {ids.shape[1]} tokens, but beside {max_new_tokens} new ones the"
            f" target has room for {max(room, 0)}: shorten it, or ask for fewer new tokens."
        )
    return ids.to(target.device)


def left_padded(
    prompts: Sequence[Sequence[int] | Tensor], pad_token: int, device: torch.device | None = None
) -> dict[str, Tensor]:
    """Make `input_ids` and `attention_mask`, (batch, longest), of prompts, each (length,)."""
    rows = [torch.as_tensor(prompt) for prompt in prompts]
    ids = pad_sequence(rows, batch_first=True, padding_value=pad_token, padding_side="left")
    ones = [torch.ones_like(row) for row in rows]
    mask = pad_sequence(ones, batch_first=True, padding_side="left")
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def room_for_prompt(target: PreTrainedModel, max_new_tokens: int) -> float:
    """Return how many tokens a prompt may have; infinity where the target names no limit."""
    return (max_positions(text_config(target)) or float("inf")) - max_new_tokens
