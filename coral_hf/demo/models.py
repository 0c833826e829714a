"""The demo's models: trained within a budget of time, and kept.

In: DemoSettings. Out: folders that `from_pretrained` loads, each with a record of what it depends
on. The target is a small Llama with a byte-level tokenizer, the drafter is trained with its router.
"""

import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from timeit import repeat
from typing import Any

import torch
from rich import get_console
from rich.progress import Progress
from transformers import (
    DataCollatorForLanguageModeling,
    GPT2Tokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from ..atomic import keep_settings, new_folder
from ..drafters.coral import CoralDrafter
from ..measure.autotune import choose_head
from ..measure.prompts import encode
from ..training import CoralTrainer, CoralTrainingArguments
from ..training.pipeline import save
from . import Budget, DemoSettings
from .stories import held_out_prompts, story_rows, told

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WARMUP_STEPS = 20
DRAFTER_BATCH_SIZE = 2  # rows of a step: more steps in the same time
# settings on which no weights depend
NOT_TRAINED = ("output", "compile", "pad_layers", "tree", "max_new_tokens")
RECORD = "demo.json"  # in the folder of a model


def kept(settings: DemoSettings, name: str, train: Callable[[Path], None], **read: str) -> Path:
    """Return the folder of a trained model, which `train` fills unless there is one.

    Args:
        read: digests of what the model depends on beside the settings.

    Raises:
        ValueError: if there is one that depends on something else.
    """
    folder = settings.output / name
    trained = {key: value for key, value in vars(settings).items() if key not in NOT_TRAINED}
    if not (folder / RECORD).is_file():
        with new_folder(folder) as unfinished:
            train(unfinished)
            keep_settings(unfinished / RECORD, trained | read, folder)
    keep_settings(folder / RECORD, trained | read, folder)
    return folder


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """Train byte-level BPE, in which no character is unknown."""
    empty = GPT2Tokenizer(pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token=None)
    quietly = {"length": len(texts), "show_progress": False}
    return empty.train_new_from_iterator(texts, vocab_size, **quietly)


def small_llama(
    tokenizer: PreTrainedTokenizerBase, width: int, layers: int, heads: int
) -> LlamaConfig:
    """Make the config of a small Llama with the tokens of a tokenizer."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=1024,
        # three times the usual: so narrow a model starts to learn much sooner
        initializer_range=0.06,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def train_target(settings: DemoSettings, folder: Path) -> None:
    """Train tokenizer and Llama, in sizes that suit two CPU cores, and save both in `folder`."""
    texts, _ = told(settings)
    tokenizer = train_tokenizer(texts, vocab_size=1024)
    set_seed(settings.seed)
    config = small_llama(tokenizer, width=128, layers=2, heads=4)
    trainer = Trainer(
        model=LlamaForCausalLM(config),
        args=TrainingArguments(
            **common_arguments(settings, settings.target_budget, folder),
            per_device_train_batch_size=4,  # large logits are slow to allocate on a CPU
            weight_decay=0.1,
            adam_beta2=0.95,
        ),
        train_dataset=story_rows(texts, tokenizer),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        processing_class=tokenizer,
    )
    train_within(settings.target_budget, trainer, "target")
    trainer.save_model()


def train_drafter(
    settings: DemoSettings,
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
) -> None:
    """Train the drafter, then its router, each in its own time, and save both in `folder`.

    The drafter reads the faster of its two heads, by prompts that are neither trained on nor shown.
    """
    rows = story_rows(told(settings)[0], tokenizer).shuffle(seed=settings.seed)
    most = settings.drafter_budget.max_steps * DRAFTER_BATCH_SIZE  # that are used up
    rows = rows.select(range(min(most, len(rows))))
    # fp32, whatever the target's dtype: small updates vanish in lower ones
    drafter = CoralDrafter.from_target(target).float()
    # a small machine verifies fewer nodes
    drafter.generation_config.update(tree_depth=6, tree_top_k=8, tree_nodes=32)
    for stage, budget in (("drafter", settings.drafter_budget), ("router", settings.router_budget)):
        args = CoralTrainingArguments(
            **common_arguments(settings, budget, folder),
            # likely tokens lie in many groups of a small vocabulary: half of it is read
            num_groups=8,
            num_active_groups=4,
            stage=stage,
            classification_weight=1.0,
            max_length=settings.max_length,
            per_device_train_batch_size=DRAFTER_BATCH_SIZE,
        )
        trainer = CoralTrainer(drafter, target, args, tokenizer, train_dataset=rows)
        train_within(budget, trainer, stage)
    prompts = held_out_prompts(settings, part=1)  # those of part 0 are measured
    choose_head(drafter, target, [encode(prompt, tokenizer)[0] for prompt in prompts])
    save(drafter, tokenizer, folder)


def common_arguments(settings: DemoSettings, budget: Budget, folder: Path) -> dict[str, Any]:
    """Return the arguments of `Trainer` that all training runs of the demo share."""
    return {
        "output_dir": str(folder),
        "max_steps": budget.max_steps,
        "learning_rate": 4e-3,
        "lr_scheduler_type": "constant",  # `BudgetCallback` is the schedule
        "bf16": bf16_pays(),
        "use_cpu": DEVICE == "cpu",
        "save_strategy": "no",
        "disable_tqdm": True,
        "report_to": "none",
        "dataloader_pin_memory": DEVICE == "cuda",
        "seed": settings.seed,
    }


@cache
def bf16_pays() -> bool:
    """Measure whether a product in bf16 is clearly faster than in fp32: some CPUs emulate it."""

    def seconds(dtype: torch.dtype) -> float:
        matrix = torch.ones(512, 512, dtype=dtype, device=DEVICE)  # (rows, columns)
        # reading a number waits for the device; the fastest, since others may use the machine
        return min(repeat(lambda: (matrix @ matrix)[0, 0].item(), number=1, repeat=5))

    return seconds(torch.bfloat16) < 0.7 * seconds(torch.float32)


def train_within(budget: Budget, trainer: Trainer, name: str) -> None:
    """Train what has a name until the budget is used up, with one bar of how much of it is."""
    trainer.remove_callback(PrinterCallback)
    with Progress(console=get_console()) as progress:
        trainer.add_callback(BudgetCallback(budget, progress, f"Training the {name}"))
        trainer.train()


class BudgetCallback(TrainerCallback):
    """Ends a training run on time, its learning rate at zero, however fast the machine is."""

    def __init__(self, budget: Budget, progress: Progress, title: str) -> None:
        self.budget, self.progress = budget, progress
        self.bar = progress.add_task(title, total=1.0)

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Start the clock: what lies before is not training."""
        self.start = time.monotonic()

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs) -> None:
        """Warm up linearly over steps, decay linearly over the budget."""
        warmup = min(1.0, (state.global_step + 1) / WARMUP_STEPS)
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * warmup * max(0.0, 1 - self.spent(state.global_step))

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Stop when the time is over; the steps are the trainer's own limit."""
        spent = self.spent(state.global_step)
        self.progress.update(self.bar, completed=min(spent, 1.0))
        control.should_training_stop |= spent >= 1

    def spent(self, num_steps: int) -> float:
        """Return the share of the budget that is used up."""
        seconds = time.monotonic() - self.start
        return max(num_steps / self.budget.max_steps, seconds / self.budget.max_seconds)
