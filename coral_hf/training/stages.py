"""The whole training: the drafter or an adapter of it, then its router, then one folder to publish.

In: a target, its tokenizer, conversations. Out: a checkpoint that `AutoModel.from_pretrained`
loads.
"""

from pathlib import Path

from accelerate import PartialState
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import get_last_checkpoint

from ..modeling_coral import CoralDrafter
from .arguments import CoralTrainingArguments
from .head_stages import check_head_settings
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
        resume: continue each stage from its last checkpoint, where it has one.
        eval_dataset: held-out conversations, for arguments with an `eval_strategy`.
    """
    drafter = CoralDrafter.from_target(target).float() if drafter is None else drafter
    for args in stages:  # now, and not when a stage's turn comes
        check_head_settings(drafter, args)
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
    """Write drafter, router, tokenizer and settings into one folder, ready for the Hub."""
    if PartialState().is_main_process:
        drafter.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
