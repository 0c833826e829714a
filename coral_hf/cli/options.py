"""Options that several commands share, and what they load.

In: names of folders, files and Hub repositories. Out: models, prompts, datasets. What takes seconds
to import is imported when it is needed.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .. import measure
from ..measure.settings import option

logger = logging.getLogger(__name__)
A_HANDFUL = 10  # prompts, below which a figure says little
DTYPES = Literal["auto", "float32", "bfloat16", "float16", "float64"]


@dataclass(kw_only=True)
class ChatOptions:
    """How chats are rendered: by the target's tokenizer."""

    target: str = option("The target: a folder or a Hub id.")
    chat_template: str | None = option("Another chat template: a file, or its text.", None)
    chat_template_kwargs: str | None = option("Its options, as a JSON object.", None)

    def load_tokenizer(self):
        """Return the target's tokenizer, with the chat template and the options that were given."""
        from transformers import AutoTokenizer

        from ..measure.chat import set_chat_options

        tokenizer = AutoTokenizer.from_pretrained(self.target)
        return set_chat_options(tokenizer, self.chat_template, self.chat_template_kwargs)

    def vocab_size(self) -> int | None:
        """Return how many tokens the target has; None where only its tokenizer is given."""
        from transformers import AutoConfig

        try:
            return AutoConfig.from_pretrained(self.target).get_text_config(decoder=True).vocab_size
        except (OSError, ValueError):
            return None


@dataclass(kw_only=True)
class TargetOptions(ChatOptions):
    """The target."""

    dtype: DTYPES = option("Precision of its weights.", "auto")

    def load_target(self, device: str | None = None):
        """Return the target, on the GPU where there is one, and its tokenizer."""
        import torch
        from transformers import AutoModelForCausalLM

        tokenizer = self.load_tokenizer()
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        model = AutoModelForCausalLM.from_pretrained(self.target, dtype=self.dtype).to(device)
        return model.eval(), tokenizer


@dataclass(kw_only=True)
class DatasetOptions:
    """Conversations, of which the last ones may be held out."""

    dataset: list[str] = option("Conversations: a file, a folder or a Hub id; or cached features.")
    weight: list[float] = option("Of each dataset: 2 reads its rows twice, 0.5 half of them.", [])
    hold_out: int = option("Leave out the last rows of each dataset.", 0, least=0)
    ignore_columns: list[str] = option("Leave out this column.", [], flag="ignore-column")
    split: str = option("The split of a dataset that has several.", "train")
    config: str | None = option("The configuration of a Hub dataset.", None)
    revision: str | None = option("The branch, tag or commit of a Hub dataset.", None)

    def rows(self):
        """Return the conversations that are not held out, or cached features."""
        from ..training.features import INDEX, CachedFeatures

        cached = [path for path in self.dataset if (Path(path) / INDEX).is_file()]
        if not cached:
            return self.conversations()
        if len(self.dataset) > 1 or self.hold_out or self.weight:
            remedy = "give --hold-out and all datasets to `coral-hf features`."
            raise ValueError(f"{cached} is a feature cache, read alone and whole; {remedy}")
        return CachedFeatures(cached[0])

    def conversations(self, limit: int | None = None, held_out: bool = False):
        """Return the first conversations of each dataset, or the ones that are held out."""
        from ..training.data import join_datasets, load_conversations, with_weight

        parts, weights = [], self.weight or [1.0] * len(self.dataset)
        if len(weights) != len(self.dataset):
            raise ValueError(f"{len(self.dataset)} --dataset have {len(weights)} --weight.")
        for path, weight in zip(self.dataset, weights, strict=True):
            rows = load_conversations(path, self.split, self.config, self.revision)
            ignored = [name for name in self.ignore_columns if name in rows.column_names]
            rows = rows.remove_columns(ignored)
            kept = range(len(rows) - self.hold_out)
            if not kept:
                raise ValueError(f"--hold-out {self.hold_out} leaves no row of {path}.")
            chosen = rows.select(range(len(kept), len(rows)) if held_out else kept[:limit])
            parts.append(chosen if held_out else with_weight(chosen, weight))
        return join_datasets(parts, self.dataset)


