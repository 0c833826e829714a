"""Medusa heads: a target's feature → what each head says of one token further.

    position        0        1        2        3
    token           x0       x1       x2       x3
    target feature  f0       f1       f2       f3         f_i has read x_0 … x_i
    the LM head     of f1: x2
    head 1          of f1:   x3                           head i reads f_t and predicts x_{t+i+1}
    head 2          of f1:   x4

A head is residual blocks, x + SiLU(Wx + b), and an LM head: its own, or the target's.
"""

from functools import partial

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..decoding.drafting import Level, TreeShape
from ..heads.draft_heads import OtherVocabulary
from ..heads.settings import check_sizes
from ..lm_head import LMHead
from ..target import Target, read_target
from .configuration import FamilyConfig
from .layers import ResidualBlock
from .model import Drafter, register_family
from .tree_drafting import LastFeatureDrafting, MarginalDrafting

logger = logging.get_logger(__name__)


@strict
class MedusaConfig(FamilyConfig):
    """Configuration of a [`MedusaDrafter`].

    `MedusaConfig.from_target` fills in everything that follows from a target. What it shares with
    other families is in `FamilyConfig`.

    Args:
        num_heads: each drafts one token further than the one before it.
        num_hidden_layers: residual blocks of each head.
        has_lm_heads: whether each head has an LM head of its own, as published first; else all read
            the target's, as in the last version of Medusa's code.

    Example:

    ```python
    >>> from transformers import LlamaConfig
    >>> from coral_hf import MedusaConfig
    >>> MedusaConfig.from_target(LlamaConfig(hidden_size=256), num_heads=3).hidden_size
    256
    ```
    """

    model_type = "coral_medusa"

    num_heads: int = 5
    num_hidden_layers: int = 1
    has_lm_heads: bool = True

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        check_sizes(self, 1, None, "num_heads", "num_hidden_layers")


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
    title, paper = "Medusa", "[Medusa (ICML 2024)](https://arxiv.org/abs/2401.10774)"
    _no_split_modules = ["ResidualBlock"]

    def __init__(self, config: MedusaConfig):
        super().__init__(config)
        width, heads, depth = config.hidden_size, config.num_heads, config.num_hidden_layers
        self.blocks = nn.ModuleList(
            nn.Sequential(*(ResidualBlock(width) for _ in range(depth))) for _ in range(heads)
        )
        own = range(heads if config.has_lm_heads else 0)
        self.lm_heads = nn.ModuleList(nn.Linear(width, config.vocab_size, bias=False) for _ in own)
        self.post_init()

    def post_init(self) -> None:
        """See [`Drafter.post_init`]: a tree has a level for each head, which costs no more."""
        super().post_init()
        self.generation_config.tree_depth = self.config.num_heads

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
            for parameter in drafter.blocks.parameters():
                parameter.zero_()
            for own in drafter.lm_heads if head.is_readable else ():
                own.weight.copy_(head.weight * head.scale)
        return drafter

    def forward(self, features: Tensor, num_heads: int | None = None) -> Tensor:
        """What each head's LM head reads, (heads, *batch, hidden), of features (*batch, hidden).

        `num_heads`: so many of the first ones; all by default.
        """
        features = features.to(self.dtype)
        return torch.stack([blocks(features) for blocks in [*self.blocks][:num_heads]])

    def logits(self, states: Tensor, target_head: LMHead) -> Tensor:
        """Logits of each head, (heads, *batch, hidden) → (heads, *batch, vocab).

        `target_head` is read by heads that have none of their own.
        """
        if not self.config.has_lm_heads:
            return target_head.logits(states)
        pairs = zip(self.lm_heads, states, strict=False)  # as many as there are states
        return torch.stack([head(own) for head, own in pairs])


class MedusaDrafting(MarginalDrafting, LastFeatureDrafting):
    """All heads read one feature, and a tree is made of what they say; see [`FixedDrafting`]."""

    drafter: MedusaDrafter

    def __init__(self, drafter: MedusaDrafter, target: Target, memory: None = None):
        super().__init__(drafter, target)
        logits_of = partial(drafter.logits, target_head=target.head)
        self.head = OtherVocabulary(logits_of, self._num_tokens)

    def _outputs(self, levels: int) -> Tensor:
        return self.drafter(self._feature, levels)

    def fix(self, capacity: int, shape: TreeShape, is_drawn: bool) -> tuple[Level, ...]:
        """See [`FixedDrafting`]; a tree is no deeper than there are heads."""
        depth = min(shape.depth, self.drafter.config.num_heads)
        return super().fix(capacity, shape._replace(depth=depth), is_drawn)


register_family(MedusaDrafter, MedusaDrafting)
