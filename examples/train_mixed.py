"""Train the drafter of docs/results/speed.md: dialogues and stories, all answered by the target.

python examples/train_mixed.py --target coral-bench --dialogues sgd_train.jsonl.gz \
    --stories tinystories_v2_head.txt --held-out-stories tinystories_val.txt --output mixed \
    --recipe coral

Trained on the first eight turns of every 18th dialogue but for the last 200, on a greedy story for
every beginning, and on one drawn at T = 1 for every 8th. OUTPUT gets the drafter with its router,
and `dialogues.jsonl` and `stories.jsonl`, the held-out prompts for `round_speed.py`. An interrupted
run resumes. All other options are those of CoralTrainingArguments.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from datasets import Dataset, concatenate_datasets
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from coral_hf import CoralDrafter
from coral_hf.atomic import write_text
from coral_hf.measure import Prompt, read_prompts
from coral_hf.training import parse_arguments, pipeline
from coral_hf.training.data import load_conversations
from coral_hf.training.regeneration import RegenerationSettings
from coral_hf.training.regeneration.regenerate import regenerate

HELD_OUT = 200  # last dialogues
EVERY = 18
TURNS = 8
BEGINNING = 10  # words
OPTIONS = (
    "--max_steps 1200 --per_device_train_batch_size 4 --learning_rate 2e-3 --warmup_steps 10"
    " --lr_scheduler_type cosine --adam_beta2 0.95 --bf16 True --classification_weight 1.0"
    " --max_length 512 --train_sampling_strategy group_by_length --use_cpu True --save_steps 100"
    " --report_to none"
)
TOKENS = {"dialogues": 48, "stories": 160}  # of an answer at most


def story_prompts(path: str, skip: frozenset[str] = frozenset()) -> Iterator[Prompt]:
    """Yield a prompt for each beginning of a story; a file without marks has paragraphs."""
    seen = set(skip)
    for prompt in read_prompts(path, num_words=BEGINNING):
        text = " ".join(prompt.text.split())
        if text.startswith(("Once upon a time", "One day")) and text not in seen:
            seen.add(text)
            asked = {"role": "user", "content": f"Tell me a short story that begins: {text}"}
            yield Prompt("stories", prompt.id, (asked,))


def held_out_dialogues(path: str) -> list[Prompt]:
    """Return the answered user turns of the last dialogues, the third from the end first."""
    turns = [read_prompts(path, last=HELD_OUT, user_turn=turn) for turn in (-3, -2, 0)]
    unique = {str(prompt.messages): prompt._replace(task="dialogues") for prompt in sum(turns, [])}
    return [*unique.values()]


def training_dialogues(path: str, every: int) -> Dataset:
    """Return the first turns of some dialogues, but for the last ones."""
    rows = load_conversations(path)
    rows = rows.select(range(0, len(rows) - HELD_OUT, every))
    return Dataset.from_list([{"messages": row["messages"][:TURNS]} for row in rows])


def write_prompts(prompts: list[Prompt], path: Path) -> None:
    rows = [{"id": prompt.id, "messages": prompt.messages} for prompt in prompts]
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def own_answers(target, tokenizer, rows: Dataset, path: Path, **settings) -> Dataset:
    """Return the rows with the target's answers, as tokens that it wrote."""
    regenerate(target, tokenizer, rows, path, RegenerationSettings(batch_size=64, **settings))
    return load_conversations(path).select_columns(["messages", "token_rows"])


def main(options: argparse.Namespace, typed: list[str]) -> None:
    options.output.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(options.target)
    target = AutoModelForCausalLM.from_pretrained(options.target, dtype="auto").eval()
    trained = [*story_prompts(options.stories)]
    begun = frozenset(prompt.messages[0]["content"].split(": ", 1)[1] for prompt in trained)
    write_prompts(
        [*story_prompts(options.held_out_stories, begun)], options.output / "stories.jsonl"
    )
    write_prompts(held_out_dialogues(options.dialogues), options.output / "dialogues.jsonl")
    silence = {"role": "assistant", "content": ""}  # is answered by the target
    stories = Dataset.from_list([{"messages": [*one.messages, silence]} for one in trained])
    dialogues = training_dialogues(options.dialogues, options.every)
    rows = []
    for name, asked, temperature in (
        ("dialogues", dialogues, 0.0),
        ("stories", stories, 0.0),
        ("stories", stories.select(range(0, len(stories), 8)), 1.0),
    ):
        path = options.output / f"own_{name}_{temperature}.jsonl"
        settings = {"max_new_tokens": TOKENS[name], "temperature": temperature}
        rows.append(own_answers(target, tokenizer, asked, path, **settings))
    stages = [
        parse_arguments(options.output / "drafter", [*OPTIONS.split(), *typed]),
        parse_arguments(
            options.output / "router",
            [*OPTIONS.split(), *typed],
            stage="router",
            max_steps=options.router_steps,
        ),
    ]
    set_seed(stages[0].seed)
    drafter = CoralDrafter.from_target(target).float()
    drafter = pipeline.train(
        target, tokenizer, concatenate_datasets(rows), stages, drafter, resume=True
    )
    pipeline.save(drafter, tokenizer, options.output)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", required=True)
    parser.add_argument("--dialogues", required=True)
    parser.add_argument("--stories", required=True)
    parser.add_argument("--held-out-stories", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--every", type=int, default=EVERY, help="one dialogue in so many")
    parser.add_argument("--router-steps", type=int, default=400)
    main(*parser.parse_known_args())
