"""Options that several commands share, and what they load.

In: names of folders, files and Hub repositories. Out: models, prompts, datasets. What takes seconds
to import is imported when it is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from ..measure.settings import option
from .parser import refuse

COUNTED_LENGTH = 2048  # tokens of a conversation in which tokens are counted
DRAFTER = "The drafter: a folder or a Hub id."
DTYPES = Literal["auto", "float32", "bfloat16", "float16", "float64"]


@dataclass(kw_only=True)
class TargetOptions:
    """The target."""

    target: str = option("The target: a folder or a Hub id.")
    dtype: DTYPES = option("Precision of its weights.", "auto")

    def load_target(self, device: str | None = None):
        """Return the target, on the GPU where there is one, and its tokenizer."""
        return load_target(self.target, self.dtype, device)


@dataclass(kw_only=True)
class PaddedTargetOptions(TargetOptions):
    """The target, which may be measured as if it were deeper."""

    pad_layers: int | None = option("Measure on a target padded to so many layers.", None)

    def load_target(self, device: str | None = None):
        """Return the target, padded if that was asked for, and its tokenizer."""
        from ..measure.padding import pad_target

        model, tokenizer = super().load_target(device)
        return (pad_target(model, self.pad_layers) if self.pad_layers else model), tokenizer


@dataclass(kw_only=True)
class DatasetOptions:
    """Conversations, of which the last ones may be held out."""

    dataset: list[str] = option("Conversations: a file, a folder or a Hub id; or cached features.")
    hold_out: int = option("Leave out the last rows of each dataset.", 0, least=0)

    def rows(self):
        """Return the conversations without the last ones of each dataset, or cached features."""
        from ..training.features import INDEX, CachedFeatures

        cached = [path for path in self.dataset if (Path(path) / INDEX).is_file()]
        if not cached:
            return self.conversations()
        refuse(
            len(self.dataset) > 1 or self.hold_out > 0,
            f"{cached[0]} is a feature cache: it is read alone and whole. Give `--hold-out` and"
            " all datasets to `coral-hf features`.",
        )
        return CachedFeatures(cached[0])

    def conversations(self, limit: int | None = None):
        """Return the first conversations of each dataset, without those that are held out."""
        return self._joined(lambda num_left, num_rows: range(min(num_left, limit or num_left)))

    def held_out(self):
        """Return the last conversations of each dataset."""
        return self._joined(range)

    def _joined(self, chosen: Callable[[int, int], range]):
        """Join the rows that are chosen of each dataset by its numbers of rows left and in all."""
        from ..training.data import join_datasets, load_conversations

        parts = []
        for path in self.dataset:
            rows = load_conversations(path)
            num_left = len(rows) - self.hold_out
            message = f"--hold-out {self.hold_out} of the {len(rows)} rows of {path} leaves none."
            refuse(num_left < 1, message)
            parts.append(rows.select(chosen(num_left, len(rows))))
        return join_datasets(parts, self.dataset)


@dataclass(kw_only=True)
class PromptOptions:
    """Files of prompts."""

    prompts: list[Path] = option("MT-bench, HumanEval, GSM8K, Spec-Bench, messages or text.")
    limit: int | None = option("Prompts of each file at most.", None)
    last: int | None = option("Only the last rows of each file.", None)
    user_turn: int = option("Which user turn of a dialogue is answered; -1 is the last.", -1)

    def read_prompts(self) -> list:
        """Return the prompts of all files."""
        from ..measure.prompts import read_prompts

        read = partial(read_prompts, limit=self.limit, last=self.last, user_turn=self.user_turn)
        return [prompt for path in self.prompts for prompt in read(path)]


def load_target(name: str, dtype: str, device: str | None = None):
    """Return a target, on the GPU where there is one, and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype).to(device)
    return model.eval(), AutoTokenizer.from_pretrained(name)


def token_ids(conversations, tokenizer) -> list:
    """Return the tokens of conversations, a tensor (1, length) each."""
    import torch

    from ..training.data import prepare_dataset

    rows = prepare_dataset(conversations, tokenizer, COUNTED_LENGTH)
    return [torch.tensor([row["input_ids"]]) for row in rows]


def load_drafter(name: str | None, target):
    """Return a drafter in its target's dtype, on its device; an untrained one without a name."""
    from transformers import AutoModel

    from .. import CoralDrafter

    if name is None:
        return CoralDrafter.from_target(target).eval()
    return AutoModel.from_pretrained(name, dtype=target.dtype).to(target.device).eval()
