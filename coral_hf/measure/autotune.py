"""What pays best on this machine, found by measuring it: a drafter's draft head, and its tree.

In: a drafter, its target and prompts. Out: τ and speed by head, and a Tuning. The config names the
fastest head, and the last entry of the training record keeps all figures, for the card. Then one
setting of the tree is changed at a time, each tree is compared with plain decoding of the same
prompt just before it, and all measurements together give the costs by which sampling decides how
much to draft.
"""

import time
from collections.abc import Iterator, Sequence
from itertools import combinations, cycle
from statistics import median
from typing import Any, NamedTuple

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..decoding.guard import TREE, judge_target
from ..decoding.settings import TREE_DEFAULTS
from ..heads.collection import DraftHeads
from ..target import read_target
from .calls import ROUND_STAGES, Bench, Call, sampling_arguments
from .prompts import Prompt, encode, left_padded
from .report import describe_environment
from .summary import summarise

logger = logging.get_logger(__name__)

CANDIDATES = {
    "tree_nodes": (8, 16, 32, 60, 100),
    "tree_depth": (2, 4, 6, 8),
    "tree_top_k": (1, 4, 10),
}
NEW_TOKENS = 32  # of a call
PROMPTS = 8  # are enough to choose a head
WARMUP_TOKENS = 8
FINALISTS = 3  # trees that are measured again while there is time
LEAST_COST = 1e-4  # plain passes, of a level or a node

Tree = dict[str, int]
Figures = dict[str, dict[str, Any]]  # by head: `tau` and `speedup`


def heads_of(drafter: PreTrainedModel, target: PreTrainedModel) -> list[str]:
    """List the draft heads that a drafter has, the full one first; none of a family without them.

    Those in eight bits are left out: a private copy of the target's LM head is for who asks for it.
    Of a target whose LM head cannot be read in parts there is the full one alone.
    """
    heads = getattr(drafter, "heads", None)
    if not isinstance(heads, DraftHeads):
        return []
    if not read_target(target).head.is_readable:
        return ["full"]
    parts = {
        "full": True,
        "routed": heads.router is not None and drafter.config.is_router_trained,
        "frequency": heads.hot_tokens is not None,
    }
    return [name for name, is_there in parts.items() if is_there]


def choose_head(
    drafter: PreTrainedModel,
    target: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    max_seconds: float = 60.0,
) -> Figures:
    """Let a drafter read the fastest of the draft heads that it has.

    Every prompt is answered greedily by the target alone and with each head, with the drafter's own
    tree; the first one untimed before that.

    Args:
        prompts: token ids, (length,) each, as varied as those to come; some eight are enough.
        max_seconds: after which no new prompt is begun.

    Returns:
        by head, its τ and its speed-up over plain `generate`, the prefill left out, the median over
        prompts; nothing where there is one head, or no prompt was answered with two tokens.
    """
    names = heads_of(drafter, target)
    if len(names) < 2:
        return {}
    common = sampling_arguments(0.0, NEW_TOKENS)
    common["pad_token_id"] = drafter.config.pad_token_id or 0
    drafting = common | {"assistant_model": drafter, "speculation": "always"}
    methods = {name: drafting | {"draft_head": name} for name in names}
    bench = Bench(target, {"plain": common} | methods, warmup=1)
    batches = [left_padded([prompt], 0, target.device) for prompt in prompts]
    calls: list[Call] = []
    bench.warm_up(batches)
    end = time.perf_counter() + max_seconds
    for item, batch in enumerate(batches):
        calls += bench.compare(batch, item)
        if time.perf_counter() > end:
            break
    rows = {row.method: row for row in summarise(calls, "num_rows")}
    found: Figures = {
        name: {"tau": rows[name].tau_per_token, "speedup": rows[name].decoding_speedup}
        for name in names
        if rows[name].decoding_speedup
    }
    if found:
        num_prompts, fastest = item + 1, max(found, key=lambda name: found[name]["speedup"])
        drafter.heads.configure(draft_head=fastest)
        shown = ", ".join(f"{name} {one['speedup']:.2f}x" for name, one in found.items())
        logger.info(f"`draft_head` is {fastest!r}: of {num_prompts} prompts, over plain, {shown}.")
        if drafter.training_record:
            facts = describe_environment(target)
            own = {"prompts": num_prompts, "hardware": facts.hardware, "dtype": facts.dtype}
            drafter.training_record[-1]["heads"] = {"figures": found, **own}
    return found


class Trial(NamedTuple):
    """One call with one tree."""

    tree: Tree
    plain: float  # seconds of a plain pass at the time
    call: Call

    @property
    def speedup(self) -> float:
        """The speed-up over plain decoding, the prefill left out."""
        return self.plain * sum(self.call.round_lengths) / stage_seconds(self.call)


def stage_seconds(call: Call) -> float:
    """Sum the seconds of a call's rounds, without the prefill and the set-up of `generate`."""
    return sum(call.stage_seconds[stage] for stage in ROUND_STAGES)


