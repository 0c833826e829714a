"""Compare the recipes of EAGLE, HASS and CORAL: the tables of docs/results/recipes.md.

OMP_NUM_THREADS=1 python examples/recipes.py --target stories260k \
    --dataset tinystories_v2_head.txt --rows docs/results/recipes.jsonl --seconds 3300

Each recipe, as it is shipped, trains a fresh drafter with each seed, on the same rows, for as many
steps; with --minutes, for as many as fit into so much processor time, by the pace of a few. While
it learns and at its end it answers held-out beginnings, which no row of the training has, greedily.
A finished run is appended to ROWS; the recipes of one seed come before the next seed. After SECONDS
no further run is begun, and the same command goes on; a run that was interrupted goes on from its
last checkpoint, beside ROWS. KEEP is a folder for the trained drafters. --trial
'hass single_step_share=0.3' is compared in place of the recipes, several in turn. All other options
are those of training arguments.
"""

import argparse
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import combinations, product
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import torch
from scipy.stats import t as student
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    TrainerCallback,
    TrainerState,
    set_seed,
)
from transformers.trainer import TRAINER_STATE_NAME

from coral_hf.atomic import JsonLines
from coral_hf.identity import digest
from coral_hf.measure.calls import decoded_rounds
from coral_hf.measure.report import (
    COLOURS,
    Line,
    Table,
    describe_environment,
    line_figure,
    save_figure,
)
from coral_hf.measure.settings import ComparisonSettings
from coral_hf.target import read_target
from coral_hf.training import CoralTrainingArguments, parse_arguments
from coral_hf.training.comparison.trials import Comparison, Trial
from coral_hf.training.data import load_conversations, prepare_dataset
from coral_hf.training.evaluation.acceptance import acceptance_by_depth, count_rounds, prompt_of
from coral_hf.training.planning.run import PARTS, seconds_of, steps_in
from coral_hf.training.runs.checkpoints import last_checkpoint

RECIPES = ("eagle", "hass", "coral")
OPTIONS = (
    "--per_device_train_batch_size 4 --learning_rate 3e-3 --warmup_steps 30"
    " --lr_scheduler_type cosine --adam_beta2 0.95 --max_length 128"
)
TREE = {"tree_depth": 6, "tree_top_k": 8, "tree_nodes": 32}
MEASURED = (1 / 8, 1 / 4, 1 / 2, 3 / 4, 1)  # of the steps
AT_ONCE = 20  # prompts that are answered together
CONVERGED = 0.1  # tokens that τ still gains in the last quarter, at most
LEVEL, POWER = 0.05, 0.8
FACTS = ("hardware", "num_threads", "dtype", "versions", "target")
PACES, PACED = 3, 20  # runs of each part, and their steps, that tell how many fit the minutes
ELSEWHERE = ("rows", "seconds", "seeds", "plot", "trial", "keep")  # what no run depends on
Row = dict[str, Any]


def clocks() -> torch.Tensor:
    """Read the clock and the processor time, in seconds."""
    return torch.tensor([time.perf_counter(), time.process_time()], dtype=torch.float64)


class Clock(TrainerCallback):
    """Counts the time of a run. The log of its checkpoints keeps it, so that a run may go on."""

    begin = torch.zeros(2)  # by the clocks

    @property
    def spent(self) -> list[float]:
        """Seconds of the clock and of the processor."""
        return (clocks() - self.begin).tolist()

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """See [`~transformers.TrainerCallback`]."""
        before = logged(state, "spent")
        self.begin = clocks() - torch.tensor(before[-1] if before else 0.0)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """See [`~transformers.TrainerCallback`]."""
        if state.global_step % args.save_steps == 0 or state.global_step == state.max_steps:
            state.log_history.append({"spent": self.spent})


class Watch(Clock):
    """Lets a drafter answer the prompts after some of its steps; its answers are not counted.

    Args:
        answer: gives the tokens of each round.
        steps: of the whole run.
    """

    def __init__(self, answer: Callable[[Any], list[int]], steps: int):
        self.answer = answer
        self.steps = {max(1, round(share * steps)) for share in MEASURED}

    def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
        """See [`~transformers.TrainerCallback`]."""
        if state.global_step in self.steps:
            begin = clocks()
            rounds = self.answer(model.eval())
            model.train()
            read = {"steps": state.global_step, "trained_on": int(state.num_input_tokens_seen)}
            counts = count_rounds(rounds, TREE["tree_depth"])
            found = {**read, "tau": mean(rounds), "rounds": counts.tolist()}
            state.log_history.append({"found": found})
            self.begin += clocks() - begin
        super().on_step_end(args, state, control)


