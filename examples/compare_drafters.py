"""Compare the families of drafters on one target: the table of docs/results/drafters.md.

python examples/compare_drafters.py --target stories260k --dataset tinystories_v2_head.txt \
    --work drafters --rows docs/results/drafters.jsonl --clock processor --seconds 170

Every family is trained on the same rows, in the same order, for as many steps as take MINUTES: some
steps are timed first, so that the learning rate falls to its end. Its recipe decides the rest, and
a small language model has one layer of the target's width and loss kl. A bigram table is counted on
the same rows, and prompt lookup needs none. All of them answer the last HOLD_OUT rows' beginnings
with one tree, each beside plain `generate`. A seed, 0 to SEEDS - 1, draws fresh weights and the
order of the rows; the table has means over seeds, and of τ the 95 % t-interval. A finished
measurement is appended to ROWS; drafters and checkpoints lie in WORK. After SECONDS no further step
or measurement is begun, and the same command resumes. All other options are those of training
arguments.
"""

import argparse
import json
import math
import time
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
import transformers
from bigram import BigramDrafter
from scipy.stats import t as student
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, set_seed

import coral_hf
from coral_hf.atomic import JsonLines, keep_settings, new_folder, sole_writer, write_json
from coral_hf.identity import digest
from coral_hf.measure.benchmark import measure_prompts
from coral_hf.measure.calls import Bench, Call, sampling_arguments
from coral_hf.measure.prompts import encode, read_prompts
from coral_hf.measure.report import describe_environment, tabulate
from coral_hf.measure.summary import grouped, median_ratio, summarise_tasks
from coral_hf.training.arguments import RECIPES, parse_arguments
from coral_hf.training.assistant import small_model
from coral_hf.training.data import load_conversations, prepare_dataset
from coral_hf.training.planning.run import PARTS, steps_in
from coral_hf.training.runs.checkpoints import last_checkpoint
from coral_hf.training.steps import kind_of_recipe

NAMES = {  # by recipe, where a family has one
    "one_step_first": "CORAL",
    "eagle3": "EAGLE-3",
    "medusa": "Medusa",
    "parallel": "P-EAGLE",
    "recurrent": "Recurrent Drafter",
    "language_model": "small language model",
    "bigram": "bigram table",
    "prompt_lookup": "prompt lookup",
}
UNTRAINED = ("bigram", "prompt_lookup")  # seed 0 alone
OPTIONS = (
    "--per_device_train_batch_size 4 --learning_rate 3e-3 --warmup_steps 30 --save_steps 200"
    " --lr_scheduler_type cosine --adam_beta2 0.95 --max_length 128 --logging_steps 50"
    " --save_total_limit 1 --disable_tqdm True"
)
UNTIMED, TIMED = 3, 12  # steps
TREE = {"tree_depth": 5, "tree_top_k": 4, "tree_nodes": 16, "speculation": "always"}
TEMPERATURES = (0.0, 1.0)
KEY = ("run", "seed", "family", "temperature")
FACTS = ("hardware", "num_threads", "dtype", "versions", "target")
TRAINING = ("target", "dtype", "dataset", "hold_out", "minutes", "clock", "typed", "options")
ELSEWHERE = ("work", "rows", "seconds", "family", "seeds")  # what no result depends on
COLUMNS = {
    "family": "{0[name]}",
    "T": "{0[temperature]:g}",
    "own parameters": "{0[parameters]:,.0f}",
    "minutes": "{0[minutes]:.1f}",
    "steps": "{0[steps]:.0f}",
    "seeds": "{0[seeds]}",
    "τ": "{0[tau]:.2f}{0[spread]}",
    "draft, ms a round": "{0[draft_ms]:.2f}",
    "decoding over eager": "{0[speedup]:.2f}×",
    "e": "{0[efficiency]:.2f}",
    "over compiled": "{0[over_compiled]:.2f}×",
    "whole call over eager": "{0[whole_call]:.2f}×",
    "estimated over eager, 4 times the layers": "{0[deeper]:.2f}×",
}
DEEPER = 4


