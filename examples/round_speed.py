"""Time rounds of a drafter beside eager and compiled `generate`: tables of docs/results/speed.md.

python examples/round_speed.py --target coral-bench --drafter mixed --work rounds --seconds 170 \
    --prompts mixed/dialogues.jsonl --prompts mixed/stories.jsonl --rows docs/results/rounds.jsonl

Plain `generate` runs eagerly over its own cache, and compiled over a static one; drafting runs in
each of WAYS. All of them answer each batch in turn. A cell of the table is a set of prompts, a
depth of the target, a batch size and a temperature. There each way drafts with the one setting that
gave most tokens/s on prompts that are not measured. A finished row is appended to ROWS; what is
measured until then is kept in WORK. After SECONDS no new batch is begun, and the same command
resumes. `examples/train_mixed.py` makes the drafter and the prompts.
"""

import argparse
import time
from collections import Counter
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from pandas import DataFrame
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, AutoTokenizer, CompileConfig, PreTrainedModel

from coral_hf import CoralDrafter
from coral_hf.atomic import JsonLines
from coral_hf.measure.calls import (
    ROUND_STAGES,
    Arguments,
    Batch,
    Bench,
    Call,
    call_generate,
    sampling_arguments,
)
from coral_hf.measure.padding import pad_target
from coral_hf.measure.prompts import Prompt, encode, left_padded, read_prompts
from coral_hf.measure.report import describe_environment, tabulate

WAYS = ("growing", "static", "compiled")
# depth, top-k, nodes
TREES = [(4, 2, 8), (5, 4, 16), (6, 8, 32)]
SAMPLED = {
    "chosen": {"verification": "token", "drawn_tree": False},
    "drawn": {"verification": "token", "drawn_tree": True},
    "traversal": {"verification": "traversal"},
}
COMPILED_TREES = [(4, 1, 5), (4, 2, 8), (5, 4, 16)]
SAMPLED_TREES = [(4, 1, 5), (4, 2, 16)]
TASKS = {"dialogues": 64, "stories": 128, "repetitive stories": 128}  # new tokens of an answer
LEAST_TOKENS = 16  # of a dialogue's plain answer
MOST_REPEATS = 3  # of any four tokens in a row in a story's plain answer
CHOOSING = 2  # batches of prompts behind the measured ones, on which the setting is chosen
COMPILED = "plain compiled"
FACTS = ("hardware", "num_threads", "dtype", "versions", "target", "drafter_digest")
COLUMNS = {
    "prompts": "{0[task]}",
    "layers": "{0[num_layers]}",
    "batch": "{0[batch_size]}",
    "T": "{0[temperature]:g}",
    "way": "{0[way]}",
    "tree": "{0[setting]}",
    "nodes": "{0[nodes]:.0f}",
    "τ": "{0[tau]:.2f}",
    "tokens/s: eager, compiled, drafted": "{0[tokens_per_second][eager]:.0f},"
    " {0[tokens_per_second][compiled]:.0f}, {0[tokens_per_second][drafted]:.0f}",
    "over eager": "{0[speedup][eager]:.2f}×",
    "over compiled": "{0[speedup][compiled]:.2f}×",
    "e over eager, compiled": "{0[efficiency][eager]:.2f}, {0[efficiency][compiled]:.2f}",
    "whole call over eager (bound), compiled": "{0[whole_call][eager]:.2f}×"
    " ({0[whole_call_bound]:.2f}×), {0[whole_call][compiled]:.2f}×",
    "draft + verify + other, ms a round": " + ".join(
        f"{{0[round_ms][{stage}]:.1f}}" for stage in ROUND_STAGES
    ),
    "draft ÷ eager token": "{0[draft_per_token]:.2f}",
}


class Cell(NamedTuple):
    """What a row of the table is measured on."""

    task: str
    num_layers: int
    batch_size: int
    temperature: float


