"""Bigram drafter: a table of successors, counted on text, that needs no training.

A family of drafters of its own, which importing this file registers.

In: token ids of some text. Out: a BigramDrafter, whose trees have the shape of the learned
drafter's and cost next to nothing. What it reaches, a learned drafter has to beat.

    text           a b a c a b        after "a": b twice, c once
    successors[a]  b, c               log_probs[a]  log 2/3, log 1/3
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

import coral_hf
from coral_hf.decoding.drafting import Drafting, DraftTree, TreeShape, Warp
from coral_hf.drafters import TreeBuilder
from coral_hf.target import Target, text_config

# a token that was never seen before another one counts as this part of an occurrence
UNSEEN_WEIGHT = 1e-3

logger = logging.get_logger(__name__)


class BigramConfig(PreTrainedConfig):
    """Configuration of a [`BigramDrafter`].

    Args:
        vocab_size: of the target.
        top_k: successors that are kept of each token.
    """

    model_type = "coral_bigram"

    vocab_size: int = 32000
    top_k: int = 10


class BigramDrafter(PreTrainedModel):
    """The most frequent successors of each token, best first.

    Example:

    ```python
    >>> drafter = BigramDrafter.from_texts(texts, vocab_size=target.config.vocab_size)
    >>> target.generate(**inputs, assistant_model=drafter)
    ```
    """

    config_class = BigramConfig
    config: BigramConfig
    base_model_prefix = "model"
    successors: Tensor  # (vocab, top_k), distinct in each row
    log_probs: Tensor  # (vocab, top_k)

    def __init__(self, config: BigramConfig):
        super().__init__(config)
        shape = config.vocab_size, config.top_k
        self.register_buffer("successors", torch.zeros(shape, dtype=torch.long))
        self.register_buffer("log_probs", torch.zeros(shape))
        self.post_init()

    # a table has no parameters, of which transformers asks these two

    @property
    def device(self) -> torch.device:
        """The device of the table."""
        return self.log_probs.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the log-probabilities."""
        return self.log_probs.dtype

    @classmethod
    def from_texts(
        cls, texts: Iterable[Tensor], vocab_size: int, top_k: int = 10
    ) -> "BigramDrafter":
        """Count the pairs of neighbours in `texts`, each (length,) of token ids.

        Where fewer than `top_k` successors were seen, the most frequent tokens of all fill up.
        """
        texts = [text.long() for text in texts]
        # a pair of tokens is one number
        seen = torch.cat([text[:-1] * vocab_size + text[1:] for text in texts])
        frequent = torch.cat(texts).bincount(minlength=vocab_size).topk(top_k).indices
        every = torch.arange(vocab_size, device=frequent.device)[:, None]
        filling = (every * vocab_size + frequent).flatten()  # (vocab * top_k,)
        codes, index = torch.cat([seen, filling]).unique(return_inverse=True)
        ones = torch.ones(len(index), dtype=torch.float32, device=index.device)
        ones[len(seen) :] = UNSEEN_WEIGHT
        weights = ones.new_zeros(len(codes)).index_add_(0, index, ones)
        heaviest = weights.argsort(descending=True, stable=True)
        order = heaviest[(codes[heaviest] // vocab_size).argsort(stable=True)]  # by first token
        codes, weights = codes[order], weights[order]
        first = codes // vocab_size
        starts = torch.searchsorted(first, every)  # (vocab, 1)
        best = starts + torch.arange(top_k, device=first.device)  # (vocab, top_k)
        totals = weights.new_zeros(vocab_size).index_add_(0, first, weights)
        drafter = cls(BigramConfig(vocab_size=vocab_size, top_k=top_k)).eval().to(first.device)
        drafter.successors.copy_(codes[best] % vocab_size)
        drafter.log_probs.copy_((weights[best] / totals[:, None]).log())
        return drafter


class BigramDrafting(Drafting):
    """The drafting side of one call.

    It reads and remembers nothing, as the protocol's own methods: a tree follows from its root.
    """

    layers: tuple[int, ...] = ()

    def __init__(self, drafter: BigramDrafter, target: Target, memory: None = None) -> None:
        num_tokens = text_config(target.model).vocab_size
        if num_tokens != drafter.config.vocab_size:
            logger.warning_once(
                f"The bigram table has {drafter.config.vocab_size} tokens, the target {num_tokens}:"
                " the output is still the target's own; of another model, expect few accepted."
            )
        added = max(num_tokens - drafter.config.vocab_size, 0)
        # a token that was added since has no successor, and one that is gone is none
        successors = F.pad(drafter.successors, (0, 0, 0, added))
        log_probs = F.pad(drafter.log_probs, (0, 0, 0, added), value=float("-inf"))
        log_probs = log_probs.masked_fill(successors >= num_tokens, float("-inf"))
        table = (successors.clamp(max=num_tokens - 1), log_probs)
        self.table = [part.to(target.device) for part in table]

    def propose(self, root: Tensor, shape: TreeShape, warp: Warp | None = None) -> DraftTree:
        """Draft the most probable paths of the bigram chain below `root` (batch,)."""
        root = root.to(self.table[0].device)
        builder, tokens = TreeBuilder(root, shape), root[:, None]  # (batch, beam)
        successors, log_probs = (part[:, : shape.top_k] for part in self.table)
        for _ in range(shape.depth):
            beam = builder.add_level(successors[tokens], log_probs[tokens])
            if not beam.is_worth(shape.level_floor):
                break
            tokens = beam.tokens
        return builder.build()


AutoConfig.register(BigramConfig.model_type, BigramConfig, exist_ok=True)
AutoModel.register(BigramConfig, BigramDrafter, exist_ok=True)
coral_hf.register_drafting(BigramConfig.model_type, BigramDrafting)
