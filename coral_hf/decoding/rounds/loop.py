"""The decoding loop in rounds of constant shapes: the host reads one small tensor a round.

In: a call whose scores follow from logits alone. Out: what the general loop gives, token for token.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import CompileConfig, GenerationConfig

from ..draft_policy import AdaptiveDraft, CostModel, Costs, DraftPolicy, RoundSample
from ..drafting import FixedDrafting, TreeShape, host_tensor
from ..loop import DecodingLoop
from ..target_runner import TargetRunner
from .fixed_rounds import FixedRounds
from .steps import Steps, measure_cost, run_dry, steps_of

LEAST_CAPACITY = 256
FAR = 4096  # new tokens for which there is room from the start, where a call may write more


def capacity_for(length: int) -> int:
    """The smallest capacity for rows of `length` tokens: 256, 512, 1024, …"""
    return max(LEAST_CAPACITY, 1 << (length - 1).bit_length())


class FixedPlan(NamedTuple):
    """How a call runs its rounds."""

    shape: TreeShape  # of every tree
    is_adaptive: bool  # whether drafting is given up where it does not pay
    config: GenerationConfig  # of the call
    # makes the two sides of the call anew, as they are before its first pass
    fresh: Callable[[], tuple[FixedDrafting, TargetRunner]]
    is_captured: bool = False  # whether steps are captured in CUDA graphs
    is_warm_up: bool = False  # whether to compile what the call needs, and no more

    @property
    def compile_config(self) -> CompileConfig | None:
        """How steps are compiled, if they are."""
        return None if self.config.disable_compile else self.config.compile_config


@dataclass
class FixedLoop(DecodingLoop):
    """One call of `generate` in rounds of constant shapes; see [`DecodingLoop`].

    A row that has ended stays in its place, and nothing of it is kept any more.
    """

    drafting: FixedDrafting
    fixed: FixedPlan = field(kw_only=True)

    def run(self, model_kwargs: dict) -> None:
        """Decode until every row has ended; `model_kwargs` are what `generate` prepared."""
        prompt = self.sequences.prompt_length
        self.capacity = self._capacity(min(self.plan.max_length, prompt + FAR))
        if self.fixed.compile_config is not None:
            self.warm_up()
        if self.fixed.is_warm_up:
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
        drafting, target = self.fixed.fresh()
        prompts = self.sequences.ids[:, :1].expand(-1, 2)
        output = target.prefill(prompts, {"attention_mask": torch.ones_like(prompts)})
        tokens = torch.cat([prompts, prompts[:, :1]], dim=1)
        drafting.begin(tokens, output.features, target.cache.positions)
        rounds = self._rounds(drafting, target, self.capacity)
        steps = self._ready(rounds)
        if self.fixed.is_adaptive:
            measure_cost(rounds, steps)
        self.lap("warm_up_seconds")

    def begin_rounds(self) -> None:
        """Go on from the prompts in buffers of constant shape."""
        self.rounds = self._rounds(self.drafting, self.target, self.capacity)
        self.steps = self._ready(self.rounds)
        self.policy = DraftPolicy(self.fixed.shape)
        if self.fixed.is_adaptive:
            cost = Costs(measure_cost(self.rounds, self.steps), level=0.0, node=0.0)
            self.policy = AdaptiveDraft(self.fixed.shape, CostModel(cost))
        self._note_ends()

    def _rounds(self, drafting: FixedDrafting, target: TargetRunner, capacity: int) -> FixedRounds:
        root = self.sequences.last(list(range(len(self.sequences.lengths))))
        how = self.fixed.shape, self.plan.rule, tuple(self.sequences.processors)
        return FixedRounds(drafting, target, root, *how, capacity)

    def _ready(self, rounds: FixedRounds) -> Steps:
        """The steps of rounds, each of which has run once."""
        steps = steps_of(rounds, self.fixed.compile_config, self.fixed.is_captured)
        run_dry(rounds, steps, ["draft", "verify", *(["token"] if self.fixed.is_adaptive else [])])
        return steps

    def _capacity(self, length: int) -> int:
        """What rows of `length` tokens need, with all that a round may write behind them."""
        return capacity_for(length + self.fixed.shape.depth + 1)

    def drop(self, rows: list[int], kept: list[int]) -> None:
        """Keep all rows."""

    def kept(self, rows: list[int]) -> list[int]:
        """All rows: what has ended stays in its place."""
        return rows

    def round(self) -> None:
        """Draft and verify, and read what came out."""
        rows = self.sequences.active
        if (
            max(self.sequences.lengths[row] for row in rows) + self.fixed.shape.depth
            >= self.capacity
        ):
            self._grow()
        self.lap_start, is_plain = time.perf_counter(), self.policy.is_plain
        self.rounds.uniforms.draw_all()
        if is_plain:
            self.stats.is_stepped_back, self.keep_memory = True, False
            read = self.steps.run("token", self.rounds)
        else:
            self.steps.run("draft", self.rounds)
            self.lap("draft_seconds")
            read = self.steps.run("verify", self.rounds)
        found = self._read(read)
        self.lap("verify_seconds")
        counts = [len(new) for new in self.sequences.emit([found[row] for row in rows])]
        self._note_ends()
        self.stats.num_rounds += 1
        self.stats.round_lengths += counts
        tree = self.rounds.tree
        self.stats.num_levels += 0 if is_plain else tree.levels
        self.stats.num_nodes += 1 if is_plain else tree.tokens.shape[1]
        if not is_plain:
            sizes = len(rows), tree.levels, tree.tokens.shape[1]
            self.policy.note(RoundSample(*sizes, sum(counts) / len(rows)))
        self.lap("other_seconds")

    def _read(self, read: Tensor) -> list[list[int]]:
        """The new tokens of each row, from what a step gives, (batch, depth + 2)."""
        found = [row[: row[-1]] for row in read.tolist()]
        if any(token < 0 for row in self.sequences.active for token in found[row]):
            raise RuntimeError(
                "The target's probabilities are no distribution: they contain inf or nan, or are"
                " all zero. Check its weights and dtype, or the logits processors of the call."
            )
        return found

    def _note_ends(self) -> None:
        """Tell the device which rows have ended."""
        is_active = host_tensor([not is_stopped for is_stopped in self.sequences.is_stopped])
        self.rounds.is_active.copy_(is_active)

    def _grow(self) -> None:
        """Go on in buffers of the next capacity."""
        lengths = self._committed()
        self.target.cache = self.target.cache.grown(lengths)
        self.drafting.unfix(lengths)
        self.capacity = self._capacity(max(lengths) + self.capacity // 2 + 1)
        self.rounds = self._rounds(self.drafting, self.target, self.capacity)
        self.steps = self._ready(self.rounds)
        self._note_ends()

    def _committed(self) -> list[int]:
        """Tokens of each row that both models have read: all but the newest."""
        return [length - 1 for length in self.sequences.lengths]

    def end_rounds(self) -> None:
        """Go back to buffers that grow, for whoever continues the sequences."""
        lengths = self._committed()
        self.target.cache = self.target.cache.grown(lengths)
        if self.keep_memory:
            self.drafting.unfix(lengths)
