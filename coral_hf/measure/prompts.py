"""Prompts of a benchmark, read from the files as they are published.

In: a question file of MT-bench, Spec-Bench or EAGLE (`turns`), HumanEval (`prompt`), GSM8K
(`question`), dialogues (`messages`), or plain text; JSON lines may be gzipped. Out: a list of
Prompt, the token ids of one, a left-padded batch of several.
"""

import gzip
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

Message = dict[str, str]
Row = dict[str, Any]

# Spec-Bench counts MT-bench's eight categories, the rows of two turns, as one of its six tasks
SPEC_BENCH_TASKS = ("translation", "summarization", "qa", "math_reasoning", "rag")
END_OF_DOCUMENT = "<|endoftext|>"


class Prompt(NamedTuple):
    """What a model is asked: messages of a conversation, or a text to continue."""

    task: str
    id: str
    messages: tuple[Message, ...] = ()
    text: str | None = None  # continued as it stands, never wrapped in a chat template
    turns: tuple[str, ...] = ()  # the user turns that follow once the first is answered

    def follow_up(self, answer: str) -> "Prompt":
        """The same conversation one turn on: the answer and the next user turn appended."""
        asked = ({"role": "assistant", "content": answer}, user_message(self.turns[0]))
        return self._replace(messages=self.messages + asked, turns=self.turns[1:])


def user_message(content: str) -> Message:
    return {"role": "user", "content": content}


def read_prompts(
    path: str | Path,
    limit: int | None = None,
    skip: int = 0,
    last: int | None = None,
    user_turn: int = -1,
    num_words: int = 32,
) -> list[Prompt]:
    """Read the prompts of one benchmark file.

    Args:
        path: a `.jsonl`, `.jsonl.gz` or `.txt` file.
        limit: keep at most so many prompts.
        skip: leave out so many from the start.
        last: look only at the last so many rows of the file (a held-out tail), then `skip`.
        user_turn: which of a dialogue's answered user turns is asked, as a Python index, the
            nearest one where the dialogue is shorter. The last one (-1) is often a goodbye.
        num_words: how many words of a plain-text document are the prompt; shorter documents leave
            nothing to continue and are left out.
    """
    path = Path(path)
    if path.name.endswith(".txt"):
        prompts = read_documents(path, num_words)
    else:
        rows = read_rows(path)
        prompts = [prompt_from_row(row, index, path, user_turn) for index, row in enumerate(rows)]
    if not prompts:
        raise ValueError(
            f"`path` is {path}, which holds no prompt; give a file with at least one row."
        )
    tail = prompts if last is None else prompts[max(len(prompts) - last, 0) :]
    return tail[skip:] if limit is None else tail[skip : skip + limit]


def read_rows(path: Path) -> list[Row]:
    """The JSON objects of a `.jsonl` or `.jsonl.gz` file, one a line."""
    if not path.name.endswith((".jsonl", ".jsonl.gz")):
        raise ValueError(f"`path` ends in {path.suffix!r}; expected .jsonl, .jsonl.gz or .txt.")
    opener: Callable[..., Any] = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.strip()]


def prompt_from_row(row: Row, index: int, path: Path, user_turn: int = -1) -> Prompt:
    """One prompt from a row, its format told by the field that holds the question."""
    if "turns" in row:
        first, *later = row["turns"]
        task, id_ = question_task(row, path), row.get("question_id", index)
        return Prompt(task, str(id_), (user_message(first),), turns=tuple(later))
    if "messages" in row:
        asked = tuple(asked_messages(row["messages"], user_turn))
        return Prompt(file_task(path), str(row.get("id", index)), asked)
    if "task_id" in row and "prompt" in row:
        return Prompt("humaneval", row["task_id"], (user_message(row["prompt"]),))
    if "question" in row:
        return Prompt("gsm8k", str(index), (user_message(row["question"]),))
    raise ValueError(
        f"row {index} of {path.name} has the fields {sorted(row)}; expected `turns`, `messages`, "
        "`task_id` with `prompt`, or `question`."
    )


def question_task(row: Row, path: Path) -> str:
    """Spec-Bench's task of a question row; the file's name where it is from elsewhere."""
    if row.get("category") in SPEC_BENCH_TASKS:
        return row["category"]
    return "mt_bench" if len(row["turns"]) == 2 else file_task(path)


def file_task(path: Path) -> str:
    """What a file is called; its folder where it is only called `question`, `test` or `train`."""
    name = path.name.split(".")[0]
    return path.absolute().parent.name if re.match(r"(question|test|train)(_|$)", name) else name


def asked_messages(messages: Sequence[Message], user_turn: int = -1) -> list[Message]:
    """A dialogue up to and including an answered user turn, or its last user turn if none is."""
    users = [i for i, message in enumerate(messages) if message["role"] == "user"]
    if not users:
        raise ValueError(
            f"a dialogue of {len(messages)} messages has no user turn; give one with `role` user."
        )
    followed = [
        i for i in users if i + 1 < len(messages) and messages[i + 1]["role"] == "assistant"
    ]
    if not followed:
        return list(messages[: users[-1] + 1])
    index = user_turn if user_turn >= 0 else len(followed) + user_turn
    return list(messages[: followed[min(max(index, 0), len(followed) - 1)] + 1])


def read_documents(path: Path, num_words: int) -> list[Prompt]:
    """The first words of each document; blank lines part them where no end-of-text mark does."""
    text = path.read_text(encoding="utf-8")
    parted = text.split(END_OF_DOCUMENT) if END_OF_DOCUMENT in text else re.split(r"\n\s*\n", text)
    heads = (re.match(rf"(\S+\s+){{{num_words - 1}}}\S+(?=\s+\S)", part.strip()) for part in parted)
    task = file_task(path)
    return [Prompt(task, str(i), text=head[0]) for i, head in enumerate(heads) if head]


def encode(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Token ids of a prompt, (1, length): messages by the chat template, if the tokenizer has one.

    Text starts with BOS if the tokenizer knows one; a chat template decides that by itself.
    """
    if prompt.messages and tokenizer.chat_template is not None:
        encoded = tokenizer.apply_chat_template(
            list(prompt.messages), add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        return encoded["input_ids"]
    if prompt.text is not None:
        text = prompt.text
    else:
        text = "\n".join(message["content"] for message in prompt.messages)
    ids = tokenizer(text, return_tensors="pt")["input_ids"].long()  # (1, length)
    bos = tokenizer.bos_token_id
    if bos is None or (ids.shape[1] and ids[0, 0] == bos):
        return ids
    return torch.cat([torch.tensor([[bos]]), ids], dim=1)


def as_batch(ids: Tensor) -> dict[str, Tensor]:
    """The arguments of `generate` for one prompt (1, length), both (1, length)."""
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def left_padded(
    prompts: Sequence[Sequence[int] | Tensor],
    pad_token: int,
    device: torch.device | None = None,
) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask` (batch, longest) of prompts, each (length,)."""
    rows = [torch.as_tensor(prompt) for prompt in prompts]
    ids = pad_sequence(rows, batch_first=True, padding_value=pad_token, padding_side="left")
    ones = [torch.ones_like(row) for row in rows]
    mask = pad_sequence(ones, batch_first=True, padding_side="left")
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
