"""Numbers of a dataset, as training would read it, and its strangest rows.

In: rows of any layout, the target's tokenizer. Out: the numbers by name, as JSON holds them.
"""

from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase as Tokenizer

from .dataset import notes_of, tokenize_rows

QUANTILES = [0.5, 0.9, 0.99, 1]
NUM_STRANGE = 4  # rows of each kind


def check_dataset(
    dataset: Dataset,
    tokenizer: Tokenizer,
    max_length: int,
    num_proc: int | None = None,
    vocab_size: int | None = None,
) -> dict[str, Any]:
    """Read a dataset as training would, and count.

    Args:
        dataset: rows of any layout.
        tokenizer: the target's.
        max_length: tokens after which a row is cut.
        num_proc: processes that read.
        vocab_size: of the target, to find token ids that it does not have.

    Returns:
        Counts of rows and tokens; quantiles of the tokens of a training row; `unread`, why rows are
        refused, of the first row with each reason, and how many are; and strange rows by number.
    """
    rows = tokenize_rows(dataset, tokenizer, max_length, num_proc, vocab_size)
    notes = notes_of(rows).set_index("source")
    bad, read = notes.problem[notes.problem != ""], notes[notes.problem == ""]
    kept = read[read.num_trained > 0]
    # numbers of turns and sizes are not another reason
    reasons = bad.groupby(bad.str.replace(r"\d+", "N", regex=True), sort=False)
    share = (kept.num_trained / kept.num_tokens).round(3)
    return {
        "num_rows": len(dataset),
        "num_unread_rows": len(bad),
        "num_training_rows": len(kept),
        "num_dropped_rows": len(read) - len(kept),  # without a trained token before the cut
        "num_cut_rows": int((read.num_lost > 0).sum()),
        "num_cut_tokens": int(read.num_lost.sum()),
        "num_tokens": int(kept.num_tokens.sum()),
        "num_trained_tokens": int(kept.num_trained.sum()),
        "max_length": max_length,
        "quantiles_of_length": kept.num_tokens.quantile(QUANTILES).to_dict() if len(kept) else {},
        "unread": {same.iloc[0]: len(same) for _, same in reasons},
        "rows_of_most_tokens": kept.num_tokens.nlargest(NUM_STRANGE).to_dict(),
        "rows_of_fewest_trained": kept.num_trained.nsmallest(NUM_STRANGE).to_dict(),
        "rows_of_smallest_share": share.nsmallest(NUM_STRANGE).to_dict(),
    }
