"""Training stages: what each trains, and the draft head that a drafter gets for it.

stage        trains                         with the rest
drafter      the drafter                    -
router       its router                     frozen
low_rank     its low-rank head              frozen
joint        the drafter and its router     -
"""

from collections.abc import Iterator
from contextlib import contextmanager

from peft import PeftModel
from torch import nn

from ..drafters.coral.configuration import CoralConfig
from ..drafters.coral.modeling import CoralDrafter
from ..target import Target
from .arguments import MOST_GROUPS, CoralTrainingArguments
from .grouping import group_order

HEADS = ("heads.router.", "heads.low_rank.")
TRAINED_HEADS = {"drafter": (), "router": HEADS[:1], "low_rank": HEADS[1:], "joint": HEADS[:1]}
ROUTER_SETTINGS = ("num_groups", "num_active_groups", "grouping")
# what a stage gives a new head; the first is None in the config of a drafter without one
HEAD_SETTINGS = {
    "drafter": (),
    "router": ROUTER_SETTINGS,
    "low_rank": ("head_rank",),
    "joint": ROUTER_SETTINGS,
}
GROUPING = "kmeans"  # of a new router, by default
HEAD_RANK = 64  # of a new low-rank head, by default


def add_heads(
    drafter: CoralDrafter,
    args: CoralTrainingArguments,
    target: Target,
    rows,
    num_tokens: int | None = None,
) -> None:
    """Give the drafter the head that its stage trains; one that it has is trained further.

    Args:
        rows: the training rows, from which groupings are counted.
        num_tokens: of the tokenizer; ids from there on pad the vocabulary.
    """
    check_head_settings(drafter, args)
    if args.stage in ("router", "joint") and drafter.heads.router is None:
        number = args.num_groups or default_groups(drafter.config.vocab_size)
        grouping = args.grouping or GROUPING
        order = group_order(grouping, target, rows, number, args.seed, num_tokens)
        active = args.num_active_groups or max(number // 8, 1)
        drafter.heads.add_router(number, active, order, grouping)
    if args.stage == "low_rank" and drafter.heads.low_rank is None:
        rank = args.head_rank or min(HEAD_RANK, drafter.config.hidden_size)
        drafter.heads.add_low_rank_head(rank, target.head)


def default_groups(vocab_size: int) -> int:
    """The groups of a new router: 64, or fewer but 8 where they would hold less than 64 tokens."""
    return max(min(MOST_GROUPS, vocab_size // 64), min(8, vocab_size))


def check_head_settings(drafter: CoralDrafter | PeftModel, args: CoralTrainingArguments) -> None:
    """Refuse settings of a new head where a stage trains the drafter's own head.

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
                " would train further. Leave it out, or remove that head to get a new one:"
                " drafter.heads.remove_router() or drafter.heads.remove_low_rank_head(), on the"
                " command line --fresh-head."
            )


def freeze_others(model: nn.Module, stage: str) -> None:
    """Freeze everything that the stage does not train."""
    for name, parameter in model.named_parameters():
        is_head = name.startswith(HEADS)
        is_trained = name.startswith(TRAINED_HEADS[stage])
        parameter.requires_grad_(is_trained if is_head else stage in ("drafter", "joint"))


@contextmanager
def announced(config: CoralConfig, stage: str) -> Iterator[None]:
    """Note in a drafter's config that a stage trains a head, which is read from now on.

    From the beginning, since evaluations and checkpoints during training need it; a stage that
    fails takes it back.
    """
    fields: dict[str, bool | str] = {}
    if stage in ("router", "joint"):
        fields = {"is_router_trained": True, "draft_head": "routed"}
    if stage == "low_rank":
        fields = {"draft_head": "low_rank"}
    before = {name: getattr(config, name) for name in fields}
    config.update(fields)
    try:
        yield
    except BaseException:
        config.update(before)
        raise
