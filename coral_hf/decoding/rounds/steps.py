"""How the steps of fixed rounds are run: as they are, or compiled.

In: `FixedRounds`. Out: the same steps, of which each is one graph. Graphs are kept with their
target, by all that a shape or a constant of them follows from, so that a call of the same kind
compiles nothing.
"""

import statistics
import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
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
_COMPILING = Lock()  # one thread at a time
TRIALS = 3  # dry rounds, whose median says what a round costs


@dataclass
class Steps:
    """The steps of rounds of one kind, by name, and what is known of them."""

    by_name: dict[str, Step] = field(default_factory=lambda: dict(STEPS))
    done: set[str] = field(default_factory=set)  # that have been compiled
    costs: list[Costs] = field(default_factory=list)  # of a round, once they were measured

    def run(self, name: str, rounds: FixedRounds) -> Tensor | None:
        """Run a step; the target's heads share keys also where it is traced."""
        if name in rounds.checked:
            return rounds.checked[name](rounds)
        step = self.by_name[name]
        with sharing_keys():
            found = step(rounds)
        if isinstance(step, Compiled) and rounds.root.device.type == "cpu":
            if (unguarded := step.unguarded()) is not None:
                rounds.checked[name] = unguarded
        return found

    def is_ready(self, *names: str) -> bool:
        """Whether nothing of some steps is left to compile."""
        return self.done >= {*names}


# by target, and by kind
_STEPS: "WeakKeyDictionary[PreTrainedModel, dict[Hashable, Steps]]" = WeakKeyDictionary()


def steps_of(model: PreTrainedModel, kind: Hashable, config: CompileConfig | None) -> Steps:
    """The steps of rounds, compiled where a `config` asks for it; made once a process.

    Args:
        model: the target.
        kind: all that shapes and constants of the steps follow from, beside the target.
    """
    options = None if config is None else _options(config)
    kind, known = (kind, repr(options)), _STEPS.setdefault(model, {})
    if kind not in known:
        known[kind] = Steps()
        if options is not None:
            known[kind].by_name = {name: Compiled(step, options) for name, step in STEPS.items()}
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


def run_dry(rounds: FixedRounds, *names: str) -> None:
    """Compile steps by running each once, in rounds that keep nothing.

    A step that cannot be compiled runs as it is from then on, which is said once.
    """
    steps: Steps = rounds.steps
    with _idle(rounds), _COMPILING:
        for name in (name for name in names if name not in steps.done):
            try:
                steps.run(name, rounds)
            except Exception as error:
                reason = " ".join(str(error).strip().split("\n")[:2])
                logger.warning_once(
                    f"The step `{name}` of a round cannot be compiled with this target and drafter,"
                    f" and runs as it is ({type(error).__name__}: {reason}). Leave out"
                    " `compile_config`, or call `torch._logging.set_logs(graph_breaks=True)` to see"
                    " why."
                )
                steps.by_name[name] = STEPS[name]
            steps.done.add(name)


def measure_costs(rounds: FixedRounds) -> Costs:
    """What rounds cost in passes of one token: measured once, in rounds that keep nothing.

    Once in a process, so that calls alike decide alike.
    """
    if not rounds.steps.costs:
        with _idle(rounds):
            seconds = {name: [_timed(rounds, name) for _ in range(TRIALS)] for name in STEPS}
        draft, verify, token = (statistics.median(seconds[name]) for name in STEPS)
        tree = rounds.tree
        more = max(verify / token - 1, 0.0) / max(tree.tokens.shape[1] - 1, 1)
        rounds.steps.costs.append(Costs(base=1.0, level=draft / token / tree.levels, node=more))
    return rounds.steps.costs[0]


@contextmanager
def _idle(rounds: FixedRounds) -> Iterator[None]:
    """Let rounds keep nothing of any row."""
    is_active = rounds.is_active.clone()
    rounds.is_active.fill_(False)
    yield
    rounds.is_active.copy_(is_active)


def _timed(rounds: FixedRounds, name: str) -> float:
    """Seconds of a step, with what a device has still to do."""
    start = time.perf_counter()
    rounds.run(name)
    rounds.root.tolist()
    return time.perf_counter() - start
