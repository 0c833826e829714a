"""How the steps of fixed rounds are run: as they are, compiled, or captured in CUDA graphs.

In: `FixedRounds`. Out: the same steps, of which each is one graph. Graphs are kept with their
target, by all that a shape or a constant of them follows from, so that a call of the same kind
compiles nothing.
"""

import statistics
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from threading import Lock
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import CompileConfig, PreTrainedModel
from transformers.utils import logging

from ..caches.shared_keys import sharing_keys
from ..plain.costs import Costs
from .fixed_rounds import FixedRounds

logger = logging.get_logger(__name__)

Step = Callable[[FixedRounds], Tensor | None]
_ALL: tuple[Any, ...] = FixedRounds.draft, FixedRounds.verify, FixedRounds.token
STEPS: dict[str, Step] = {step.__name__: step for step in _ALL}
COMPILERS = ("torch._dynamo", "torch._inductor")  # whose errors come before anything has run
_COMPILING = Lock()  # one thread at a time
TRIALS = 3  # dry rounds, whose median says what a round costs


@dataclass
class Steps:
    """The steps of rounds of one kind, by name, and what is known of them."""

    by_name: dict[str, Step] = field(default_factory=lambda: dict(STEPS))
    done: set[str] = field(default_factory=set)  # that have run
    costs: list[Costs] = field(default_factory=list)  # of a round, once they were measured

    def run(self, name: str, rounds: FixedRounds) -> Tensor | None:
        """Run a step; the target's heads share keys also where it is traced."""
        if name in rounds.checked:
            return rounds.checked[name](rounds)
        step = self.by_name[name]
        with sharing_keys():
            if not isinstance(step, Compiled):
                return step(rounds)
            try:
                found = step(rounds)
            except Exception as error:
                if not type(error).__module__.startswith(COMPILERS):
                    raise
                # the target has changed since, and what it is now does not compile
                self.give_up(name, rounds, error)
                return self.by_name[name](rounds)
            unguarded = step.unguarded() if rounds.root.device.type == "cpu" else None
            if unguarded is not None:
                rounds.checked[name] = unguarded
            return found

    @property
    def is_ready(self) -> bool:
        """Whether draft and verification have run, so that nothing of them is left to compile."""
        return self.done >= {"draft", "verify"}

    def give_up(self, name: str, rounds: FixedRounds, error: Exception) -> None:
        """Run a step as it is from now on, and say so once."""
        self.by_name[name] = STEPS[name]
        rounds.forget_pass()
        reason = " ".join(str(error).strip().split("\n")[:2])
        logger.warning_once(
            f"The step `{name}` of a round cannot be compiled or captured with this target and"
            f" drafter, and runs as it is ({type(error).__name__}: {reason}). Leave out"
            " `compile_config` or `capture`, or call `torch._logging.set_logs(graph_breaks=True)`"
            " to see why."
        )


# by target, and by kind
_STEPS: "WeakKeyDictionary[PreTrainedModel, dict[Hashable, Steps]]" = WeakKeyDictionary()


def steps_of(
    model: PreTrainedModel, kind: Hashable, config: CompileConfig | None, is_captured: bool
) -> Steps:
    """The steps of rounds, compiled where a `config` asks for it; made once a process.

    Those that are captured are of one call, whose buffers they know by their addresses.

    Args:
        model: the target.
        kind: all that shapes and constants of the steps follow from, beside the target.
    """
    options = None if config is None else _options(config)
    kind = kind, repr(options), is_captured
    known = _STEPS.setdefault(model, {})
    if kind not in known:
        known[kind] = Steps()
        if options is not None:
            known[kind].by_name = {name: Compiled(step, options) for name, step in STEPS.items()}
    if is_captured:
        captured: dict[str, Step] = {name: Captured(step) for name, step in STEPS.items()}
        return Steps(captured, costs=known[kind].costs)
    return known[kind]


