"""Run by `test_evaluation.py` in one and in two processes: train, evaluate, save the metrics."""

import os
import sys
from pathlib import Path

import torch
from conftest import VOCAB, tiny_target
from datasets import Dataset

from coral_hf import CoralDrafter, CoralTrainer, CoralTrainingArguments


def main(folder: Path) -> None:
    torch.manual_seed(0)
    target = tiny_target("llama", torch.float64)
    prompts = torch.randint(2, VOCAB, (16, 4))
    mask = torch.ones_like(prompts)
    texts = target.generate(prompts, attention_mask=mask, do_sample=False, max_new_tokens=16)
    rows = Dataset.from_list(
        [
            {"input_ids": text, "attention_mask": [1] * 20, "labels": [-100] * 4 + text[4:]}
            for text in texts.tolist()
        ]
    )
    drafter = CoralDrafter.from_target(target)
    world = int(os.environ["WORLD_SIZE"])
    args = CoralTrainingArguments(
        output_dir=str(folder),
        max_steps=20,
        per_device_train_batch_size=8 // world,
        per_device_eval_batch_size=4,
        learning_rate=1e-2,
        csra_negatives="sequence",
        classification_weight=1.0,
        eval_prompts=5,  # an odd number: the ranks' shares differ
        eval_max_new_tokens=12,
        eval_strategy="steps",
        eval_steps=10,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = CoralTrainer(
        model=drafter, target_model=target, args=args, train_dataset=rows, eval_dataset=rows
    )
    trainer.train()
    metrics = {name: n for name, n in trainer.evaluate().items() if "acceptance" in name}
    torch.save(metrics, folder / f"{args.process_index}.pt")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
