"""The ways of generating that are compared, behind one signature.

In: a prompt's ids (1, length). Out: a Generation. "plain" is the target alone, "coral" the drafter,
"bigram" a table in its place; "prompt_lookup" and "assisted" are transformers' own, the latter with
a small model of the target's vocabulary.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from ..decoding.settings import DECODING_KEYWORDS
from ..drafters.bigram import BigramDrafter
from .settings import BenchmarkSettings


class Generation(NamedTuple):
    """What one call of generate gave."""

    tokens: list[int]  # the new ones
    round_lengths: list[int]  # tokens of each target pass after the first
    stage_seconds: dict[str, float]  # by name, see `Run`; empty where the method does not tell


class Drafters(NamedTuple):
    """What drafts for the target, by the method that uses it."""

    coral: PreTrainedModel | None
    bigram: BigramDrafter | None
    assisted: PreTrainedModel | None


Arguments = dict[str, Any]  # of generate
Method = Callable[[Tensor], Generation]


class RoundRecorder(BaseStreamer):
    """Counts the tokens of each target pass: transformers hands a streamer one pass at a time."""

    def __init__(self) -> None:
        self.lengths: list[int] = []  # the prompt's first

    def put(self, value: Tensor) -> None:
        self.lengths.append(value.numel())

    def end(self) -> None:
        pass


class FirstTokenClock(StoppingCriteria):
    """Notes when the first token is there, and never stops."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self.seconds: float | None = None

    def __call__(self, input_ids: Tensor, scores: object, **kwargs: object) -> Tensor:
        if self.seconds is None:
            self.seconds = time.perf_counter() - self._start
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def build_methods(
    target: PreTrainedModel, drafters: Drafters, settings: BenchmarkSettings
) -> dict[str, Method]:
    """The methods that the settings name, each a function of a prompt's ids."""
    check_drafters(drafters, settings)
    generate = {
        "plain": generate_plain,
        "coral": generate_in_trees,
        "bigram": generate_in_trees,
        "prompt_lookup": generate_in_chains,
        "assisted": generate_in_chains,
    }
    common = sampling_arguments(settings)
    return {
        name: partial(
            generate[name], target, common | own_arguments(name, target, drafters, settings)
        )
        for name in settings.methods
    }


def check_drafters(drafters: Drafters, settings: BenchmarkSettings) -> None:
    """Raise where a method lacks its drafter."""
    arguments = {"coral": "drafter", "bigram": "bigram", "assisted": "assistant"}
    missing = [name for name, drafter in drafters._asdict().items() if drafter is None]
    for method in set(missing) & set(settings.methods):
        raise ValueError(
            f"`methods` has {method!r}, but `{arguments[method]}` is None; "
            "pass one or leave the method out."
        )


def sampling_arguments(settings: BenchmarkSettings) -> Arguments:
    """Explicit, so that no default of a target's generation config (top-k 50, say) slips in."""
    choice: dict[str, float | None]
    if settings.do_sample:
        choice = {"temperature": settings.temperature, "top_k": 0, "top_p": 1.0}
    else:
        choice = {"temperature": None, "top_k": None, "top_p": None}
    return choice | {"max_new_tokens": settings.max_new_tokens, "do_sample": settings.do_sample}


def own_arguments(
    method: str, target: PreTrainedModel, drafters: Drafters, settings: BenchmarkSettings
) -> Arguments:
    """What makes a call of generate this method's."""
    decoding = {"speculation": settings.speculation, **settings.tree}
    if method == "coral":
        return {"assistant_model": drafters.coral, **decoding}
    if method == "bigram" and drafters.bigram is not None:
        own = {name: value for name, value in decoding.items() if name in DECODING_KEYWORDS}
        return {"assistant_model": drafters.bigram, **own}
    if method == "prompt_lookup":
        return {"prompt_lookup_num_tokens": settings.prompt_lookup_tokens}
    return {"assistant_model": drafters.assisted} if method == "assisted" else {}


def generate_plain(target: PreTrainedModel, arguments: Arguments, ids: Tensor) -> Generation:
    """Generate from ids (1, length) as anyone does: one token a pass."""
    clock = FirstTokenClock()
    sequences = target.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        stopping_criteria=StoppingCriteriaList([clock]),
        **arguments,
    )
    tokens = sequences[0, ids.shape[1] :].tolist()
    return Generation(tokens, [1] * (len(tokens) - 1), {"prefill": clock.seconds or 0.0})


def generate_in_trees(target: PreTrainedModel, arguments: Arguments, ids: Tensor) -> Generation:
    """Generate from ids (1, length) with our loop, which keeps its own statistics."""
    out = target.generate(
        ids, attention_mask=torch.ones_like(ids), return_dict_in_generate=True, **arguments
    )
    stats = out.stats
    stages = {
        "prefill": stats.prefill_seconds,
        "draft": stats.draft_seconds,
        "verify": stats.verify_seconds,
        "other": stats.other_seconds,
    }
    return Generation(out.sequences[0, ids.shape[1] :].tolist(), list(stats.round_lengths), stages)


def generate_in_chains(target: PreTrainedModel, arguments: Arguments, ids: Tensor) -> Generation:
    """Generate from ids (1, length) with transformers' own loop over drafted chains."""
    recorder = RoundRecorder()
    sequences = target.generate(
        ids, attention_mask=torch.ones_like(ids), streamer=recorder, **arguments
    )
    # lengths: the prompt, the first pass (which already verifies a draft here), the rounds
    return Generation(sequences[0, ids.shape[1] :].tolist(), recorder.lengths[2:], {})