def ways_of(backend: str) -> dict[str, Arguments]:
    """Return how rounds run: arguments of `generate` beside the drafter's."""
    static = {"cache_implementation": "static"}
    compiled = static | {"compile_config": CompileConfig(backend=backend)}
    return dict(zip(WAYS, ({}, static, compiled), strict=True))


def compile_anywhere(backend: str) -> CompileConfig:
    """Make what has `generate` compile on a CPU too, which it does in benchmarks alone."""
    config = CompileConfig(backend=backend)
    config._compile_all_devices = True
    return config


def most_repeats(tokens: list[int]) -> int:
    """Count the most frequent four tokens in a row."""
    return max(Counter(zip(*(tokens[i:] for i in range(4)), strict=False)).values(), default=0)


def task_of(prompt: Prompt, answer: list[int]) -> str | None:
    """Name the set that a prompt belongs to by its plain answer, if any."""
    if "dialogues" in prompt.task:
        return "dialogues" if len(answer) >= LEAST_TOKENS else None
    return "stories" if most_repeats(answer) <= MOST_REPEATS else "repetitive stories"


def prompt_sets(target, tokenizer, options) -> dict[str, list[torch.Tensor]]:
    """Answer prompts greedily, each alone, until all sets are full: token ids, (length,) each."""
    answers = JsonLines(options.work / "plain_answers.jsonl")
    known = {(row["task"], row["id"], row["turns"]): row["tokens"] for row in answers.read()}
    size = options.num_prompts + CHOOSING * max(options.batch_size)
    found: dict[str, list[torch.Tensor]] = {task: [] for task in TASKS}
    for path in options.prompts:
        is_talk = "dialogues" in Path(path).stem
        kinds = [task for task in options.task if (task == "dialogues") == is_talk]
        for prompt in read_prompts(path):
            if all(len(found[kind]) >= size for kind in kinds):
                break
            ids = encode(prompt, tokenizer)[0]
            key = (prompt.task, prompt.id, len(prompt.messages))
            if key not in known:
                most = min(TASKS[kinds[0]], options.max_new_tokens)
                arguments = sampling_arguments(0.0, most)
                known[key] = call_generate(target, left_padded([ids], 0), arguments).tokens[0]
                row = dict(zip(("task", "id", "turns"), key, strict=True))
                answers.append([row | {"tokens": known[key]}])
            task = task_of(prompt, known[key])
            if task in kinds:
                found[task].append(ids)
    return found


def settings_of(temperature: float, way: str) -> dict[str, Arguments]:
    """Return the settings of drafting that are tried in a way, by name."""
    rules = SAMPLED if temperature else {"": {}}
    trees = SAMPLED_TREES if temperature else TREES
    if way == "compiled":
        trees = COMPILED_TREES  # each takes two graphs
    names = ("tree_depth", "tree_top_k", "tree_nodes")
    return {
        f"{rule} {tree[0]}, {tree[1]}, {tree[2]}".strip(): {
            **dict(zip(names, tree, strict=True)),
            **own,
        }
        for (rule, own), tree in product(rules.items(), trees)
    }


def counts(call: Call) -> dict[str, Any]:
    """Return what is pooled of a call; the first token of a row comes with the prefill."""
    return {
        "method": call.method,
        "decode_tokens": call.num_tokens - call.num_rows,
        "decode_seconds": call.round_seconds,
        "tokens": call.num_tokens,
        "seconds": call.seconds,
        "rounds": call.num_rounds,
        "row_rounds": len(call.round_lengths),
        "nodes": call.num_nodes,
        "rows": call.num_rows,
        "equal_rows": call.num_equal_rows,
        **call.stage_seconds,
    }


def num_graphs() -> int:
    return counters["stats"]["unique_graphs"]


