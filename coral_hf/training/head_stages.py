"""What each stage trains, and the draft heads that a drafter gets for it.

stage        trains                         with the rest
drafter      the drafter                    -
router       its router                     frozen
low_rank     its low-rank head              frozen
joint        the drafter and its router     -
"""

from torch import nn

from ..modeling_coral import CoralDrafter
from ..target import Target
from .arguments import CoralTrainingArguments
from .grouping import group_order

HEADS = ("router.", "low_rank.")
TRAINED_HEADS = {"drafter": (), "router": HEADS[:1], "low_rank": HEADS[1:], "joint": HEADS[:1]}
FROZEN_DRAFTER = ("router", "low_rank")


def add_heads(
    drafter: CoralDrafter,
    args: CoralTrainingArguments,
    target: Target,
    rows,
    num_tokens: int | None = None,
) -> None:
    """Give the drafter the head that its stage trains, where it has none.

    Args:
        rows: of training, from which groupings are counted.
        num_tokens: of the tokenizer; ids from there on pad the vocabulary.
    """
    if args.stage in ("router", "joint") and drafter.router is None:
        order = group_order(args.grouping, target, rows, args.num_groups, args.seed, num_tokens)
        drafter.add_router(args.num_groups, args.num_active_groups, order, args.grouping)
    if args.stage == "low_rank" and drafter.low_rank is None:
        drafter.add_low_rank_head(args.head_rank, target.head)


def choose_trained(model: nn.Module, stage: str) -> None:
    """Let the parameters learn that a stage trains, and no others."""
    for name, parameter in model.named_parameters():
        is_head = name.startswith(HEADS)
        is_trained = name.startswith(TRAINED_HEADS[stage])
        parameter.requires_grad_(is_trained if is_head else stage not in FROZEN_DRAFTER)


def announce(drafter: CoralDrafter, stage: str) -> None:
    """Note in the config that a stage has trained a head, which is read from now on."""
    if stage in ("router", "joint"):
        drafter.config.is_router_trained = True
        drafter.config.draft_head = "routed"
    if stage == "low_rank":
        drafter.config.draft_head = "low_rank"
