"""Commands that publish a drafter, and exchange drafters with other programs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..measure.settings import option
from .options import DTYPES, DatasetOptions, TargetOptions

OVERWRITE = "Replace an earlier checkpoint in the output folder."


@dataclass(kw_only=True)
class PublishOptions:
    """The repository, and what its card says."""

    folder: Path = option("A drafter: what `coral-hf train` wrote.", positional=True)
    repo: str = option("Where it goes: organisation/name.")
    report: list[Path] = option("A report.json of `coral-hf benchmark`, for the card.", [])
    base_model: str | None = option("The target's Hub id, where it was a local folder.", None)
    license: str | None = option("Such as apache-2.0.", None)
    language: list[str] | None = option("Such as en.", None)
    dataset: list[str] = option("Hub id of a dataset that it was trained on.", [])
    private: bool = option("Make a new repository that only you see.", False)
    revision: str | None = option("A branch other than main.", None)


def publish(own: PublishOptions) -> None:
    """Write a drafter's card and upload both, with the token of `hf auth login` or HF_TOKEN."""
    from .. import hub

    facts = hub.CardFacts(own.repo, own.base_model, own.license, own.language, own.dataset)
    private, revision = own.private or None, own.revision
    done = hub.publish(own.folder, own.repo, own.report, facts, private, revision=revision)
    print(f"Published: {done.commit_url}")


@dataclass(kw_only=True)
class ImportOptions(TargetOptions):
    """The checkpoint, and the folder that it goes to."""

    source: str = option("Folder or Hub id of such a checkpoint.", positional=True)
    output: Path = option("Folder of the drafter.")
    revision: str | None = option("Revision of the checkpoint's Hub id.", None)
    overwrite: bool = option(OVERWRITE, False)


def import_(own: ImportOptions) -> None:
    """Turn a checkpoint of EAGLE-1, 2, 3, HASS, Medusa or a Recurrent Drafter into a drafter."""
    from ..atomic import new_folder
    from ..checkpoints import DRAFTER_FILES, check_output, config_folder, import_drafter, read_shape

    place = (own.output, own.overwrite, DRAFTER_FILES, (own.source, own.target))
    check_output(*place)
    # before the target, which takes longer
    read_shape(config_folder(own.source, revision=own.revision))
    target, tokenizer = own.load_target()
    drafter = import_drafter(target, own.source, tokenizer=tokenizer, revision=own.revision)
    check_output(*place)  # again: the loading takes minutes
    with new_folder(own.output, last="config.json") as folder:
        drafter.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    print(f"The drafter is in {own.output}.")


@dataclass(kw_only=True)
class ExportOptions(DatasetOptions):
    """The drafter, and how it is written."""

    drafter: str = option("The drafter: a folder or a Hub id.", positional=True)
    to: Literal["vllm", "sglang", "eagle", "medusa", "redrafter"] = option("What reads it.")
    output: Path = option("A new or an empty folder.")
    target: str | None = option("The target, whose embeddings are then copied or compared.", None)
    dtype: DTYPES = option("Precision that is written; the drafter's own by default.", "auto")
    num_hot_tokens: int | None = option("How many SGLang may draft.", None, needs="target dataset")
    dataset: list[str] = option("Where tokens are counted.", [], needs="num_hot_tokens")
    limit: int = option("Rows counted of each.", 200, least=1, needs="num_hot_tokens")
    overwrite: bool = option(OVERWRITE, False)


def export(own: ExportOptions) -> None:
    """Write a drafter as vLLM, SGLang, or the code of its own paper reads it."""
    from transformers import AutoModel

    from ..checkpoints import check_drafter, check_output, export_drafter, export_files
    from ..measure.chat import restore_chat_options
    from ..target import read_target
    from ..training.data import prepare_dataset
    from ..training.grouping import most_frequent_first, token_counts

    if own.num_hot_tokens is not None and own.to != "sglang":
        raise ValueError("--num-hot-tokens goes with --to sglang.")
    sources = (own.drafter, own.target)
    check_output(own.output, own.overwrite, export_files(own.to), sources)
    check_drafter(own.drafter)
    drafter, target, hot_tokens = AutoModel.from_pretrained(own.drafter, dtype="auto"), None, None
    if own.target is not None:
        target, tokenizer = TargetOptions(target=own.target).load_target()
        drafter = drafter.to(target.device)
        if own.num_hot_tokens is not None:
            restore_chat_options(tokenizer, drafter.config)
            # those that the target says most after rows of the dataset, its end tokens first
            rows = prepare_dataset(own.conversations(own.limit), tokenizer, max_length=2048)
            counts = token_counts(read_target(target), rows.with_format("torch"))
            if (ends := drafter.config.eos_token_id) is not None:
                counts[ends] = counts.max() + 1
            hot_tokens = most_frequent_first(counts)[: own.num_hot_tokens]
    dtype = None if own.dtype == "auto" else own.dtype
    done = export_drafter(drafter, own.to, own.output, target, dtype, hot_tokens, own.overwrite)
    print(*done.notes, f"The drafter is in {done.folder}. Serve it with", sep="\n")
    print(f"  {done.command}")