class Bed(NamedTuple):
    """A target of some depth and the batches of a set, on which the baseline is compiled once."""

    target: PreTrainedModel
    measured: list[Batch]
    choosing: list[Batch]
    max_new_tokens: int
    calls: JsonLines
    end: float  # of the time that the process has

    def run(self, cell: Cell, phase: str, methods: dict[str, Arguments]) -> DataFrame:
        """Measure what is left of a phase of a cell, and sum up all of it by method.

        Raises:
            TimeoutError: if time ran out before the last batch.
        """
        batches = self.choosing if phase.startswith("choosing") else self.measured
        key = [*cell, phase]
        done = [row["calls"] for row in self.calls.read() if row["key"] == key]
        if len(done) < len(batches):
            # the longest prompt first: the static cache of plain `generate` keeps its length; the
            # shortest for the other capacity that rounds may have
            by_length = sorted(batches, key=lambda one: one["input_ids"].shape[1])
            is_compiled = any(
                "compile_config" in own for name, own in methods.items() if name != COMPILED
            )
            bench = Bench(self.target, methods, warmup=2 if is_compiled else 1)
            bench.warm_up([by_length[-1], by_length[0]])
            graphs = num_graphs()
            assert graphs or COMPILED not in methods, "nothing was compiled"
            for item in range(len(done), len(batches)):
                if time.monotonic() > self.end:
                    raise TimeoutError
                done.append([counts(call) for call in bench.compare(batches[item], item)])
                assert num_graphs() == graphs, "a graph was compiled while it was timed"
                self.calls.append([{"key": key, "item": item, "calls": done[-1]}])
        return DataFrame(sum(done, [])).groupby("method").sum()

    def measure(self, cell: Cell, ways: dict[str, Arguments], drafter, backend) -> list[dict]:
        """Choose a setting for each way, measure all ways beside the baselines; a row for each."""
        common = sampling_arguments(cell.temperature, self.max_new_tokens) | {"pad_token_id": 0}
        drafting = {"assistant_model": drafter, "speculation": "always"}
        chosen: dict[str, str] = {}
        drafted: dict[str, Arguments] = {}
        for way, how in ways.items():
            own = {
                name: common | drafting | setting | how
                for name, setting in settings_of(cell.temperature, way).items()
            }
            tried = self.run(cell, f"choosing {way}", {"plain": common} | own).drop("plain")
            chosen[way] = (tried["decode_tokens"] / tried["decode_seconds"]).idxmax()
            drafted[way] = own[chosen[way]]
        static = {"cache_implementation": "static", "compile_config": compile_anywhere(backend)}
        methods = {"plain": common, COMPILED: common | static} | drafted
        pooled = self.run(cell, f"measuring {', '.join(ways)}", methods)
        return [make_row(cell, way, chosen[way], pooled) for way in ways]


def make_row(cell: Cell, way: str, setting: str, pooled: DataFrame) -> dict[str, Any]:
    """Compute a row of the table from sums over all calls of each method."""
    own, eager = pooled.loc[way], pooled.loc["plain"]
    speed = pooled["decode_tokens"] / pooled["decode_seconds"]
    tau = own["decode_tokens"] / own["row_rounds"]
    token = eager["decode_seconds"] / eager["rounds"]
    prefill = eager["prefill"] / eager["seconds"]
    whole = pooled["seconds"] / pooled["tokens"]
    over = {"eager": speed["plain"], "compiled": speed[COMPILED]}
    return {
        **cell._asdict(),
        "way": way,
        "setting": setting,
        "num_rows": int(own["rows"]),
        "num_tokens": int(own["tokens"]),
        "tau": tau,
        "nodes": own["nodes"] / own["rounds"],
        "tokens_per_second": {**over, "drafted": speed[way]},
        "speedup": {name: speed[way] / value for name, value in over.items()},
        "efficiency": {name: speed[way] / value / tau for name, value in over.items()},
        "whole_call": {
            "eager": whole["plain"] / whole[way],
            "compiled": whole[COMPILED] / whole[way],
        },
        # were a round as cheap as a plain token
        "whole_call_bound": 1 / (prefill + (1 - prefill) / tau),
        "eager_token_ms": 1000 * token,
        "round_ms": {stage: 1000 * own[stage] / own["rounds"] for stage in ROUND_STAGES},
        "draft_per_token": own["draft"] / own["rounds"] / token,
        "equal_rows": None if cell.temperature else int(own["equal_rows"]),
    }


