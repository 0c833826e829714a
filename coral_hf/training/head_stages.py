"""What each stage trains, and the draft heads that a drafter gets for it.

stage        trains                         with the rest
drafter      the drafter                    -
router       its router                     frozen
low_rank     its low-rank head              frozen
joint        the drafter and its router     -
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftModel
from torch import nn
from transformers.utils import CONFIG_NAME

from ..drafters.coral.configuration import CoralConfig
from ..drafters.coral.modeling import CoralDrafter
from ..target import Target
from .arguments import MOST_GROUPS, CoralTrainingArguments
from .grouping import group_order

HEADS = ("heads.router.", "heads.low_rank.")
TRAINED_HEADS = {"drafter": (), "router": HEADS[:1], "low_rank": HEADS[1:], "joint": HEADS[:1]}
FROZEN_DRAFTER = ("router", "low_rank")
OF_ROUTER = ("num_groups", "num_active_groups", "grouping")
# what a stage gives a new head; the first is None in the config of a drafter without one
HEAD_SETTINGS = {"drafter": (), "router": OF_ROUTER, "low_rank": ("head_rank",), "joint": OF_ROUTER}
GROUPING = "kmeans"  # of a new router, by default
HEAD_RANK = 64  # of a new low-rank head, by default


def add_heads(
    drafter: CoralDrafter,
    args: CoralTrainingArguments,
    target: Target,
    rows,
    num_tokens: int | None = None,
) -> None:
    """Give the drafter the head that its stage trains; one that it has is trained on.

    Args:
        rows: of training, from which groupings are counted.
        num_tokens: of the tokenizer; ids from there on pad the vocabulary.
    """
    check_head_settings(drafter, args)
    with torch.random.fork_rng([]):
        torch.manual_seed(args.seed)
        if args.stage in ("router", "joint") and drafter.heads.router is None:
            _add_router(drafter, args, target, rows, num_tokens)
        if args.stage == "low_rank" and drafter.heads.low_rank is None:
            drafter.heads.add_low_rank_head(args.head_rank or HEAD_RANK, target.head)


def _add_router(drafter: CoralDrafter, args: CoralTrainingArguments, target, rows, num_tokens):
    number = args.num_groups or default_groups(drafter.config.vocab_size)
    grouping = args.grouping or GROUPING
    order = group_order(grouping, target, rows, number, args.seed, num_tokens)
    drafter.heads.add_router(number, args.num_active_groups or max(number // 8, 1), order, grouping)


def default_groups(vocab_size: int) -> int:
    """64 groups; fewer where they would hold less than 64 tokens each, but 8."""
    return max(min(MOST_GROUPS, vocab_size // 64), min(8, vocab_size))


def check_head_settings(drafter: CoralDrafter | PeftModel, args: CoralTrainingArguments) -> None:
    """Refuse settings of a new head where a stage trains the drafter's own on.

    Raises:
        ValueError: naming the first that differs.
    """
    names = HEAD_SETTINGS[args.stage]
    if not names or getattr(drafter.config, names[0]) is None:
        return
    for name in names:
        own, given = getattr(drafter.config, name), getattr(args, name)
        if given not in (None, own):
            raise ValueError(
                f"`{name}` is {given!r}, but the drafter has a head with {own!r}, which this stage"
                " would train on. Leave it out, or take that head away to get a new one:"
                " drafter.heads.remove_router() or drafter.heads.remove_low_rank_head(), on the"
                " command line --fresh-head."
            )


def check_same_groups(drafter: CoralDrafter, checkpoint: str) -> None:
    """Refuse to go on from a checkpoint whose router tells other groups apart.

    Raises:
        ValueError: naming what differs.
    """
    if not (Path(checkpoint) / CONFIG_NAME).is_file():
        return
    then, now = CoralConfig.from_pretrained(checkpoint), drafter.config
    for name in ("num_groups", "grouping", "grouping_hash"):
        if getattr(then, name) != getattr(now, name):
            raise ValueError(
                f"The router of {checkpoint} was trained with {name} = {getattr(then, name)}, now"
                f" it is {getattr(now, name)}. Go on with the same `grouping`, `num_groups`, `seed`"
                " and dataset, or pass the drafter of that checkpoint as `model`."
            )


def choose_trained(model: nn.Module, stage: str) -> None:
    """Let the parameters learn that a stage trains, and no others."""
    for name, parameter in model.named_parameters():
        is_head = name.startswith(HEADS)
        is_trained = name.startswith(TRAINED_HEADS[stage])
        parameter.requires_grad_(is_trained if is_head else stage not in FROZEN_DRAFTER)


@contextmanager
def announced(drafters: Iterable[CoralDrafter], stage: str) -> Iterator[None]:
    """Note in the config that a stage trains a head, which is read from now on.

    From the beginning, since evaluations and checkpoints on the way need it; a stage that fails
    takes it back.
    """
    fields: dict[str, bool | str] = {}
    if stage in ("router", "joint"):
        fields = {"is_router_trained": True, "draft_head": "routed"}
    if stage == "low_rank":
        fields = {"draft_head": "low_rank"}
    configs = [drafter.config for drafter in drafters]
    before = [{name: getattr(config, name) for name in fields} for config in configs]
    for config in configs:
        config.update(fields)
    try:
        yield
    except BaseException:
        for config, was in zip(configs, before, strict=True):
            config.update(was)
        raise
