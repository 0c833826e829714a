"""Fine-tune all weights of a target on conversations, as a case for `compare_starts.py`.

python examples/fine_tune.py --target org/my-llama --dataset code.json --hold-out 200 \
    --output_dir my-llama-code --max_steps 200 --learning_rate 1e-3
"""

import argparse

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
)

from coral_hf.training.data import CoralCollator, load_conversations, prepare_dataset


def main(options: argparse.Namespace, args: TrainingArguments) -> None:
    tokenizer = AutoTokenizer.from_pretrained(options.target)
    target = AutoModelForCausalLM.from_pretrained(options.target, dtype=torch.float32)
    dtype = target.config.dtype
    rows = load_conversations(options.dataset)
    rows = rows.select(range(len(rows) - options.hold_out))
    trainer = Trainer(
        model=target,
        args=args,
        train_dataset=prepare_dataset(rows, tokenizer, options.max_length),
        data_collator=CoralCollator(tokenizer.pad_token_id or 0),
    )
    trainer.train()
    target.to(dtype).save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument(
        "--hold-out", type=int, default=200, help="last rows, not used for training"
    )
    parser.add_argument("--max-length", type=int, default=256)
    options, rest = parser.parse_known_args()
    pinned = ["--dataloader_pin_memory", str(torch.cuda.is_available())]
    defaults = ["--report_to", "none", "--save_strategy", "no", "--logging_steps", "10", *pinned]
    (args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(defaults + rest)
    main(options, args)
