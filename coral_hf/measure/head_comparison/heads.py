"""Drafters with a head each, made from one trained drafter and kept in a folder.

In: a drafter, its target, training rows. Out: a copy of the drafter for each trial.
"""

import copy
import logging
import tempfile
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from ... import CoralDrafter
from ...target import read_target
from ...training import CoralTrainer, parse_arguments
from ...training.grouping import most_frequent_first, token_counts
from .trial import READ_ALONE, HeadTrial

logger = logging.getLogger(__name__)


class Heads:
    """Makes heads; one that was made before is loaded."""

    def __init__(
        self,
        drafter: CoralDrafter,
        target: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        rows,
        folder: Path,
        options: list[str],
    ):
        """`rows` of training, `options` of the trainer as on a command line."""
        self._drafter = drafter
        self._target = target
        self._tokenizer = tokenizer
        self._rows = rows
        self._folder = folder
        self._options = options

    def drafter_for(self, trial: HeadTrial) -> CoralDrafter:
        """The drafter with a trial's head, which it reads, in the target's dtype."""
        folder = self._folder / trial.key
        if not folder.exists():
            # aside, so that a head is whole or not there
            staged = folder.with_name(f"{folder.name}.part")
            self._make(trial).save_pretrained(staged)
            staged.rename(folder)
        drafter = CoralDrafter.from_pretrained(folder, dtype=self._target.dtype).eval()
        drafter.heads.configure(**{**READ_ALONE, "draft_head": trial.head, **trial.read_with})
        return drafter.to(self._drafter.device)

    def _make(self, trial: HeadTrial) -> CoralDrafter:
        """A copy of the drafter with a trial's head, trained or counted."""
        logger.info("making %s", trial.key)
        drafter = copy.deepcopy(self._drafter).float()
        if trial.head == "routed":
            drafter.heads.remove_router()
            self._train(drafter, "router", trial)
        elif trial.head == "low_rank":
            drafter.heads.remove_low_rank_head()
            self._train(drafter, "low_rank", trial)
        elif trial.head == "frequency":
            target = read_target(self._target)
            tokens = most_frequent_first(token_counts(target, self._rows))
            number = trial.made_with["num_hot_tokens"]
            if number > len(tokens):
                raise ValueError(
                    f"`num_hot_tokens` is {number}; use a value up to the target's {len(tokens)}."
                )
            drafter.heads.add_frequency_head(tokens[:number])
        return drafter

    def _train(self, drafter: CoralDrafter, stage: str, trial: HeadTrial) -> None:
        with tempfile.TemporaryDirectory() as folder:
            args = parse_arguments(
                folder,
                self._options,
                stage=stage,
                save_strategy="no",
                disable_tqdm=True,
                plots=False,
                **trial.trained_with,
            )
            set_seed(args.seed)
            CoralTrainer(
                model=drafter,
                target_model=self._target,
                args=args,
                train_dataset=self._rows,
                processing_class=self._tokenizer,
            ).train()
