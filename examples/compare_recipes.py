"""Reproduce the recipe table of docs/results/training.md.

python examples/compare_recipes.py --target coral-bench --dialogues sgd_train.jsonl.gz \
    --mt-bench mt_bench/question.jsonl --gsm8k gsm8k/question_eagle.jsonl --output recipes

The drafters are trained on every fourth dialogue, without the last 200. The prompts are every sixth
of those 200 and every fifth question of the other two files. An interrupted run resumes from
OUTPUT/results.jsonl. Other trials: `--trial "coral csra_weight=0.5"`, see `coral-hf compare`.
"""

import argparse
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from coral_hf.measure import Prompt, read_prompts
from coral_hf.training import parse_arguments
from coral_hf.training.comparison import Comparison, ComparisonSettings, Trial, compare
from coral_hf.training.data import load_conversations, prepare_dataset
from coral_hf.training.features import CachedFeatures, write_features

HELD_OUT = 200
OPTIONS = (
    "--per_device_train_batch_size 4 --learning_rate 2e-3 --warmup_steps 20 --use_cpu True"
    " --lr_scheduler_type cosine --adam_beta2 0.95 --bf16 True --max_length 512"
)
TREE = {"tree_depth": 6, "tree_top_k": 8, "tree_nodes": 32}


def features(target, tokenizer, dialogues: str, every: int, folder: Path) -> CachedFeatures:
    """Store the target's features of the training dialogues."""
    rows = load_conversations(dialogues)
    rows = rows.select(range(0, len(rows) - HELD_OUT, every))
    max_length = parse_arguments(folder, OPTIONS.split()).max_length
    write_features(target, prepare_dataset(rows, tokenizer, max_length), folder)
    return CachedFeatures(folder)


def chosen_prompts(options: argparse.Namespace) -> list[Prompt]:
    """Return first turns of questions and second turns of held-out dialogues."""
    asked = [read_prompts(options.mt_bench)[::5], read_prompts(options.gsm8k)[::5]]
    dialogues = read_prompts(options.dialogues, last=HELD_OUT, user_turn=1)[::6]
    return [prompt for part in (*asked, dialogues) for prompt in part[: options.limit]]


def main(options: argparse.Namespace) -> None:
    tokenizer = AutoTokenizer.from_pretrained(options.target)
    target = AutoModelForCausalLM.from_pretrained(options.target, dtype="auto").eval()
    settings = ComparisonSettings(
        output=options.output, options=OPTIONS.split(), max_new_tokens=48, **TREE
    )
    rows = features(
        target, tokenizer, options.dialogues, options.every, options.output / "features"
    )
    comparison = Comparison(target, tokenizer, rows, chosen_prompts(options), settings)
    trials = [Trial.parse(text) for text in options.trial or ("eagle", "hass", "coral")]
    print(compare(comparison, trials, options.steps or [320], options.seeds))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", required=True)
    parser.add_argument("--dialogues", required=True)
    parser.add_argument("--mt-bench", required=True)
    parser.add_argument("--gsm8k", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--trial", action="append", help="a recipe and settings")
    parser.add_argument("--steps", type=int, action="append", help="of each training run: 320")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--every", type=int, default=4, help="train on one dialogue in so many")
    parser.add_argument("--limit", type=int, default=12, help="prompts of each kind")
    main(parser.parse_args())
