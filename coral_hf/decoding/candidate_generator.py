"""The drafting side of a call: the drafter, its cache, and the trees it proposes.

In: tokens that are certain and the target's features of them. Out: a `DraftTree` a round. The loop
knows a drafter by `begin`, `propose` and `commit` (`Drafting`) and nothing else.

    certain tokens       x0       x1       x2       x3
    target features      f0       f1       f2
    begin reads          (x1,f0)  (x2,f1)  (x3,f2)        the last output, f̂3, gives level 1
    a level reads        (node, its parent's f̂)           and gives the next level
"""

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.generation.candidate_generator import CandidateGenerator

from ..draft_head import Children
from ..modeling_coral import CoralDrafter
from ..target import FEATURE, Target
from .cache import GrowingCache
from .tree import Beam, DraftTree, TreeBuilder, TreeShape, root_only


class Drafting(Protocol):
    """All that the decoding loop knows of a drafter."""

    def begin(self, tokens: Tensor, features: Tensor) -> None:
        """Start at a prompt.

        Args:
            tokens: (batch, length + 1), the last one just emitted.
            features: (batch, length, hidden), the target's, of all tokens but the last.
        """
        ...

    def propose(self, shape: TreeShape) -> DraftTree:
        """Draft a tree below the last certain token, no larger than `shape`."""
        ...

    def commit(self, tokens: Tensor, features: Tensor) -> None:
        """Read the tokens that a round made certain, each with the feature before it.

        Args:
            tokens: (batch, new).
            features: (batch, new, hidden).
        """
        ...


