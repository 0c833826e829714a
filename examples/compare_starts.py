"""Compare initial weights of a drafter: one training run each, same data, seed and settings.

python examples/compare_starts.py --target org/my-llama --dataset talk.jsonl --hold-out 200 \
    --start random --start a-drafter --start lora8:a-drafter --rows starts.jsonl \
    --output_dir runs

A start is `random`; the folder of a drafter or an EAGLE checkpoint; or `loraR:FOLDER`, which trains
an adapter of rank R on a drafter. Each start reads each `--share` of the rows, the first ones, for
each of the `--seeds`. A finished run is appended to `--rows`, and the same command goes on. All
other options are those of CoralTrainingArguments.
"""

import argparse
import time
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from coral_hf import CoralDrafter, CoralTrainer
from coral_hf.atomic import JsonLines
from coral_hf.identity import digest
from coral_hf.measure.calls import decoded_rounds
from coral_hf.measure.prompts import Prompt, asked_messages, encode
from coral_hf.measure.report import tabulate
from coral_hf.target import read_target
from coral_hf.training import parse_arguments
from coral_hf.training.data import load_conversations, prepare_dataset, to_messages
from coral_hf.training.stages import lora
from coral_hf.training.warm_start import warm_start

KEY = ("run", "seed", "share", "start")
AT_ONCE = 20  # prompts that are answered together
COLUMNS = {
    "start": "{0[start]}",
    "seed": "{0[seed]}",
    "rows": "{0[rows]:,}",
    "steps": "{0[steps]}",
    "trained": "{0[parameters]:,}",
    "τ before": "{0[tau_before]:.2f}",
    "agreement": "{0[agreement]:.3f}",
    "τ": "{0[tau]:.2f}",
    "core-seconds": "{0[core_seconds]:.0f}",
}


def drafter_from(start: str, target) -> CoralDrafter:
    if start == "random":
        return CoralDrafter.from_target(target).float()
    return warm_start(target, start.split(":")[-1])


def acceptance_length(target, drafter, prompts: list[list[int]]) -> tuple[float, int]:
    """Return τ, greedy: tokens per target pass over all prompts; and these tokens."""
    drafter.generation_config.update(tree_depth=6, tree_top_k=8, tree_nodes=32)
    read = read_target(target)
    rounds = decoded_rounds(drafter.eval(), read, prompts, max_new_tokens=64, batch_size=AT_ONCE)
    return mean(rounds), sum(rounds)


def last_agreement(history: list[dict], entries: int = 10) -> float:
    found = [entry["agreement_1"] for entry in history if "agreement_1" in entry][-entries:]
    return sum(found) / len(found)


def main(options: argparse.Namespace, typed: list[str]) -> None:
    defaults = ["--save_strategy", "no", "--logging_steps", "1"]
    args = parse_arguments("runs", defaults + typed)
    tokenizer = AutoTokenizer.from_pretrained(options.target)
    target = AutoModelForCausalLM.from_pretrained(options.target, dtype=options.dtype)
    target = target.to(args.device)
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
    table = JsonLines(options.rows).mend()
    run = digest(
        [options.target, options.dataset, options.hold_out, len(prompts), options.dtype, typed]
    )[:12]
    known = {tuple(row[name] for name in KEY): row for row in table.read()}
    keys = [*product([run], range(options.seeds), options.share or [1.0], options.start)]
    for key in keys:
        if key not in known:
            some = tokens.select(range(max(1, round(key[2] * len(tokens)))))
            same = [
                row["tau_before"]
                for of, row in known.items()
                if of[:2] + of[3:] == key[:2] + key[3:]
            ]
            found = trained(target, some, prompts, args, key[3], key[1], *same[:1])
            known[key] = dict(zip(KEY, key, strict=True)) | found
            table.append([known[key]])
    print(tabulate("", COLUMNS, [known[key] for key in keys]).to_markdown())


def trained(
    target, rows, prompts, args, start: str, seed: int, before: float | None = None
) -> dict[str, Any]:
    """Train a start on rows, and return what is known of it; `before` is its τ, if it is known."""
    set_seed(seed)
    args.seed = seed
    drafter = drafter_from(start, target).to(args.device)
    if before is None and start != "random":
        before, _ = acceptance_length(target, drafter, prompts)
    rank = int(start.split(":")[0].removeprefix("lora")) if start.startswith("lora") else None
    given = {"args": args, "target_model": target, "train_dataset": rows}
    trainer = CoralTrainer(drafter, peft_config=None if rank is None else lora(rank), **given)
    size = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    begin = time.process_time()
    trainer.train()
    seconds = time.process_time() - begin
    if isinstance(trainer.model, PeftModel):
        drafter = trainer.model.merge_and_unload()
    tau, num_tokens = acceptance_length(target, drafter, prompts)
    return {
        "rows": len(rows),
        "steps": trainer.state.global_step,
        "parameters": size,
        "tau_before": before,
        "agreement": last_agreement(trainer.state.log_history),
        "tau": tau,
        "prompts": len(prompts),
        "tokens": num_tokens,
        "core_seconds": seconds,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--start", action="append", required=True)
    parser.add_argument(
        "--hold-out", type=int, default=200, help="last rows, not used for training"
    )
    parser.add_argument("--num-prompts", type=int, default=20, help="held-out rows to measure τ on")
    parser.add_argument("--share", type=float, action="append", help="of the rows; default: all")
    parser.add_argument("--dtype", default="auto", help="of the target")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--rows", type=Path, required=True, help="JSON lines of all results")
    parser.add_argument("--user-turn", type=int, default=-1, help="the user turn that is answered")
    main(*parser.parse_known_args())
