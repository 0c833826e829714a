"""From conversations to what the trainer reads.

In: conversations in any common layout (file, hub id, `datasets.Dataset`), the target's tokenizer.
Out: rows of `input_ids`, `attention_mask`, `labels`; [`CoralCollator`] pads them to a batch.
Trained is what the target writes itself: the assistant's turns or, of plain text, everything.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

Data = TypeVar("Data", "Dataset", "IterableDataset")
Row = Mapping[str, Any]
Message = dict[str, Any]
Encoded = dict[str, list[int]]  # `input_ids` and `labels`, each (length,)

logger = logging.get_logger(__name__)
IGNORED = -100  # the label that cross entropy and the trainer's count of items skip
DOCUMENT_CHARACTERS = 2000  # about 500 tokens of English
GENERATION_BLOCK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
READERS = {".json": "json", ".jsonl": "json", ".txt": "text", ".parquet": "parquet", ".csv": "csv"}
ROLES = {
    **{role: role for role in ("system", "developer", "user", "assistant", "tool")},
    "human": "user",
    # a function call is written by the target, what comes back is not
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model", "function_call"), "assistant"),
    **dict.fromkeys(("function", "observation", "function_response", "tool_response"), "tool"),
}


def load_conversations(path: str | Path, split: str = "train") -> Dataset:
    """Load conversations or plain text from a file, a folder or the hub.

    Args:
        path: a JSON, JSONL, text, parquet or CSV file, also with `.gz`; a folder of `save_to_disk`;
            or what `datasets.load_dataset` takes, such as a hub id. Of a text file the documents
            become `text` rows: where no `<|endoftext|>` separates them, paragraphs are joined in
            order to documents of about 2000 characters.
        split: the split; a file has `train`. Text files and saved folders take no slices of it.
    """
    import datasets

    file, name = Path(path), str(path)
    reader = READERS.get(Path(name.removesuffix(".gz")).suffix)
    if reader is None and (file / "dataset_dict.json").is_file():
        return datasets.DatasetDict.load_from_disk(name)[split]
    if reader is None and (file / "state.json").is_file():
        return datasets.Dataset.load_from_disk(name)
    if reader is None:
        return datasets.load_dataset(name, split=split)
    if reader != "text":
        return datasets.load_dataset(reader, data_files=name, split=split)
    if split != "train":
        raise ValueError(f"`split` is {split!r}, but a text file has 'train' only; use that.")
    return datasets.Dataset.from_dict({"text": _documents(file)})


def _documents(file: Path) -> list[str]:
    data = file.read_bytes()
    text = (gzip.decompress(data) if file.suffix == ".gz" else data).decode("utf-8")
    if "<|endoftext|>" in text:
        return [part.strip() for part in text.split("<|endoftext|>") if part.strip()]
    documents = [""]
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        if len(documents[-1]) >= DOCUMENT_CHARACTERS:
            documents.append("")
        documents[-1] = f"{documents[-1]}\n\n{paragraph}".strip()
    return documents


def to_messages(row: Row) -> list[Message]:
    """Write a conversation of any accepted layout as messages with `role` and `content`.

    A `system` column goes in front; the answer of a preference row is its `chosen` turn.
    """
    layout = _layout(row)
    if layout in ("text", "input_ids"):
        raise ValueError(f"A row of `{layout}` is no conversation; pass it to `tokenize` as it is.")
    turns = _alpaca_turns(row) if layout == "instruction" else list(row[layout])
    if not turns:
        raise ValueError(f"`{layout}` has no turns; drop such rows with `dataset.filter`.")
    if isinstance(row.get("chosen"), Mapping):
        turns.append(row["chosen"])
    if row.get("system"):
        turns.insert(0, {"role": "system", "content": row["system"]})
    return [_message(turn, position) for position, turn in enumerate(turns)]


def _layout(row: Row) -> str:
    """Name the column that decides how a row is read; what is nearest to the trainer goes first."""
    columns = [column for column, value in row.items() if value is not None]
    has_answer = "output" in columns or "response" in columns
    for column in ("input_ids", "messages", "conversations", "instruction", "text"):
        if column in columns and (column != "instruction" or has_answer):
            return column
    raise ValueError(
        f"Found the columns {columns}; rename yours to `messages` (role, content), `conversations`"
        " (from, value), `instruction` with `output` or `response`, `text`, or `input_ids`."
    )


def _alpaca_turns(row: Row) -> list[Message]:
    question = "\n\n".join(part for part in (row["instruction"], row.get("input")) if part)
    answer = row["output"] if row.get("output") is not None else row["response"]
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _message(turn: Row, position: int) -> Message:
    """Rename ShareGPT's keys and roles; keep what else templates read (`tool_calls`, `name`)."""
    keys = {"from": "role", "value": "content"}
    message = {keys.get(key, key): value for key, value in turn.items() if value is not None}
    role = message.get("role")
    if role not in ROLES:
        raise ValueError(f"Turn {position} has role {role!r}; known are {[*ROLES]}. Rename it.")
    if "content" not in message and "tool_calls" not in message:
        raise ValueError(f"Turn {position} ({role}) has no content; fill it, or drop the turn.")
    return {**message, "role": ROLES[role]}


