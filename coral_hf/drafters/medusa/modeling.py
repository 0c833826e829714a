"""Medusa heads: a target's feature → what each head says of one token further.

    position        0        1        2        3
    token           x0       x1       x2       x3
    target feature  f0       f1       f2       f3         f_i has read x_0 … x_i
    the LM head     of f1: x2
    head 1          of f1:   x3                           head i reads f_t and predicts x_{t+i+1}
    head 2          of f1:   x4

A head is residual blocks, x + SiLU(Wx + b), and an LM head: its own, or the target's.
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ...decoding.settings import TREE_DEFAULTS
from ...lm_head import LMHead
from ...target import read_target
from ..layers import ResidualBlock
from ..model import Drafter
from .configuration import MedusaConfig, Paths

logger = logging.get_logger(__name__)


class MedusaDrafter(Drafter):
    """Heads on a target's last feature, each of which predicts one token further.

    Example:

    ```python
    >>> drafter = MedusaDrafter.from_target(target, num_heads=3)  # fresh, to be trained
    >>> drafter = import_drafter(target, "org/medusa-vicuna")  # or import trained ones
    >>> target.generate(**inputs, assistant_model=drafter)
    ```
    """

    config_class = MedusaConfig
    config: MedusaConfig
    _no_split_modules = ["ResidualBlock"]

    def __init__(self, config: MedusaConfig):
        super().__init__(config)
        width, heads, depth = config.hidden_size, config.num_heads, config.num_hidden_layers
        self.blocks = nn.ModuleList(
            nn.ModuleList(ResidualBlock(width) for _ in range(depth)) for _ in range(heads)
        )
        own = heads if config.has_lm_heads else 0
        self.lm_heads = nn.ModuleList(
            nn.Linear(width, config.vocab_size, bias=False) for _ in range(own)
        )
        self.post_init()

    def post_init(self) -> None:
        """See [`~transformers.PreTrainedModel`]; settings of trees are set."""
        super().post_init()
        self.use_tree(self.config.tree_choices)

    def use_tree(self, choices: Paths | None) -> None:
        """Draft a static tree, or for None the most confident nodes.

        The settings of trees become as large as the static tree; without one, a tree has a level
        for each head, which costs nothing more than the first.

        Args:
            choices: see [`MedusaConfig`].

        Raises:
            ValueError: for what is no tree, or deeper than the heads.
        """
        paths = None if choices is None else self.config.check_choices(choices)
        size = TREE_DEFAULTS | {"tree_depth": self.config.num_heads}
        if paths is not None:
            size = {"tree_depth": max(map(len, paths)), "tree_nodes": len(paths) + 1}
            size["tree_top_k"] = 1 + max(map(max, paths))
        self.config.tree_choices = paths
        self.generation_config.update(**size)

    @classmethod
    def from_target(cls, target: PreTrainedModel, **overrides) -> "MedusaDrafter":
        """Make untrained heads for `target`: each says what the target's LM head says.

        `overrides` are fields of [`MedusaConfig`].

        Raises:
            ValueError: for a target that cannot take a drafter.
        """
        drafter, head = super().from_target(target, **overrides), read_target(target).head
        if drafter.lm_heads and not head.is_readable:
            logger.warning(
                "The target's LM head is quantised or offloaded: the heads' own begin at random."
            )
        with torch.no_grad():
            for blocks in drafter.blocks:
                for block in blocks:
                    block.linear.weight.zero_()
                    block.linear.bias.zero_()
            for own in drafter.lm_heads if head.is_readable else ():
                own.weight.copy_(head.weight * head.scale)
        return drafter

    def forward(self, features: Tensor, num_heads: int | None = None) -> Tensor:
        """What each head's LM head reads, (heads, *batch, hidden), of features (*batch, hidden).

        `num_heads`: so many of the first ones; all by default.
        """
        features, states = features.to(self.dtype), []
        for _, blocks in zip(range(num_heads or len(self.blocks)), self.blocks, strict=False):
            hidden = features
            for block in blocks:
                hidden = block(hidden)
            states.append(hidden)
        return torch.stack(states)

    def logits(self, states: Tensor, target_head: LMHead) -> Tensor:
        """Logits of each head, (heads, *batch, hidden) → (heads, *batch, vocab).

        `target_head` is read by heads that have none of their own.
        """
        if not self.config.has_lm_heads:
            return target_head.logits(states)
        pairs = zip(self.lm_heads, states, strict=False)  # as many as there are states
        return torch.stack([head(own) for head, own in pairs])
