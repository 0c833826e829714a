"""Commands that publish a drafter, and exchange drafters with other programs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..measure.settings import option
from .options import TargetOptions, load_drafter


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
    output: Path = option("A new or an empty folder.")
    revision: str | None = option("Revision of the checkpoint's Hub id.", None)


def import_(own: ImportOptions) -> None:
    """Turn a checkpoint of EAGLE-1, 2, 3, P-EAGLE, HASS or Medusa into a drafter."""
    from ..atomic import new_folder
    from ..checkpoints import check_output, config_folder, import_drafter, read_shape

    check_output(own.output)
    # before the target, which takes longer
    read_shape(config_folder(own.source, revision=own.revision))
    target, tokenizer = own.load_target()
    drafter = import_drafter(target, own.source, tokenizer=tokenizer, revision=own.revision)
    with new_folder(own.output) as folder:
        drafter.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    print(f"The drafter is in {own.output}.")


@dataclass(kw_only=True)
class ExportOptions(TargetOptions):
    """The drafter, and how it is written."""

    drafter: str = option("The drafter: a folder or a Hub id.", positional=True)
    to: Literal["vllm", "sglang"] = option("What reads it.")
    output: Path = option("A new or an empty folder.")


def export(own: ExportOptions) -> None:
    """Write a drafter as vLLM or SGLang reads it, in the target's precision."""
    from ..checkpoints import check_output, export_drafter

    check_output(own.output)
    target, _ = own.load_target()
    done = export_drafter(load_drafter(own.drafter, target), own.to, own.output, target)
    print(*done.notes, f"The drafter is in {done.folder}. Serve it with", sep="\n")
    print(f"  {done.command}")
