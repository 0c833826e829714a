"""Pushes of a drafter to the Hub during and after training, with a model card.

In: the files that `Trainer` pushes. Out: the same files with our card and training record, and
warnings of failed pushes.
"""

import logging
from pathlib import Path

from transformers import Trainer, TrainerCallback

from ...atomic import write_json
from ...drafters.model import TRAINING_RECORD
from ...hub import Branch, CardFacts, bring_card, finish_config, write_card
from ..adapters import is_adapted

logger = logging.getLogger(__name__)


class DrafterPushes(Trainer):
    """A `Trainer` whose `push_to_hub` and `hub_strategy` publish drafters; see [`PushCallback`]."""

    def init_hf_repo(self, token: str | None = None, **kwargs) -> None:
        """See [`~transformers.Trainer.init_hf_repo`].

        Raises:
            ValueError: if another model is there, or a public repository instead of a private one.
        """
        super().init_hf_repo(token=token, **kwargs)
        if self.is_world_process_zero():
            # newer versions of transformers pass it on from `push_to_hub`
            private = kwargs.get("private")
            private = self.args.hub_private_repo if private is None else private
            branch = Branch(self.hub_model_id, self.args.hub_revision, token or self.args.hub_token)
            branch.check_vacant(private)
            folder = Path(self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            bring_card(folder, branch)

    def create_model_card(self, language=None, license=None, tags=None, **others) -> None:
        """See [`~transformers.Trainer.create_model_card`].

        A card that somebody wrote, in the folder or on the Hub, stays. `finetuned_from` is the
        target's id; `tasks`, `dataset` and `dataset_args` have no place on a drafter's card.
        """
        if is_adapted(self.drafter):  # PEFT's card: the adapter loads with PEFT
            return super().create_model_card(language, license, tags, **others)
        if not self.is_world_process_zero():
            return
        folder, target = self.args.output_dir, others.get("finetuned_from")
        repo_id = getattr(self, "hub_model_id", None) or others.get("model_name")
        facts = CardFacts(
            repo_id=repo_id or Path(folder).absolute().name,
            base_model=target,
            license=license,
            language=language,
            datasets=_as_list(others.get("dataset_tags")),
            tags=_as_list(tags),
        )
        if not write_card(folder, self.drafter, facts):
            logger.warning("%s/README.md was written by hand and stays as it is.", folder)
        finish_config(self.drafter.config, folder, target)


class PushCallback(TrainerCallback):
    """Completes the files of each checkpoint that is pushed, and warns of pushes that failed.

    `Trainer` pushes in the background and ignores the results.
    """

    def __init__(self, trainer: DrafterPushes):
        self._trainer = trainer

    def on_push_begin(self, args, state, control, **kwargs) -> None:
        """See [`~transformers.TrainerCallback.on_push_begin`]."""
        trainer = self._trainer
        self._report()
        checkpoint = Path(args.output_dir, f"checkpoint-{state.global_step}")
        if not trainer.is_in_train or is_adapted(trainer.drafter):
            return  # `push_to_hub` writes a card itself, and PEFT has another
        trainer.create_model_card()
        if checkpoint.is_dir():  # `Trainer` copies its config, and may push all of it
            finish_config(trainer.drafter.config, checkpoint)
        write_json(Path(args.output_dir, TRAINING_RECORD), trainer.drafter.training_record)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        """See [`~transformers.TrainerCallback.on_train_end`]."""
        self._report(is_last=True)

    def _report(self, is_last: bool = False) -> None:
        """Warn of each push that failed, once; at last wait for those that go on."""
        pushes = getattr(self._trainer, "push_in_progress", None)
        jobs = [] if pushes is None else pushes.jobs
        for job in [*jobs]:
            if is_last or job.done():
                jobs.remove(job)
                if (error := job.exception()) is not None:
                    # with its cause: of a large file the error itself only names the file
                    name = self._trainer.hub_model_id
                    logger.warning("A push to %s failed", name, exc_info=error)


def _as_list(names: str | list[str] | None) -> list[str]:
    return [names] if isinstance(names, str) else list(names or [])
