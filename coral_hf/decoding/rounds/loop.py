"""The decoding loop in rounds of constant shapes: the host reads one small tensor a round.

In: a call whose scores follow from logits alone. Out: what the general loop gives, token for token.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import CompileConfig, GenerationConfig

from ..drafting import FixedDrafting, TreeShape, host_tensor, root_only
from ..loop import DecodingLoop
from ..plain.costs import CostModel, Costs, RoundSample
from ..plain.draft_policy import AdaptiveDraft, DraftPolicy
from ..target_runner import TargetRunner
from .fixed_rounds import FixedRounds
from .steps import Steps, measure_costs, run_dry, steps_of

LEAST_CAPACITY = 256
FINE = 1024  # a capacity from which on there is another one between each and its double
SPARE = 4  # how much larger a capacity that is compiled may be than one that is not
FAR = 4096  # new tokens for which there is room from the start, where a call may write more


def capacity_for(length: int) -> int:
    """The smallest capacity for rows of `length` tokens: 256, 512, 1024, 1536, 2048, 3072, …

    A pass attends to all of it, so long ones are no more than a half longer than their text.
    """
    capacity = max(LEAST_CAPACITY, 1 << (length - 1).bit_length())
    smaller = capacity * 3 // 4
    return smaller if length <= smaller and capacity > FINE else capacity


def compile_config_of(config: GenerationConfig) -> CompileConfig | None:
    """How the steps of a call are compiled, if they are."""
    return None if config.disable_compile else config.compile_config


class FixedPlan(NamedTuple):
    """How a call runs its rounds."""

    shape: TreeShape  # of every tree
    is_adaptive: bool  # whether drafting is given up where it does not pay
    # makes the two sides of the call anew, as they are before its first pass
    fresh: Callable[[], tuple[Any, TargetRunner]]
    costs: Costs | None = None  # what rounds cost; None: measured once in a process
    is_captured: bool = False  # whether steps are captured in CUDA graphs
    only_compiles: bool = False  # whether nothing is decoded


class HostCopy:
    """A tensor on its way to the host, for which nobody waits before it is read."""

    def __init__(self, tensor: Tensor):
        self._tensor = tensor
        self._event: torch.cuda.Event | None = None
        if tensor.device.type == "cuda":
            there = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
            self._tensor = there.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(tensor.device))

    def read(self) -> list:
        """Wait for the tensor, and no more: what was launched since goes on."""
        if self._event is not None:
            self._event.synchronize()
        return self._tensor.tolist()


@dataclass
class FixedLoop(DecodingLoop):
    """One call of `generate` in rounds of constant shapes; see [`DecodingLoop`].

    A row that has ended stays in its place, and nothing of it is kept any more.
    """

    drafting: FixedDrafting
    fixed: FixedPlan = field(kw_only=True)

    def __post_init__(self):
        super().__post_init__()
        self.compile_config = compile_config_of(self.collector.config)
        self.stats.way = "static" if self.compile_config is None else "compiled"
        if self.fixed.is_captured:
            self.stats.way = "captured"
        # a device that works by itself drafts while the host reads; a draft keeps nothing
        self.drafts_ahead = self.sequences.ids.is_cuda
        self.is_ahead = False  # whether the next tree is being drafted

    def run(self, model_kwargs: dict) -> None:
        """Decode until every row has ended; `model_kwargs` are what `generate` prepared."""
        prompt, only_compiles = self.sequences.prompt_length, self.fixed.only_compiles
        longest = self.plan.max_length
        self.capacity = self._capacity(longest if only_compiles else min(longest, prompt + FAR))
        if self.compile_config is not None:
            if not only_compiles:
                self.capacity = self._ready_capacity()
            self.warm_up()
        if only_compiles:
            return
        self.lap_start = time.perf_counter()
        self.prefill(model_kwargs)
        self.lap("prefill_seconds")
        if self.sequences.active:
            self.begin_rounds()
            while self.sequences.active:
                self.round()
            self.end_rounds()
        self.sequences.end()

    def warm_up(self) -> None:
        """Compile what this call runs, on prompts of two tokens, before its first token."""
        steps, how = self._steps(), self.fixed
        if steps.is_ready and (not how.is_adaptive or steps.costs or how.costs):
            return
        drafting, target = self.fixed.fresh()
        prompts = self.sequences.ids[:, :1].expand(-1, 2)
        output = target.prefill(prompts, {"attention_mask": torch.ones_like(prompts)})
        tokens = torch.cat([prompts, prompts[:, :1]], dim=1)
        drafting.begin(tokens, output.features, target.cache.positions)
        self._rounds(drafting, target)
        self.lap("warm_up_seconds")

    def begin_rounds(self) -> None:
        """Go on from the prompts in buffers of constant shape."""
        self._begin()
        self.policy = DraftPolicy(self.fixed.shape)
        if self.fixed.is_adaptive:
            costs = self.fixed.costs or measure_costs(self.rounds)
            self.policy = AdaptiveDraft(self.fixed.shape, CostModel(costs))

    def _begin(self) -> None:
        """Make rounds, in the buffers of this call."""
        self.rounds = self._rounds(self.drafting, self.target)
        self.num_stopped = 0
        self._note_ends()

    def _rounds(self, drafting: FixedDrafting, target: TargetRunner) -> FixedRounds:
        """Rounds of which each step has run once, and was measured where somebody asks."""
        root = self.sequences.last(list(range(len(self.sequences.lengths))))
        how = self.fixed.shape, self.plan.rule, tuple(self.sequences.processors)
        rounds = FixedRounds(drafting, target, root, *how, self.capacity, self._steps())
        run_dry(rounds, "draft", "verify", *(["token"] if self.fixed.is_adaptive else []))
        if self.fixed.is_adaptive and self.fixed.costs is None:
            measure_costs(rounds)
        return rounds

    def _steps(self) -> Steps:
        """The steps of rounds, which all calls of a kind share."""
        processors = tuple(
            (type(one), tuple((name, repr(value)) for name, value in vars(one).items()))
            for one in self.sequences.processors
        )
        sizes = len(self.sequences.lengths), self.capacity, self.fixed.shape, self.plan.rule
        kind = *sizes, processors, self.drafting.kind, self.sequences.ids.device
        how = self.compile_config, self.fixed.is_captured
        return steps_of(self.target.model, kind, *how)

    def _capacity(self, length: int) -> int:
        """What rows of `length` tokens need, with all that a round may write behind them."""
        return capacity_for(length + self.fixed.shape.depth + 1)

    def _ready_capacity(self) -> int:
        """The next capacity that is compiled, or the one at hand where none is near."""
        least = self.capacity
        while self.capacity <= SPARE * least:
            if self._steps().is_ready:
                return self.capacity
            self.capacity = capacity_for(self.capacity + 1)
        return least

    def kept(self, rows: list[int]) -> list[int]:
        """All rows: what has ended stays in its place."""
        return rows

    def round(self) -> None:
        """Draft and verify, and read what came out; by then the next draft may be under way."""
        rows, self.lap_start = self.sequences.active, time.perf_counter()
        if not self.is_ahead:
            self._draft()
        self.is_ahead = False
        if is_plain := self.policy.is_plain:
            self.stats.is_stepped_back, self.keep_memory = True, False
        tree = root_only(self.rounds.root) if is_plain else self.rounds.tree
        self.sequences.show(tree)
        self.lap("draft_seconds")
        copy = HostCopy(self.rounds.run("token" if is_plain else "verify"))
        if self.drafts_ahead and not self._is_full(rounds=2):
            self._draft()
            self.is_ahead = True
        found = self._tokens(copy.read())
        self.lap("verify_seconds")
        counts = [len(new) for new in self.sequences.emit([found[row] for row in rows])]
        self._note_ends()
        self.stats.add_round(tree, counts)
        if not is_plain:
            size, tokens = (tree.levels, tree.tokens.shape[1]), sum(counts) / len(rows)
            self.policy.note(RoundSample(len(rows), *size, tokens))
        self.lap("other_seconds")

    def _draft(self) -> None:
        """Begin a round, with a tree where drafting pays."""
        if self._is_full():  # go on in buffers of the next capacity
            self.end_rounds(goes_on=True)
            self.capacity = self._capacity(self.sequences.longest + self.capacity // 2)
            self._begin()
        self.rounds.uniforms.draw_all()
        if not self.policy.is_plain:
            self.rounds.run("draft")

    def _is_full(self, rounds: int = 1) -> bool:
        """Whether some row may not have room for so many rounds more."""
        longest = max(self.sequences.lengths[row] for row in self.sequences.active)
        return longest + rounds * (self.fixed.shape.depth + 1) > self.capacity

    def _tokens(self, found: list[list[int]]) -> list[list[int]]:
        """The new tokens of each row, from what a step gives, (batch, depth + 2)."""
        tokens = [row[: row[-1]] for row in found]
        if any(token < 0 for row in self.sequences.active for token in tokens[row]):
            raise RuntimeError(
                "The target's probabilities are no distribution: they contain inf or nan, or are"
                " all zero. Check its weights and dtype, or the logits processors of the call."
            )
        return tokens

    def _note_ends(self) -> None:
        """Tell the device which rows have ended, when one has."""
        is_stopped = self.sequences.is_stopped
        if sum(is_stopped) > self.num_stopped:
            self.num_stopped = sum(is_stopped)
            is_active = host_tensor([not one for one in is_stopped])
            self.rounds.is_active.copy_(is_active, non_blocking=True)

    def end_rounds(self, goes_on: bool = False) -> None:
        """Go back to buffers that grow, for whoever continues the sequences."""
        lengths = [length - 1 for length in self.sequences.lengths]  # neither has read the newest
        self.target.cache = self.target.cache.grown(lengths)
        if goes_on or self.keep_memory:
            self.drafting.unfix(lengths)
