"""The command that makes a paper's table from a recipe file.

In: a YAML file such as `recipes/coral.yaml`. Out: a folder of each drafter, a report of each cell,
`table.md`; what is there is not made again.
"""

import json
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from ..measure.settings import BenchmarkSettings, option
from .measure import BenchmarkOptions, benchmark
from .train import TrainOptions, train

SHIPPED = Path(__file__).parent / "recipes"
NOT_RUN = ["not run"] * 2


@dataclass(kw_only=True)
class ReproduceOptions:
    """The recipe, and where its results go."""

    recipe: str = option("A recipe file, or one that is shipped: coral.", positional=True)
    output: Path = option("Folder of drafters, reports and table; resumed if it has some.")


def reproduce(own: ReproduceOptions, training_options: list[str]) -> None:
    """Train a paper's drafters, measure them on its benchmarks, and print its table.

    Every other option is one of CoralTrainingArguments, in place of the recipe's. Run again, it
    goes on where it was interrupted. On several GPUs, where one of them measures:
    accelerate launch -m coral_hf.cli reproduce coral --output FOLDER
    """
    from accelerate import PartialState

    from ..atomic import keep_settings, write_text

    shipped = SHIPPED / f"{own.recipe}.yaml"
    path = shipped if shipped.is_file() else Path(own.recipe)
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    own.output.mkdir(parents=True, exist_ok=True)
    settings = recipe | {"options": training_options}
    keep_settings(own.output / "settings.json", settings, own.output)
    # before anything is trained
    sources = recipe["benchmarks"].items()
    files = {name: prompt_file(source, own.output, name) for name, source in sources}
    models: dict[str, Any] = {name: recipe[name] for name in ("target", "dtype")}
    for name, drafter in recipe["drafters"].items():
        fields = recipe["train"] | drafter
        known = {one: fields.pop(one) for one in ("stage", "router_epochs") if one in fields}
        known |= models | recipe["data"] | {"output": own.output / name, "resume": True}
        if not (own.output / name / "config.json").is_file():
            words = [f"--{field}={value}" for field, value in fields.items()]
            train(TrainOptions(**known), words + training_options)
    if not PartialState().is_main_process:
        return
    for method, name, temperature in product(recipe["methods"], files, recipe["temperatures"]):
        file, fields = cell(own.output, method, name, temperature), {**recipe["methods"][method]}
        if not file.is_file():
            drafter = str(own.output / fields.pop("drafter"))
            part: dict[str, Any] = {"prompts": [files[name]], "output": file.parent}
            options = BenchmarkOptions(drafter=drafter, limit=recipe.get("limit"), **models, **part)
            fields |= recipe["measure"] | {"temperature": temperature}
            benchmark(options, BenchmarkSettings(**fields))
            write_text(own.output / "table.md", table(own.output, recipe))
    print(table(own.output, recipe))


def prompt_file(source: str, output: Path, name: str) -> Path:
    """Return a checked file of prompts, of a URL a copy."""
    from ..atomic import new_file
    from ..measure import read_prompts
    from ..training.data import load_conversations

    path = Path(source)
    if "://" in source:
        path = output / "prompts" / f"{name}.jsonl"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            with new_file(path) as aside:
                load_conversations(source).to_json(aside)
    read_prompts(path)
    return path


def cell(output: Path, method: str, benchmark: str, temperature: float) -> Path:
    """Return the file of the report of a cell."""
    return output / "results" / f"{method}, {benchmark}, T={temperature:g}" / "report.json"


def table(output: Path, recipe: dict[str, Any]) -> str:
    """Make the table of a paper from the reports that there are."""
    from ..measure.report import Table, dashed
    from ..measure.summary import OVERALL

    lines, notes, place = list[list[str]](), dict[str, str](), ""
    for temperature, method in product(recipe["temperatures"], recipe["methods"]):
        pairs: list[Any] = []
        for name in recipe["benchmarks"]:
            file = cell(output, method, name, temperature)
            text = file.read_text(encoding="utf-8") if file.is_file() else '{"rows": []}'
            report = json.loads(text)
            rows = {(row["task"], row["method"]): row for row in report["rows"]}
            row = rows.get((OVERALL, "coral"))
            pairs.append(row and (row["speedup"], row["tau_per_token"]))
            if row:
                notes[name] = f"{name}: {row['num_items']} answers, {row['num_tokens']} tokens"
                place = f"; on {report['environment']['hardware']}, {recipe['dtype']}.\n"
        pairs.append([fmean(one) for one in zip(*pairs, strict=True)] if all(pairs) else None)
        cells = [dashed("{:.2f}x|{:.2f}", *one).split("|") if one else NOT_RUN for one in pairs]
        lines.append([f"{temperature:g}", method, *sum(cells, [])])
    header = ["T", "method", *sum(([name, "τ"] for name in (*recipe["benchmarks"], "mean")), [])]
    title = f"{recipe['title']}, {recipe['target']}"
    return Table(title, header, lines, "; ".join(notes.values()) + place).to_markdown()
