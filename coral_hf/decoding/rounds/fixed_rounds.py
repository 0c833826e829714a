"""One round of constant shapes: draft, verify and commit are tensors on the device.

In: what a prompt's pass has left. Out: for each round one small tensor, which the host reads.

    draft     levels unrolled: step → head → top-k → level
    verify    target over the tree → accepted path → both caches keep it → the drafter reads it
    token     target over the newest token alone, where drafting does not pay

No value decides a shape and nothing is read on the way, so that each of the three can be compiled
once. All that a round leaves to the next stays in the same buffers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from ...target import text_config
from ..caches.fixed_cache import FixedCache
from ..chance import Uniforms
from ..drafting import PADDING, DraftTree, FixedDrafting, Level, TreeShape, root_only
from ..rules import Verdict
from ..settings import Rule
from ..target_runner import TargetRunner
from ..verifier import decide
from ..watchers import processed


@dataclass
class FixedRounds:
    """The rounds of one call, over the rows of its batch.

    Args:
        drafting: which has read the prompts.
        target: which has read them too.
        root: (batch,), the newest token of each row.
        shape: of every tree.
        rule: by which trees are drafted and verified.
        processors: whose scores follow from logits alone.
        capacity: tokens that a row may have.
        steps: how they are run, by name; see [`steps.Steps`].
    """

    drafting: FixedDrafting
    target: TargetRunner
    root: Tensor
    shape: TreeShape
    rule: Rule
    processors: Sequence[LogitsProcessor]
    capacity: int
    steps: Any = None

    def __post_init__(self):
        batch, device = len(self.root), self.root.device
        plan = self.drafting.fix(self.capacity, self.shape, self.rule.is_drawn)
        drawn = sum(level.families * level.children for level in plan)
        nodes = 1 + drawn if plan else self.shape.nodes
        sizes = self.capacity, nodes, self.shape.depth + 1
        self.target.cache = FixedCache(self.target.cache, *sizes)
        self.root = self.root.clone()
        self.is_active = torch.ones(batch, dtype=torch.bool, device=device)
        # steps of which this call has checked that their graph is still right; see `Compiled`
        self.checked: dict[str, Callable] = {}
        self.tree = self._plant(nodes, plan)
        levels, branching = self.tree.levels, self.tree.branching
        counts = {"greedy": 0, "token": (levels + 1) * (branching * bool(plan) + 1)}
        count = counts.get(self.rule.name, nodes + 1)
        self.uniforms = Uniforms(batch, count, drawn, device)

    def _plant(self, nodes: int, plan: tuple[Level, ...]) -> DraftTree:
        """The buffers of a tree, (batch, nodes), whose levels are drawn as planned, or chosen."""
        batch, device = len(self.root), self.root.device
        tokens, parents, depths = (
            torch.full((batch, nodes), fill, dtype=torch.long, device=device)
            for fill in (0, PADDING, 0)
        )
        if not plan:
            levels, branching = self.shape.depth, self.shape.top_k
            return DraftTree(tokens, parents, depths, levels=levels, branching=branching)
        vocab, branching = text_config(self.target.model).vocab_size, max(c for _, c in plan)
        draft_probs = torch.zeros(batch, nodes, vocab, dtype=torch.float32, device=device)
        parts = tokens, parents, depths, draft_probs
        return DraftTree(*parts, "without_replacement", len(plan), branching, plan)

    def run(self, name: str) -> Any:
        """Run a step of a round, `draft`, `verify` or `token`: None, or (batch, new + 1)."""
        return self.steps.run(name, self)

    def draft(self) -> None:
        """Draft a tree below each root."""
        self.uniforms.rewind()
        warp = partial(processed, self.processors) if self.rule.is_drawn else None
        tree = self.drafting.propose(self.root, self.shape, warp, self.uniforms)
        for own, part in zip(self.tree, tree, strict=True):
            if isinstance(own, Tensor):  # a head that reads few tokens has fewer children
                own[:, : part.shape[1]] = part
        self.tree.tokens[:, 0] = self.root

    def verify(self) -> Tensor:
        """Verify the tree: (batch, depth + 2), the new tokens and, last, how many they are."""
        features, verdict, tokens = self._accept(self.tree)
        counts = verdict.lengths * self.is_active
        index = verdict.path[..., None].expand(-1, -1, features.shape[2])
        self.drafting.commit(tokens.clamp(min=0), features.gather(1, index), counts)
        return torch.cat([tokens, verdict.lengths[:, None]], dim=1)

    def token(self) -> Tensor:
        """Read the newest token of each row: (batch, 2), the next one, and a count of 1."""
        _, verdict, tokens = self._accept(root_only(self.root))
        return torch.cat([tokens, verdict.lengths[:, None]], dim=1)

    def _accept(self, tree: DraftTree) -> tuple[Tensor, Verdict, Tensor]:
        """Features (batch, nodes, width) of a pass, its verdict and its tokens; commits them."""
        output = self.target.score(tree)
        self.uniforms.rewind()
        rule, watched = self.rule.name, (self.processors, self.uniforms)
        verdict = decide(rule, tree, output.logits, *watched)
        tokens = verdict.tokens(tree)  # (batch, depth + 1)
        self.target.cache.commit(verdict.lengths * self.is_active, verdict.path)
        last = tokens.gather(1, verdict.lengths[:, None] - 1)[:, 0]
        self.root.copy_(torch.where(self.is_active, last.clamp(min=0), self.root))
        return output.features, verdict, tokens
