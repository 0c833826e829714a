"""Compare ways to draft by tokens per second: docs/results/defaults.md.

OMP_NUM_THREADS=1 python examples/defaults.py --target coral-bench --drafter mixed \
    --prompts mixed/dialogues.jsonl --prompts mixed/stories.jsonl --rows defaults.jsonl \
    --mode default --mode "drawn tree_depth=4 tree_top_k=2 verification=traversal"

A mode is a name and the arguments of `generate` that it stands for, and `spreads` of
`decoding/plain/draft_policy.py`; with --tune there is one more, of a copy of the drafter after
`autotune`. All modes answer a batch in turn, with the same seeds, before the next one. Seconds are
those of the processor. A row, of one setting, is appended to ROWS as it ends, and the same command
goes on. Intervals are of ratios of tokens per second to the first mode, over the batches.
"""

import argparse
import time
from copy import deepcopy
from itertools import chain, product, zip_longest
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import yaml
from scipy.stats import bootstrap
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from coral_hf import autotune
from coral_hf.atomic import JsonLines
from coral_hf.decoding.plain import draft_policy
from coral_hf.measure import read_prompts
from coral_hf.measure.calls import Arguments, Batch, call_generate, sampling_arguments, seeded
from coral_hf.measure.padding import pad_target
from coral_hf.measure.prompts import encode, left_padded
from coral_hf.measure.report import Table, describe_environment

COUNTED = ("tokens", "rounds", "seconds")
SETTING = {"dtype": "dtype", "layers": "layers", "batch_size": "batch"}
SETTING |= {"temperature": "T", "top_p": "top-p"}
COLUMNS = "mode", "τ", "tokens/s", "of the first (95 %)"


def parse_mode(text: str) -> tuple[str, Arguments]:
    """Read "NAME keyword=value …"."""
    name, *given = text.split()
    return name, {key: yaml.safe_load(value) for key, value in (one.split("=") for one in given)}


def measure(
    target, modes: dict[str, Arguments], batches: list[Batch], samples: int
) -> dict[str, dict[str, list[float]]]:
    """Count tokens, rounds of a row and seconds of each mode, by batch."""
    found = {name: {one: [0.0] * len(batches) for one in COUNTED} for name in modes}
    for place, batch in enumerate(batches):
        for seed, (name, own) in product(range(samples), modes.items()):
            begin = time.perf_counter()
            patience = own.get("spreads", draft_policy.SPREADS)
            arguments = {name: value for name, value in own.items() if name != "spreads"}
            with (
                patch.object(draft_policy, "SPREADS", patience),
                seeded(place * samples + seed, target.device),
            ):
                call = call_generate(target, batch, arguments)
            of_mode = found[name]
            of_mode["seconds"][place] += time.perf_counter() - begin
            of_mode["tokens"][place] += call.num_tokens - call.num_rows
            of_mode["rounds"][place] += len(call.round_lengths)
    return found


def compare(row: dict[str, Any]) -> list[list[str]]:
    """Return a line of the table for each mode of a row."""
    first, lines = next(iter(row["modes"].values())), []
    for name, one in row["modes"].items():
        data = [np.array(part[key]) for part in (one, first) for key in ("tokens", "seconds")]

        def ratio(tokens, seconds, other_tokens, other_seconds, axis=-1):
            rate = tokens.sum(axis) / seconds.sum(axis)
            return rate / (other_tokens.sum(axis) / other_seconds.sum(axis))

        low, high = 1.0, 1.0
        if one is not first:
            drawn = bootstrap(data, ratio, paired=True, vectorized=True, rng=0, method="basic")
            low, high = drawn.confidence_interval
        tokens, rounds, seconds = (sum(one[key]) for key in COUNTED)
        spread = f"{ratio(*data):.2f} ({low:.2f} to {high:.2f})"
        settings = [str(row[key]).removesuffix(".0") for key in SETTING]
        lines.append([*settings, name, f"{tokens / rounds:.2f}", f"{tokens / seconds:.0f}", spread])
    return lines


