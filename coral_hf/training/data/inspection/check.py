"""Numbers of a dataset, as training would read it, and its strangest rows.

In: rows of any layout, the target's tokenizer. Out: a `DataCheck`, as text or JSON. Rows are read
in batches, by several processes; a few numbers of each are kept.
"""

import unicodedata
import zlib
from collections import Counter
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

import datasets
from datasets import Dataset
from pandas import DataFrame, concat
from transformers import PreTrainedTokenizerBase

from ..dataset import map_rows
from ..encoding import IGNORED, encode
from ..layouts import Row, layout_of

TEXT, INTEGER, FLOAT = (datasets.Value(kind) for kind in ("string", "int64", "float64"))
# of a training row; `num_turns` and `num_assistant` stand in the first of those of a row
MEASURES = {
    **dict.fromkeys(("row", "num_tokens", "num_trained", "num_cut", "num_turns"), INTEGER),
    **dict.fromkeys(("num_assistant", "shortest_answer", "odd_characters"), INTEGER),
    **dict.fromkeys(("trained_share", "repetition"), FLOAT),
    **dict.fromkeys(("layout", "behaviour", "problem"), TEXT),
}
# what makes a row strange: a measure, whether the most of it does, and its name
STRANGE = [
    ("num_tokens", True, "most tokens"),
    ("shortest_answer", False, "shortest answer, in tokens"),
    ("odd_characters", True, "odd characters"),
    ("trained_share", False, "least of it is trained, as a share"),
    ("repetition", True, "most repetition: zlib makes it shorter by the factor"),
]
NUM_STRANGE = 10
QUANTILES = {"median": 0.5, "90 %": 0.9, "99 %": 0.99, "longest": 1.0}
LEAST_TEXT = 200  # characters of a text whose repetition counts
# control characters, private and unassigned ones, halves of pairs; and what stands for bad bytes
ODD, USUAL, REPLACED = {"Cc", "Cn", "Co", "Cs"}, "\n\t\r", "\ufffd"


@dataclass
class DataCheck:
    """What `check_dataset` found; rows are those of the dataset, unless it says training rows."""

    num_rows: int
    num_training_rows: int
    layouts: dict[str, int]
    num_turns: int
    num_assistant_turns: int
    num_tokens: int
    num_trained: int
    lengths: dict[str, float]  # of training rows, in tokens: quantiles
    max_length: int
    num_cut_rows: int  # training rows
    num_cut_tokens: int
    num_dropped: int  # training rows without a trained token in their first `max_length`
    unread: dict[str, int]  # why rows cannot be read → how many
    unread_rows: dict[str, int]  # the first row of each
    behaviour: dict[str, int]  # of the chat template → in how many conversations
    strangest: list[dict[str, Any]]  # row, reason, value

    def to_dict(self) -> dict[str, Any]:
        """Return all of it, as JSON takes it."""
        return asdict(self)

    def __str__(self) -> str:
        share = self.num_trained / max(self.num_tokens, 1)
        lengths = ", ".join(f"{name} {size:,.0f}" for name, size in self.lengths.items())
        layouts = ", ".join(f"{count:,} of `{name}`" for name, count in self.layouts.items())
        lines = [
            f"rows       {self.num_rows:,} ({layouts}) → {self.num_training_rows:,} training rows",
            f"turns      {self.num_turns:,}, {self.num_assistant_turns:,} of them the assistant's",
            f"tokens     {self.num_tokens:,}; of a training row: {lengths}",
            f"trained    {self.num_trained:,} tokens ({share:.1%})",
            f"cut        {self.num_cut_rows:,} training rows lose {self.num_cut_tokens:,} tokens"
            f" beyond {self.max_length:,}",
            f"dropped    {self.num_dropped:,} training rows, without a trained token before that",
            f"not read   {sum(self.unread.values()):,} rows, which training refuses",
        ]
        lines += [
            f"           {count:,}, the first is row {self.unread_rows[why]}: {why}"
            for why, count in self.unread.items()
        ]
        lines += [
            f"{'template' if not index else '':10} {count:,} conversations: {what}"
            for index, (what, count) in enumerate(self.behaviour.items())
        ]
        lines += ["strangest"] + [
            f"           row {one['row']}: {one['reason']} {one['value']:,.4g}"
            for one in self.strangest
        ]
        return "\n".join(lines)


