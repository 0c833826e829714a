"""Planned against measured: memory, disk and seconds of short training runs.

    python examples/plan_accuracy.py --case stories260k stories.txt --case coral-bench chats.jsonl

A case is a target and its dataset, on a CPU. Measured memory is the peak of all allocations that
torch's profiler sees, and the target's weights, which are there before; with `--resident` also what
a process of its own grew by without the profiler, the target's weights left out. With `--seconds`
each run is made once more, planned with a few timed steps.
"""

import argparse
import gc
import json
import re
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path

import transformers
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from coral_hf import CoralDrafter, CoralTrainer, CoralTrainingArguments, plan
from coral_hf.training.data import load_conversations, pack_dataset, prepare_dataset
from coral_hf.training.features import CachedFeatures, write_features
from coral_hf.training.planning import PlanSettings


def resident(name: str) -> int:
    """Bytes of this process now (VmRSS) or at most (VmHWM), on Linux."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{name}:\s*(\d+) kB", status)[1]) * 1024


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def peak_bytes(profiler: profile) -> int:
    """The most bytes that were allocated while a profile was made."""
    live = peak = 0
    events = profiler.profiler.kineto_results.events()
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


def measure(options: argparse.Namespace, case: list[str], only: list[str]) -> dict:
    """Plan and run one case; `only`: its recipe, where features are from, what is measured."""
    (name, dataset), (recipe, source, what) = case, only
    tokenizer = AutoTokenizer.from_pretrained(name)
    rows = load_conversations(dataset)
    rows = rows.select(range(min(options.rows, len(rows))))
    with tempfile.TemporaryDirectory() as folder:
        args = CoralTrainingArguments(
            str(Path(folder, "run")),
            recipe=recipe,
            max_length=options.max_length,
            per_device_train_batch_size=4,
            num_train_epochs=1,
            packing=options.packing,
            bf16=options.bf16,
            save_strategy="epoch",
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        target = AutoModelForCausalLM.from_pretrained(name, dtype="auto")
        weights = target.get_memory_footprint()
        if source == "cached":
            prepared = prepare_dataset(rows, tokenizer, options.max_length)
            prepared = pack_dataset(prepared, options.max_length) if options.packing else prepared
            write_features(target, prepared, Path(folder, "features"))
            rows = CachedFeatures(Path(folder, "features"))
        timed = PlanSettings(measure=what == "seconds")
        planned = plan(name, rows, args, timed, tokenizer)
        found = {"planned": planned.memory.total, "planned_disk": planned.stages[0].disk}
        set_seed(0)
        gc.collect()  # what is released during the run was not allocated in it

        def train() -> None:
            drafter = CoralDrafter.from_target(target).float()
            CoralTrainer(drafter, target, args, tokenizer, train_dataset=rows).train()

        if what == "allocated":
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
                train()
            found["allocated"] = weights + peak_bytes(profiler)
        elif what == "seconds":
            start = time.perf_counter()
            train()
            seconds = time.perf_counter() - start
            return {"planned_seconds": planned.hours * 3600, "seconds": seconds}
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
            before = resident("VmRSS")
            train()
            found["resident"] = resident("VmHWM") - before
        found["disk"] = folder_bytes(Path(folder, "run"))
        return found


def run(words: list[str], case: list[str], recipe: str, source: str, what: str) -> dict:
    command = [sys.executable, __file__, *words, "--case", *case, "--only", recipe, source, what]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(output.splitlines()[-1])


def main(options: argparse.Namespace) -> None:
    """Measure every case, or print the numbers of one."""
    if options.only is not None:
        print(json.dumps(measure(options, options.case[0], options.only)))
        return
    print(f"transformers {transformers.__version__}; MB")
    names = ["target", "recipe", "features", "memory planned", "allocated", "ratio"]
    names += ["disk planned", "written"] + ["process grew by"] * options.resident
    names += ["seconds planned", "the run took"] * options.seconds
    print(f"| {' | '.join(names)} |\n|---|---|---|{'---:|' * (len(names) - 3)}", flush=True)
    words = ["--rows", str(options.rows), "--max-length", str(options.max_length)]
    words += ["--packing"] * options.packing + ["--bf16"] * options.bf16
    for case, recipe, source in product(options.case, options.recipe, ("online", "cached")):
        found = measure(options, case, [recipe, source, "allocated"])
        planned, allocated = found["planned"], found["allocated"]
        sizes = [planned, allocated, found["planned_disk"], found["disk"]]
        if options.resident:
            sizes.append(run(words, case, recipe, source, "resident")["resident"])
        shown = [f"{size / 1e6:.3g}" for size in sizes]
        shown.insert(2, f"{planned / allocated:.3f}")
        if options.seconds:
            timed = measure(options, case, [recipe, source, "seconds"])
            shown += [f"{timed['planned_seconds']:.3g}", f"{timed['seconds']:.3g}"]
        print(f"| {Path(case[0]).name} | {recipe} | {source} | {' | '.join(shown)} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Planned against measured training runs.")
    parser.add_argument("--case", nargs=2, action="append", required=True)
    parser.add_argument("--recipe", action="append", help="eagle and coral by default")
    parser.add_argument("--rows", type=int, default=24)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--packing", action="store_true")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--resident", action="store_true", help="measure processes of their own")
    parser.add_argument("--seconds", action="store_true", help="time the runs, too")
    parser.add_argument("--only", nargs=3)
    chosen = parser.parse_args()
    chosen.recipe = chosen.recipe or ["eagle", "coral"]
    main(chosen)