def read_batches(options: argparse.Namespace, tokenizer) -> list[Batch]:
    """Take prompts of each file in turn, and put them together in batches."""
    share = options.num_prompts // len(options.prompts)
    files = [read_prompts(path, options.skip + share)[options.skip :] for path in options.prompts]
    mixed = [prompt for prompt in chain(*zip_longest(*files)) if prompt]
    ids = [encode(prompt, tokenizer)[0] for prompt in mixed]
    starts = range(0, len(ids), options.batch_size)
    return [left_padded(ids[start : start + options.batch_size], 0) for start in starts]


def tuned(options: argparse.Namespace, drafter, target, tokenizer):
    """Return a copy of a drafter after `autotune` on prompts behind those that are measured."""
    share = options.skip + options.num_prompts // len(options.prompts)
    prompts = [one for path in options.prompts for one in read_prompts(path, share + 10)[share:]]
    own = deepcopy(drafter)
    found = autotune(own, target, [encode(one, tokenizer) for one in prompts], None, options.tune)
    print(found)
    return own


def main(options: argparse.Namespace) -> None:
    tokenizer = AutoTokenizer.from_pretrained(options.target)
    target = AutoModelForCausalLM.from_pretrained(options.target, dtype=options.dtype).eval()
    if options.layers:
        target = pad_target(target, options.layers)
    drafter = AutoModel.from_pretrained(options.drafter, dtype=target.dtype).eval()
    batches = read_batches(options, tokenizer)
    always = {"assistant_model": drafter, "pad_token_id": 0}
    given = dict(map(parse_mode, options.mode))
    table = JsonLines(options.rows).mend()
    fixed = {
        "dtype": str(target.dtype).removeprefix("torch."),
        "layers": target.config.num_hidden_layers,
        "batch_size": options.batch_size,
    }
    for temperature, top_p in product(options.temperature, options.top_p):
        setting = fixed | {"temperature": temperature, "top_p": top_p if temperature else 1.0}
        if any(setting.items() <= row.items() for row in table.read()):
            continue
        every = sampling_arguments(temperature, options.max_new_tokens) | always
        if temperature:
            every["top_p"] = top_p
        modes = {name: every | own for name, own in given.items()}
        if options.tune:
            modes["tuned"] = every | {"assistant_model": tuned(options, drafter, target, tokenizer)}
        warm_up = {name: own | {"max_new_tokens": 8} for name, own in modes.items()}
        measure(target, warm_up, batches[:1], 1)
        found = measure(target, modes, batches, options.samples)
        environment = vars(describe_environment(target, drafter))
        table.append([setting | {"modes": found, "environment": environment}])
    lines = [line for row in table.read() for line in compare(row)]
    print(Table("", [*SETTING.values(), *COLUMNS], lines).to_markdown())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", required=True)
    parser.add_argument("--drafter", required=True)
    parser.add_argument("--prompts", action="append", required=True)
    parser.add_argument("--rows", type=Path, required=True, help="JSON lines")
    parser.add_argument("--mode", action="append", required=True, help="NAME keyword=value …")
    parser.add_argument("--num-prompts", type=int, default=100, help="of all files together")
    parser.add_argument("--skip", type=int, default=0, help="prompts of each file")
    parser.add_argument("--samples", type=int, default=5, help="of each prompt")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--layers", type=int, help="pad the target to so many")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--tune", type=float, default=0.0, help="seconds of `autotune`")
    parser.add_argument("--temperature", nargs="+", type=float, default=[0.3, 0.6, 0.8, 1.0, 1.2])
    parser.add_argument("--top-p", nargs="+", type=float, default=[1.0, 0.9])
    # other work on the machine hardly changes the time of the processor
    with patch.object(time, "perf_counter", time.process_time):
        main(parser.parse_args())
