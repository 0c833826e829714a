"""The decoding loop in rounds of constant shapes: the host reads one small tensor a round.

In: a call whose scores follow from logits alone. Out: what the general loop gives, token for token.
"""

import time
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from transformers import CompileConfig, GenerationConfig
from transformers.utils import logging

from ...target import CONVOLUTION, sliding_windows, takes_positions
from ..drafting import FixedDrafting, TreeShape, host_tensor, root_only
from ..loop import DecodingLoop
from ..plain.costs import CostModel, Costs, RoundSample
from ..plain.draft_policy import AdaptiveDraft
from ..preparation.needs import rotary_switches
from ..target_runner import TargetRunner
from .fixed_rounds import FixedRounds
from .steps import Steps, measure_costs, run_dry, steps_of

logger = logging.get_logger(__name__)
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
    is_adaptive: bool  # whether trees are given up where that pays
    costs: Costs | None = None  # what rounds cost; None: measured once in a process
    only_compiles: bool = False  # whether the call is there to compile, and decodes nothing


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
        self.step_names = ["draft", "verify", *(["token"] if self.fixed.is_adaptive else [])]

    def run(self, model_kwargs: dict) -> None:
        """Decode until every row has ended; `model_kwargs` are what `generate` prepared."""
        longest, only_compiles = self.plan.max_length, self.fixed.only_compiles
        most = longest if only_compiles else self.sequences.prompt_length + FAR
        self.capacity = self._capacity(min(longest, most))
        if self.compile_config is not None and not only_compiles:
            self.capacity = self._ready_capacity()
        self.prefill(model_kwargs)
        self.lap("prefill_seconds")
        if self.sequences.active or only_compiles:
            self.begin_rounds()
            if self.fixed.is_adaptive:
                costs = self.fixed.costs or measure_costs(self.rounds)
                self.policy = AdaptiveDraft(self.fixed.shape, CostModel(costs))
            while self.sequences.active and not only_compiles:
                self.round()
            self.end_rounds()
        self.sequences.end()

    def begin_rounds(self) -> None:
        """Go on in buffers of constant shape, with steps that are compiled where they shall be."""
        root = self.sequences.last(list(range(len(self.sequences.lengths))))
        how = self.fixed.shape, self.plan.rule, tuple(self.sequences.processors)
        steps = self._steps()
        self.rounds = FixedRounds(self.drafting, self.target, root, *how, self.capacity, steps)
        if self.compile_config is not None and not steps.is_ready(*self.step_names):
            run_dry(self.rounds, *self.step_names)
            self.lap("warm_up_seconds")
        self._note_ends()

    def _steps(self) -> Steps:
        """The steps of this call's rounds, which all calls of a kind share."""
        processors = tuple(
            (type(one), tuple((name, repr(value)) for name, value in vars(one).items()))
            for one in self.sequences.processors
        )
        sizes = len(self.sequences.lengths), self.capacity, self.fixed.shape, self.plan.rule
        kind = *sizes, processors, self.drafting.kind, self.sequences.ids.device
        return steps_of(self.target.model, kind, self.compile_config)

    def _capacity(self, length: int) -> int:
        """What rows of `length` tokens need, with all that a round may write behind them."""
        return capacity_for(length + self.fixed.shape.depth + 1)

    def _ready_capacity(self) -> int:
        """The next capacity that is compiled, or the one at hand where none is near."""
        least = self.capacity
        while self.capacity <= SPARE * least:
            if self._steps().is_ready("draft", "verify"):
                return self.capacity
            self.capacity = capacity_for(self.capacity + 1)
        return least

    def kept(self, rows: list[int]) -> list[int]:
        """All rows: what has ended stays in its place."""
        return rows

    def round(self) -> None:
        """Draft where that pays, verify, and read what came out."""
        rows, self.lap_start = self.sequences.active, time.perf_counter()
        longest = max(self.sequences.lengths[row] for row in rows)
        if longest + self.fixed.shape.depth + 1 > self.capacity:  # go on in the next one
            self.end_rounds(goes_on=True)
            self.capacity = self._capacity(longest + self.capacity // 2)
            self.begin_rounds()
        rounds, tree = self.rounds, self.rounds.tree
        rounds.uniforms.draw_all()
        if is_plain := self.policy.is_plain:
            self.stats.is_stepped_back, self.keep_memory = True, False
            tree = root_only(rounds.root)
        else:
            rounds.run("draft")
        self.sequences.show(tree)
        self.lap("draft_seconds")
        found = self._tokens(rounds.run("token" if is_plain else "verify").tolist())
        self.lap("verify_seconds")
        counts = [len(new) for new in self.sequences.emit([found[row] for row in rows])]
        self._note_ends()
        self.stats.add_round(tree, counts)
        if not is_plain:
            size, tokens = (tree.levels, tree.tokens.shape[1]), sum(counts) / len(rows)
            self.policy.note(RoundSample(len(rows), *size, tokens))
        self.lap("other_seconds")

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
        """Tell the device which rows have ended."""
        is_active = host_tensor([not one for one in self.sequences.is_stopped])
        self.rounds.is_active.copy_(is_active, non_blocking=True)

    def end_rounds(self, goes_on: bool = False) -> None:
        """Go back to buffers that grow, for whoever continues the sequences."""
        lengths = [length - 1 for length in self.sequences.lengths]  # neither has read the newest
        self.target.cache = self.target.cache.grown(lengths)
        if goes_on or self.keep_memory:
            self.drafting.unfix(lengths)


def with_constant_shapes(loop: DecodingLoop, how: FixedPlan, is_prepared: bool) -> DecodingLoop:
    """The loop of a call: with constant shapes where it asks for them and can have them.

    A call asks in the way in which it asks transformers.

    Args:
        is_prepared: whether the target prepares the inputs of each round itself, or takes no tree.

    Raises:
        ValueError: if it cannot, and is there to compile and no more.
    """
    config = loop.collector.config
    if config.cache_implementation != "static" and compile_config_of(config) is None:
        return loop
    obstacle = _obstacle(loop, is_prepared)
    if obstacle is None:
        sides: tuple[Any, TargetRunner] = loop.drafting, loop.target
        return FixedLoop(*sides, loop.sequences, loop.collector, loop.policy, loop.plan, fixed=how)
    if how.only_compiles:
        raise ValueError(f"There is nothing to compile: {obstacle}.")
    logger.info(f"The rounds of this call have varying shapes: {obstacle}.")
    return loop


def _obstacle(loop: DecodingLoop, is_prepared: bool) -> str | None:
    """Why the rounds of a call cannot have constant shapes; None if they can."""
    model = loop.target.model
    devices = {*getattr(model, "hf_device_map", {"": model.device}).values()}
    devices.add(getattr(loop.drafting, "device", model.device))
    reasons = {
        "the drafter has none of that kind": not hasattr(loop.drafting, "fix"),
        "something needs one token after another, or scores of each": loop.verifier.is_stepwise,
        "the target prepares the inputs of each round itself": is_prepared,
        "the target takes no positions": not takes_positions(model),
        "the target's rotary embedding changes with the length": rotary_switches(model),
        "a layer of the target holds no text": {0, CONVOLUTION} & {*sliding_windows(model)},
        "the models are on several devices": len(devices) > 1,
    }
    return next((reason for reason, is_so in reasons.items() if is_so), None)
