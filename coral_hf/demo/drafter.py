"""The demo's drafter: trained, then its router, then saved with the target's tokenizer.

In: a target, its tokenizer, settings. Out: a folder that `AutoModel.from_pretrained` loads.
"""

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..drafters.coral.modeling import CoralDrafter
from ..training import CoralTrainer, CoralTrainingArguments
from ..training.stages import save
from .budget import BudgetCallback, trainer_arguments
from .settings import Budget, DemoSettings
from .texts import training_rows

LEARNING_RATE = 4e-3
SMALL_VOCAB = 8192
# likely tokens lie in many groups of a small vocabulary: half of it is read, not an eighth
SMALL_VOCAB_GROUPS: dict[str, Any] = {"num_groups": 8, "num_active_groups": 4}
# a small machine verifies fewer nodes
TREE = {"tree_depth": 6, "tree_top_k": 8, "tree_nodes": 32}


def train_drafter(
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: DemoSettings,
    folder: Path,
) -> None:
    """Train both stages, each in its own time, and save the result in `folder`."""
    rows = training_rows(settings, tokenizer)
    # fp32, whatever the target's dtype: small updates vanish in lower ones
    drafter = CoralDrafter.from_target(target).float()
    drafter.generation_config.update(**TREE)
    for stage, budget in (
        ("drafter", settings.drafter_budget),
        ("router", settings.router_budget),
    ):
        trainer = CoralTrainer(
            model=drafter,
            target_model=target,
            args=stage_arguments(stage, budget, settings, target, folder),
            train_dataset=rows,
            processing_class=tokenizer,
            callbacks=[BudgetCallback(budget)],
        )
        trainer.train()
    save(drafter, tokenizer, folder)


def stage_arguments(
    stage: str, budget: Budget, settings: DemoSettings, target: PreTrainedModel, folder: Path
) -> CoralTrainingArguments:
    """The arguments of one stage."""
    return CoralTrainingArguments(
        **trainer_arguments(budget, folder, target.device),
        **(SMALL_VOCAB_GROUPS if target.config.get_text_config().vocab_size < SMALL_VOCAB else {}),
        stage=stage,
        classification_weight=1.0,
        max_length=settings.row_length,
        per_device_train_batch_size=settings.drafter_batch_size,
        learning_rate=LEARNING_RATE,
        seed=settings.seed,
    )
