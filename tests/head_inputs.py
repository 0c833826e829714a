"""Small LM heads, routers and levels that the tests of draft heads share."""

import torch
from torch import Tensor, nn

from coral_hf.heads.router import Groups, Router
from coral_hf.lm_head import LMHead

NODES, HIDDEN = 3, 16

# (vocab_size, num_groups): even, uneven, one token a group, last groups that stay empty
SPLITS = [(48, 16), (50, 16), (50, 7), (7, 7), (7, 5), (9, 1)]


def make_head(vocab_size: int, bias: bool = False, **finish) -> LMHead:
    torch.manual_seed(vocab_size)
    return LMHead(nn.Linear(HIDDEN, vocab_size, bias=bias).double(), **finish)


def make_order(vocab_size: int) -> Tensor:
    """(vocab,), some permutation of the token ids."""
    return torch.randperm(vocab_size, generator=torch.Generator().manual_seed(vocab_size))


def make_router(num_groups: int, order: Tensor | None = None) -> Router:
    torch.manual_seed(num_groups)
    return Router(HIDDEN, num_groups, order).double()


def make_level(batch: int = 1, nodes: int = NODES) -> tuple[Tensor, Tensor]:
    """Features (batch, nodes, hidden) and the log-confidence of their paths (batch, nodes)."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(batch, nodes, HIDDEN, generator=generator, dtype=torch.float64)
    return features, -torch.rand(batch, nodes, generator=generator)


def group_of(groups: Groups) -> Tensor:
    """The group of each token id, of shape (vocab,)."""
    places = torch.arange(groups.vocab_size)
    found = torch.empty_like(places)
    found[places if groups.order is None else groups.order] = places // groups.size
    return found
