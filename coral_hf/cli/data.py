"""Commands that show, make and store training data."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..measure.settings import option
from ..training.regeneration import RegenerationSettings
from .options import DatasetOptions, TargetOptions, load_drafter
from .parser import refuse


@dataclass(kw_only=True)
class DataOptions:
    """Rows of a dataset to be shown."""

    action: Literal["show"] = option("What to do.", positional=True)
    dataset: str = option("A file, a folder or a Hub id.")
    target: str = option("The target or its tokenizer alone: a folder or a Hub id.")
    row: int = option("The first row shown, from 0; -1 is the last.", 0)
    limit: int = option("Rows shown.", 1, least=1)
    max_length: int | None = option("Cut rows as training would.", None, least=1)


def data(own: DataOptions) -> None:
    """Show which tokens of a dataset are trained, in colour or, through a pipe, with marks."""
    from transformers import AutoTokenizer

    from ..training.data import load_conversations, show

    rows = load_conversations(own.dataset)
    chosen = range(len(rows))[own.row :][: own.limit]
    message = f"--row is {own.row}, but the dataset has {len(rows)} rows, from 0."
    refuse(not chosen, message)
    tokenizer = AutoTokenizer.from_pretrained(own.target)
    show(((index, rows[index]) for index in chosen), tokenizer, own.max_length)


@dataclass(kw_only=True)
class RegenerateOptions(TargetOptions, DatasetOptions):
    """What is answered, and where the answers go."""

    output: Path = option("JSONL file of the answers.")
    limit: int | None = option("Only the first rows.", None, least=1)
    drafter: str | None = option("A drafter of the target, to be faster.", None)


def regenerate(own: RegenerateOptions, settings: RegenerationSettings) -> None:
    """Let the target answer a dataset's prompts itself; an interrupted run resumes."""
    from ..training.regeneration.regenerate import regenerate as answer

    rows = own.conversations(own.limit)
    target, tokenizer = own.load_target()
    drafter = load_drafter(own.drafter, target) if own.drafter else None
    done = answer(target, tokenizer, rows, own.output, settings, drafter)
    print(
        f"{done.num_rows} rows are in {own.output}; {done.num_unfinished} end with an answer that"
        f" was cut off; {done.num_left_out} have no answer and are left out."
    )


@dataclass(kw_only=True)
class FeaturesOptions(TargetOptions, DatasetOptions):
    """Which features are stored, and how."""

    output: Path = option("Folder of the features.")
    # not read by --check and --delete
    target: str = option("The target: a folder or a Hub id.", "")
    dataset: list[str] = option("Conversations: a file, a folder or a Hub id.", [])
    max_length: int = option("Tokens after which a row is cut.", 2048, least=1)
    packing: bool = option("Put several conversations in each row.", False)
    format: Literal["bfloat16", "int8"] = option("'int8' takes half the space.", "bfloat16")
    batch_size: int = option("Rows that are read at once.", 8, least=1)
    shard_megabytes: int = option("Size of a file, about.", 1000, least=1)
    plan: bool = option("Print time and space that it takes, and stop.", False)
    check: bool = option("Compare files and checksums, and stop.", False)
    delete: bool = option("Delete the features, and stop.", False)

    def __post_init__(self) -> None:
        has_rows = bool(self.target and self.dataset) or self.delete or self.check
        refuse(not has_rows, "Writing features needs --target and --dataset.")


def features(own: FeaturesOptions) -> None:
    """Store the target's features on disk, so that training runs need not compute them.

    An interrupted run resumes where it stopped. Train with `coral-hf train --dataset` and this
    folder.
    """
    from ..training.data import pack_dataset, prepare_dataset
    from ..training.data.dataset import warn_of_other_ends
    from ..training.features import CachedFeatures, delete_features, plan_features, write_features

    output, shard_bytes = own.output, own.shard_megabytes * 10**6
    if own.delete:
        print(f"Deleted {delete_features(output) / 1e9:.3g} GB in {output}.")
        return
    if own.check:
        index = CachedFeatures(output, checksums=True).index
        print(f"{output} is whole: {index.num_rows} rows of {index.target}.")
        return
    conversations = own.conversations()
    target, tokenizer = own.load_target()
    # the rows as the trainer would read them
    warn_of_other_ends(tokenizer, target)
    vocab_size = target.config.get_text_config(decoder=True).vocab_size
    rows = prepare_dataset(conversations, tokenizer, own.max_length, vocab_size=vocab_size)
    rows = pack_dataset(rows, own.max_length) if own.packing else rows
    print(plan_features(target, rows, output, own.format, shard_bytes))
    if not own.plan:
        index = write_features(target, rows, output, own.format, own.batch_size, shard_bytes)
        print(f"The features are in {output}. Storing them lost {index.lost:.2%} (RMS).")
