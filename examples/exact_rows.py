"""Gain of exact training rows: drafters of a target that thinks, trained on two kinds of rows.

    python examples/exact_rows.py --target coral-bench --dialogues sgd_train.jsonl.gz --output exact

Fixed before the runs:

- Target: `--target`, fine-tuned on dialogues whose answers begin with a thought, made by a rule
  (`thought_of`). Its chat template strips the thoughts of earlier answers, as Qwen3's does.
- Data: the target answers 120 other dialogues of at most four questions (`regenerate`, greedy).
- Drafters: equal seeds, weights at the start, steps (60), and tokens a step (two packed rows of
  384), recipe `eagle`, trained on `whole`: each dialogue rendered once by `apply_chat_template`,
  its answers trained, of which only the last has its thought; on `exact`: the token rows of
  `regenerate`, what the target read and wrote; and on `shared`: the same, the prompts of a dialogue
  stored once (`share_prompts`, the default).
- Question: tau of `exact` and of `shared` less tau of `whole`, on thoughts and on answers: 40
  held-out dialogues, the second question of each, greedy, two seeds. A round that spans the end of
  a thought counts in parts, by its tokens. Prompts whose output has no whole thought are counted
  and left out.
- Spread: 95 % intervals of the differences, by resampling prompts.

An interrupted run resumes: each model, file of answers and measured prompt is kept in `--output`.
"""

import argparse
import random
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pandas import DataFrame
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from coral_hf import CoralDrafter, CoralTrainer, CoralTrainingArguments
from coral_hf.atomic import JsonLines
from coral_hf.measure.calls import call_generate, sampling_arguments
from coral_hf.measure.prompts import Prompt, encode, left_padded, read_prompts
from coral_hf.training.data import (
    CoralCollator,
    load_conversations,
    prepare_dataset,
    set_chat_options,
    share_prompts,
)
from coral_hf.training.regeneration import RegenerationSettings
from coral_hf.training.regeneration.regenerate import regenerate

KINDS, SEEDS = ("whole", "exact", "shared"), (0, 1)
PARTS = ("thought", "answer", "both")
HELD_OUT, TURNS = 200, 8
MAX_LENGTH, MAX_NEW_TOKENS, TREE = 384, 96, {"tree_depth": 6, "tree_top_k": 8, "tree_nodes": 32}
END = "</think>"
TEMPLATE = """\
{{ bos_token }}{% set ns = namespace(asked=-1) %}\
{% for m in messages %}{% if m.role == 'user' %}{% set ns.asked = loop.index0 %}{% endif %}\
{% endfor %}\
{% for m in messages %}<|{{ m.role }}|>
{% if m.role == 'assistant' %}{% generation %}\
{{ m.content if loop.index0 > ns.asked else m.content.split('</think>')[-1].lstrip('\\n') }}<|end|>\
{% endgeneration %}{% else %}{{ m.content }}<|end|>{% endif %}

{% endfor %}{% if add_generation_prompt %}<|assistant|>
{% endif %}"""
COMMON: dict[str, Any] = {
    "lr_scheduler_type": "cosine",
    "warmup_steps": 20,
    "adam_beta2": 0.95,
    "bf16": True,
    "use_cpu": True,
    "save_strategy": "no",
    "report_to": "none",
    "dataloader_pin_memory": False,
    "logging_steps": 20,
}


def thought_of(question: str, answer: str) -> str:
    """Write a thought before an answer: how the question begins, and what is to be done."""
    asked = " ".join(question.split()[:6])
    kind = "ask" if answer.rstrip().endswith("?") else "say"
    return f"<think>\nThe user says: {asked}. I {kind} something.\n{END}\n\n{answer}"


def thoughtful(row: dict[str, Any]) -> dict[str, Any]:
    """Return the first turns of a dialogue, its answers with thoughts."""
    turns = row["messages"][:TURNS]
    for asked, turn in zip(turns, turns[1:], strict=False):
        if turn["role"] == "assistant":
            turn["content"] = thought_of(asked["content"], turn["content"])
    return {"messages": turns}


