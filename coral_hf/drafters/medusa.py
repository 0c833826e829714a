"""Medusa heads: a target's feature → what each head says of one token further.

    position        0        1        2        3
    token           x0       x1       x2       x3
    target feature  f0       f1       f2       f3         f_i has read x_0 … x_i
    the LM head     of f1: x2
    head 1          of f1:   x3                           head i reads f_t and predicts x_{t+i+1}
    head 2          of f1:   x4

A head is residual blocks, x + SiLU(Wx + b), and an LM head: its own, or the target's.
"""

from collections.abc import Hashable, Sequence
from functools import partial
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.utils import logging

from ..decoding.drafting import PADDING, DraftTree, Level, TreeShape, Warp, host_tensor
from ..decoding.settings import TREE_DEFAULTS
from ..heads.draft_heads import OtherVocabulary
from ..heads.settings import check_sizes
from ..lm_head import LMHead
from ..target import Target, read_target
from .configuration import FamilyConfig
from .layers import ResidualBlock
from .model import Drafter, register_family
from .tree_drafting import LastFeatureDrafting, MarginalDrafting

logger = logging.get_logger(__name__)
Paths = Sequence[Sequence[int]]


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
        tree_choices: the nodes of a static tree, each as the ranks of the tokens on its path, the
            most important ones first: `[[0], [0, 0], [1]]` are a head's best token, the next head's
            best one below it, and the first head's second best. None: the most confident nodes.

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
    tree_choices: list | tuple | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        check_sizes(self, 1, None, "num_heads", "num_hidden_layers")
        if self.tree_choices is not None:
            self.tree_choices = self.check_choices(self.tree_choices)

    def check_choices(self, choices: Paths) -> list[list[int]]:
        """Put the nodes of a static tree in an order in which parents come before children.

        Raises:
            ValueError: for what is no tree of the heads and the vocabulary, naming a node.
        """
        paths = [tuple(path) if isinstance(path, list | tuple) else path for path in choices]
        for path in paths or [()]:
            is_node = (
                isinstance(path, tuple)
                and 1 <= len(path) <= self.num_heads
                and all(type(rank) is int and 0 <= rank < self.vocab_size for rank in path)
                and paths.count(path) == 1
                and (len(path) == 1 or path[:-1] in paths)
            )
            if not is_node:
                raise ValueError(
                    f"`tree_choices` has {path!r}; list each node once, as 1 to {self.num_heads}"
                    f" ranks below {self.vocab_size}, and its parent too: [[0], [0, 0], [1]]."
                )
        whole = (path[: depth + 1] for path in paths for depth in range(len(path)))
        return [[*path] for path in dict.fromkeys(whole)]


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
            nn.ModuleList(ResidualBlock(width) for _ in range(depth)) for _ in range(heads)
        )
        own = range(heads if config.has_lm_heads else 0)
        self.lm_heads = nn.ModuleList(nn.Linear(width, config.vocab_size, bias=False) for _ in own)
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
            for parameter in drafter.blocks.parameters():
                parameter.zero_()
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


class StaticTree:
    """A tree whose nodes are ranks of tokens, the same in each round.

    `tokens` of a node: its rank among those of its level.
    """

    def __init__(self, paths: Paths, device: torch.device):
        place = {tuple(path): index for index, path in enumerate(paths, 1)}
        self.depth = max(map(len, paths))
        self.top_k = 1 + max(map(max, paths))
        self._branching = max(sum(path[:-1] == one for path in place) for one in [(), *place])
        columns = [(len(p), p[-1], place.get(p[:-1], 0), max(p)) for p in place]
        # (nodes - 1,) each, the root left out
        columns = host_tensor(columns).to(device).unbind(1)
        self._depths, self._ranks, self._parents, self._highest = columns

    def build(self, root: Tensor, shape: TreeShape, tokens: Tensor) -> DraftTree:
        """Fill the nodes that a shape has room for; others are padding.

        Args:
            root: (batch,).
            tokens: (levels, batch, top_k), best first.
        """
        kept, levels = slice(shape.nodes - 1), len(tokens)
        depths, ranks = self._depths[kept], self._ranks[kept]
        places = (depths - 1).clamp(max=levels - 1) * tokens.shape[2] + ranks
        chosen = tokens.transpose(0, 1).flatten(1)[:, places]  # (batch, nodes - 1)
        is_node = (depths <= shape.depth) & (self._highest[kept] < shape.top_k)
        parents = self._parents[kept].masked_fill(~is_node, PADDING)
        parents, depths = (F.pad(one, (1, 0)).expand(len(root), -1) for one in (parents, depths))
        tokens = torch.cat([root[:, None], chosen], dim=1)
        return DraftTree(tokens, parents, depths, levels=levels, branching=self._branching)


class MedusaDrafting(MarginalDrafting, LastFeatureDrafting):
    """All heads read one feature, and a tree is made of what they say; see [`FixedDrafting`]."""

    drafter: MedusaDrafter

    def __init__(self, drafter: MedusaDrafter, target: Target, memory: None = None):
        super().__init__(drafter, target)
        choices = drafter.config.tree_choices
        self._static = None if choices is None else StaticTree(choices, self.device)
        logits_of = partial(drafter.logits, target_head=target.head)
        self.head = OtherVocabulary(logits_of, self._num_tokens)

    @property
    def kind(self) -> Hashable:
        """See [`FixedDrafting`]."""
        return super().kind, str(self.drafter.config.tree_choices)

    def _outputs(self, levels: int) -> Tensor:
        return self.drafter(self._feature, levels)

    def propose(
        self, root: Tensor, shape: TreeShape, warp: Warp | None = None, chance: Any = None
    ) -> DraftTree:
        """Draft the static tree below `root` (batch,), the most confident, or a drawn one."""
        shape, static = self._fitted(shape), self._static
        if warp is not None or static is None:
            return super().propose(root, shape, warp, chance)
        shape = shape._replace(depth=min(shape.depth, static.depth))
        outputs = self._outputs(shape.depth)
        log_path = outputs.new_zeros(outputs.shape[:2])
        tokens = self.head.children(outputs, log_path, static.top_k).tokens
        return static.build(root.to(self.device), shape, tokens)

    def _fitted(self, shape: TreeShape) -> TreeShape:
        """A shape no deeper than there are heads."""
        return shape._replace(depth=min(shape.depth, self.drafter.config.num_heads))

    def fix(self, capacity: int, shape: TreeShape, is_drawn: bool) -> tuple[Level, ...]:
        """See [`FixedDrafting`]: the feature is in one buffer anyway."""
        return super().fix(capacity, self._fitted(shape), is_drawn)


register_family(MedusaDrafter, MedusaDrafting)
