"""A drafter that needs no training: a bigram table, counted on text.

In: token ids of some text. Out: a BigramDrafter, whose trees have the shape of the learned
drafter's and cost next to nothing. What it reaches, a learned drafter has to beat.

    text           a b a c a b        after "a": b twice, c once
    successors[a]  b, c               log_probs[a]  log 2/3, log 1/3
"""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..configuration_coral import CoralConfig
from ..decoding.drafting import Warp
from ..decoding.generate import decoder_of
from ..decoding.settings import DECODING_KEYWORDS
from ..decoding.tree import DraftTree, TreeBuilder, TreeShape, root_only
from ..modeling_coral import TREE_DEFAULTS

# a token that was never seen before another one counts as this part of an occurrence
UNSEEN_WEIGHT = 1e-3


class BigramDrafter(NamedTuple):
    """The most frequent successors of each token, best first."""

    successors: Tensor  # (vocab, top_k), distinct in each row
    log_probs: Tensor  # (vocab, top_k)

    @classmethod
    def from_texts(
        cls, texts: Iterable[Tensor], vocab_size: int, top_k: int = 10
    ) -> "BigramDrafter":
        """Count the pairs of neighbours in `texts`, each (length,) of token ids.

        Where fewer than `top_k` successors were seen, the most frequent tokens of all fill up.
        """
        texts = [text.long() for text in texts]
        seen = torch.cat([pair_codes(text[:-1], text[1:], vocab_size) for text in texts])
        frequent = torch.cat(texts).bincount(minlength=vocab_size).topk(top_k).indices
        every = torch.arange(vocab_size)
        filling = pair_codes(every[:, None], frequent, vocab_size).flatten()  # (vocab * top_k,)
        weights = torch.cat([torch.ones(len(seen)), torch.full((len(filling),), UNSEEN_WEIGHT)])
        return cls(*best_pairs(torch.cat([seen, filling]), weights, vocab_size, top_k))

    def decoder(
        self, target: PreTrainedModel, tree: Mapping[str, int | str]
    ) -> Callable[..., object]:
        """The loop for `target.generate(custom_generate=...)`; `tree` as with a CoralDrafter."""
        settings = {name: tree[name] for name in DECODING_KEYWORDS if name in tree}
        table = BigramDrafter(*(tensor.to(target.device) for tensor in self))
        config = CoralConfig.from_target(target.config)
        return decoder_of(config, lambda *_: BigramDrafting(table), TREE_DEFAULTS, settings, None)


class BigramDrafting:
    """The drafting side of one call: all that it remembers is the last token."""

    _root: Tensor  # (batch,)

    def __init__(self, drafter: BigramDrafter) -> None:
        self.drafter = drafter

    def begin(self, tokens: Tensor, features: Tensor, positions: Tensor) -> None:
        """See [`coral_hf.decoding.drafting.Drafting`]."""
        self._root = tokens[:, -1]

    def commit(self, tokens: Tensor, features: Tensor, counts: Tensor) -> None:
        """See [`coral_hf.decoding.drafting.Drafting`]."""
        self._root = tokens.gather(1, counts[:, None] - 1)[:, 0]

    def select(self, rows: Tensor) -> None:
        """See [`coral_hf.decoding.drafting.Drafting`]."""
        self._root = self._root[rows]

    def memory(self) -> None:
        """See [`coral_hf.decoding.drafting.Drafting`]."""

    def propose(self, shape: TreeShape, warp: Warp | None = None) -> DraftTree:
        """The most probable paths of the bigram chain below the last certain token."""
        if shape.depth == 0 or shape.nodes == 1:
            return root_only(self._root)
        builder, tokens = TreeBuilder(self._root, shape), self._root[:, None]  # (batch, beam)
        successors, log_probs = (table[:, : shape.top_k] for table in self.drafter)
        for _ in range(shape.depth):
            beam = builder.add_level(successors[tokens], log_probs[tokens])
            if not builder.is_worth_more(beam):
                break
            tokens = beam.tokens
        return builder.build()


def pair_codes(first: Tensor, second: Tensor, vocab_size: int) -> Tensor:
    """One number for each pair of tokens, of the broadcast shape of both."""
    return first * vocab_size + second


def best_pairs(
    codes: Tensor, weights: Tensor, vocab_size: int, top_k: int
) -> tuple[Tensor, Tensor]:
    """The heaviest successors of each token and their log-probabilities, (vocab, top_k) each.

    Args:
        codes: (pairs,), at least `top_k` different ones for each first token.
        weights: (pairs,), summed over equal codes.
    """
    codes, index = codes.unique(return_inverse=True)
    weights = torch.zeros(len(codes)).index_add_(0, index, weights)
    heaviest = weights.argsort(descending=True, stable=True)
    order = heaviest[(codes[heaviest] // vocab_size).argsort(stable=True)]  # by first token
    codes, weights = codes[order], weights[order]
    first = codes // vocab_size
    starts = torch.searchsorted(first, torch.arange(vocab_size))
    best = starts[:, None] + torch.arange(top_k)  # (vocab, top_k)
    totals = torch.zeros(vocab_size).index_add_(0, first, weights)
    return codes[best] % vocab_size, (weights[best] / totals[:, None]).log()