def check_dataset(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    num_proc: int | None = None,
    vocab_size: int | None = None,
) -> DataCheck:
    """Read a dataset as training would, and count.

    Args:
        dataset: rows of any layout.
        tokenizer: the target's.
        max_length: tokens after which a row is cut.
        num_proc: processes that read.
        vocab_size: of the target, to find token ids that it does not have.
    """
    given = {"tokenizer": tokenizer, "max_length": max_length, "vocab_size": vocab_size}
    parts = map_rows(dataset, _measure, MEASURES, "Reading", num_proc, **given).to_pandas()
    read = parts[parts.problem == ""]
    kept = read[read.num_trained > 0]
    lengths = kept.num_tokens.quantile([*QUANTILES.values()]).tolist() if len(kept) else []
    # numbers of turns and sizes are not another reason
    reasons = parts[parts.problem != ""].problem.str.replace(r"\d+", "N", regex=True)
    first = parts.row[reasons.drop_duplicates().index]
    behaviour = read.behaviour.dropna().str.split("\n").explode()
    return DataCheck(
        num_rows=len(dataset),
        num_training_rows=len(kept),
        layouts=parts.layout.value_counts().to_dict(),
        num_turns=int(read.num_turns.sum()),
        num_assistant_turns=int(read.num_assistant.sum()),
        num_tokens=int(kept.num_tokens.sum()),
        num_trained=int(kept.num_trained.sum()),
        lengths=dict(zip(QUANTILES, lengths, strict=False)),
        max_length=max_length,
        num_cut_rows=int((read.num_cut > 0).sum()),
        num_cut_tokens=int(read.num_cut.sum()),
        num_dropped=len(read) - len(kept),
        unread=reasons.value_counts().to_dict(),
        unread_rows=dict(zip(reasons[first.index], first.tolist(), strict=True)),
        behaviour=behaviour[behaviour != ""].value_counts().to_dict(),
        strangest=_strangest(read),
    )


def _strangest(parts: DataFrame) -> list[dict[str, Any]]:
    """Return rows that are the first by one of the measures, in turn, each once."""
    ranked = []
    for name, is_most, reason in STRANGE:
        order = {"by": [name, "row"], "ascending": [not is_most, True], "ignore_index": True}
        # what was not measured of a row is null
        first = parts.dropna(subset=name).sort_values(**order).head(NUM_STRANGE)
        ranked.append(DataFrame({"row": first.row, "reason": reason, "value": first[name]}))
    in_turn = concat(ranked).sort_index(kind="stable").drop_duplicates("row")
    return in_turn.head(NUM_STRANGE).to_dict("records")


def _measure(
    row: Row,
    index: int,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    vocab_size: int | None,
) -> list[dict[str, Any]]:
    """Measure the training rows of a row."""
    try:
        encoded = encode(row, tokenizer, max_length, vocab_size)
    except ValueError as error:
        return [{"row": index, "problem": str(error)}]
    turns, found = encoded.messages, []
    for one in encoded.rows:
        labels = one["labels"][:max_length]
        answers = [len([*part]) for kept, part in groupby(labels, lambda i: i != IGNORED) if kept]
        found.append(
            {
                "row": index,
                "num_tokens": len(labels),
                "num_trained": sum(answers),
                "num_cut": len(one["input_ids"]) - len(labels),
                "shortest_answer": min(answers, default=None),
                "trained_share": sum(answers) / max(len(labels), 1),
                "problem": "",
            }
        )
    text = "\n".join(str(turn.get("content") or "") for turn in turns)
    text = text if turns else tokenizer.decode(encoded.rows[0]["input_ids"])
    found[0] |= {
        "layout": layout_of(row),
        "behaviour": "\n".join(encoded.behaviour),
        "num_turns": len(turns),
        "num_assistant": sum(turn["role"] == "assistant" for turn in turns),
        "odd_characters": num_odd(text) or None,
        "repetition": repetition(text),
    }
    return found


def num_odd(text: str) -> int:
    """Count characters that no one types: control, private and unassigned ones, and bad bytes."""
    for usual in USUAL:
        text = text.replace(usual, "")
    if text.isprintable() and REPLACED not in text:  # what is printable is no other odd one
        return 0
    return sum(
        count
        for char, count in Counter(text).items()
        if char == REPLACED or unicodedata.category(char) in ODD
    )


def repetition(text: str) -> float | None:
    """Return by which factor zlib makes a text shorter; None of a short one."""
    if len(text) < LEAST_TEXT:
        return None
    data = text.encode("utf-8", "replace")
    return len(data) / len(zlib.compress(data, 1))
