"""Train a drafter and its router on conversations, and save them ready to publish.

python examples/train.py --target org/my-llama --dataset conversations.jsonl --output my-drafter
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from coral_hf import CoralDrafter, CoralTrainer, CoralTrainingArguments
from coral_hf.training.data import load_conversations


def main(options: argparse.Namespace) -> None:
    output = options.output
    tokenizer = AutoTokenizer.from_pretrained(options.target)
    target = AutoModelForCausalLM.from_pretrained(options.target)
    drafter = CoralDrafter.from_target(target).float()
    for stage in ("drafter", "router"):
        args = CoralTrainingArguments(
            output_dir=str(output / stage),
            stage=stage,
            max_steps=options.max_steps,
            per_device_train_batch_size=2,
            learning_rate=1e-3,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            dataloader_pin_memory=torch.cuda.is_available(),
        )
        trainer = CoralTrainer(
            model=drafter,
            target_model=target,
            args=args,
            train_dataset=load_conversations(options.dataset),
            processing_class=tokenizer,
        )
        trainer.train()
    trainer.save_model(str(output))  # drafter, router, settings and tokenizer: ready to publish


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--max-steps", type=int, default=1000)
    main(parser.parse_args())
