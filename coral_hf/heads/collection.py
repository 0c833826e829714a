"""The draft heads of a drafter: which it has, which it reads, how it gets one.

In: the drafter's config, weights, and a target's LM head. Out: the `DraftHead` of a call.
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.utils import logging

from ..lm_head import Derived, LMHead
from .draft_head import DraftHead, FrequencyHead, FullHead, LowRank, LowRankHead
from .group_logits import has_kernel
from .groups import check_order, order_hash
from .routed_head import RoutedHead
from .router import Router, Routing
from .settings import DRAFT_HEADS, HEAD_FIELDS

logger = logging.get_logger(__name__)


class DraftHeads(nn.Module):
    """The draft heads of a drafter, as its submodule `heads`.

    Args:
        config: the drafter's own, an object that both share: `HEAD_FIELDS` say which heads there
            are and which one is read.
    """

    router: Router | None
    hot_tokens: Tensor | None  # (num_hot_tokens,), the most frequent first
    low_rank: LowRank | None

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.config = config
        # moves with the drafter, so that a new head lands where the drafter is
        self.register_buffer("_placement", torch.empty(0), persistent=False)
        self._make(config)

    def _make(self, config: PreTrainedConfig) -> None:
        """Room for the heads that a checkpoint with this config holds."""
        self.router = self.low_rank = None
        if config.num_groups is not None:
            has_order = config.grouping != "contiguous"
            order = torch.arange(config.vocab_size) if has_order else None
            self.router = Router(config.hidden_size, config.num_groups, order)
        hot = None if config.num_hot_tokens is None else torch.arange(config.num_hot_tokens)
        self.register_buffer("hot_tokens", hot)
        if config.head_rank is not None:
            self.low_rank = LowRank(config.hidden_size, config.head_rank)
        # copies of a target's head in another order, or fewer rows or channels of it
        self._grouped, self._hot, self._squeezed = Derived(), Derived(), Derived()

    def bind(self, head: LMHead, name: str | None = None) -> DraftHead:
        """The draft head called `name` (the config's by default) on a target's LM head.

        Raises:
            ValueError: if the drafter has no such head, or the target's cannot be read by rows.
        """
        name = self.config.draft_head if name is None else name
        if name not in DRAFT_HEADS:
            raise ValueError(f"`draft_head` is {name!r}; use one of {DRAFT_HEADS}.")
        if name == "full":
            return FullHead(head)
        if not head.is_readable:
            raise ValueError(
                f"`draft_head` is {name!r}, but the target's LM head is quantised, offloaded or"
                " adapted, so that no part of it can be read alone; use draft_head='full'."
            )
        makers = {"routed": self._routed, "frequency": self._frequent, "low_rank": self._low_rank}
        return makers[name](head)

    def _routed(self, head: LMHead) -> DraftHead:
        config, router = self.config, self.router
        if router is None or not config.is_router_trained:
            raise ValueError(
                "`draft_head` is 'routed', but this drafter has no trained router; train one with"
                " CoralTrainer(..., args=CoralTrainingArguments(stage='router')) or use"
                " draft_head='full'."
            )
        if self._placement.device.type != "cpu" and not _is_finite(router):
            logger.warning_once(
                "The router's weights are not finite: the whole LM head is read instead."
            )
            return FullHead(head)
        weight = self._grouped_weight(head, router)
        return RoutedHead(head, router, Routing.of(config), weight)

    def _grouped_weight(self, head: LMHead, router: Router) -> Tensor | None:
        """(vocab, hidden) with each group in one piece; None where the head is read as it is."""
        order, weight = router.order, head.weight
        if order is None or has_kernel(weight):
            return None
        return self._grouped.of([weight, order], lambda: weight.detach()[order])

    def _frequent(self, head: LMHead) -> DraftHead:
        tokens, weight = self.hot_tokens, head.weight
        if tokens is None:
            raise ValueError(
                "`draft_head` is 'frequency', but this drafter knows no frequent tokens; give them"
                " with drafter.heads.add_frequency_head(token_ids) or use draft_head='full'."
            )
        rows = self._hot.of([weight, tokens], lambda: weight.detach()[tokens])
        return FrequencyHead(head, tokens, rows)

    def _low_rank(self, head: LMHead) -> DraftHead:
        low_rank, weight = self.low_rank, head.weight
        if low_rank is None:
            raise ValueError(
                "`draft_head` is 'low_rank', but this drafter has no such head; train one with"
                " CoralTrainer(..., args=CoralTrainingArguments(stage='low_rank')) or use"
                " draft_head='full'."
            )
        up = low_rank.up.weight  # (hidden, rank)
        channels = self._squeezed.of(
            [weight, up], lambda: weight.detach() @ up.detach().to(weight.dtype)
        )
        return LowRankHead(head, low_rank, channels)

    def adopt(self, config: PreTrainedConfig) -> None:
        """Make room for the heads of another drafter, whose tensors are to be loaded then."""
        self.configure(**{name: getattr(config, name) for name in HEAD_FIELDS})
        self._make(self.config)
        self.to(self._placement)

    def check(self) -> None:
        """Refuse groups that do not cover the vocabulary or are not the router's, and hot tokens
        that are none.

        Raises:
            ValueError: naming what is missing.
        """
        if self.hot_tokens is not None:
            self._check_tokens(self.hot_tokens)
        order = None if self.router is None else self.router.order
        if order is None:
            return
        check_order(order, self.config.vocab_size)
        if self.config.grouping_hash != order_hash(order):
            raise ValueError(
                "The checkpoint's router has other groups than those it was trained for: the hash"
                f" of its order is {order_hash(order)}, `grouping_hash` is"
                f" {self.config.grouping_hash}. Download or save it again, or train the router"
                " again (add_router, then stage='router')."
            )

    def add_router(
        self,
        num_groups: int,
        num_active_groups: int,
        order: Tensor | None = None,
        grouping: str | None = None,
    ) -> None:
        """Give the drafter a fresh router over `num_groups` groups of the vocabulary.

        Args:
            num_active_groups: how many of them are read at a time.
            order: (vocab,), token ids, of which equal slices are the groups; the order of the ids
                themselves by default.
            grouping: where the order comes from; `"custom"` by default.

        Raises:
            ValueError: if the order does not name each token once.
        """
        if order is not None:
            order = torch.as_tensor(order)
            check_order(order, self.config.vocab_size)
        has_order = order is not None
        self.configure(
            num_groups=num_groups,
            num_active_groups=num_active_groups,
            grouping=(grouping or "custom") if has_order else "contiguous",
            grouping_hash=order_hash(order) if order is not None else None,
            max_active_groups=None,
            is_router_trained=False,
            draft_head="full",
        )
        order = None if order is None else order.to(dtype=torch.long, device="cpu").clone()
        router = Router(self.config.hidden_size, num_groups, order)
        for layer in (router.fc, router.groups):
            nn.init.normal_(layer.weight, std=self.config.initializer_range)
        self.router = router.to(self._placement)

    def remove_router(self) -> None:
        """Take the router away, so that a stage of training adds a fresh one."""
        self.configure(
            num_groups=None,
            grouping="contiguous",
            grouping_hash=None,
            max_active_groups=None,
            is_router_trained=False,
            draft_head="full",
        )
        self.router = None

    def remove_low_rank_head(self) -> None:
        """Take the low-rank head away, so that a stage of training adds a fresh one."""
        self.configure(head_rank=None, draft_head="full")
        self.low_rank = None

    def add_frequency_head(self, tokens: Tensor) -> None:
        """Let the drafter read the rows of these tokens alone.

        Args:
            tokens: (read,), ids, the most frequent first; see
                `coral_hf.training.grouping.most_frequent_first`.
        """
        tokens = torch.as_tensor(tokens)
        self._check_tokens(tokens)
        self.configure(num_hot_tokens=len(tokens), draft_head="frequency")
        self.hot_tokens = tokens.to(device=self._placement.device, dtype=torch.long).clone()

    def _check_tokens(self, tokens: Tensor) -> None:
        vocab_size, unique = self.config.vocab_size, tokens.unique()
        is_inside = bool(((tokens >= 0) & (tokens < vocab_size)).all())
        if tokens.ndim != 1 or not len(tokens) or not is_inside or len(unique) < len(tokens):
            raise ValueError(
                f"Hot tokens have shape {tuple(tokens.shape)} and {len(unique)} different values;"
                f" expected (read,) different token ids from 0 to {vocab_size - 1}."
            )

    def add_low_rank_head(self, rank: int, head: LMHead) -> None:
        """Let the drafter read `rank` channels of the head's rows, at first the largest ones.

        Raises:
            ValueError: if the head's rows cannot be read, or there are not so many channels.
        """
        if not head.is_readable:
            raise ValueError(
                "A low-rank head starts from the rows of the target's LM head, which is quantised,"
                " offloaded or adapted; load the target with a plain LM head."
            )
        before = {name: getattr(self.config, name) for name in ("head_rank", "draft_head")}
        self.configure(head_rank=rank, draft_head="low_rank")
        try:
            low_rank = LowRank(self.config.hidden_size, rank)
            low_rank.start_from(head.weight.detach())
        except BaseException:
            self.configure(**before)
            raise
        self.low_rank = low_rank.to(self._placement)

    def configure(self, **fields) -> None:
        """Set fields of the config, which are checked together."""
        type(self.config).from_dict({**self.config.to_dict(), **fields})  # raises if they clash
        for name, value in fields.items():
            setattr(self.config, name, value)


def _is_finite(router: Router) -> bool:
    return all(bool(parameter.isfinite().all()) for parameter in router.parameters())
