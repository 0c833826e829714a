"""Which tree pays best on this machine: a search over short runs, in a time that is given.

In: a drafter, its target and prompts. Out: a `Tuning`. One setting is changed at a time, each run
is compared with a plain one that was timed just before it, and what was measured on the way gives
the costs by which sampling decides how much to draft.
"""

import time
from collections.abc import Sequence
from itertools import combinations, cycle
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..decoding.settings import TREE_DEFAULTS
from ..target import tree_obstacle

CANDIDATES = {
    "tree_nodes": (8, 16, 32, 60, 100),
    "tree_depth": (2, 4, 6, 8),
    "tree_top_k": (1, 4, 10),
}
NEW_TOKENS = 32  # of a run
FINALISTS = 3  # trees
LEAST_COST = 1e-4  # plain passes, of a level or a node

Tree = dict[str, int]


class Trial(NamedTuple):
    """One run with one tree; seconds are those of its rounds, without the prompt."""

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
        """Over plain decoding."""
        return self.plain * self.tokens / self.seconds


class Tuning(NamedTuple):
    """What `autotune` has found."""

    tree: Tree
    costs: dict[str, float]  # `base`, `level` and `node`, in plain passes of the target
    speedup: float  # over plain decoding, the prompt's pass left out


def read_prompts(
    prompts: Sequence[Tensor | str],
    tokenizer: PreTrainedTokenizerBase | None,
    device: torch.device,
) -> list[Tensor]:
    """Token ids of prompts, (1, length) each; texts need the target's tokenizer."""
    if not prompts:
        raise ValueError("`prompts` is empty; give at least one.")
    ids = []
    for prompt in prompts:
        if isinstance(prompt, str):
            if tokenizer is None:
                raise ValueError("`prompts` has texts, but `tokenizer` is None; give the target's.")
            prompt = tokenizer(prompt, return_tensors="pt").input_ids
        ids.append(prompt.to(device))
    return ids


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
        max_seconds: no new run begins after them.
    """
    ids = read_prompts(prompts, tokenizer, target.device)
    base = target.get_base_model() if hasattr(target, "get_base_model") else target
    own = drafter.generation_config
    tree = {name: getattr(own, name, value) for name, value in TREE_DEFAULTS.items()}
    if tree_obstacle(base) is not None:  # a chain has a depth and nothing else
        tree = {"tree_depth": tree["tree_depth"]}
    tuning = search(drafter, target, ids, tree, max_seconds)
    for name, value in tuning.tree.items():
        setattr(own, name, value)
    own.draft_costs = tuning.costs
    return tuning


def search(
    drafter: PreTrainedModel,
    target: PreTrainedModel,
    prompts: Sequence[Tensor],
    tree: Tree,
    max_seconds: float,
) -> Tuning:
    """The best tree and the costs of a round.

    Args:
        prompts: (1, length) each.
        tree: where the search starts; only the settings that it has are searched.
    """
    candidates = {name: CANDIDATES[name] for name in CANDIDATES if name in tree}
    bench = Bench(drafter, target, prompts, time.perf_counter() + max_seconds)
    bench.warm_up(tree)
    best = tree
    with logging.tqdm(total=1 + sum(map(len, candidates.values())), desc="autotune") as bar:
        bench.measure(best)
        bar.update()
        for name, values in candidates.items():
            for value in values:
                if value != best[name] and not bench.is_over:
                    bench.measure(best | {name: value})
                    bar.update()
            best = max(bench.trees, key=bench.speedup)
    while not bench.is_over:  # the best few again, as long as there is time
        for again in sorted(bench.trees, key=bench.speedup)[-FINALISTS:]:
            if not bench.is_over:
                bench.measure(again)
    best = max(bench.trees, key=bench.speedup)
    return Tuning(best, fit_costs(bench.trials), bench.speedup(best))


class Bench:
    """Runs trees and plain decoding in turn, prompt after prompt."""

    def __init__(
        self,
        drafter: PreTrainedModel,
        target: PreTrainedModel,
        prompts: Sequence[Tensor],
        end: float,
    ):
        """`end`: when to stop, on the clock of `time.perf_counter`."""
        self.trials: list[Trial] = []
        self._drafter, self._target, self._end = drafter, target, end
        self._prompts = cycle(prompts)

    @property
    def is_over(self) -> bool:
        """Whether the time is up."""
        return time.perf_counter() > self._end

    @property
    def trees(self) -> list[Tree]:
        """Those that were measured, each once."""
        trees = [trial.tree for trial in self.trials]
        return [tree for index, tree in enumerate(trees) if tree not in trees[:index]]

    def speedup(self, tree: Tree) -> float:
        """The median over the runs of a tree."""
        return median(trial.speedup for trial in self.trials if trial.tree == tree)

    def warm_up(self, tree: Tree) -> None:
        """Run what is slower the first time."""
        prompt = next(self._prompts)
        self._run(prompt, tree, tokens=8)
        self._run(prompt, None, tokens=8)

    def measure(self, tree: Tree) -> None:
        """Run a tree on the next prompt, just after a plain run on it."""
        prompt = next(self._prompts)
        plain, stats = self._run(prompt, None), self._run(prompt, tree)
        if not stats.num_rounds:
            raise ValueError(
                "One of `prompts` is answered with a single token; give prompts with longer"
                " answers."
            )
        self.trials.append(
            Trial(
                tree,
                plain=plain.round_seconds / plain.num_rounds,
                seconds=stats.round_seconds,
                draft=stats.draft_seconds,
                tokens=sum(stats.round_lengths),
                rounds=stats.num_rounds,
                levels=stats.num_levels,
                nodes=stats.num_nodes,
            )
        )

    def _run(self, prompt: Tensor, tree: Tree | None, tokens: int = NEW_TOKENS) -> Any:
        """The `DecodingStats` of a run; None is plain decoding."""
        choice = {"speculation": "never"} if tree is None else {"speculation": "always", **tree}
        out = self._target.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            assistant_model=self._drafter,
            do_sample=False,
            max_new_tokens=tokens,
            return_dict_in_generate=True,
            **choice,
        )
        return out.stats


def fit_costs(trials: Sequence[Trial]) -> dict[str, float]:
    """The cost of a round, a level and a node in plain passes.

    A round's cost beside its levels is base + node · nodes beside the root; medians of slopes
    (Theil and Sen) and of heights, since a run that the machine held up is far off the line.
    """
    level = median(t.draft / t.plain / max(t.levels, 1) for t in trials)
    points = [(t.nodes / t.rounds - 1, (t.seconds - t.draft) / t.plain / t.rounds) for t in trials]
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in combinations(points, 2) if a[0] != b[0]]
    node = max(median(slopes or [0.0]), LEAST_COST)
    base = max(median(cost - node * nodes for nodes, cost in points), 1.0)
    return {"base": base, "level": max(level, LEAST_COST), "node": node}
