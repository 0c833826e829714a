"""Training pipeline: the stages of a drafter one after the other, then one folder to publish.

In: a target, its tokenizer, conversations, the arguments of each stage. Out: a checkpoint that
`AutoModel.from_pretrained` loads.
"""

import os
import shutil
from pathlib import Path

from accelerate import PartialState
from peft import PeftModel
from transformers import PreTrainedModel, ProgressCallback, set_seed
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils import logging

from ..drafters.model import Drafter
from ..hub.repository import stale_files
from ..measure.autotune import NEW_TOKENS, PROMPTS, choose_head
from .arguments import CoralTrainingArguments
from .evaluation import EvaluationTable
from .evaluation.acceptance import held_out_prompts
from .runs.checkpoints import INCOMPLETE, flush, last_checkpoint, write_error
from .runs.run_record import check_vacant
from .stages import ROUTER_STAGES, check_head_settings
from .steps import kind_of_recipe
from .trainer import CoralTrainer

logger = logging.get_logger(__name__)


def train(
    target: PreTrainedModel,
    tokenizer: Tokenizer,
    dataset,
    stages: list[CoralTrainingArguments],
    drafter: Drafter | PeftModel | None = None,
    resume: bool = False,
    eval_dataset=None,
) -> Drafter:
    """Run training stages one after the other on one drafter.

    After a head's stage the drafter reads the fastest of its draft heads, measured on prompts of
    the held-out rows, or else of the training rows; in runs of several processes the trained one.

    Args:
        target: frozen.
        tokenizer: the target's.
        dataset: conversations in any form that `prepare_dataset` takes, or `CachedFeatures`.
        stages: usually one with `stage="drafter"` and one with `stage="router"`, each with its own
            `output_dir`.
        drafter: to be trained further; by default a fresh one in fp32, of the family that the first
            stage's recipe is for, drawn with its seed. If it is a `PeftModel` (see `with_adapter`),
            its adapter is trained, saved in the first stage's folder, and merged.
        resume: resume each stage from its last checkpoint, where it has one; otherwise a folder
            with checkpoints is refused.
        eval_dataset: held-out conversations, for arguments with an `eval_strategy`.
    """
    if drafter is None:
        set_seed(stages[0].seed)
        kind = kind_of_recipe(stages[0].recipe)
        drafter = kind.drafter.from_target(target, **kind.fresh_fields(stages[0])).float()
    for args in stages:  # before the first stage is trained
        check_head_settings(drafter, args)
        if not resume:
            check_vacant(Path(args.output_dir))
    for args in stages:
        datasets = {"train_dataset": dataset, "eval_dataset": eval_dataset}
        trainer = CoralTrainer(drafter, target, args, tokenizer, **datasets)
        if trainer.pop_callback(ProgressCallback) is not None:
            trainer.add_callback(EvaluationTable)
        trainer.train(resume_from_checkpoint=last_checkpoint(args.output_dir, resume))
        if isinstance(trainer.drafter, PeftModel):
            trainer.save_model()
            drafter = trainer.drafter.merge_and_unload()
    drafter.eval()
    if any(args.stage in ROUTER_STAGES for args in stages) and PartialState().num_processes == 1:
        rows = trainer.train_dataset if trainer.eval_dataset is None else trainer.eval_dataset
        rows = next(iter(rows.values())) if isinstance(rows, dict) else rows  # several by name
        sizes = PROMPTS, NEW_TOKENS, trainer.args.eval_prompt_length
        try:
            choose_head(drafter, target, held_out_prompts(rows, trainer.target, *sizes))
        except (ValueError, RuntimeError) as error:  # no prompt leaves room, a full device, …
            # what was trained is saved whatever happens here
            logger.warning(f"Draft heads are not compared: {error}")
    return drafter


def save(drafter: PreTrainedModel, tokenizer: Tokenizer, folder: str | Path) -> None:
    """Write drafter, router, tokenizer and settings into one folder, ready for the Hub.

    An existing drafter is replaced once all of the new one is on the disk.

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
        files = [path for path in aside.rglob("*") if path.is_file()]
        for path in files:  # all are on the disk before the first is moved
            flush(path)
        for path in files:
            place = folder / path.relative_to(aside)
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, place)
        flush(folder)
        for name in stale_files(os.listdir(folder), names):
            (folder / name).unlink()
    except Exception as error:  # a full disk raises errors of tokenizers and safetensors too
        remedy = "What was there is whole; make room, then save again (coral-hf train: --resume)."
        raise write_error("The drafter", folder, repr(error), remedy) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