class Watch(transformers.TrainerCallback):
    """Notes when steps end, and stops a run with a checkpoint when its time is up."""

    def __init__(self, end: float):
        self.end, self.ends = end, list[float]()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """See [`~transformers.TrainerCallback`]."""
        self.ends.append(time.perf_counter())
        if time.monotonic() > self.end and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True


class Experiment:
    """One target, the rows that its drafters are trained on, and the prompts that they answer."""

    def __init__(self, options: argparse.Namespace, typed: list[str]):
        self.options, self.typed, self.end = options, typed, time.monotonic() + options.seconds
        self.tokenizer = AutoTokenizer.from_pretrained(options.target)
        target = AutoModelForCausalLM.from_pretrained(options.target, dtype=options.dtype)
        self.target = target.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        rows = load_conversations(options.dataset)
        rows = rows.select(range(len(rows) - options.hold_out))
        max_length = parse_arguments(options.work, [*OPTIONS.split(), *typed]).max_length
        self.rows = prepare_dataset(rows, self.tokenizer, max_length)
        trained = "\n".join(rows["text"] if "text" in rows.features else ())
        which = {"last": options.hold_out, "num_words": options.num_words}
        found = read_prompts(options.dataset, user_turn=options.user_turn, **which)
        chosen = [one for one in found if one.text is None or one.text not in trained]
        # the longest first: a static cache keeps its length
        chosen = chosen[: options.num_prompts]
        self.prompts = sorted(chosen, key=lambda one: -encode(one, self.tokenizer).shape[1])

    def train(self, family: str, folder: Path, watch: Watch, seed: int = 0, **fields: Any) -> Any:
        """Train a fresh drafter, or the one of the last checkpoint; returns its trainer."""
        is_small = family == "language_model"
        trainer_kind = coral_hf.AssistantTrainer if is_small else coral_hf.CoralTrainer
        kind = coral_hf.AssistantTrainingArguments if is_small else coral_hf.CoralTrainingArguments
        fields |= {} if is_small else {"recipe": family}
        fields |= {"use_cpu": self.target.device.type == "cpu", "seed": seed}
        args = parse_arguments(folder, [*OPTIONS.split(), *self.typed], kind, **fields)
        set_seed(seed)
        if is_small:
            width = self.target.config.get_text_config().hidden_size
            model: Any = small_model(self.target.config, 1, width)
        else:
            step = kind_of_recipe(family)
            model = step.drafter.from_target(self.target, **step.fresh_fields(args)).float()
        known = {"processing_class": self.tokenizer, "train_dataset": self.rows}
        known |= {"callbacks": [watch], "args": args, "target_model": self.target}
        trainer = trainer_kind(model, **known)
        trainer.train(resume_from_checkpoint=last_checkpoint(folder, resume=True))
        return trainer

    def pace(self, family: str, **fields: Any) -> float:
        """Seconds of a training step."""
        watch = Watch(float("inf"))
        with TemporaryDirectory() as folder:
            fields |= {"max_steps": UNTIMED + TIMED, "save_strategy": "no"}
            self.train(family, Path(folder), watch, **fields)
        return (watch.ends[-1] - watch.ends[UNTIMED - 1]) / TIMED

    def num_steps(self, family: str) -> int:
        """How many steps take the time that a family has, from a few that are timed."""
        known = JsonLines(self.options.work / "steps.jsonl").mend()
        found = {row["family"]: row["steps"] for row in known.read()}
        if family not in found:
            seconds, recipe = 60 * self.options.minutes, RECIPES.get(family)
            if recipe and recipe.single_step_share:
                given = [*OPTIONS.split(), *self.typed]
                args = parse_arguments(self.options.work, given, recipe=family)
                paces = [self.pace(family, **own) for own in PARTS]
                found[family] = steps_in(seconds, args, *paces)
            else:
                found[family] = max(1, round(seconds / self.pace(family)))
            known.append([{"family": family, "steps": found[family]}])
        return found[family]

    def drafter(self, family: str, seed: int) -> Any:
        """A family's drafter, trained if it is not there, and its entry of the training record.

        Raises:
            TimeoutError: if time ran out before the last step.
        """
        place = self.options.work / f"{family}-{seed}"
        if not place.exists():
            if family == "bigram":
                texts = [torch.tensor(ids) for ids in self.rows["input_ids"]]
                size = self.target.config.get_text_config().vocab_size
                model, entry = BigramDrafter.from_texts(texts, size), {}
            else:
                run = place.with_name(f"{place.name}-run")
                steps = self.num_steps(family)
                trainer = self.train(family, run, Watch(self.end), seed, max_steps=steps)
                if trainer.state.global_step < steps:
                    raise TimeoutError
                model, entry = trainer.drafter, trainer.training_record[-1]
            with new_folder(place) as folder:
                model.save_pretrained(folder)
                write_json(folder / "entry.json", entry)
        auto = AutoModelForCausalLM if family == "language_model" else AutoModel
        model = auto.from_pretrained(place, dtype=self.target.dtype).to(self.target.device).eval()
        if family == "language_model":
            model = coral_hf.LanguageModelDrafter(model, self.tokenizer)
        return model, json.loads((place / "entry.json").read_text())

    def measure(self, seed: int, family: str, temperature: float) -> dict[str, Any]:
        """Let a family answer all prompts beside plain `generate`; a row of the table."""
        entry: dict[str, Any] = {}
        drafter, own = None, {"prompt_lookup_num_tokens": 10}
        if family != "prompt_lookup":
            drafter, entry = self.drafter(family, seed)
            own = {"assistant_model": drafter, **TREE}
        common = sampling_arguments(temperature, self.options.max_new_tokens)
        methods = {"plain": common, "drafted": common | own}
        if self.options.compiled:
            config = transformers.CompileConfig()
            config._compile_all_devices = True  # on a CPU `generate` compiles in benchmarks alone
            static = {"cache_implementation": "static", "compile_config": config}
            methods["compiled"] = common | static
        if time.monotonic() > self.end:
            raise TimeoutError
        bench = Bench(self.target, methods, warmup=2)
        calls, mismatches, _ = measure_prompts(bench, self.tokenizer, self.prompts)
        return {
            "name": NAMES[family],
            "parameters": drafter and drafter.num_parameters() or None,
            "minutes": entry["seconds"] / 60 if entry else None,
            "steps": entry.get("steps"),
            "trained_tokens": entry.get("trained_tokens"),
            "widest_tie": max((one.top2_gap for one in mismatches), default=None),
            **numbers(calls),
        }


