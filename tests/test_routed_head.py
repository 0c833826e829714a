"""The routed head reads the groups of the LM head that a router picks for a tree level."""

import pytest
import torch
from head_inputs import (
    HIDDEN,
    SPLITS,
    group_of,
    make_head,
    make_level,
    make_order,
    make_router,
)
from torch import Tensor

from coral_hf.heads.draft_heads import FullHead, RoutedHead
from coral_hf.heads.router import Router, Routing
from coral_hf.lm_head import LMHead


def routed(head: LMHead, router: Router, num_active: int, name="shared", **limits) -> RoutedHead:
    weight = None if router.order is None else head.weight[router.order]
    return RoutedHead(head, router, Routing(name, num_active, **limits), weight)


def confidence_by_hand(head: LMHead, router: Router, features: Tensor, groups: list[int]) -> Tensor:
    """Mass of `groups` × probability among their tokens; 0 for all other tokens."""
    logits, mass = head.logits(features), router(features).exp()
    is_read = torch.isin(group_of(router.groups_of(logits.shape[-1])), torch.tensor(groups))
    confidence = torch.zeros_like(logits)
    total = mass[..., groups].sum(-1, keepdim=True)
    confidence[..., is_read] = total * logits[..., is_read].softmax(-1)
    return confidence


@pytest.fixture(params=[False, True], ids=["contiguous", "ordered"])
def order_of(request):
    """Vocabulary size → an order of its tokens, or None."""
    return make_order if request.param else lambda vocab_size: None


def favouring(group: int, num_groups: int) -> Router:
    """A router that gives one group nearly all mass of features of ones."""
    router = make_router(num_groups)
    with torch.no_grad():
        router.fc.weight.zero_()
        router.groups.weight.zero_()
        router.groups.weight[group] = 9.0
    return router


@pytest.mark.parametrize(("vocab_size", "num_groups"), SPLITS)
@pytest.mark.parametrize("bias", [False, True])
def test_with_all_groups_read_children_are_those_of_the_whole_head(
    vocab_size, num_groups, bias, order_of
):
    head = make_head(vocab_size, bias, softcap=3.0)
    router = make_router(num_groups, order_of(vocab_size))
    features, log_path = make_level()
    top_k = min(6, vocab_size)
    children = routed(head, router, num_groups).children(features, log_path, top_k)
    whole = FullHead(head).children(features, log_path, top_k)
    assert children.tokens.equal(whole.tokens)
    # but for what an untrained router gives to groups without a token
    filled = range(router.groups_of(vocab_size).filled)
    confidence = confidence_by_hand(head, router, features, [*filled]).gather(-1, whole.tokens)
    torch.testing.assert_close(children.log_confidence, confidence.log().float())


@pytest.mark.parametrize("num_active", [1, 2, 3])
def test_the_rows_of_a_level_share_the_groups_of_the_largest_total_mass(num_active, order_of):
    head, router = make_head(50), make_router(7, order_of(50))
    features, log_path = make_level()
    total = (log_path[..., None].exp() * router(features).exp()).sum((0, 1))
    groups = total.topk(num_active).indices.tolist()
    children = routed(head, router, num_active).children(features, log_path, 5)
    best, tokens = confidence_by_hand(head, router, features, groups).sort(-1, descending=True)
    assert children.tokens.equal(tokens[..., :5])
    torch.testing.assert_close(children.log_confidence, best[..., :5].log().float())


def test_rows_that_read_their_own_groups_are_levels_of_their_own(order_of):
    head, router = make_head(50, bias=True), make_router(7, order_of(50))
    features, log_path = make_level(nodes=5)
    own = routed(head, router, 2, "per_node")
    together, logits = own.children(features, log_path, 4), own.logits(features, log_path)
    for row in range(5):
        one = features[:, row : row + 1], log_path[:, row : row + 1]
        alone = routed(head, router, 2).children(*one, 4)
        assert together.tokens[:, row].equal(alone.tokens[:, 0])
        torch.testing.assert_close(together.log_confidence[:, row], alone.log_confidence[:, 0])
        torch.testing.assert_close(logits[:, row], routed(head, router, 2).logits(*one)[:, 0])