@dataclass(kw_only=True)
class TrainingDataOptions(DatasetOptions):
    """Conversations, and those that an evaluation reads."""

    eval_dataset: list[str] = option("For --eval-strategy, in place of --hold-out.", [])

    def eval_rows(self, strategy: str):
        """Return the conversations that are evaluated; None where none are."""
        if strategy == "no":
            return None
        if self.eval_dataset:
            ignored = self.ignore_columns
            return DatasetOptions(dataset=self.eval_dataset, ignore_columns=ignored).rows()
        if not self.hold_out:
            raise ValueError("--eval-strategy goes with --hold-out or --eval-dataset.")
        return self.conversations(held_out=True)


@dataclass(kw_only=True)
class PromptOptions:
    """Files of prompts."""

    prompts: list[Path] = option("MT-bench, HumanEval, GSM8K, Spec-Bench, messages, or text.")
    limit: int | None = option("Prompts of each file at most.", None, least=1)
    last: int | None = option("Only the last rows of each file.", None, least=1)
    user_turn: int = option("Which user turn of a dialogue is answered; -1 is the last.", -1)

    def read_prompts(self) -> list:
        """Return the prompts of all files."""
        part = (self.limit, self.last, self.user_turn)
        return [prompt for path in self.prompts for prompt in measure.read_prompts(path, *part)]

    def measured_prompts(self) -> list:
        """Return the prompts that figures rest on, and warn if they are few."""
        if len(prompts := self.read_prompts()) < A_HANDFUL:
            few = f"Only {len(prompts)} of {A_HANDFUL} or more prompts"
            logger.warning(f"{few}: figures are a first look.")
        return prompts


@dataclass(kw_only=True)
class DrafterOptions(TargetOptions):
    """A drafter and its target."""

    drafter: str = option("The drafter, or a small language model: a folder or a Hub id.")

    def load_models(self, pad_layers: int | None = None) -> tuple:
        """Return the target, padded if that was asked for, the drafter and the tokenizer."""
        from ..measure.chat import restore_chat_options

        target, tokenizer = self.load_target()
        target = measure.pad_target(target, pad_layers) if pad_layers else target
        drafter = load_drafter(self.drafter, target)
        restore_chat_options(tokenizer, drafter.config)
        return target, drafter, tokenizer


@dataclass(kw_only=True)
class MeasuredOptions(DrafterOptions, PromptOptions):
    """What is measured: a drafter with its target on prompts; and the folder of the results."""

    output: Path = option("Folder of report.json, report.md and the plots.")
    pad_layers: int | None = option("Measure on a target padded to so many layers.", None)

    def load(self) -> tuple:
        """Return the target, padded if that was asked for, drafter, tokenizer and prompts."""
        prompts = self.measured_prompts()  # first, since loading models takes longer
        return *self.load_models(self.pad_layers), prompts

    def show(self, report) -> None:
        """Write a report and print its tables."""
        from rich.console import Console
        from rich.markdown import Markdown

        report.write(self.output)
        Console().print(*(Markdown(table.to_markdown()) for table in report.tables))


def load_drafter(name: str, target):
    """Return a drafter in its target's dtype, on its device; an untrained one without a name.

    A language model drafts as a [`LanguageModelDrafter`].
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from .. import CoralDrafter, LanguageModelDrafter
    from ..decoding import generate

    if not name:
        return CoralDrafter.from_target(target).eval()
    if generate.is_drafter(name):
        return generate.load_drafter(name, target)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=target.dtype).to(target.device)
    return LanguageModelDrafter(model, AutoTokenizer.from_pretrained(name))
