"""One round of constant shapes: draft, verify and commit are tensors on the device.

In: what a prompt's pass has left. Out: for each round one small tensor, which the host reads.

    draft     levels unrolled: step → head → top-k → level
    verify    target over the tree → accepted path → both caches keep it → the drafter reads it
    token     target over the newest token alone, where drafting does not pay

No value decides a shape and nothing is read on the way, so that each of the three can be compiled
or captured once. All that a round leaves to the next stays in the same buffers.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessor

from ..acceptance_rules import Uniforms
from ..caches.fixed_cache import FixedCache
from ..drafting import PADDING, DraftTree, FixedDrafting, TreeShape, root_only
from ..settings import Rule
from ..target_runner import TargetRunner
from ..verifier import Verdict, verify_greedy, verify_token


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
    """

    drafting: FixedDrafting
    target: TargetRunner
    root: Tensor
    shape: TreeShape
    rule: Rule
    processors: Sequence[LogitsProcessor]
    capacity: int

    def __post_init__(self):
        batch, device = len(self.root), self.root.device
        self.drafting.fix(self.capacity, self.shape)
        self.target.cache = FixedCache(self.target.cache, self.capacity, self.shape.nodes)
        self.root = self.root.clone()
        self.is_active = torch.ones(batch, dtype=torch.bool, device=device)
        self.tokens, self.parents, self.depths = (
            torch.zeros(batch, self.shape.nodes, dtype=torch.long, device=device) for _ in range(3)
        )
        self.parents.fill_(PADDING)
        self.uniforms = Uniforms(batch, self._num_draws, device)

    @property
    def _num_draws(self) -> int:
        """Draws of a round for a row: of each level, one for a child of a node and one beside."""
        if self.rule.name == "greedy":
            return 0
        return (self.shape.depth + 1) * (self.shape.top_k * self.rule.is_drawn + 1)

    @property
    def kind(self) -> Hashable:
        """All that shapes and constants of the steps follow from, beside the target."""
        processors = tuple(
            (type(one), tuple((k, repr(v)) for k, v in vars(one).items()))
            for one in self.processors
        )
        sizes = len(self.root), self.capacity, self.shape, self.rule
        return *sizes, processors, self.drafting.kind, self.root.device

    def forget_pass(self) -> None:
        """Forget what a step has left that was broken off."""
        self.target.cache.truncate()
        self.drafting.forget_pass()

    def draft(self) -> None:
        """Draft a tree below each root."""
        tree = self.drafting.propose(self.root, self.shape)
        for own, part in zip((self.tokens, self.parents, self.depths), tree, strict=False):
            own[:, : part.shape[1]] = part  # a head that reads few tokens has fewer children
        self.tokens[:, 0] = self.root

    def verify(self) -> Tensor:
        """Verify the tree: (batch, depth + 2), the new tokens and, last, how many they are."""
        parts = self.tokens, self.parents, self.depths
        tree = DraftTree(*parts, levels=self.shape.depth, branching=self.shape.top_k)
        features, verdict, tokens = self._accept(tree)
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
        verdict = self._verdict(tree, output.logits)
        tokens = verdict.tokens(tree)  # (batch, depth + 1)
        self.target.cache.commit(verdict.lengths * self.is_active, verdict.path)
        last = tokens.gather(1, verdict.lengths[:, None] - 1)[:, 0]
        self.root.copy_(torch.where(self.is_active, last.clamp(min=0), self.root))
        return output.features, verdict, tokens

    def _verdict(self, tree: DraftTree, logits: Tensor) -> Verdict:
        """What the target accepts; `logits` are (batch, nodes, vocab)."""
        if self.rule.name == "greedy":
            scores = self._processed(logits.flatten(0, 1)) if self.processors else logits
            return verify_greedy(tree, scores.view_as(logits))
        rows = torch.arange(len(logits), device=logits.device)
        self.uniforms.rewind()
        return verify_token(
            tree, lambda node: self._processed(logits[rows, node]).softmax(-1), self.uniforms
        )

    def _processed(self, logits: Tensor) -> Tensor:
        """Scores of (rows, vocab) logits, in fp32 as in plain `generate`."""
        scores = logits.float()
        for processor in self.processors:
            scores = processor(self.tokens[:1, :1].expand(len(scores), 1), scores)
        return scores
