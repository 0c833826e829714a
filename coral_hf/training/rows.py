"""The rows that a trainer reads, from whatever it is given.

In: conversations, rows of tokens, or a feature cache. Out: rows that the collator takes, packed if
the arguments say so.
"""

from transformers import PreTrainedTokenizerBase

from .arguments import CoralTrainingArguments
from .data import pack_dataset, prepare_dataset
from .data.vocabulary import check_rows
from .feature_cache import CachedFeatures


def training_rows(
    dataset,
    tokenizer: PreTrainedTokenizerBase | None,
    args: CoralTrainingArguments,
    vocab_size: int,
):
    """Rows of a dataset, or of each of several; without a tokenizer they hold tokens already."""
    if isinstance(dataset, dict):
        return {
            name: training_rows(part, tokenizer, args, vocab_size) for name, part in dataset.items()
        }
    if isinstance(dataset, CachedFeatures):
        return _checked(dataset, args)
    if "position_ids" in (dataset.column_names or ()):  # packed before
        return dataset
    if tokenizer is None:
        check_rows(dataset, vocab_size)
    else:
        dataset = prepare_dataset(dataset, tokenizer, args.max_length, vocab_size=vocab_size)
    return pack_dataset(dataset, args.max_length) if args.packing else dataset


def _checked(dataset: CachedFeatures, args: CoralTrainingArguments) -> CachedFeatures:
    if args.packing and not dataset.is_packed:
        raise ValueError(
            f"`packing` is True, but each row of the cache in {dataset.folder} is one document;"
            " write the cache with packing, or pass packing=False."
        )
    return dataset