def test_by_node_changes_the_routing_and_nothing_else(order_of):
    head, router = make_head(50, bias=True), make_router(7, order_of(50))
    level = make_level(nodes=5)
    expected = routed(head, router, 2, "per_node").children(*level, 4)
    found = routed(head, router, 2).by_node().children(*level, 4)
    assert found.tokens.equal(expected.tokens)


@pytest.mark.parametrize("routing", ["shared", "per_node"])
@pytest.mark.parametrize("active_mass", [None, 0.3])
def test_logits_are_the_targets_in_the_active_groups_and_impossible_elsewhere(
    routing, active_mass, order_of
):
    head, router = make_head(50, bias=True, softcap=2.0), make_router(7, order_of(50))
    features, log_path = make_level(batch=2)
    draft_head = routed(head, router, 2, routing, active_mass=active_mass)
    logits = draft_head.logits(features, log_path)
    active = draft_head.routing.choose(router(features), log_path).expand(-1, 3, -1)
    groups = group_of(router.groups_of(50))
    is_read = (active[..., None] == groups).any(2)  # (batch, nodes, vocab)
    assert logits.isfinite().equal(is_read)
    torch.testing.assert_close(logits[is_read], head.logits(features)[is_read].float())


@pytest.mark.parametrize("routing", ["shared", "per_node"])
def test_children_are_tokens_that_were_read_each_once(routing, order_of):
    head, router = make_head(50), make_router(16, order_of(50))
    features, log_path = make_level()
    draft_head = routed(head, router, 2, routing)
    children = draft_head.children(features, log_path, top_k=10)
    is_read = draft_head.logits(features, log_path).isfinite()
    for row in range(3):
        counts = children.log_confidence[0, row] > float("-inf")
        tokens = children.tokens[0, row][counts].tolist()
        assert len(set(tokens)) == len(tokens) == min(10, int(is_read[0, row].sum()))
        assert is_read[0, row, tokens].all()


def test_empty_groups_are_never_read():
    assert Router(HIDDEN, 5).groups_of(7).filled == 4  # 7 tokens are 2 + 2 + 2 + 1 + 0
    features = torch.ones(1, 1, HIDDEN, dtype=torch.float64)
    children = routed(make_head(7), favouring(4, 5), 1).children(features, torch.zeros(1, 1), 2)
    assert children.tokens.max() < 7
    assert children.log_confidence[..., 0].isfinite().all()


def test_confidence_is_never_above_one(order_of):
    children = routed(make_head(9), make_router(3, order_of(9)), 2).children(*make_level(), 3)
    assert (children.log_confidence <= 0).all()


def test_a_router_that_is_sure_reads_one_group_only():
    features, log_path = torch.ones(1, 2, HIDDEN, dtype=torch.float64), torch.zeros(1, 2)
    sure = routed(make_head(50), favouring(3, 7), 4, active_mass=0.9)
    assert int(sure.logits(features, log_path)[0, 0].isfinite().sum()) == 8
    always = routed(make_head(50), favouring(3, 7), 4)
    assert int(always.logits(features, log_path)[0, 0].isfinite().sum()) > 24


@torch.no_grad()
def test_each_text_of_a_batch_reads_groups_of_its_own(order_of):
    torch.manual_seed(0)
    features, log_path = torch.randn(3, 4, HIDDEN).double(), torch.zeros(3, 4)
    draft_head = routed(make_head(50), make_router(7, order_of(50)), 1)
    together = draft_head.children(features, log_path, 3)
    for text in range(3):
        alone = draft_head.children(features[text : text + 1], log_path[:1], 3)
        assert together.tokens[text].equal(alone.tokens[0])
        torch.testing.assert_close(together.log_confidence[text], alone.log_confidence[0])
