"""Pushing while and after training, with a card that says what is known.

In: what `Trainer` pushes. Out: the same with our card, without the token.
"""

import logging
from concurrent.futures import Future
from pathlib import Path

from ...hub import Branch, CardFacts, bring_card, finish_config, write_card
from ..adapters import is_adapted
from .checkpointing import CheckpointedTrainer
from .record import TrainingRecord

logger = logging.getLogger(__name__)


class PublishingTrainer(CheckpointedTrainer):
    """A `Trainer` that pushes drafters, as `push_to_hub` and `hub_strategy` ask for."""

    def __init__(self, *args, **kwargs):
        self.record = TrainingRecord()
        self._reported: set[Future] = set()
        super().__init__(*args, **kwargs)

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
            token = token or self.args.hub_token
            branch = Branch(self.hub_model_id, self.args.hub_revision, token)
            branch.check_vacant(private)
            folder = Path(self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            bring_card(folder, branch)

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """See [`~transformers.Trainer.create_model_card`].

        A card that somebody wrote, in the folder or on the Hub, stays. `finetuned_from` is the
        target's id; `tasks`, `dataset` and `dataset_args` say nothing of a drafter.
        """
        if is_adapted(self.drafter):  # PEFT's card: the adapter loads with PEFT
            return super().create_model_card(
                language=language, license=license, tags=tags, model_name=model_name
            )
        if not self.is_world_process_zero():
            return
        repo_id = getattr(self, "hub_model_id", None) or model_name
        facts = CardFacts(
            repo_id=repo_id or Path(self.args.output_dir).absolute().name,
            base_model=finetuned_from,
            license=license,
            language=language,
            datasets=_as_list(dataset_tags),
            tags=_as_list(tags),
        )
        folder = self.args.output_dir
        if not write_card(folder, self.drafter, facts):
            logger.warning("%s/README.md was written by hand and stays as it is.", folder)
        finish_config(self.drafter.config, folder, finetuned_from)

    def train(self, *args, **kwargs):
        """See [`~transformers.Trainer.train`]; a push that failed meanwhile is told of."""
        self.record.start()
        output = super().train(*args, **kwargs)
        self.record.write(self, self.accelerator.reduce)
        self._report_pushes()
        return output

    def _save_checkpoint(self, model, trial) -> None:
        self.record.write(self, self.accelerator.reduce)  # the checkpoint's config has it
        super()._save_checkpoint(model, trial)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self._is_staging and self.args.hub_strategy != "end":
            self._report_pushes()
            self.create_model_card()
            if self.is_world_process_zero() and not is_adapted(self.drafter):
                # from where `Trainer` copies it, and uploads it
                finish_config(self.drafter.config, checkpoint_folder)
        super()._push_from_checkpoint(checkpoint_folder)

    def _report_pushes(self) -> None:
        """`Trainer` pushes in the background and looks at no result."""
        pushes = getattr(self, "push_in_progress", None)
        for job in pushes.jobs if pushes is not None else []:
            if not job.done() or job in self._reported:
                continue
            self._reported.add(job)
            if (error := job.exception()) is not None:
                # with its cause: of a large file the error itself only names the file
                logger.warning("A push to %s failed", self.hub_model_id, exc_info=error)


def _as_list(names: str | list[str] | None) -> list[str]:
    return [names] if isinstance(names, str) else list(names or [])