def measure_all(options: argparse.Namespace, table: JsonLines, end: float) -> None:
    """Measure the cells that have no row yet, those of one bed together.

    Raises:
        TimeoutError: if time ran out before the last cell.
    """
    tokenizer = AutoTokenizer.from_pretrained(options.target)
    base = AutoModelForCausalLM.from_pretrained(options.target, dtype=torch.bfloat16).eval()
    drafter = CoralDrafter.from_pretrained(options.drafter, dtype=torch.bfloat16).eval()
    sets = prompt_sets(base, tokenizer, options)
    calls = JsonLines(options.work / "calls.jsonl").mend()
    known = {(*(row[name] for name in Cell._fields), row["way"]) for row in table.read()}
    for task, layers, size in product(options.task, options.layers, options.batch_size):
        cells = [Cell(task, layers, size, temperature) for temperature in options.temperature]
        ways = ways_of(options.backend)
        left = {
            cell: {way: ways[way] for way in options.way if (*cell, way) not in known}
            for cell in cells
        }
        if not any(left.values()):
            continue
        torch._dynamo.reset()  # graphs of another bed, whose number is limited
        counters.clear()
        chosen, behind = sets[task][: options.num_prompts], sets[task][options.num_prompts :]
        measured, choosing = (
            [left_padded(part[at : at + size], 0) for at in range(0, len(part) - size + 1, size)]
            for part in (chosen, behind[: CHOOSING * size])
        )
        if not measured or not choosing:
            raise ValueError(f"{len(chosen + behind)} of `--prompts` are {task}; give more.")
        most = min(TASKS[task], options.max_new_tokens)
        bed = Bed(pad_target(base, layers), measured, choosing, most, calls, end)
        for cell, own in left.items():
            for row in bed.measure(cell, own, drafter, options.backend) if own else ():
                facts = vars(describe_environment(bed.target, drafter))
                facts = {name: facts[name] for name in FACTS} | {"clock": options.clock}
                table.append([row | facts])


def main(options: argparse.Namespace) -> None:
    options.work.mkdir(parents=True, exist_ok=True)
    table = JsonLines(options.rows).mend()
    clock = patch.object(time, "perf_counter", time.process_time)
    try:
        with clock if options.clock == "processor" else nullcontext():
            measure_all(options, table, time.monotonic() + options.seconds)
    except TimeoutError:
        print("Time is up; the same command goes on.")
    print(tabulate("", COLUMNS, table.read()).to_markdown())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", required=True)
    parser.add_argument("--drafter", required=True)
    parser.add_argument("--prompts", action="append", required=True, help="the files it came with")
    parser.add_argument("--rows", type=Path, required=True, help="JSON lines, a finished row each")
    parser.add_argument("--work", type=Path, required=True, help="folder of unfinished rows")
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument(
        "--clock",
        choices=["wall", "processor"],
        default="wall",
        help="processor time is for one thread on a busy machine",
    )
    parser.add_argument("--num-prompts", type=int, default=40, help="of each set")
    parser.add_argument("--max-new-tokens", type=int, default=max(TASKS.values()))
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    several = {"task": TASKS, "way": WAYS, "layers": (8, 32), "batch-size": (1, 8)}
    for name, values in {**several, "temperature": (0.0, 1.0)}.items():
        first, *_ = values
        choices = list(values) if isinstance(first, str) else None
        parser.add_argument(
            f"--{name}", nargs="+", type=type(first), choices=choices, default=[*values]
        )
    main(parser.parse_args())
