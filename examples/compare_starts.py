"""Compare initial weights of a drafter: one training run each, same data, seed and settings.

python examples/compare_starts.py --target org/my-llama --dataset talk.jsonl --hold-out 200 \
    --start random --start layer --start a-drafter --start lora8:a-drafter --output_dir runs

A start is `random`; `layer`, the target's last layer, also with another `fc` (`layer=0.5,0.5`,
`layer=random`); the folder of a drafter or an EAGLE checkpoint; or `loraR:FOLDER`, which trains an
adapter of rank R on a drafter. All other options are those of CoralTrainingArguments.
"""

import argparse
import time
from statistics import mean

from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from coral_hf import CoralDrafter, CoralTrainer, CoralTrainingArguments
from coral_hf.measure.calls import decoded_rounds
from coral_hf.measure.prompts import Prompt, asked_messages, encode
from coral_hf.target import read_target
from coral_hf.training import parse_arguments
from coral_hf.training.adapters import lora
from coral_hf.training.data import load_conversations, prepare_dataset, to_messages
from coral_hf.training.warm_start import from_layer, warm_start


def drafter_from(start: str, target) -> CoralDrafter:
    if start == "random":
        return CoralDrafter.from_target(target).float()
    if start == "layer=random":
        return from_layer(target, fc=None)
    if start.startswith("layer="):
        embedding, feature = map(float, start.removeprefix("layer=").split(","))
        return from_layer(target, fc=(embedding, feature))
    return warm_start(target, start.split(":")[-1])


def acceptance_length(target, drafter, prompts: list[list[int]]) -> float:
    """Return τ, greedy: tokens per target pass over all prompts."""
    drafter.generation_config.update(tree_depth=6, tree_top_k=8, tree_nodes=32)
    read = read_target(target)
    rounds = decoded_rounds(drafter.eval(), read, prompts, max_new_tokens=64, batch_size=1)
    return mean(rounds)


def last_agreement(history: list[dict], entries: int = 10) -> float:
    found = [entry["agreement_1"] for entry in history if "agreement_1" in entry][-entries:]
    return sum(found) / len(found)


def main(options: argparse.Namespace, args: CoralTrainingArguments) -> None:
    tokenizer = AutoTokenizer.from_pretrained(options.target)
    target = AutoModelForCausalLM.from_pretrained(options.target, dtype="auto").to(args.device)
    rows = load_conversations(options.dataset)
    held_out = rows.select(range(len(rows) - options.hold_out, len(rows)))
    rows = rows.select(range(len(rows) - options.hold_out))
    tokens = prepare_dataset(rows, tokenizer, args.max_length)
    asked = [
        asked_messages(to_messages(row), options.user_turn)
        for row in held_out.select(range(options.num_prompts))
    ]
    prompts = [
        encode(Prompt("held-out", "", tuple(messages)), tokenizer)[0].tolist() for messages in asked
    ]
    print(
        "| start | trained | τ before | agreement | τ | core-seconds |\n|---|---|---|---|---|---|"
    )
    for start in options.start:
        set_seed(args.seed)
        drafter = drafter_from(start, target).to(args.device)
        before = acceptance_length(target, drafter, prompts)
        rank = int(start.split(":")[0].removeprefix("lora")) if start.startswith("lora") else None
        trainer = CoralTrainer(
            model=drafter,
            target_model=target,
            args=args,
            train_dataset=tokens,
            peft_config=None if rank is None else lora(rank),
        )
        size = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
        begin = time.process_time()
        trainer.train()
        seconds = time.process_time() - begin
        if isinstance(trainer.model, PeftModel):
            drafter = trainer.model.merge_and_unload()
        after = acceptance_length(target, drafter, prompts)
        agreement = last_agreement(trainer.state.log_history)
        print(
            f"| {start} | {size:,} | {before:.2f} | {agreement:.3f} | {after:.2f} | {seconds:.0f} |"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--start", action="append", required=True)
    parser.add_argument(
        "--hold-out", type=int, default=200, help="last rows, not used for training"
    )
    parser.add_argument("--num-prompts", type=int, default=20, help="held-out rows to measure τ on")
    parser.add_argument("--user-turn", type=int, default=-1, help="the user turn that is answered")
    options, rest = parser.parse_known_args()
    defaults = ["--save_strategy", "no", "--logging_steps", "1"]
    main(options, parse_arguments("runs", defaults + rest))
