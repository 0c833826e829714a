"""The command that makes a paper's table from a recipe file.

In: a YAML file such as `recipes/coral.yaml`. Out: a folder of each drafter, a report of each cell,
`table.md`; what is there is not made again.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from ..measure.settings import BenchmarkSettings, option
from .measure import BenchmarkOptions, benchmark
from .options import DTYPES
from .train import TrainOptions, train

SHIPPED = Path(__file__).parent / "recipes"
NOT_RUN = ["not run"] * 2


@dataclass(kw_only=True)
class ReproduceOptions:
    """The recipe, what takes the place of its target and data, and how much of it is run."""

    recipe: str = option("A recipe file, or one that is shipped: coral.", positional=True)
    output: Path = option("Folder of drafters, reports and table; resumed if it has some.")
    target: str | None = option("In place of the recipe's.", None)
    dtype: DTYPES | None = option("Precision of the target's weights.", None)
    dataset: list[str] = option("In place of the recipe's, all rows of it.", [])
    prompts: list[str] = option("Of a benchmark: HumanEval=FILE, a URL, a Hub id[:config].", [])
    limit: int | None = option("Prompts of each benchmark at most.", None, least=1)
    method: list[str] = option("A line of the table; by default all are run.", [])
    benchmark: list[str] = option("A column of the table; by default all are run.", [])

    def read(self) -> dict[str, Any]:
        """Read the recipe with what is given in place of its values.

        Raises:
            ValueError: for a recipe, a method or a benchmark that there is not.
        """
        shipped = {one.stem: one for one in SHIPPED.iterdir()}
        path = shipped.get(self.recipe, Path(self.recipe))
        if not path.is_file():
            raise ValueError(f"`recipe` is {self.recipe!r}; use a YAML file, or of {[*shipped]}.")
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
        found |= {name: value for name in ("target", "dtype") if (value := vars(self)[name])}
        if self.dataset:
            found["data"] = {"dataset": self.dataset}
        if bad := [word for word in self.prompts if "=" not in word]:
            raise ValueError(f"`prompts` is {bad[0]!r}; give a benchmark too: HumanEval={bad[0]}.")
        found["benchmarks"] |= dict(word.split("=", 1) for word in self.prompts)
        for name in ("method", "benchmark"):
            known = [*found[f"{name}s"]]
            if unknown := {*vars(self)[name]} - {*known}:
                raise ValueError(f"`{name}` is {', '.join(unknown)}; use one of {known}.")
        return found


def values(found: Any) -> Any:
    """Return a part of a recipe with values alone, without what is said of those left open."""
    if not isinstance(found, dict):
        return found
    if "open" in found:
        return found["value"]
    return {name: values(one) for name, one in found.items()}


def choices(found: dict[str, Any], part: str = "") -> Iterator[list[str]]:
    """Yield part, name, value and reason of each value of a recipe that the paper leaves open."""
    for name, one in found.items():
        if isinstance(one, dict) and "open" in one:
            yield [part, name, str(one["value"]), one["open"]]
        elif isinstance(one, dict):
            yield from choices(one, f"{part} {name}".strip())


def reproduce(own: ReproduceOptions, training_options: list[str]) -> None:
    """Train a paper's drafters, measure them on its benchmarks, and print its table.

    Every other option is one of CoralTrainingArguments, in place of the recipe's. Run again, it
    goes on where it was interrupted. On several GPUs, where one of them measures:
    accelerate launch -m coral_hf.cli reproduce coral --output FOLDER
    """
    from accelerate import PartialState

    from ..atomic import keep_settings, write_text

    read = own.read()
    recipe = values(read)
    settings = recipe | {"limit": own.limit, "options": training_options}
    own.output.mkdir(parents=True, exist_ok=True)
    keep_settings(own.output / "settings.json", settings, own.output)
    wanted = own.method or [*recipe["methods"]], own.benchmark or [*recipe["benchmarks"]]
    # before anything is trained
    files = {name: prompt_file(recipe["benchmarks"][name], own.output, name) for name in wanted[1]}
    models: dict[str, Any] = {name: recipe[name] for name in ("target", "dtype")}
    for name in dict.fromkeys(recipe["methods"][method]["drafter"] for method in wanted[0]):
        fields = recipe["train"] | recipe["drafters"][name]
        known = {one: fields.pop(one) for one in ("stage", "router_epochs") if one in fields}
        known |= models | recipe["data"] | {"output": own.output / name, "resume": True}
        if not (own.output / name / "config.json").is_file():
            words = [f"--{field}={value}" for field, value in fields.items()]
            train(TrainOptions(**known), words + training_options)
    if not PartialState().is_main_process:
        return
    text = table(own.output, read)
    for method, name, temperature in product(*wanted, recipe["temperatures"]):
        file, fields = cell(own.output, method, name, temperature), {**recipe["methods"][method]}
        if not file.is_file():
            drafter = str(own.output / fields.pop("drafter"))
            part: dict[str, Any] = {"prompts": [files[name]], "output": file.parent}
            options = BenchmarkOptions(drafter=drafter, limit=own.limit, **models, **part)
            fields |= recipe["measure"] | {"temperature": temperature}
            benchmark(options, BenchmarkSettings(**fields))
            text = table(own.output, read)
            write_text(own.output / "table.md", text)
    print(text)


def prompt_file(source: str, output: Path, name: str) -> Path:
    """Return a checked file of prompts, if need be a copy of what lies on the Hub or elsewhere."""
    from ..atomic import new_file
    from ..measure import read_prompts
    from ..training.data import load_conversations

    path = Path(source)
    if not path.is_file():
        path = output / "prompts" / f"{name}.jsonl"
        if not path.is_file():
            place, split, config = source, "train", ""
            if "://" not in source:
                split, (place, _, config) = "test", source.partition(":")
            path.parent.mkdir(parents=True, exist_ok=True)
            with new_file(path) as aside:
                load_conversations(place, split, config or None).to_json(aside)
    read_prompts(path)
    return path


def cell(output: Path, method: str, benchmark: str, temperature: float) -> Path:
    """Return the file of the report of a cell."""
    return output / "results" / f"{method}, {benchmark}, T={temperature:g}" / "report.json"


def table(output: Path, read: dict[str, Any]) -> str:
    """Make the table of a paper from the reports that there are, and list our own choices."""
    from ..measure.report import Table, dashed
    from ..measure.summary import OVERALL

    recipe, lines, notes, place = values(read), list[list[str]](), dict[str, str](), ""
    for temperature, method in product(recipe["temperatures"], recipe["methods"]):
        pairs: list[Any] = []
        for name in recipe["benchmarks"]:
            file = cell(output, method, name, temperature)
            text = file.read_text(encoding="utf-8") if file.is_file() else '{"rows": []}'
            report = json.loads(text)
            overall = (row for row in report["rows"] if row["task"] == OVERALL)
            row = next((row for row in overall if row["method"] == "coral"), None)
            pairs.append(row and (row["speedup"], row["tau_per_token"]))
            if row:
                notes[name] = f"{name}: {row['num_items']} answers, {row['num_tokens']} tokens"
                place = f"; on {report['environment']['hardware']}, {recipe['dtype']}.\n"
        pairs.append([fmean(one) for one in zip(*pairs, strict=True)] if all(pairs) else None)
        cells = [dashed("{:.2f}x|{:.2f}", *one).split("|") if one else NOT_RUN for one in pairs]
        lines.append([f"{temperature:g}", method, *sum(cells, [])])
    header = ["T", "method", *sum(([name, "τ"] for name in (*recipe["benchmarks"], "mean")), [])]
    title = f"{recipe['title']}, {recipe['target']}"
    shown = Table(title, header, lines, "; ".join(notes.values()) + place)
    own = Table("What the paper leaves open", ["part", "setting", "ours", "why"], [*choices(read)])
    return f"{shown.to_markdown()}\n{own.to_markdown()}"
