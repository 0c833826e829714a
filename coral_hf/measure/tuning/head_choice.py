"""Choice of a drafter's draft head: those that it has are measured in turn, the fastest is read.

In: a drafter, its target and prompts. Out: τ and speed by head. The config names the fastest, and
the last entry of the training record keeps all figures, for the card.
"""

import time
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import logging

from ...heads.collection import DraftHeads
from ...target import read_target
from ..calls import Bench, Call, sampling_arguments
from ..prompts import left_padded
from ..report import describe_environment
from ..summary import summarise

logger = logging.get_logger(__name__)
NEW_TOKENS = 32  # of a call
PROMPTS = 8  # are enough

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
        "low_rank": heads.low_rank is not None,
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
    found = _figures(names, calls)
    if found:
        _keep(drafter, target, found, num_prompts=calls[-1].item + 1)
    return found


def _figures(names: Sequence[str], calls: Sequence[Call]) -> Figures:
    """Sum up calls by head; nothing where none decoded a token after the prefill."""
    rows = {row.method: row for row in summarise(calls, "num_rows")}
    return {
        name: {"tau": rows[name].tau_per_token, "speedup": rows[name].decoding_speedup}
        for name in names
        if rows[name].decoding_speedup
    }


def _keep(
    drafter: PreTrainedModel, target: PreTrainedModel, found: Figures, num_prompts: int
) -> None:
    """Let the config name the fastest head, and the training record what was measured."""
    fastest = max(found, key=lambda name: found[name]["speedup"])
    drafter.heads.configure(draft_head=fastest)
    shown = ", ".join(f"{name} {one['speedup']:.2f}x" for name, one in found.items())
    logger.info(
        f"`draft_head` is {fastest!r}: over plain decoding of {num_prompts} prompts {shown}."
    )
    if drafter.training_record:
        facts = describe_environment(target)
        drafter.training_record[-1]["heads"] = {
            "figures": found,
            "prompts": num_prompts,
            "hardware": facts.hardware,
            "dtype": facts.dtype,
        }