class Tuning(NamedTuple):
    """The result of `autotune`."""

    heads: Figures  # of a drafter that has several
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
    """Find the fastest head and tree for a drafter and its target on this machine, and keep them.

    The head goes into the drafter's config, the tree and the costs into its `generation_config`;
    `save_pretrained` saves both.

    Args:
        prompts: token ids (1, length) each, or texts; as varied as those to come.
        tokenizer: the target's, for prompts that are texts.
        max_seconds: after which no new call begins; a quarter of them for the head.

    Raises:
        ValueError: for no prompts, texts without a tokenizer, or a prompt that is answered with a
            single token.
    """
    if not prompts:
        raise ValueError("`prompts` is empty; give at least one.")
    base = target.get_base_model() if hasattr(target, "get_base_model") else target
    own = drafter.generation_config
    tree = {name: getattr(own, name, value) for name, value in TREE_DEFAULTS.items()}
    if judge_target(base).way != TREE:  # a chain has a depth and nothing else
        tree = {"tree_depth": tree["tree_depth"]}
    encoded = [_encode(prompt, tokenizer).to(target.device) for prompt in prompts]
    end = time.perf_counter() + max_seconds
    some = [ids[0] for ids in encoded[:PROMPTS]]  # (length,) each
    heads = choose_head(drafter, target, some, max_seconds / 4)
    batches = cycle(left_padded(ids, 0) for ids in encoded)

    def measured(tree: Tree, num_tokens: int = NEW_TOKENS) -> Trial:
        common = sampling_arguments(0.0, num_tokens) | {"assistant_model": drafter}
        plain, drafted = {"speculation": "never"}, {"speculation": "always", **tree}
        bench = Bench(target, {"plain": common | plain, "tree": common | drafted})
        alone, call = bench.compare(next(batches))  # our loop counts both
        if not call.num_rounds:
            raise ValueError("One of `prompts` is answered with a single token; leave it out.")
        return Trial(tree, stage_seconds(alone) / alone.num_rounds, call)

    measured(tree, WARMUP_TOKENS)
    trials: list[Trial] = []
    for candidate in search(tree, trials):
        trials.append(measured(candidate))
        if time.perf_counter() > end:
            break
    best, costs = ranking(trials)[0], fit_costs(trials)
    for name, value in {**best, "draft_costs": costs}.items():
        setattr(own, name, value)
    return Tuning(heads, best, costs, speedup(best, trials))


def _encode(prompt: Tensor | str, tokenizer: PreTrainedTokenizerBase | None) -> Tensor:
    """Return the token ids of a prompt, (1, length)."""
    if not isinstance(prompt, str):
        return prompt
    if tokenizer is None:
        raise ValueError("`prompts` has texts, but `tokenizer` is None; give the target's.")
    return encode(Prompt("prompt", "0", text=prompt), tokenizer)


def search(start: Tree, trials: Sequence[Trial]) -> Iterator[Tree]:
    """Yield the trees to measure: one setting changed at a time, then the best few repeatedly.

    Args:
        start: a tree; only the settings that it has are searched.
        trials: all measurements so far; the caller appends to them after each tree.
    """
    yield start
    changes = [{name: value} for name in start for value in CANDIDATES[name]]
    for change in logging.tqdm(changes, desc="autotune"):
        best = ranking(trials)
        if best[0] | change not in best:
            yield best[0] | change
    while True:
        yield from ranking(trials)[:FINALISTS]


def ranking(trials: Sequence[Trial]) -> list[Tree]:
    """Sort the trees that were measured, the fastest first."""
    distinct = {tuple(trial.tree.items()): trial.tree for trial in trials}.values()
    return sorted(distinct, key=lambda tree: -speedup(tree, trials))


def speedup(tree: Tree, trials: Sequence[Trial]) -> float:
    """Return the median speed-up of a tree over its trials."""
    return median(trial.speedup for trial in trials if trial.tree == tree)


def fit_costs(trials: Sequence[Trial]) -> dict[str, float]:
    """Fit the cost of a round, a level and a node in plain passes.

    A round's cost beside its levels is base + node · nodes beside the root; medians of slopes
    (Theil and Sen) and of heights, since a call that the machine delayed is an outlier.
    """
    levels, points = [], []
    for _, plain, call in trials:
        draft, rounds = call.stage_seconds["draft"], call.num_rounds
        levels.append(draft / plain / max(call.num_levels, 1))
        cost = (stage_seconds(call) - draft) / plain / rounds
        points.append((call.num_nodes / rounds - 1, cost))
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in combinations(points, 2) if a[0] != b[0]]
    node = max(median(slopes or [0.0]), LEAST_COST)
    base = max(median(cost - node * nodes for nodes, cost in points), 1.0)
    return {"base": base, "level": max(median(levels), LEAST_COST), "node": node}
