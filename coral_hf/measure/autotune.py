"""A search for the tree that pays best on this machine, over short calls in a given time.

In: a drafter, its target and prompts. Out: a Tuning. One setting is changed at a time, each tree is
compared with plain decoding of the same prompt just before or after it, and what was measured on
the way gives the costs by which sampling decides how much to draft.
"""

import time
from collections.abc import Sequence
from itertools import combinations, cycle
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..decoding.settings import TREE_DEFAULTS
from ..target import tree_obstacle
from .calls import Bench, Call, sampling_arguments

CANDIDATES = {
    "tree_nodes": (8, 16, 32, 60, 100),
    "tree_depth": (2, 4, 6, 8),
    "tree_top_k": (1, 4, 10),
}
NEW_TOKENS = 32  # of a call
WARMUP_TOKENS = 8
FINALISTS = 3  # trees that are measured again while there is time
LEAST_COST = 1e-4  # plain passes, of a level or a node

Tree = dict[str, int]


class Trial(NamedTuple):
    """One call with one tree; seconds are those of its rounds, without the prefill."""

    tree: Tree
    plain: float  # seconds of a plain pass at the time
    seconds: float
    draft: float  # of the seconds, the drafter's
    tokens: int
    rounds: int
    levels: int
    nodes: int  # over all rounds, the roots included

    @property
    def speedup(self) -> float:
        """The speed-up over plain decoding."""
        return self.plain * self.tokens / self.seconds


class Tuning(NamedTuple):
    """What `autotune` has found."""

    tree: Tree
    costs: dict[str, float]  # `base`, `level` and `node`, in plain passes of the target
    speedup: float  # over plain decoding, the prefill left out


def autotune(
    drafter: PreTrainedModel,
    target: PreTrainedModel,
    prompts: Sequence[Tensor | str],
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_seconds: float = 45.0,
) -> Tuning:
    """Find the tree that pays best for a drafter and its target on this machine, and keep it.

    The tree and the costs go into the drafter's `generation_config`, which `save_pretrained` saves.

    Args:
        prompts: token ids (1, length) each, or texts; as different as those to come.
        tokenizer: the target's, for prompts that are texts.
        max_seconds: no new call begins after them.

    Raises:
        ValueError: without prompts, for texts without a tokenizer, and for a prompt that is
            answered with a single token.
    """
    ids = [_encode(prompt, tokenizer).to(target.device) for prompt in prompts]
    if not ids:
        raise ValueError("`prompts` is empty; give at least one.")
    base = target.get_base_model() if hasattr(target, "get_base_model") else target
    own = drafter.generation_config
    tree = {name: getattr(own, name, value) for name, value in TREE_DEFAULTS.items()}
    if tree_obstacle(base) is not None:  # a chain has a depth and nothing else
        tree = {"tree_depth": tree["tree_depth"]}
    tuning = Search(drafter, target, ids, max_seconds).run(tree)
    for name, value in tuning.tree.items():
        setattr(own, name, value)
    own.draft_costs = tuning.costs
    return tuning


def _encode(prompt: Tensor | str, tokenizer: PreTrainedTokenizerBase | None) -> Tensor:
    """The token ids (1, length) of a prompt."""
    if not isinstance(prompt, str):
        return prompt
    if tokenizer is None:
        raise ValueError("`prompts` has texts, but `tokenizer` is None; give the target's.")
    return tokenizer(prompt, return_tensors="pt").input_ids


class Search:
    """Measures trees beside plain decoding, prompt after prompt, until the time is up."""

    def __init__(
        self,
        drafter: PreTrainedModel,
        target: PreTrainedModel,
        prompts: Sequence[Tensor],
        max_seconds: float,
    ):
        """Start the clock; `prompts` are (1, length) each."""
        self.trials: list[Trial] = []
        self._drafter, self._target = drafter, target
        self._prompts = cycle(prompts)
        self._end = time.perf_counter() + max_seconds

    @property
    def is_over(self) -> bool:
        """Whether the time is up."""
        return time.perf_counter() > self._end

    def run(self, start: Tree) -> Tuning:
        """Search from a tree; only the settings that it has are searched."""
        self._compare(start, WARMUP_TOKENS)
        candidates = {name: values for name, values in CANDIDATES.items() if name in start}
        best = start
        with logging.tqdm(total=1 + sum(map(len, candidates.values())), desc="autotune") as bar:
            self.measure(best)
            bar.update()
            for name, values in candidates.items():
                for value in values:
                    if value != best[name] and not self.is_over:
                        self.measure(best | {name: value})
                        bar.update()
                best = self.ranking()[0]
        while not self.is_over:
            for again in self.ranking()[:FINALISTS]:
                if not self.is_over:
                    self.measure(again)
        best = self.ranking()[0]
        return Tuning(best, fit_costs(self.trials), self.speedup(best))

    def ranking(self) -> list[Tree]:
        """The trees that were measured, the fastest first."""
        trees = [trial.tree for trial in self.trials]
        distinct = [tree for index, tree in enumerate(trees) if tree not in trees[:index]]
        return sorted(distinct, key=self.speedup, reverse=True)

    def speedup(self, tree: Tree) -> float:
        """The median speed-up of a tree over its calls."""
        return median(trial.speedup for trial in self.trials if trial.tree == tree)

    def measure(self, tree: Tree) -> None:
        """Measure a tree on the next prompt, beside plain decoding of it."""
        plain, call = self._compare(tree, NEW_TOKENS)
        if not call.num_rounds:
            raise ValueError(
                "One of `prompts` is answered with a single token; give prompts with longer"
                " answers."
            )
        self.trials.append(
            Trial(
                tree,
                plain=_round_seconds(plain) / plain.num_rounds,
                seconds=_round_seconds(call),
                draft=call.stage_seconds["draft"],
                tokens=sum(call.round_lengths),
                rounds=call.num_rounds,
                levels=call.num_levels,
                nodes=call.num_nodes,
            )
        )

    def _compare(self, tree: Tree, num_tokens: int) -> tuple[Call, Call]:
        """The calls of plain decoding and of a tree; in both our loop counts its seconds."""
        common = sampling_arguments(0.0, num_tokens) | {"assistant_model": self._drafter}
        plain, drafted = {"speculation": "never"}, {"speculation": "always", **tree}
        bench = Bench(self._target, {"plain": common | plain, "tree": common | drafted})
        ids = next(self._prompts)  # (1, length)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        calls = {call.method: call for call in bench.compare(batch, item=len(self.trials))}
        return calls["plain"], calls["tree"]


def _round_seconds(call: Call) -> float:
    """The seconds of a call's rounds alone, as the loop counted them."""
    return sum(call.stage_seconds[stage] for stage in ("draft", "verify", "other"))


def fit_costs(trials: Sequence[Trial]) -> dict[str, float]:
    """The cost of a round, a level and a node in plain passes.

    A round's cost beside its levels is base + node · nodes beside the root; medians of slopes
    (Theil and Sen) and of heights, since a call that the machine held up is far off the line.
    """
    level = median(t.draft / t.plain / max(t.levels, 1) for t in trials)
    points = [(t.nodes / t.rounds - 1, (t.seconds - t.draft) / t.plain / t.rounds) for t in trials]
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in combinations(points, 2) if a[0] != b[0]]
    node = max(median(slopes or [0.0]), LEAST_COST)
    base = max(median(cost - node * nodes for nodes, cost in points), 1.0)
    return {"base": base, "level": max(level, LEAST_COST), "node": node}