def teach(options: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Fine-tune the target to think."""
    set_seed(0)
    target = AutoModelForCausalLM.from_pretrained(options.target, dtype=torch.float32)
    rows = load_conversations(options.dialogues)
    rows = rows.select(range(min(options.taught, len(rows) - HELD_OUT))).map(thoughtful)
    rows = prepare_dataset(rows, tokenizer, MAX_LENGTH)
    size = {"max_steps": options.taught_steps, "per_device_train_batch_size": 4}
    args = TrainingArguments(str(folder), learning_rate=1e-3, **size, **COMMON)
    pad = tokenizer.pad_token_id
    Trainer(target, args, train_dataset=rows, data_collator=CoralCollator(pad)).train()
    tokenizer.save_pretrained(folder)
    target.to(target.config.dtype).save_pretrained(folder)


def whole_row(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Render an answered dialogue once, as a plain script does."""
    wanted = {"return_dict": True, "return_assistant_tokens_mask": True}
    found = tokenizer.apply_chat_template(row["messages"], **wanted)
    return {"input_ids": found["input_ids"], "assistant_masks": found["assistant_masks"]}


def rows_of(kind: str, answers: Path, tokenizer: PreTrainedTokenizerBase):
    """Make the training rows of a kind from the file of answers."""
    rows = load_conversations(str(answers))
    if kind != "whole":
        return prepare_dataset(rows.select_columns(["token_rows"]), tokenizer, MAX_LENGTH)
    rows = rows.map(whole_row, fn_kwargs={"tokenizer": tokenizer}, remove_columns=rows.column_names)
    return prepare_dataset(rows, tokenizer, MAX_LENGTH)


def train(target, tokenizer, rows, folder: Path, seed: int, **settings: Any) -> None:
    """Train a drafter from the weights that a seed gives."""
    set_seed(seed)
    drafter = CoralDrafter.from_target(target).float()
    args = CoralTrainingArguments(
        str(folder),
        recipe="eagle",
        **settings,
        per_device_train_batch_size=2,
        learning_rate=2e-3,
        classification_weight=1.0,
        packing=True,
        max_length=MAX_LENGTH,
        seed=seed,
        **COMMON,
    )
    CoralTrainer(drafter, target, args, tokenizer, train_dataset=rows).train()
    drafter.save_pretrained(folder)


def passes(tokens: list[int], rounds: list[int], end: int) -> dict[str, float] | None:
    """Count tokens and passes of thought and answer; the first token is the prefill's.

    tokens (new,); the first `end` of them are the thought.
    """
    counts = dict.fromkeys(("thought", "thought_passes", "answer", "answer_passes"), 0.0)
    start = 1
    for length in rounds:
        inside = min(max(end - start, 0), length)
        start += length
        for part, number in (("thought", inside), ("answer", length - inside)):
            counts[part] += number
            counts[f"{part}_passes"] += number / length
    return counts if start == len(tokens) else None


def measure(target, tokenizer, drafter, prompts: list[Prompt]):
    """Yield for each prompt the counts of `passes`, or why there are none."""
    arguments = sampling_arguments(0.0, MAX_NEW_TOKENS) | TREE
    arguments |= {"assistant_model": drafter, "speculation": "always"}
    for prompt in prompts:
        call = call_generate(target, left_padded([encode(prompt, tokenizer)[0]], 0), arguments)
        (tokens,) = call.tokens
        ends = [i for i in range(1, len(tokens)) if END in tokenizer.decode(tokens[:i])]
        found = passes(tokens, call.round_lengths, ends[0]) if ends else None
        yield {"prompt": prompt.id, **(found or {"without": "a whole thought"})}


def taus(rows: DataFrame, part: str, samples: np.ndarray) -> np.ndarray:
    """Pool the tokens a pass of samples (samples, prompts) of a frame's rows."""
    tokens, passed = (rows[f"{part}{end}"].to_numpy()[samples].sum(1) for end in ("", "_passes"))
    return tokens / passed


def table(results: list[dict]) -> str:
    """Tabulate tau by rows and seed, and the differences with their intervals."""
    left_out = {row["prompt"] for row in results if "without" in row}
    found = DataFrame([row for row in results if row["prompt"] not in left_out])
    if found.empty:
        return f"{len(left_out)} prompts, none answered with a whole thought."
    found["both"] = found["thought"] + found["answer"]
    found["both_passes"] = found["thought_passes"] + found["answer_passes"]
    by_prompt = found.groupby(["rows", "prompt"]).sum(numeric_only=True)  # of all seeds
    every = range(found["prompt"].nunique())
    lines = [f"{len(every)} prompts, {len(left_out)} left out.", ""]
    lines += ["| rows | seed | thoughts | answers | both |", "|---|---|---:|---:|---:|"]
    for name, seed in product(KINDS, SEEDS):
        own = found[(found["rows"] == name) & (found["seed"] == seed)]
        cells = [f"{taus(own, part, np.array([every]))[0]:.3f}" for part in PARTS]
        lines.append(f"| {name} | {seed} | {' | '.join(cells)} |")
    for name in KINDS[1:]:
        draw, cells = random.Random(0), []
        samples = np.array([every, *(draw.choices(every, k=len(every)) for _ in range(2000))])
        for part in PARTS:
            own, whole = (taus(by_prompt.loc[one], part, samples) for one in (name, "whole"))
            gain = own - whole
            low, high = np.sort(gain[1:])[[50, 1949]]
            cells.append(f"{gain[0]:+.3f} ({low:+.3f} to {high:+.3f})")
        lines.append(f"| {name} less whole | both | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(options: argparse.Namespace) -> None:
    output: Path = options.output
    tokenizer = set_chat_options(AutoTokenizer.from_pretrained(options.target), TEMPLATE)
    if not (output / "target" / "config.json").exists():
        teach(options, tokenizer, output / "target")
    target = AutoModelForCausalLM.from_pretrained(output / "target", dtype="auto").eval()
    dialogues = load_conversations(options.dialogues)
    first = min(options.taught, len(dialogues) - HELD_OUT - options.answered)
    dialogues = dialogues.select(range(first, first + options.answered))
    answers = output / "answers.jsonl"
    asked = dialogues.map(lambda row: {"messages": row["messages"][:TURNS]})
    settings = RegenerationSettings(max_new_tokens=MAX_NEW_TOKENS, unfinished="drop", batch_size=32)
    print(regenerate(target, tokenizer, asked.select_columns(["messages"]), answers, settings))
    kinds = {kind: rows_of(kind, answers, tokenizer) for kind in KINDS}
    for kind, rows in kinds.items():
        stored = share_prompts(rows, MAX_LENGTH) if kind == "shared" else rows
        read = sum(map(len, stored["input_ids"]))
        trained = sum(label != -100 for labels in rows["labels"] for label in labels)
        print(f"{kind}: {len(rows)} rows, {read} tokens, {trained} of them trained")
    every = max(HELD_OUT // options.prompts, 1)
    asked = read_prompts(options.dialogues, last=HELD_OUT, user_turn=1)[::every][: options.prompts]
    results = JsonLines(output / "results.jsonl").mend()
    for seed in SEEDS:
        for kind, rows in kinds.items():
            folder = output / f"{kind}-{seed}"
            if not (folder / "config.json").exists():
                settings = {"max_steps": options.steps, "share_prompts": kind == "shared"}
                train(target, tokenizer, rows, folder, seed, **settings)
            drafter = CoralDrafter.from_pretrained(folder, dtype=target.dtype).eval()
            run = {"rows": kind, "seed": seed}
            done = {row["prompt"] for row in results.read() if run.items() <= row.items()}
            left = [prompt for prompt in asked if prompt.id not in done]
            for row in measure(target, tokenizer, drafter, left):
                results.append([{**run, **row}])
    print(table([*results.read()]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Gain of exact training rows.")
    parser.add_argument("--target", required=True)
    parser.add_argument("--dialogues", required=True, help="of `messages`, such as SGD's")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--taught", type=int, default=1500, help="dialogues that teach to think")
    parser.add_argument("--taught-steps", type=int, default=120)
    parser.add_argument("--answered", type=int, default=120, help="dialogues to train drafters on")
    parser.add_argument("--steps", type=int, default=60, help="of each drafter")
    parser.add_argument("--prompts", type=int, default=40)
    main(parser.parse_args())