def tokenize(row: Row, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Encoded:
    """Turn a row into `input_ids`, `attention_mask`, `labels`, each (length,), up to `max_length`.

    Of conversations the assistant's tokens are trained (all or none is an error), of plain text all
    tokens, of `input_ids` those with a label (without padding). The label of all others is -100.
    """
    layout = _layout(row)
    if layout == "input_ids":
        encoded = _encode_ids(row)
    elif layout == "text":
        encoded = _encode_text(row["text"], tokenizer)
    else:
        encoded = _encode_conversation(row, tokenizer)
    # A drafter reads a token and the feature before it; nothing predicts the first two tokens.
    # position        0      1        2        3
    # token           x0     x1       x2       x3
    # feature         f0     f1       f2       f3       f_i has read x_0 .. x_i
    # drafter reads          (x1,f0)  (x2,f1)  (x3,f2)  and predicts x2, x3, x4
    # label           -100   -100     x2       x3
    ids = encoded["input_ids"][:max_length]
    labels = [IGNORED, IGNORED, *encoded["labels"][2:]][: len(ids)]
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}


def _encode_ids(row: Row) -> Encoded:
    ids = row["input_ids"]
    labels = ids if row.get("labels") is None else row["labels"]
    mask = [1] * len(ids) if row.get("attention_mask") is None else row["attention_mask"]
    sizes = {len(ids), len(labels), len(mask)}
    if len(sizes) > 1 or any(b not in (a, IGNORED) for a, b in zip(ids, labels, strict=True)):
        raise ValueError(
            f"{len(ids)} `input_ids` have {len(labels)} `labels` and {len(mask)} in the mask; each"
            " needs one, and a label is its own token (unshifted) or -100."
        )
    pairs = [pair for *pair, is_real in zip(ids, labels, mask, strict=True) if is_real]
    return {"input_ids": [i for i, _ in pairs], "labels": [label for _, label in pairs]}


def _encode_text(text: str, tokenizer: PreTrainedTokenizerBase) -> Encoded:
    ids = tokenizer(text, verbose=False)["input_ids"]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    ids = [bos, *ids] if bos is not None and ids[:1] != [bos] else ids
    ids = [*ids, eos] if eos is not None and ids[-1:] != [eos] else ids
    return {"input_ids": ids, "labels": ids}


def _encode_conversation(row: Row, tokenizer: PreTrainedTokenizerBase) -> Encoded:
    messages = to_messages(row)
    if not (tokenizer.chat_template and tokenizer.is_fast):
        raise ValueError(
            f"Expected a fast tokenizer with a chat template, found `is_fast` {tokenizer.is_fast}"
            f" and a template {bool(tokenizer.chat_template)}; set `tokenizer.chat_template` to the"
            " one the target is used with, or give `text` rows."
        )
    tools = row.get("tools") or None
    tools = json.loads(tools) if isinstance(tools, str) else tools

    def render(turns: list[Message], **options: Any) -> Any:
        return tokenizer.apply_chat_template(turns, tools=tools or None, **options)

    if GENERATION_BLOCK.search(tokenizer.get_chat_template(tools=tools or None)):
        silent = {"verbose": False}  # of the length: the cut to `max_length` comes later
        full = render(messages, return_assistant_tokens_mask=True, tokenizer_kwargs=silent)
        mask = full["assistant_masks"]
    else:
        text = render(messages, tokenize=False)
        full = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        mask = _mask_by_prefixes(messages, text, full["offset_mapping"], render)
    if all(mask) or not any(mask):
        raise ValueError(
            f"{'Every' if any(mask) else 'No'} token of {[turn['role'] for turn in messages]} is"
            " trained; expected the answers' alone. Drop rows without prompt or answer with"
            " `dataset.filter`, or enclose only the answers in the template in `{% generation %}`."
        )
    labels = [i if kept else IGNORED for i, kept in zip(full["input_ids"], mask, strict=True)]
    return {"input_ids": full["input_ids"], "labels": labels}


