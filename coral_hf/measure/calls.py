"""Counted and timed calls of `generate`: several methods in turn on the same prompts.

In: a target, the arguments of `generate` by method, prompts. Out: a Call for each.

    pass of the target   0 (prefill)   1           2           3
    row 0 emits          x0            x1 x2       x3          x4 x5 x6     ends
    row 1 emits          y0            y1          (ended)
    rounds 3, round lengths 2 1 3 and 1, tau = 7 / 4 tokens of a row a round
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from ..decoding.drafting import family_of
from ..decoding.guard import TREE, judge_target
from ..target import Target
from .prompts import left_padded

COUNTS = ("round_lengths", "num_rounds", "num_levels", "num_nodes")  # of `DecodingStats`
ROUND_STAGES = ("draft", "verify", "other")
STAGES = ("prefill", *ROUND_STAGES)

Arguments = dict[str, Any]  # of `generate`
Batch = Mapping[str, Tensor]  # `input_ids` and `attention_mask`, (batch, length)


@dataclass(frozen=True, kw_only=True)
class Call:
    """The output and cost of one call of `generate`, and which call it was."""

    tokens: list[list[int]]  # new tokens of each row, up to its own end
    # tokens that each row emitted in each round; the prefill and its tokens are left out
    round_lengths: list[int]
    num_rounds: int  # passes of the target after the prefill, each over all unfinished rows
    num_levels: int = 0  # drafted levels over all rounds
    num_nodes: int = 0  # verified nodes of a row over all rounds, the roots included
    seconds: float = 0.0  # of the whole call, the prefill included
    # "prefill", "draft", "verify", "other"; those that a method does not report are left out
    stage_seconds: dict[str, float] = field(default_factory=dict)
    peak_bytes: int | None = None  # of GPU memory; None on a CPU
    prompt_length: int = 0  # of the longest row
    temperature: float = 0.0  # 0 is greedy
    method: str = ""
    repeat: int = 0
    item: int = 0  # the same for all methods and repeats on one batch
    num_equal_rows: int | None = None  # rows whose tokens are those of "plain"; None if sampled
    task: str = ""
    prompt: str = ""  # its id in its file
    turn: int = 0  # 0 is the first

    @property
    def num_rows(self) -> int:
        """The rows of the batch."""
        return len(self.tokens)

    @property
    def num_tokens(self) -> int:
        """The new tokens of all rows, the first ones included."""
        return sum(map(len, self.tokens))

    @property
    def round_seconds(self) -> float:
        """The seconds of the whole call without the prefill."""
        return self.seconds - self.stage_seconds["prefill"]

    @property
    def seconds_per_token(self) -> float:
        """The seconds of the whole call by its tokens."""
        return self.seconds / self.num_tokens

    @property
    def decoding_seconds_per_token(self) -> float | None:
        """Seconds per token without the prefill; None where a method does not report it."""
        num_tokens = self.num_tokens - self.num_rows
        if "prefill" not in self.stage_seconds or not num_tokens:
            return None
        return self.round_seconds / num_tokens

    def to_dict(self) -> dict[str, Any]:
        """Return the entry of a report: counts in place of tokens."""
        counts = {"num_rows": self.num_rows, "num_tokens": self.num_tokens}
        fields = asdict(self)
        del fields["tokens"]
        return fields | counts


class Bench(NamedTuple):
    """A target and the methods that are compared on it."""

    target: PreTrainedModel
    methods: dict[str, Arguments]  # "plain" is what the others are compared with
    repeats: int = 1
    warmup: int = 0
    seed: int = 0

    def compare(self, batch: Batch, item: int = 0, **labels: Any) -> list[Call]:
        """Call every method on a batch, in an order that rotates with each item and repeat.

        A machine that slows down slows all methods alike.
        """
        names = list(self.methods)
        calls = []
        for repeat in range(self.repeats):
            first = (item + repeat) % len(names)
            for name in names[first:] + names[:first]:
                # transformers samples from the global generator
                with seeded(self.seed + repeat, self.target.device):
                    call = call_generate(self.target, batch, self.methods[name])
                calls.append(replace(call, method=name, item=item, repeat=repeat, **labels))
        expected = next(call for call in calls if call.method == "plain")
        return [replace(call, num_equal_rows=equal_rows(expected, call)) for call in calls]

    def warm_up(self, batches: Sequence[Batch]) -> None:
        """Call every method on the first batches untimed, until allocators and kernels are warm."""
        for number in range(self.warmup):
            self._replace(repeats=1).compare(batches[number % len(batches)])


def equal_rows(expected: Call, call: Call) -> int | None:
    """Count the rows that have the expected tokens; None for sampled ones."""
    if call.temperature:
        return None
    return sum(a == b for a, b in zip(expected.tokens, call.tokens, strict=True))


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Draw from a seed within the `with` block, and restore the random state after it."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def sampling_arguments(temperature: float, max_new_tokens: int) -> Arguments:
    """Make arguments that leave nothing to a target's generation config (top-k 50, say)."""
    greedy = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
    sampled = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    return {"max_new_tokens": max_new_tokens} | (sampled if temperature else greedy)


