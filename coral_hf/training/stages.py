"""The whole training: the drafter or an adapter of it, then its router, then one folder to publish.

In: a target, its tokenizer, conversations. Out: a checkpoint that `AutoModel.from_pretrained`
loads.
"""

import os
import shutil
from pathlib import Path

from accelerate import PartialState
from peft import PeftModel
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import get_last_checkpoint

from ..drafters.coral.modeling import CoralDrafter
from ..hub.drafter_folder import stale_files
from .arguments import CoralTrainingArguments
from .head_stages import check_head_settings
from .runs.checkpointing import INCOMPLETE, flush, reason_of, write_error
from .runs.run_identity import check_vacant
from .trainer import CoralTrainer


def train(
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset,
    stages: list[CoralTrainingArguments],
    drafter: CoralDrafter | PeftModel | None = None,
    resume: bool = False,
    eval_dataset=None,
) -> CoralDrafter:
    """Run training stages one after the other on one drafter.

    Args:
        target: frozen.
        tokenizer: the target's.
        dataset: conversations in any form that `prepare_dataset` takes, or `CachedFeatures`.
        stages: usually one with `stage="drafter"` and one with `stage="router"`, each with its own
            `output_dir`.
        drafter: to be trained on; a fresh one in fp32 by default. Of one in a `PeftModel` (see
            `with_adapter`) the adapter is trained, saved in the first stage's folder, and merged.
        resume: continue each stage from its last checkpoint, where it has one; else a stage
            refuses a folder with checkpoints.
        eval_dataset: held-out conversations, for arguments with an `eval_strategy`.
    """
    drafter = CoralDrafter.from_target(target).float() if drafter is None else drafter
    for args in stages:  # now, and not when a stage's turn comes
        check_head_settings(drafter, args)
        if not resume:
            check_vacant(Path(args.output_dir))
    for args in stages:
        trainer = CoralTrainer(
            model=drafter,
            target_model=target,
            args=args,
            train_dataset=dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
        )
        trainer.train(resume_from_checkpoint=_last_checkpoint(args) if resume else None)
        if isinstance(trainer.drafter, PeftModel):
            trainer.save_model()
            drafter = trainer.drafter.merge_and_unload()
    return drafter.eval()


def _last_checkpoint(args: CoralTrainingArguments) -> str | None:
    return get_last_checkpoint(args.output_dir) if Path(args.output_dir).is_dir() else None


def save(drafter: CoralDrafter, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Write drafter, router, tokenizer and settings into one folder, ready for the Hub.

    A drafter that is there is replaced once all of the new one is on the disk.

    Raises:
        OSError: if it cannot be written, such as to a full disk.
    """
    if not PartialState().is_main_process:
        return
    folder = Path(folder)
    aside = folder / INCOMPLETE
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        drafter.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        names = [path.name for path in aside.iterdir()]
        _move_up(aside)
        for name in stale_files(os.listdir(folder), names):
            (folder / name).unlink()
    except Exception as error:
        # of a disk that takes no more, tokenizers and safetensors raise errors of their own
        is_of_disk = isinstance(error, OSError | SafetensorError) or "No space left" in str(error)
        if not is_of_disk:
            raise
        remedy = "What was there is whole; make room, then save again (coral-hf train: --resume)."
        raise write_error("The drafter", folder, reason_of(error), remedy) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _move_up(aside: Path) -> None:
    """Move files into the folder above, once the disk has all of them."""
    files = [path for path in aside.rglob("*") if path.is_file()]
    for path in files:
        flush(path)
    for path in files:
        place = aside.parent / path.relative_to(aside)
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, place)
    flush(aside.parent)