class CacheContext:
    """A drafter's own cache as the context of its steps."""

    def __init__(self, num_layers: int):
        self.cache = GrowingCache(num_layers)
        # (batch, 1, length, rows so far + length), True where a query may look
        self.mask: Tensor | None = None

    @property
    def length(self) -> int:
        """Rows in the cache."""
        return self.cache.get_seq_length()

    def attend(self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See [`coral_hf.modeling_coral.Context`]."""
        is_prompt = self.mask is None and query.shape[2] > 1
        keys, values = self.cache.update(key, value, layer_idx)
        return F.scaled_dot_product_attention(
            query, keys, values, attn_mask=self.mask, is_causal=is_prompt, enable_gqa=True
        )


class CoralCandidateGenerator(CandidateGenerator):
    """Drafts for one call of `generate` with a [`CoralDrafter`].

    Args:
        drafter: shared by calls; all state of this call is here.
        target: what the drafter reads of its target.
        draft_head: `"full"` or `"routed"`; the drafter's own choice by default.
        chain_length: tokens that `get_candidates` proposes, for transformers' own chain loop.

    Example:

    ```python
    >>> drafting = CoralCandidateGenerator(drafter, read_target(target, drafter.config))
    >>> drafting.begin(tokens, features)
    >>> tree = drafting.propose(TreeShape(depth=6, top_k=10, nodes=60))
    ```
    """

    requires_model_outputs = True
    _root: Tensor  # (batch,), the last certain token
    _feature: Tensor  # (batch, 1, hidden), predicted for the root's position

    def __init__(
        self,
        drafter: CoralDrafter,
        target: Target,
        draft_head: str | None = None,
        chain_length: int = 5,
    ):
        self.drafter = drafter
        self.target = target
        self.head = drafter.draft_head(target.head, draft_head)
        self.chain_length = chain_length
        self.model_kwargs_overrides = {"output_hidden_states": FEATURE}
        self._reset()

    def _reset(self) -> None:
        self._context = CacheContext(self.drafter.config.num_hidden_layers)

    def begin(self, tokens: Tensor, features: Tensor) -> None:
        """See [`Drafting`]."""
        self._reset()
        self.commit(tokens[:, 1:], features)

    def commit(self, tokens: Tensor, features: Tensor) -> None:
        """See [`Drafting`]."""
        # prompts may stay on the CPU, and a target's last layer may be on another device
        tokens = tokens.to(self.drafter.fc.weight.device)
        start, new = self._context.length, tokens.shape[1]
        positions = torch.arange(start, start + new, device=tokens.device)
        columns = torch.arange(start + new, device=tokens.device)
        # a lone row sees all there is, and a whole prompt is plainly causal
        needs_mask = start > 0 and new > 1
        mask = (columns <= positions[:, None])[None, None] if needs_mask else None
        predicted = self._step(tokens, features, positions[None], mask)
        self._root, self._feature = tokens[:, -1], predicted[:, -1:]

    def propose(self, shape: TreeShape) -> DraftTree:
        """See [`Drafting`]. EAGLE-2's dynamic tree, deterministic."""
        if shape.depth == 0 or shape.nodes == 1:
            return root_only(self._root)
        committed = self._context.length
        builder = TreeBuilder(self._root, shape)
        features = self._feature
        log_path = features.new_zeros(features.shape[:2], dtype=torch.float32)
        beam = builder.add_level(*self._children(features, log_path, shape))
        # (batch, beam, tree rows)
        seen = beam.tokens.new_zeros(*beam.tokens.shape, 0, dtype=torch.bool)
        for depth in range(1, shape.depth):
            seen = self._see_itself(seen, beam, is_first=depth == 1)
            features = self._expand(beam, features, seen, committed + depth - 1, committed)
            beam = builder.add_level(*self._children(features, beam.log_path, shape))
        self._context.cache.truncate(committed)
        return builder.build()

    def _children(self, features: Tensor, log_path: Tensor, shape: TreeShape) -> Children:
        top_k = min(shape.top_k, self.drafter.config.vocab_size)
        return self.head.children(features, log_path, top_k)

    @staticmethod
    def _see_itself(seen: Tensor, beam: Beam, is_first: bool) -> Tensor:
        """Which tree rows each new beam node sees: those its parent sees, and itself."""
        batch, width = beam.tokens.shape
        itself = torch.eye(width, dtype=torch.bool, device=seen.device).expand(batch, -1, -1)
        if is_first:  # the parents are the root, which is no tree row
            return itself
        inherited = seen.gather(1, beam.parents[..., None].expand(-1, -1, seen.shape[2]))
        return torch.cat([inherited, itself], dim=2)

    def _expand(
        self, beam: Beam, features: Tensor, seen: Tensor, position: int, committed: int
    ) -> Tensor:
        """One drafter step over the beam: (batch, beam, hidden) features that its nodes predict."""
        parents = beam.parents[..., None].expand(-1, -1, features.shape[2])
        mask = torch.cat([seen.new_ones(*seen.shape[:2], committed), seen], dim=2)[:, None]
        positions = torch.full((1, 1), position, device=features.device)
        return self._step(beam.tokens, features.gather(1, parents), positions, mask)

    def _step(
        self, tokens: Tensor, features: Tensor, positions: Tensor, mask: Tensor | None
    ) -> Tensor:
        device = self.drafter.fc.weight.device
        self._context.mask = mask
        embeddings = self.target.embed(tokens).to(device)
        return self.drafter(embeddings, features.to(device), positions, self._context)

    def update_candidate_strategy(
        self, input_ids: Tensor, scores: Tensor, num_matches: int
    ) -> None:
        """transformers' own contract; the length of our chains does not follow the matches."""

    def get_candidates(
        self, input_ids: Tensor, model_outputs=None, **kwargs
    ) -> tuple[Tensor, Tensor | None]:
        """transformers' own contract: a chain of candidates after `input_ids` (1, length).

        The candidates are the drafter's best guesses and come without logits, so transformers
        compares them with tokens of the target's own, which is lossless.
        """
        # the first pass reads the prompt, whose features are not there yet
        if model_outputs is None:
            return input_ids, None
        read = self._context.length
        features = model_outputs.hidden_states[FEATURE]
        self.commit(input_ids[:, read + 1 :], features[:, : input_ids.shape[1] - 1 - read])
        chain = self.propose(TreeShape(self.chain_length, top_k=1, nodes=self.chain_length + 1))
        return torch.cat([input_ids, chain.tokens[:, 1:]], dim=1), None