def _options(config: CompileConfig) -> dict[str, Any]:
    """Arguments of `torch.compile`: a step is one graph, and its shapes are constant."""
    options = {**config.to_dict(), "fullgraph": True, "dynamic": False}
    if options["options"] is not None or options["backend"] != "inductor":
        del options["mode"]  # torch takes one of the two, and other backends know no modes
    return options


class Compiled:
    """A step that compiles when it is first run, with a cache of graphs of its own.

    torch keeps graphs by code object and gives up after a few of one, so each kind has a copy.
    Before each run it checks all that the graph took for granted of the target, thousands of facts;
    a call has them checked once.
    """

    def __init__(self, step: Step, options: dict[str, Any]):
        code = step.__code__.replace(co_name=f"{step.__name__}_of_one_kind")
        self._plain = FunctionType(code, step.__globals__, step.__name__)
        self._guarded = torch.compile(self._plain, **options)

    def __call__(self, rounds: FixedRounds) -> Tensor | None:
        """Run the step, and compile what has not been or has changed."""
        # hooks change the text too, which torch leaves to whoever adds them
        with torch._dynamo.config.patch(skip_nnmodule_hook_guards=False):
            return self._guarded(rounds)

    def unguarded(self) -> Step | None:
        """The step without checks, for a call that has run it; None where graphs are several.

        Not on CUDA, where torch counts runs to manage the memory of its own CUDA graphs.
        """
        graphs = torch._dynamo.eval_frame._debug_get_cache_entry_list(self._plain.__code__)
        return FunctionType(graphs[0].code, self._plain.__globals__) if len(graphs) == 1 else None


class Captured:
    """A step in a CUDA graph: its kernels are launched at once, on the buffers of one call."""

    RUNS = 2  # before the capture, in which libraries choose their kernels and get their workspace

    def __init__(self, step: Step):
        self._step = step
        self._graph: torch.cuda.CUDAGraph | None = None
        self._output: Tensor | None = None

    def __call__(self, rounds: FixedRounds) -> Tensor | None:
        """Run the step; the first time it is captured, and must keep nothing of its rows."""
        if self._graph is None:
            self._capture(rounds)
        else:
            self._graph.replay()
        return self._output

    def _capture(self, rounds: FixedRounds) -> None:
        stream = torch.cuda.Stream(rounds.root.device)
        stream.wait_stream(torch.cuda.current_stream(rounds.root.device))
        with torch.cuda.stream(stream):
            for _ in range(self.RUNS):
                self._step(rounds)
        torch.cuda.current_stream(rounds.root.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = self._step(rounds)
        self._graph, self._output = graph, output


def run_dry(rounds: FixedRounds, *names: str) -> None:
    """Run each step once on rows that keep nothing, so that what compiles has compiled.

    A step that cannot be compiled or captured runs as it is from then on.
    """
    steps: Steps = rounds.steps
    rounds.is_active.fill_(False)
    for name in (name for name in names if name not in steps.done):
        try:
            with _COMPILING:
                steps.run(name, rounds)
        except Exception as error:
            if steps.by_name[name] is STEPS[name]:
                raise
            steps.give_up(name, rounds, error)
        steps.done.add(name)
    rounds.is_active.fill_(True)


def measure_costs(rounds: FixedRounds) -> Costs:
    """What rounds cost in passes of one token: measured once, in rounds that keep nothing.

    Once in a process, so that calls alike decide alike.
    """
    if not rounds.steps.costs:
        rounds.is_active.fill_(False)
        seconds = {name: [_timed(rounds, name) for _ in range(TRIALS)] for name in STEPS}
        draft, verify, token = (statistics.median(seconds[name]) for name in STEPS)
        tree = rounds.tree
        more = max(verify / token - 1, 0.0) / max(tree.tokens.shape[1] - 1, 1)
        rounds.steps.costs.append(Costs(base=1.0, level=draft / token / tree.levels, node=more))
        rounds.is_active.fill_(True)
    return rounds.steps.costs[0]


def _timed(rounds: FixedRounds, name: str) -> float:
    """Seconds of a step, with what a device has still to do."""
    start = time.perf_counter()
    rounds.run(name)
    rounds.root.tolist()
    return time.perf_counter() - start