def _mask_by_prefixes(
    messages: list[Message], text: str, offsets: list[tuple[int, int]], render: Callable[..., Any]
) -> list[bool]:
    """Train what an assistant's turn adds to its prompt, with the token that spans the seam."""
    spans = []
    for position, message in enumerate(messages):
        # no prompt can be rendered for a turn that opens the conversation: it is not trained
        if position == 0 or message["role"] != "assistant":
            continue
        prompt = render(messages[:position], tokenize=False, add_generation_prompt=True)
        turn = render(messages[: position + 1], tokenize=False)
        start, answer = len(prompt), turn.removeprefix(prompt)
        # reasoning templates drop the thinking of earlier turns, so an end of the answer stays
        ends = (k for k in range(len(answer)) if text.startswith(answer[k:], start))
        lost = next(ends, len(answer))
        has_prompt = turn.startswith(prompt) and text.startswith(prompt)
        if not has_prompt or (answer and lost == len(answer)):
            raise ValueError(
                f"The chat template does not render turn {position} as its prompt and an answer;"
                " enclose answers in the template in `{% generation %}` and `{% endgeneration %}`."
            )
        spans.append((start, start + len(answer) - lost))
    return [any(a < stop and b > start for start, stop in spans) for a, b in offsets]


def prepare_dataset(
    dataset: Data, tokenizer: PreTrainedTokenizerBase, max_length: int, num_proc: int | None = None
) -> Data:
    """Tokenize a dataset to the columns `input_ids`, `attention_mask` and `labels`.

    Rows that are cut before their first trained token are dropped. A stream is read lazily.
    """
    import datasets

    first = next(iter(dataset), None)
    if first is None:
        raise ValueError("`dataset` has no rows; check its path, its split and its filters.")
    columns = dataset.column_names or list(first)  # a stream may not know its columns
    _layout(dict.fromkeys(columns, True))
    given = {"tokenizer": tokenizer, "max_length": max_length}
    how: dict[str, Any] = {"with_indices": True, "remove_columns": columns, "fn_kwargs": given}
    plain = dataset.with_format(None)  # lists, not tensors
    if isinstance(plain, datasets.IterableDataset):
        return plain.map(_tokenize_numbered, **how).filter(_has_labels)
    rows = plain.map(_tokenize_numbered, **how, num_proc=num_proc, desc="Tokenizing")
    trained = rows.filter(_has_labels, num_proc=num_proc, desc="Dropping rows without labels")
    dropped = len(rows) - len(trained)
    fact = f"{dropped} of {len(rows)} rows have no trained token in their first {max_length}"
    if dropped == len(rows):
        raise ValueError(f"{fact}, so nothing is left; raise `max_length`.")
    if dropped:
        logger.warning(f"{fact} and are dropped; raise `max_length` to keep more.")
    return trained


def _tokenize_numbered(
    row: Row, index: int, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Encoded:
    try:
        return tokenize(row, tokenizer, max_length)
    except (TemplateError, TypeError, ValueError) as error:
        raise ValueError(f"Row {index}: {error}") from error


def _has_labels(row: Row) -> bool:
    return any(label != IGNORED for label in row["labels"])


@dataclass
class CoralCollator:
    """Pad rows of [`prepare_dataset`] on the right to three tensors, each (batch, length).

    >>> batch = CoralCollator(pad_to_multiple_of=8)([dataset[0], dataset[1]])
    """

    pad_token_id: int = 0  # any id of the vocabulary: mask and labels hide it
    pad_to_multiple_of: int | None = None  # so that fewer lengths occur

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        fills = {"input_ids": self.pad_token_id, "attention_mask": 0, "labels": IGNORED}
        if not fills.keys() <= rows[0].keys():
            raise ValueError(f"Rows have {[*rows[0]]}, not {[*fills]}; use `prepare_dataset`.")
        multiple = self.pad_to_multiple_of or 1
        length = -(-max(len(row["input_ids"]) for row in rows) // multiple) * multiple
        return {
            name: torch.tensor([[*row[name], *[fill] * (length - len(row[name]))] for row in rows])
            for name, fill in fills.items()
        }