def logged(state: TrainerState, name: str) -> list[Any]:
    """Return what the log has of a name, the last at the end."""
    return [entry[name] for entry in state.log_history if name in entry]


class Experiment:
    """One target, the rows that its drafters are trained on, and the prompts that they answer."""

    def __init__(self, options: argparse.Namespace, typed: Sequence[str]):
        self.options = options
        tokenizer = AutoTokenizer.from_pretrained(options.target)
        dtype = "auto" if "--bf16" in typed else torch.float32  # bf16 is slow where it is emulated
        target = AutoModelForCausalLM.from_pretrained(options.target, dtype=dtype).eval()
        device = f"--use_cpu={not torch.cuda.is_available()}"
        rows = load_conversations(options.dataset)
        split = len(rows) - options.hold_out
        trained = rows.select(range(split))
        settings = [*OPTIONS.split(), device, *typed]
        settings = ComparisonSettings(output=options.rows.parent, options=settings, **TREE)
        self.runs = Comparison(target, tokenizer, trained, [], settings)
        # whole, so that each begins where its text begins
        held_out = prepare_dataset(rows.select(range(split, len(rows))), tokenizer, sys.maxsize)
        found = unseen(self.runs.dataset, held_out, options.prompt_length)
        self.prompts = sorted(found[: options.prompts], key=len)

    def answer(self, drafter: Any) -> list[int]:
        """Return the tokens of each round of greedy answers to all prompts."""
        target, sizes = read_target(self.runs.target), (self.options.max_new_tokens, 0.0, AT_ONCE)
        return decoded_rounds(drafter, target, self.prompts, *sizes)

    def train(
        self,
        recipe: str,
        seed: int,
        steps: int,
        clock: Clock,
        folder: Path | None = None,
        **own: Any,
    ) -> TrainerState:
        """Train a fresh drafter, or go on from the last checkpoint in a folder."""
        trial = Trial.parse(recipe)
        set_seed(seed)  # before the weights are drawn
        drafter = self.runs.fresh(trial).float()
        drafter.generation_config.update(**TREE)
        lengths = {"max_steps": steps, "logging_steps": max(steps // 10, 1)}
        lengths["save_steps"] = max(steps // 10, 1)
        own |= {"seed": seed, **lengths}
        return self.runs.train(drafter, trial.options, [clock], folder, **own)

    def arguments(self, recipe: str) -> CoralTrainingArguments:
        """Return the settings of a trial."""
        options = [*self.runs.settings.options, *Trial.parse(recipe).options]
        return parse_arguments(self.options.rows.parent, options)

    def length(self, recipe: str, before: Sequence[Row]) -> int:
        """Return the steps of a run: those of the one before it, or as many as fit its minutes.

        The pace of the first trial tells how many it has, and that of another in turn with it how
        many that has in the same time, whatever the speed of the machine then.
        """
        if self.options.minutes is None:
            return self.options.steps
        known = {row["recipe"]: row["steps"] for row in reversed(before)}
        if recipe in known:
            return known[recipe]
        first = (self.options.trial or RECIPES)[0]
        spent = {name: [0.0] * len(PARTS) for name in (first, recipe)}  # by part
        for _ in range(PACES):
            for name, (part, own) in product(spent, enumerate(PARTS)):
                state = self.train(name, 0, PACED, Clock(), **own)
                spent[name][part] += logged(state, "spent")[-1][1] / (PACES * PACED)
        seconds = 60 * self.options.minutes
        if first in known:
            seconds = seconds_of(known[first], self.arguments(first), *spent[first])
        return steps_in(seconds, self.arguments(recipe), *spent[recipe])

    def run(self, recipe: str, seed: int, before: Sequence[Row], folder: Path) -> Row:
        """Train a fresh drafter and return what is known of it; the folder has its checkpoints."""
        last = last_checkpoint(folder, resume=True)
        if last:
            steps = TrainerState.load_from_json(Path(last, TRAINER_STATE_NAME)).max_steps
        else:
            steps = self.length(recipe, before)
        state = self.train(recipe, seed, steps, Watch(self.answer, steps), folder)
        *earlier, found = logged(state, "found")
        seconds, processor = logged(state, "spent")[-1]
        names = sorted({name for entry in state.log_history for name in entry})
        counts = torch.tensor(found["rounds"])
        environment = vars(describe_environment(self.runs.target))
        return {
            "recipe": recipe,
            "seed": seed,
            "minutes": seconds / 60,
            "processor_minutes": processor / 60,
            **found,
            "acceptance": [*acceptance_by_depth(counts).values()],
            "similarity": [logged(state, name)[-1] for name in names if "feature_sim" in name],
            "prompts": len(self.prompts),
            "tokens": int(counts @ torch.arange(len(counts))),
            "before": earlier,
            **{name: environment[name] for name in FACTS},
        }


def unseen(trained: Iterable[Row], held_out: Iterable[Row], length: int) -> list[list[int]]:
    """Return the different beginnings of held-out rows that no training row begins with."""
    known = {tuple(prompt_of(row, length)) for row in trained}
    found = {tuple(prompt_of(row, length)): len(row["input_ids"]) for row in held_out}
    return [[*ids] for ids, whole in found.items() if len(ids) < whole and ids not in known]


class Difference(NamedTuple):
    """A mean difference of pairs with its confidence interval."""

    pairs: int
    mean: float
    half: float  # of the width of the interval
    p: float  # of a paired t-test
    smallest: float  # true difference that would have been found in POWER of the cases


def difference(first: Sequence[float], second: Sequence[float], pairs: int = 3) -> Difference:
    """Compare values pair by pair, of two pairs or more.

    The smallest difference is that of the strictest of Holm's levels for so many comparisons.
    """
    gaps = [a - b for a, b in zip(first, second, strict=True)]
    number, freedom = len(gaps), len(gaps) - 1
    error = stdev(gaps) / math.sqrt(number)
    p = 2 * student.sf(abs(mean(gaps)) / error, freedom) if error else float(not any(gaps))
    strictest = student.ppf(1 - LEVEL / pairs / 2, freedom) + student.ppf(POWER, freedom)
    half = student.ppf(1 - LEVEL / 2, freedom) * error
    return Difference(number, mean(gaps), float(half), float(p), float(strictest * error))


def holm(values: Sequence[float]) -> list[float]:
    """Adjust p-values for their number (Holm 1979)."""
    adjusted, largest = [1.0] * len(values), 0.0
    for rank, index in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        largest = max(largest, min(1.0, (len(values) - rank) * values[index]))
        adjusted[index] = largest
    return adjusted


def pair_table(rows: Sequence[Row]) -> Table:
    """Compare the recipes pair by pair, over the seeds that both have."""
    tau = {(row["recipe"], row["seed"]): row["tau"] for row in rows}
    seeds = sorted({seed for _, seed in tau})
    found = dict[tuple[str, str], Difference]()
    pairs = [*combinations([name for name, _ in reversed(by_recipe(rows))], 2)]
    for one, other in pairs:
        both = [seed for seed in seeds if (one, seed) in tau and (other, seed) in tau]
        if len(both) > 1:
            sides = ([tau[name, seed] for seed in both] for name in (one, other))
            found[one, other] = difference(*sides, len(pairs))
    adjusted = holm([each.p for each in found.values()])
    cells = [
        [
            f"{one} − {other}",
            str(each.pairs),
            f"{each.mean:+.3f}",
            f"{each.mean - each.half:+.3f} to {each.mean + each.half:+.3f}",
            f"{p:.3g}",
            f"{each.smallest:.3f}",
        ]
        for ((one, other), each), p in zip(found.items(), adjusted, strict=True)
    ]
    header = ["pair", "seeds", "difference of τ", "95 % interval", "p (Holm)", "could be seen"]
    return Table("", header, cells)


def recipe_table(rows: Sequence[Row]) -> Table:
    """Tabulate what the drafters of each recipe reached."""
    is_counted = all("processor_minutes" in row for row in rows)
    clock, cells = "processor_minutes" if is_counted else "minutes", []
    for recipe, own in by_recipe(rows):
        taus = [row["tau"] for row in own]
        gain = mean(row["tau"] - row["before"][-1]["tau"] for row in own)
        spread = f" ± {stdev(taus):.3f}" if len(own) > 1 else ""
        similarity = [f"{value:.3f}" for value in averages(row["similarity"] for row in own)]
        acceptance = [f"{share:.1%}" for share in averages(row["acceptance"] for row in own)]
        seeds, spent = str(len(own)), f"{mean(row[clock] for row in own):.1f}"
        if is_counted:
            spent += f", {own[0]['steps']}"
        last = f"{gain:+.3f}, {'' if gain < CONVERGED else 'not '}converged"
        line = [seeds, f"{mean(taus):.3f}{spread}", last, spent]
        cells.append([recipe, *line, ", ".join(acceptance), ", ".join(similarity) or "–"])
    header = ["recipe", "seeds", "τ", "last quarter"]
    header += ["processor minutes, steps" if is_counted else "minutes"]
    header += ["accepted at depth 1, 2, …, of rounds that reach it", "cosine of steps 2, 3 to 1"]
    return Table("", header, cells)


def token_table(rows: Sequence[Row]) -> Table:
    """Tabulate the mean τ of each recipe by the tokens that were read."""
    found = [curve(own) for _, own in by_recipe(rows)]
    cells = [
        [f"{tokens[0]:,.0f}", *(f"{value:.3f}" for value in values)]
        for tokens, values in ([*zip(*line, strict=True)] for line in zip(*found, strict=True))
    ]
    return Table("", ["tokens read", *(recipe for recipe, _ in by_recipe(rows))], cells)


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw τ over the tokens that were read: a line for each recipe, a dot for each run."""
    lines = list[Line]()
    for colour, (recipe, own) in zip(COLOURS, by_recipe(rows), strict=False):
        lines.append(Line(recipe, *zip(*curve(own), strict=True), "-", colour))
        lines += (Line("", *zip(*curve([row]), strict=True), ".", colour) for row in own)
    labels = {"xlabel": "tokens read in training", "ylabel": "τ, tokens per target pass"}
    save_figure(line_figure(lines, **labels), path)


def by_recipe(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """Group rows by recipe, the shipped ones first."""
    groups = {name: list[Row]() for name in RECIPES}
    for row in rows:
        groups.setdefault(row["recipe"], []).append(row)
    return [(name, own) for name, own in groups.items() if own]


def curve(rows: Sequence[Row]) -> list[tuple[float, float]]:
    """Average the tokens that were read, and τ then, over runs."""
    runs = [[*row["before"], row] for row in rows]
    points = ([(each["trained_on"], each["tau"]) for each in run] for run in runs)
    return [(mean(x for x, _ in one), mean(y for _, y in one)) for one in zip(*points, strict=True)]


def averages(lists: Iterable[Sequence[float]]) -> list[float]:
    """Average over runs, place by place, as far as all of them go."""
    return [mean(values) for values in zip(*lists, strict=False)]


def main(options: argparse.Namespace, typed: Sequence[str]) -> None:
    end = time.monotonic() + options.seconds
    own = {name: value for name, value in vars(options).items() if name not in ELSEWHERE}
    if options.minutes is None:
        del own["minutes"]
    own |= {name: Path(own[name]).name for name in ("target", "dataset")}
    own |= {"typed": typed, "options": OPTIONS, "tree": TREE}
    table, run, experiment = JsonLines(options.rows), digest(own)[:12], None
    table.mend()
    rows = [row for row in table.read() if row["run"] == run]
    done = {(row["seed"], row["recipe"]) for row in rows}
    runs = [(seed, name) for seed in range(options.seeds) for name in options.trial or RECIPES]
    for seed, recipe in [one for one in runs if one not in done]:
        if time.monotonic() >= end:
            print("Time is up; the same command goes on.")
            break
        experiment = experiment or Experiment(options, typed)
        folder = options.rows.parent / "unfinished" / digest([run, recipe, seed])[:12]
        found = experiment.run(recipe, seed, rows, folder)
        rows.append({"run": run, **found, "settings": own})
        table.append(rows[-1:])
        if options.keep:
            kept = options.keep / f"{recipe}-{seed}".replace(" ", "-")
            shutil.copytree(last_checkpoint(folder, resume=True), kept)
        shutil.rmtree(folder)
        print(f"{recipe}, seed {seed}: τ {found['tau']:.3f}", flush=True)
    tables = [pair_table(rows), recipe_table(rows)]
    if options.minutes is None:  # else each recipe has read another number of tokens
        tables.append(token_table(rows))
    for made in tables:
        print(f"\n{made.to_markdown()}")
    if options.plot:
        draw(rows, options.plot)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", required=True)
    parser.add_argument("--dataset", required=True, help="texts, or dialogues in JSON lines")
    parser.add_argument("--rows", type=Path, required=True, help="JSON lines of all results")
    sizes = {"seeds": 5, "steps": 1600, "hold-out": 200, "prompts": 40}
    sizes |= {"prompt-length": 28, "max-new-tokens": 100}  # of a text, together 128
    for name, size in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--minutes", type=float, help="of processor time, in place of --steps")
    parser.add_argument("--trial", action="append", help="a recipe and settings")
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--keep", type=Path, help="folder for the trained drafters")
    parser.add_argument("--plot", type=Path, help="PNG file of τ by tokens")
    main(*parser.parse_known_args())