class PassRecorder(BaseStreamer):
    """A streamer that records the passes of the target, which transformers reports one by one.

    put          0 (the prompt)   1 (after the prefill)   2   3
    lengths      n                1                       4   2     2 rounds of 4 and 2 tokens
    """

    def __init__(self) -> None:
        self.lengths: list[int] = []
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        """Record the tokens of a pass, (tokens,) or (1, tokens)."""
        self.lengths.append(value.numel())
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Do nothing."""


def call_generate(target: PreTrainedModel, batch: Batch, arguments: Arguments) -> Call:
    """Call `generate` once and wait for the device before the clock is read, at both ends.

    Our drafters report their rounds, plain `generate` has one token a round, and transformers'
    own drafting is counted pass by pass; its first pass verifies a draft and is left out.

    Args:
        batch: `input_ids` and `attention_mask`, (batch, length).
    """
    is_ours = family_of(arguments.get("assistant_model")) is not None
    is_plain = not {"assistant_model", "prompt_lookup_num_tokens"} & arguments.keys()
    passes = PassRecorder()
    arguments = arguments | {"return_dict_in_generate": True}
    if not is_ours:
        arguments["streamer"] = passes
    is_cuda = target.device.type == "cuda"
    if is_cuda:
        torch.cuda.reset_peak_memory_stats(target.device)
        torch.cuda.synchronize(target.device)
    start = time.perf_counter()
    output = target.generate(**batch, **arguments)
    if is_cuda:
        torch.cuda.synchronize(target.device)
    seconds = time.perf_counter() - start
    length = batch["input_ids"].shape[1]
    stops = arguments.get("eos_token_id", target.generation_config.eos_token_id)
    new = output.sequences[:, length:].tolist()  # (batch, new)
    tokens = [until_stop(row, stops) for row in new]
    if is_ours:
        counted = {name: getattr(output.stats, name) for name in COUNTS}
        stages = {stage: getattr(output.stats, f"{stage}_seconds") for stage in STAGES}
    else:
        lengths, stages = passes.lengths[2:], {}
        if is_plain:
            lengths = [1] * (sum(map(len, tokens)) - len(tokens))
            stages = {"prefill": passes.times[1] - start}
        counted = {"round_lengths": lengths, "num_rounds": len(passes.lengths) - 2}
    return Call(
        tokens=tokens,
        seconds=seconds,
        peak_bytes=torch.cuda.max_memory_allocated(target.device) if is_cuda else None,
        prompt_length=length,
        temperature=arguments.get("temperature") or 0.0,
        stage_seconds=stages,
        **counted,
    )


def until_stop(row: list[int], stops: int | Sequence[int] | None) -> list[int]:
    """Cut the tokens of a row at its own end, behind which there is padding."""
    ends = [stops] if isinstance(stops, int) else stops or []
    return row[: next((index + 1 for index, token in enumerate(row) if token in ends), len(row))]


def decoded_rounds(
    drafter: PreTrainedModel,
    target: Target,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    temperature: float = 0.0,
    batch_size: int = 8,
    seed: int = 0,
) -> list[int]:
    """Answer prompts with the drafter and return the tokens that each round emits.

    Args:
        prompts: token ids, (length,) each.
        temperature: 0 is greedy; otherwise tokens are drawn from the whole vocabulary.
        batch_size: prompts that are answered at once, where the target verifies trees.
    """
    # where it does not, the rows of a batch wait for each other
    size = batch_size if judge_target(target.model).way == TREE else 1
    pad = getattr(drafter.config, "pad_token_id", None) or 0
    arguments = sampling_arguments(temperature, max_new_tokens)
    arguments |= {"assistant_model": drafter, "speculation": "always", "pad_token_id": pad}
    rounds: list[int] = []
    with seeded(seed, target.device):
        for start in range(0, len(prompts), size):
            batch = left_padded(prompts[start : start + size], pad, target.device)
            rounds += call_generate(target.model, batch, arguments).round_lengths
    return rounds