def numbers(calls: list[Call]) -> dict[str, Any]:
    """Acceptance and speed of "drafted" over all prompts, and its acceptance by kind of prompt."""
    rows = {(row.task, row.method): row for row in summarise_tasks(calls)}
    row = rows["overall", "drafted"]
    by_method = grouped(calls, "method")
    own = by_method["drafted"]
    speedup, tau = row.decoding_speedup, row.tau_per_token
    compiled = by_method.get("compiled", ())
    return {
        "prompts": row.num_items,
        "prompt_tokens": sum(call.prompt_length for call in own),
        "tokens": row.num_tokens,
        "rounds": sum(call.num_rounds for call in own),
        "tau": tau,
        "tau_by_task": {task: rows[task, "drafted"].tau_per_token for task, _ in rows},
        "draft_ms": row.stage_milliseconds.get("draft"),
        "stage_ms": row.stage_milliseconds,
        "speedup": speedup,
        "efficiency": speedup and tau and speedup / tau,
        "over_compiled": median_ratio(compiled, own, "decoding_seconds_per_token"),
        "whole_call": row.speedup,
        "exact_match": row.exact_match,
    }


def deeper(row: dict[str, Any]) -> float:
    """Estimate the speed-up of decoding on a target of DEEPER times the layers, the same τ.

    A plain token and a verification take as many times as long; a draft and the rest do not.
    """
    verify = row["stage_ms"]["verify"]
    rest = sum(row["stage_ms"][name] for name in ("draft", "other"))
    return row["speedup"] * (verify + rest) * DEEPER / (verify * DEEPER + rest)


