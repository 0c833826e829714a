"""The draft heads of a drafter: which it has, which it reads, how one is added.

In: the drafter's config and weights, and the LM head that it reads. Out: the `DraftHead` of a call.
"""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from ..lm_head import Cached, LMHead
from .draft_heads import DraftHead, FrequencyHead, FullHead, QuantizedHead, RoutedHead
from .products import DEVICES, has_kernel, quantize
from .router import Router, Routing, check_order, check_token_ids, order_hash
from .settings import DRAFT_HEADS, HEAD_FIELDS, HeadFields

# fields of a drafter that has no router, and what a fresh one starts from
OF_ROUTER = ("num_groups", "grouping", "grouping_hash", "is_router_trained", "draft_head")
NO_ROUTER = {name: getattr(HeadFields, name) for name in OF_ROUTER}
# what a drafter lacks for a draft head, and how it gets it
REMEDIES = {
    "routed": "trained router; train one with CoralTrainingArguments(stage='router')",
    "frequency": "frequent tokens; add them with drafter.heads.add_frequency_head(token_ids)",
}


class DraftHeads(nn.Module):
    """The draft heads of a drafter, as its submodule `heads`.

    Args:
        config: the drafter's own, shared with it: `HEAD_FIELDS` say which heads there are and
            which one is read.
    """

    router: Router | None
    hot_tokens: Tensor | None  # of shape (num_hot_tokens,), the most frequent first

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.config = config
        # of shape (0,): moves with the drafter, so that a new head lands where the drafter is
        self.register_buffer("_placement", torch.empty(0), persistent=False)
        self._make(config)

    def _make(self, config: PreTrainedConfig) -> None:
        """Make room for the heads that a checkpoint with this config holds.

        Hot tokens have shape (num_hot_tokens,), an order (vocab,).
        """
        self.router = None
        if config.num_groups is not None:
            order = None if config.grouping == "contiguous" else torch.arange(config.vocab_size)
            self.router = Router(config.hidden_size, config.num_groups, order)
        hot = None if config.num_hot_tokens is None else torch.arange(config.num_hot_tokens)
        self.register_buffer("hot_tokens", hot)
        # by what it is, such as a copy of the target's head (vocab, hidden) in another order
        self._cached: dict[str, Cached] = defaultdict(Cached)

    def bind(self, head: LMHead, name: str | None = None) -> DraftHead:
        """Return the draft head `name` (the config's by default) on a target's LM head.

        Raises:
            ValueError: if the drafter has no such head, or the target's cannot be read by rows.
        """
        name = self.config.draft_head if name is None else name
        if name not in DRAFT_HEADS:
            raise ValueError(f"`draft_head` is {name!r}; use one of {DRAFT_HEADS}.")
        if name == "full":
            return FullHead(head)
        router, problem = self.router if self.config.is_router_trained else None, None
        part: Any = {"routed": router, "frequency": self.hot_tokens}.get(name, self)
        if part is None:
            problem = f"this drafter has no {REMEDIES[name]}, or"
        elif not head.is_readable:
            problem = "the target's is quantised, offloaded or adapted, and can only be read whole;"
        elif name == "quantized" and (device := head.weight.device.type) not in DEVICES:
            problem = f"the target's LM head is on {device!r}, and eight bits need {DEVICES};"
        if problem is not None:
            raise ValueError(f"`draft_head` is {name!r}, but {problem} use draft_head='full'.")
        weight, cached, size = head.weight, self._cached[name], self.config.vocab_size
        if name == "quantized":
            return QuantizedHead(head, cached.get([weight], lambda: quantize(weight)))
        if size > len(weight):  # the target has lost tokens, which the part may name
            return FullHead(head)
        if name == "frequency":
            rows = cached.get([weight, part], lambda: weight.detach()[part])
            return FrequencyHead(head, part, rows)
        order, copy = part.order, None
        if order is not None and not has_kernel(weight):
            copy = cached.get([weight, order], lambda: weight.detach()[order])
        return RoutedHead(head, part, Routing.from_config(self.config), copy, size)

    def adopt(self, config: PreTrainedConfig) -> None:
        """Make room for the heads of another drafter, whose tensors are loaded next."""
        self.configure(**{name: getattr(config, name) for name in HEAD_FIELDS})
        self._make(self.config)
        self.to(self._placement)

    def check(self) -> None:
        """Raise a ValueError for invalid hot tokens, or groups that are not the router's or do not
        cover the vocabulary.
        """
        if self.hot_tokens is not None:
            check_token_ids("hot_tokens", self.hot_tokens, self.config.vocab_size)
        order = None if self.router is None else self.router.order
        if order is None:
            return
        check_order(order, self.config.vocab_size)
        if self.config.grouping_hash != order_hash(order):
            raise ValueError(
                f"The router has other groups than it was trained for: their hash is"
                f" {order_hash(order)}, `grouping_hash` is {self.config.grouping_hash}. Download"
                " the checkpoint again, or train its router again."
            )

    def add_router(
        self,
        num_groups: int,
        num_active_groups: int,
        order: Tensor | None = None,
        grouping: str | None = None,
    ) -> None:
        """Add a fresh router over `num_groups` groups of the vocabulary.

        Args:
            num_active_groups: how many of them are read at a time.
            order: token ids of shape (vocab,), of which equal slices are the groups; the order of
                the ids themselves by default.
            grouping: where the order comes from; `"custom"` by default.

        Raises:
            ValueError: if the order does not name each token once.
        """
        fields: dict[str, Any] = {"num_groups": num_groups, "num_active_groups": num_active_groups}
        if order is not None:
            order = torch.as_tensor(order, device="cpu")
            check_order(order, self.config.vocab_size)
            fields |= {"grouping": grouping or "custom", "grouping_hash": order_hash(order)}
            order = order.to(dtype=torch.long, device="cpu").clone()
        self.configure(**{**NO_ROUTER, **fields})
        router = Router(self.config.hidden_size, num_groups, order)
        for layer in (router.fc, router.groups):
            nn.init.normal_(layer.weight, std=self.config.initializer_range)
        self.router = router.to(self._placement)

    def remove_router(self) -> None:
        """Remove the router, so that a training stage can add a fresh one."""
        self.configure(**NO_ROUTER)
        self.router = None

    def add_frequency_head(self, tokens: Tensor) -> None:
        """Let the drafter read the LM head's rows of these tokens alone.

        Args:
            tokens: ids of shape (read,), the most frequent first; see
                `coral_hf.training.grouping.most_frequent_first`.
        """
        tokens = torch.as_tensor(tokens, device="cpu")
        check_token_ids("tokens", tokens, self.config.vocab_size)
        self.configure(num_hot_tokens=len(tokens), draft_head="frequency")
        self.hot_tokens = tokens.to(device=self._placement.device, dtype=torch.long).clone()

    def configure(self, **fields) -> None:
        """Set fields of the config after checking that they fit together."""
        type(self.config).from_dict({**self.config.to_dict(), **fields})  # a ValueError if not
        for name, value in fields.items():
            setattr(self.config, name, value)
