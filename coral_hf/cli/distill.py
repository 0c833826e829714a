"""The command that trains a small language model to draft for a target."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..measure.settings import option
from .options import TargetOptions, TrainingDataOptions

LOSSES = Literal["ce", "kl", "tvd", "tvd++"]


@dataclass(kw_only=True)
class DistillOptions(TargetOptions, TrainingDataOptions):
    """What is trained, on what, and with which loss."""

    output: Path = option("Folder of the finished model.")
    loss: LOSSES = option("On the tokens (ce), or on the target's probabilities.", "kl")
    start: str | None = option(
        "A small model with the target's tokenizer, to start from.", None, flag="from"
    )
    layers: int = option("Layers of a fresh one.", 4, least=1, excludes="start")
    hidden_size: int | None = option(
        "Its width; by default half of the target's, 1024 at most.",
        None,
        least=2,
        excludes="start",
    )
    resume: bool = option("Continue from the last checkpoint.", False)

    def load_assistant(self) -> tuple:
        """Return the model to train, in fp32, and its tokenizer; a fresh one has the target's."""
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

        from ..training.assistant import small_model

        if self.start is None:
            config = AutoConfig.from_pretrained(self.target)
            return small_model(config, self.layers, self.hidden_size), None
        model = AutoModelForCausalLM.from_pretrained(self.start, dtype="float32")
        return model, AutoTokenizer.from_pretrained(self.start)


def distill(own: DistillOptions, training_options: list[str]) -> None:
    """Train a small language model that drafts for a target: pretrain it, then fine-tune it.

    Every other option is one of AssistantTrainingArguments, as in any Trainer script:
    --learning-rate 3e-4 --max-steps 10000. Pretrain with --loss ce on text, then fine-tune with
    --loss kl, tvd or tvd++ on answers of the target, which coral-hf regenerate writes.
    """
    from transformers import set_seed

    from ..training import AssistantTrainer, AssistantTrainingArguments, parse_arguments
    from ..training.pipeline import save
    from ..training.runs.checkpoints import last_checkpoint, sole_run

    folder = own.output / "run"
    kind = AssistantTrainingArguments
    args = parse_arguments(folder, training_options, kind, loss=own.loss)
    rows, eval_rows = own.conversations(), own.eval_rows(args.eval_strategy)
    target, tokenizer = None, own.load_tokenizer()
    if own.loss != "ce" or eval_rows is not None:
        # each process of a run has a GPU of its own, to which its trainer moves the target
        target, tokenizer = own.load_target(device="cpu")
    with sole_run(own.output, args.process_index == 0):
        set_seed(args.seed)  # before weights are drawn
        model, known = own.load_assistant()
        data = {"train_dataset": rows, "eval_dataset": eval_rows}
        trainer = AssistantTrainer(model, args, target, tokenizer, known, **data)
        trainer.train(resume_from_checkpoint=last_checkpoint(folder, own.resume))
        save(trainer.drafter, tokenizer, own.output)
        print(f"The model is in {own.output}.")
