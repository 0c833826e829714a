"""Numbers of a dataset, as training would read it, and its strangest rows.

In: rows of any layout, the target's tokenizer. Out: a `DataCheck`, as text or JSON. Rows are read
in batches, by several processes; a few numbers of each are kept.
"""

from functools import partial
from itertools import groupby
from typing import Any

import datasets
from datasets import Dataset
from pandas import DataFrame, concat
from transformers import PreTrainedTokenizerBase as Tokenizer

from .dataset import map_rows
from .encoding import IGNORED, encode
from .messages import Row, layout_of

# of a training row; `num_turns` and `num_assistant` stand in the first of those of a row
NUMBERS = ("row", "num_tokens", "num_trained", "num_cut", "shortest_answer", "num_turns")
MEASURES = dict.fromkeys((*NUMBERS, "num_assistant"), datasets.Value("int64"))
MEASURES |= dict.fromkeys(("layout", "behaviour", "problem"), datasets.Value("string"))
# what makes a row strange: a measure, whether the most of it does, and its name
STRANGE = [
    ("num_tokens", True, "most tokens"),
    ("shortest_answer", False, "shortest answer, in tokens"),
    ("trained_share", False, "least of it is trained, as a share"),
]
NUM_STRANGE = 10
QUANTILES = {"median": 0.5, "90 %": 0.9, "99 %": 0.99, "longest": 1.0}
TEMPLATE = """\
rows       {num_rows:,} ({layouts}) → {num_training_rows:,} training rows
turns      {num_turns:,}, {num_assistant_turns:,} of them the assistant's
tokens     {num_tokens:,}; of a training row: {lengths}
trained    {num_trained:,} tokens ({share:.1%})
cut        {num_cut_rows:,} training rows lose {num_cut_tokens:,} tokens beyond {max_length:,}
dropped    {num_dropped:,} training rows, without a trained token before that
not read   {num_unread:,} rows, which training refuses"""


class DataCheck(dict[str, Any]):
    """What `check_dataset` found, by name; `str` makes a text of it, and it is JSON as it is.

    num_rows, num_turns, num_assistant_turns: of the dataset.
    layouts: how many rows are of each.
    num_training_rows, num_tokens, num_trained: as training reads it.
    lengths: quantiles of the tokens of a training row.
    num_cut_rows, num_cut_tokens: training rows that are cut to `max_length`, what they lose.
    num_dropped: training rows without a trained token in their first `max_length`.
    unread, unread_rows: why rows cannot be read → how many; and the first of them.
    behaviour: of the chat template → in how many conversations.
    strangest: row, reason and value of each.
    """

    def __str__(self) -> str:
        shown = {
            "share": self["num_trained"] / max(self["num_tokens"], 1),
            "lengths": ", ".join(f"{name} {size:,.0f}" for name, size in self["lengths"].items()),
            "layouts": ", ".join(
                f"{count:,} of `{name}`" for name, count in self["layouts"].items()
            ),
            "num_unread": sum(self["unread"].values()),
        }
        lines = [TEMPLATE.format(**{**self, **shown})]
        for why, count in self["unread"].items():
            lines.append(f"{'':11}{count:,}, the first is row {self['unread_rows'][why]}: {why}")
        for what, count in self["behaviour"].items():
            lines.append(f"template   {count:,} conversations: {what}")
        lines.append("strangest")
        for one in self["strangest"]:
            lines.append(f"{'':11}row {one['row']}: {one['reason']} {one['value']:,.4g}")
        return "\n".join(lines)


def check_dataset(
    dataset: Dataset,
    tokenizer: Tokenizer,
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
    measure = partial(_measure, **given)
    parts = map_rows(dataset, measure, MEASURES, "Reading", num_proc).to_pandas()
    read = parts[parts.problem == ""]
    read = read.assign(trained_share=read.num_trained / read.num_tokens.clip(lower=1))
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
        known = parts.dropna(subset=name)  # what was not measured of a row is null
        first = known.nlargest(NUM_STRANGE, name) if is_most else known.nsmallest(NUM_STRANGE, name)
        first = first.reset_index(drop=True)
        ranked.append(DataFrame({"row": first.row, "reason": reason, "value": first[name]}))
    in_turn = concat(ranked).sort_index(kind="stable").drop_duplicates("row")
    return in_turn.head(NUM_STRANGE).to_dict("records")


def _measure(
    row: Row, index: int, tokenizer: Tokenizer, max_length: int, vocab_size: int | None
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
                "problem": "",
            }
        )
    found[0] |= {
        "layout": layout_of(row),
        "behaviour": "\n".join(encoded.behaviour),
        "num_turns": len(turns),
        "num_assistant": sum(turn["role"] == "assistant" for turn in turns),
    }
    return found