def over_seeds(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Average the rows of each family and temperature over their seeds."""
    groups, found = dict[Any, list[dict[str, Any]]](), list[dict[str, Any]]()
    for row in rows:
        groups.setdefault((row["family"], row["temperature"]), []).append(row)
    for own in groups.values():
        first, number, spread = own[0], len(own), ""
        if number > 1:
            width = student.ppf(0.975, number - 1) / math.sqrt(number)
            spread = f" ± {width * stdev(row['tau'] for row in own):.2f}"
        values = {  # some seeds may have none, such as the tie of a mismatch
            key: [row[key] for row in own if isinstance(row[key], int | float)] for key in first
        }
        means = {key: mean(some) for key, some in values.items() if some}
        means["deeper"] = mean(map(deeper, own)) if first["draft_ms"] is not None else None
        found.append(first | means | {"seeds": number, "spread": spread})
    return found


def main(options: argparse.Namespace, typed: list[str]) -> None:
    own = {name: value for name, value in vars(options).items() if name not in ELSEWHERE}
    own |= {name: Path(own[name]).name for name in ("target", "dataset")}
    own |= {"typed": typed, "options": OPTIONS, "tree": TREE}
    trained = {name: own[name] for name in TRAINING}
    keep_settings(options.work / "settings.json", trained, options.work)
    table, run = JsonLines(options.rows).mend(), digest(own)[:12]
    known = {tuple(row[name] for name in KEY): row for row in table.read()}
    keys = [
        (run, *key)
        for key in product(range(options.seeds), options.family, TEMPERATURES)
        if not (key[0] and key[1] in UNTRAINED)
    ]
    clock = patch.object(time, "perf_counter", time.process_time)
    try:
        with clock if options.clock == "processor" else nullcontext():
            experiment = None
            for key in keys:
                if key not in known:
                    experiment = experiment or Experiment(options, typed)
                    row = dict(zip(KEY, key, strict=True)) | experiment.measure(*key[1:])
                    facts = vars(describe_environment(experiment.target))
                    known[key] = row | {name: facts[name] for name in FACTS} | {"settings": own}
                    table.append([known[key]])
    except TimeoutError:
        print("Time is up; the same command goes on.")
    print(
        tabulate(
            "", COLUMNS, over_seeds([known[key] for key in keys if key in known])
        ).to_markdown()
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", required=True)
    parser.add_argument("--dataset", required=True, help="texts, or dialogues in JSON lines")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--rows", type=Path, required=True, help="JSON lines of all results")
    parser.add_argument("--family", nargs="+", choices=NAMES, default=[*NAMES])
    parser.add_argument("--minutes", type=float, default=2.0, help="of training, for each family")
    sizes = {"hold-out": 200, "num-words": 32, "num-prompts": 40, "max-new-tokens": 96, "seeds": 1}
    for name, size in sizes.items():  # held-out rows, words of a text that are its prompt
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--user-turn", type=int, default=-1, help="of a dialogue, to be answered")
    parser.add_argument("--compiled", action="store_true", help="compiled plain `generate` too")
    parser.add_argument("--dtype", default="auto", help="of the target and the drafters")
    parser.add_argument("--seconds", type=float, default=float("inf"))
    # processor time is for one thread on a busy machine
    parser.add_argument("--clock", choices=["wall", "processor"], default="wall")
    found, others = parser.parse_known_args()
    with sole_writer(found.work):
        main(found, others)
