"""Training stages: what each trains, and the draft head that a drafter gets for it.

stage        trains                         with the rest
drafter      the drafter                    -
router       its router                     frozen
low_rank     its low-rank head              frozen
joint        the drafter and its router     -
"""

from typing import Any

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..drafters.coral import CoralDrafter
from ..drafters.eagle3 import Eagle3Drafter
from ..drafters.model import Drafter
from ..target import Target, text_config
from .arguments import MOST_GROUPS, CoralTrainingArguments
from .grouping import group_order

# the draft head that a stage trains; none of `drafter`
HEAD_OF = {"router": "router", "low_rank": "low_rank", "joint": "router"}
# the settings of a new head; the first is None in the config of a drafter without one
HEAD_SETTINGS = {
    "router": ("num_groups", "num_active_groups", "grouping"),
    "low_rank": ("head_rank",),
}
# fields of the config of a drafter whose head a stage trains, so that it is read from now on
TRAINED: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("router", "joint"), {"is_router_trained": True, "draft_head": "routed"}),
    "low_rank": {"draft_head": "low_rank"},
}


def follow_vocabulary(
    drafter: CoralDrafter | PeftModel, target: PreTrainedModel, stage: str
) -> None:
    """Give a drafter the size of its target's vocabulary, which may have gained or lost tokens.

    One with a router, or with frequent tokens that are lost, keeps those of the vocabulary before.
    """
    size, heads, config = text_config(target).vocab_size, drafter.heads, drafter.config
    if size == config.vocab_size:
        return
    if heads.router is not None and HEAD_OF.get(stage) == "router":
        raise ValueError(
            f"`vocab_size` of the target is {size}, but the drafter's router has groups of"
            f" {config.vocab_size} tokens. Call drafter.heads.remove_router() (on the command"
            " line --fresh-head) to train a new one."
        )
    is_lost = heads.hot_tokens is not None and int(heads.hot_tokens.max()) >= size
    if heads.router is None and not is_lost:
        config.vocab_size = size


def add_heads(
    drafter: CoralDrafter | Eagle3Drafter,
    args: CoralTrainingArguments,
    target: Target,
    rows,
    tokenizer: PreTrainedTokenizerBase | None,
) -> None:
    """Add the draft head that a stage trains; an existing one is trained further.

    Args:
        rows: the training rows, from which groupings are counted.
        tokenizer: the target's; ids beyond its tokens pad the vocabulary.
    """
    check_head_settings(drafter, args)
    head = HEAD_OF.get(args.stage)
    if head == "router" and drafter.heads.router is None:
        vocab_size = drafter.config.vocab_size
        number, grouping = args.num_groups or default_groups(vocab_size), args.grouping or "kmeans"
        num_tokens = None if tokenizer is None else min(len(tokenizer), vocab_size)
        order = group_order(grouping, target, rows, number, args.seed, num_tokens)
        if order is not None:  # a target may have tokens that the drafter's own LM head has not
            order = order[order < vocab_size]
        active = args.num_active_groups or max(number // 8, 1)
        drafter.heads.add_router(number, active, order, grouping)
    if head == "low_rank" and drafter.heads.low_rank is None:
        rank = args.head_rank or default_rank(drafter.config.hidden_size)
        drafter.heads.add_low_rank_head(rank, target.head)


def default_groups(vocab_size: int) -> int:
    """Return the number of groups of a new router: 64, or fewer of at least 64 tokens, but 8."""
    return max(min(MOST_GROUPS, vocab_size // 64), min(8, vocab_size))


def default_rank(hidden_size: int) -> int:
    """Return the number of channels of a new low-rank head: 64, or fewer of a small target."""
    return min(64, hidden_size)


def check_head_settings(drafter: Drafter | PeftModel, args: CoralTrainingArguments) -> None:
    """Raise a ValueError for a head that the drafter cannot have, and for a setting of a new one
    that differs from the head to be trained.
    """
    names = HEAD_SETTINGS.get(HEAD_OF.get(args.stage, ""), ())
    if names and isinstance(drafter, Eagle3Drafter):
        drafter.check_whole()
    if not names or getattr(drafter.config, names[0]) is None:
        return
    for name in names:
        own, given = getattr(drafter.config, name), getattr(args, name)
        if given not in (None, own):
            raise ValueError(
                f"`{name}` is {given!r}, but the drafter has a head with {own!r}, which this stage"
                " trains further. Leave it out, or first call drafter.heads.remove_router() or"
                " remove_low_rank_head() (on the command line --fresh-head)."
            )


def freeze_others(model: nn.Module, stage: str) -> None:
    """Freeze the weights, of any shape, that the stage does not train; embeddings in all stages."""
    for name, parameter in model.named_parameters():
        if name.startswith("embed_tokens."):
            parameter.requires_grad_(False)
        elif name.startswith("heads."):
            parameter.requires_grad_(name.split(".")[1] == HEAD_OF.get(stage))
        else:
            parameter.requires_grad_(stage in ("drafter", "joint"))
