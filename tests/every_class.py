"""What becomes of a target of any class with a drafter: its own text, or a refusal that says why.

In: a config class of transformers. Out: a `Finding`. The target is a tiny random model in float64,
see `tiny_models`; texts are greedy, of one row and of three padded rows, in trees and in chains,
with an untrained drafter and with one that knows the text. As a program it prints a page of the
docs, or the lines of some model types: `python tests/every_class.py > docs/results/targets.md`.
"""

import re
import signal
import sys
import warnings
from collections import Counter
from typing import NamedTuple

import torch
import transformers
from conftest import as_drafter, tiny_target
from drafted_calls import NEW, Call, Crash, Recorded, Refusal, drafted, own_calls, untrained
from tiny_models import tiny_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)

from coral_hf import CoralDrafter

TREE = {"tree_depth": 4, "tree_top_k": 6, "tree_nodes": 24}
CHAIN = {"tree_depth": 4, "tree_top_k": 1}
SEEDS = range(1, 6)  # of other weights, where a text is one token over and over
SECONDS = 180  # for one class

WAYS = {
    "tree": "its own text from trees and from chains",
    "chain": "its own text from chains; asking for a tree is refused, with this reason",
    "refused": "refused before the first pass, with this reason",
    "no text": "alone it writes no text from token ids, with this error",
    "not built": "not built in a small size here, for this reason",
    "wrong": "another text than its own",
    "crash": "an error that names no reason, or comes after the first pass",
}
HEAD = """\
# Targets: what becomes of every class?

Reference: [what is drafted, and what is refused](../reference/guard.md). All classes of
`MODEL_FOR_CAUSAL_LM_MAPPING` and, for text alone, of `MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING`, as
tiny random models in float64 (float32 where a class computes in no other dtype, and for padded rows
where its softmax does): windows and rotary switches within the text, greedy, {new} tokens after a
prompt of 3 and after three padded ones of 19, 3 and 11, with an untrained drafter and with one that
knows the text. transformers {version}.

```bash
python tests/every_class.py > docs/results/targets.md
python -m pytest -m slow tests/test_every_class.py
```

"""


class Finding(NamedTuple):
    """What was found of a class."""

    name: str
    model_type: str
    way: str  # of `WAYS`
    reason: str = ""

    @property
    def line(self) -> str:
        """Its line of the table."""
        reason = self.reason.replace("|", "\\|").replace("<", "&lt;")
        return f"| {self.name} | {self.model_type} | {self.way} | {reason} |"


def compared(target: PreTrainedModel, call: Call, shape: dict) -> list[str]:
    """Where texts drafted in one shape differ from the target's own."""
    target.to(call.dtype)
    kind = "chain" if shape is CHAIN else "tree"
    drafters = {"untrained": untrained(target), "knowing": as_drafter(Recorded(call.texts))}
    problems = []
    for name, drafter in drafters.items():
        first = call.difference(drafted(target, drafter, call, shape))
        if first is not None:
            rows = len(call.texts)
            problems.append(f"{kind}, {name} drafter, {rows} rows: differs at token {first}")
    return problems


def with_text(target: PreTrainedModel, calls: list[Call]) -> tuple[str, str]:
    """The way of a target that alone writes text, and its reason."""
    problems, obstacle = [], None
    for shape in (TREE, CHAIN):
        for call in calls:
            try:
                problems += compared(target, call, shape)
            except Refusal as error:
                if shape is CHAIN or "tree_top_k=1" not in str(error):
                    raise
                obstacle = str(error)
    if problems:
        return "wrong", "; ".join(problems)
    if not calls[0].is_varied:
        return "crash", "its random text has too few tokens to show a mistake"
    return ("tree", "") if obstacle is None else ("chain", obstacle)


def refused(target: PreTrainedModel, call: Call, reason: str) -> tuple[str, str]:
    """What refuses a drafter of the target refuses a drafter of any family."""
    target.to(call.dtype)
    foreign = CoralDrafter.from_target(tiny_target("llama", call.dtype)).eval()
    for shape in (TREE, CHAIN):
        try:
            drafted(target, foreign, call, shape)
        except Refusal:
            continue
        return "crash", f"`from_target` says: {reason} But `generate` drafts."
    return "refused", reason


def tried(target: PreTrainedModel, build) -> tuple[str, str]:
    """The way of a target and its reason; `build` makes it with other weights."""
    try:
        calls = own_calls(target)
        for seed in SEEDS:
            if calls[0].is_varied:
                break
            target = build(seed)
            calls = own_calls(target)
    except TimeoutError:
        raise
    except Exception as error:
        try:
            untrained(target)
        except Refusal as refusal:
            return "refused", str(refusal)
        return "no text", f"{type(error).__name__}: {error}"
    try:
        return with_text(target, calls)
    except Refusal as error:
        return refused(target, calls[0], str(error))


def find(auto_class: type, config_class: type[PreTrainedConfig]) -> Finding:
    """Build a target of a class, and try it; for a while only."""

    def stop(*_):
        raise TimeoutError

    def build(seed: int = 0) -> PreTrainedModel:
        return tiny_model(config_class, auto_class, seed)

    found = class_name(auto_class, config_class), config_class.model_type
    signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                target = build()
            except TimeoutError:
                raise
            except Exception as error:
                return Finding(*found, "not built", one_line(f"{type(error).__name__}: {error}"))
            way, reason = tried(target, build)
    except TimeoutError:
        way, reason = "crash", f"over {SECONDS} s"
    except Crash as error:
        way, reason = "crash", str(error)
    finally:
        signal.alarm(0)
    return Finding(*found, way, one_line(reason))


def one_line(text: str) -> str:
    """A reason without what all reasons have around it."""
    text = " ".join(text.split())
    for around in (
        r".*cannot verify a tree: (.*?)\.? Leave it out.*",
        r".*cannot take a drafter: (.*)",
    ):
        if inner := re.fullmatch(around, text):
            text = inner[1]
    return text if len(text) <= 300 else f"{text[:300]}…"


def class_name(auto_class: type, config_class: type[PreTrainedConfig]) -> str:
    """The name of the model that a mapping gives for a config."""
    model_class = auto_class._model_mapping[config_class]
    return getattr(model_class, "__name__", "several classes")


def all_classes() -> list[tuple[type, type[PreTrainedConfig]]]:
    """Auto class and config class of every class of the two mappings, each once, but drafters."""
    both = [
        (auto_class, config_class)
        for auto_class in (AutoModelForCausalLM, AutoModelForImageTextToText)
        for config_class in auto_class._model_mapping
        if not config_class.model_type.startswith("coral")
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of modules that are imported
        return list({(class_name(*pair), pair[1]): pair for pair in reversed(both)}.values())[::-1]


def page(findings: list[Finding]) -> str:
    """The page of the docs."""
    counts = Counter(finding.way for finding in findings)
    ways = "".join(f"| {way} | {counts[way]} | {WAYS[way]} |\n" for way in WAYS if counts[way])
    lines = "".join(f"{finding.line}\n" for finding in findings)
    return (
        HEAD.format(new=NEW, version=transformers.__version__)
        + f"| way | classes | |\n|---|---|---|\n{ways}\n"
        + f"| class | model type | way | reason |\n|---|---|---|---|\n{lines}"
    )


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    wanted = sys.argv[1:]
    findings = []
    for pair in all_classes():
        if not wanted or pair[1].model_type in wanted:
            findings.append(find(*pair))
            print(findings[-1].line, file=sys.stdout if wanted else sys.stderr, flush=True)
    if not wanted:
        print(page(findings), end="")
