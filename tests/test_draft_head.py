"""A draft head ranks next tokens; a router decides which part of the LM head is read for it."""

import pytest
import torch
from torch import Tensor, nn

from coral_hf.draft_head import FullHead, LMHead, RoutedHead, Router, group_mass, group_size

BATCH, ROWS, HIDDEN = 1, 3, 16

# (vocab_size, num_groups): even, uneven, one token a group, last groups that stay empty
SPLITS = [(48, 16), (50, 16), (50, 7), (7, 7), (7, 5), (9, 1)]


def make_head(vocab_size: int, bias: bool = False, **finish) -> LMHead:
    torch.manual_seed(vocab_size)
    return LMHead(nn.Linear(HIDDEN, vocab_size, bias=bias).double(), **finish)


def make_router(num_groups: int) -> Router:
    torch.manual_seed(num_groups)
    return Router(HIDDEN, num_groups).double()


def make_features(rows: int = ROWS) -> tuple[Tensor, Tensor]:
    """Features (batch, rows, hidden) and the log-confidence of their paths (batch, rows)."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(BATCH, rows, HIDDEN, generator=generator, dtype=torch.float64)
    return features, -torch.rand(BATCH, rows, generator=generator)


def confidence_by_hand(head: LMHead, router: Router, features: Tensor, groups: list[int]) -> Tensor:
    """Router mass × probability within the group of every token of `groups`, 0 elsewhere."""
    vocab_size = head.weight.shape[0]
    logits, mass = head.logits(features), router(features).exp()
    size = group_size(vocab_size, mass.shape[-1])
    confidence = torch.zeros_like(logits)
    for group in groups:
        tokens = slice(size * group, min(size * (group + 1), vocab_size))
        confidence[..., tokens] = mass[..., group, None] * logits[..., tokens].softmax(-1)
    return confidence


# ---- the LM head


def test_logits_are_scaled_before_they_are_capped():
    head = make_head(10, scale=3.0, softcap=2.0)
    features, _ = make_features()
    raw = features @ head.weight.T
    torch.testing.assert_close(head.logits(features), 2.0 * torch.tanh(3.0 * raw / 2.0))


@pytest.mark.parametrize("bias", [False, True])
def test_a_block_of_logits_is_a_part_of_all_logits(bias):
    head = make_head(10, bias, scale=3.0, softcap=2.0)
    features, _ = make_features()
    block = head.block_logits(features, 3, 7)
    torch.testing.assert_close(block, head.logits(features)[..., 3:7])


def test_features_are_cast_to_the_heads_dtype():
    head = LMHead(nn.Linear(HIDDEN, 10, bias=False).bfloat16())
    features, _ = make_features()
    assert head.logits(features).dtype == torch.bfloat16
    assert head.block_logits(features, 0, 2).dtype == torch.bfloat16


# ---- the whole head


@pytest.mark.parametrize("finish", [{}, {"scale": 0.3}, {"softcap": 1.5}])
@pytest.mark.parametrize("bias", [False, True])
def test_the_full_heads_children_are_the_most_probable_tokens(bias, finish):
    head = make_head(50, bias, **finish)
    features, log_path = make_features()
    children = FullHead(head).children(features, log_path, top_k=6)
    best, tokens = head.logits(features).log_softmax(-1).sort(-1, descending=True)
    assert children.tokens.equal(tokens[..., :6])
    torch.testing.assert_close(children.log_confidence, best[..., :6].float())


# ---- the routed head


def test_the_router_is_a_residual_block_and_a_linear_map():
    router, (features, _) = make_router(5), make_features()
    inner = nn.functional.silu(features @ router.fc.weight.T) + features
    expected = (inner @ router.groups.weight.T).softmax(-1)
    torch.testing.assert_close(router(features).exp(), expected.float())


@pytest.mark.parametrize(("vocab_size", "num_groups"), SPLITS)
@pytest.mark.parametrize("bias", [False, True])
def test_with_all_groups_read_children_rank_by_mass_times_probability_within(
    vocab_size, num_groups, bias
):
    head, router = make_head(vocab_size, bias, softcap=3.0), make_router(num_groups)
    features, log_path = make_features()
    top_k = min(6, vocab_size)
    children = RoutedHead(head, router, num_groups).children(features, log_path, top_k)
    confidence = confidence_by_hand(head, router, features, list(range(num_groups)))
    best, tokens = confidence.sort(-1, descending=True)
    assert children.tokens.equal(tokens[..., :top_k])
    torch.testing.assert_close(children.log_confidence, best[..., :top_k].log().float())


@pytest.mark.parametrize("num_active_groups", [1, 2, 3])
def test_the_rows_of_a_level_share_the_groups_of_the_largest_total_mass(num_active_groups):
    head, router = make_head(50), make_router(7)
    features, log_path = make_features()
    total = (log_path[..., None].exp() * router(features).exp()).sum((0, 1))
    groups = total.topk(num_active_groups).indices.tolist()
    children = RoutedHead(head, router, num_active_groups).children(features, log_path, 5)
    best, tokens = confidence_by_hand(head, router, features, groups).sort(-1, descending=True)
    assert children.tokens.equal(tokens[..., :5])
    torch.testing.assert_close(children.log_confidence, best[..., :5].log().float())


def test_a_sure_row_decides_which_groups_are_read():
    router = make_router(2)
    with torch.no_grad():
        router.fc.weight.zero_()
        router.groups.weight.zero_()
        router.groups.weight[0, 0] = router.groups.weight[1, 1] = 4.0
    features = torch.zeros(1, 2, HIDDEN, dtype=torch.float64)
    features[0, 0, 0] = features[0, 1, 1] = 1.0  # row 0 wants group 0, row 1 group 1
    routed = RoutedHead(make_head(10), router, 1)
    for sure, group in ((0, 0), (1, 1)):
        log_path = torch.full((1, 2), -5.0)
        log_path[0, sure] = 0.0
        tokens = routed.children(features, log_path, 5).tokens
        assert tokens.sort(-1).values.tolist() == [[list(range(5 * group, 5 * group + 5))] * 2]


def test_fewer_tokens_in_the_groups_than_wanted_gives_what_there_is():
    routed = RoutedHead(make_head(50), make_router(16), 2)  # groups of 4, the last ones of 2 and 0
    children = routed.children(*make_features(), top_k=10)
    assert children.tokens.shape == children.log_confidence.shape
    assert children.tokens.shape[-1] <= 8
    assert all(len(set(row)) == len(row) for row in children.tokens[0].tolist())


def test_empty_groups_are_never_read():
    router = make_router(5)
    assert group_size(7, 5) == 2  # 7 tokens are 2 + 2 + 2 + 1 + 0
    with torch.no_grad():
        router.fc.weight.zero_()
        router.groups.weight.zero_()
        router.groups.weight[4] = 9.0  # all mass on the empty group
    features = torch.ones(1, 1, HIDDEN, dtype=torch.float64)
    children = RoutedHead(make_head(7), router, 1).children(features, torch.zeros(1, 1), 2)
    assert children.tokens.max() < 7
    assert children.log_confidence.isfinite().all()


def test_confidence_is_never_above_one():
    features, log_path = make_features()
    for head in (FullHead(make_head(9)), RoutedHead(make_head(9), make_router(3), 2)):
        assert (head.children(features, log_path, 3).log_confidence <= 0).all()


# ---- groups


@pytest.mark.parametrize(("vocab_size", "num_groups"), SPLITS)
def test_the_mass_of_the_groups_sums_to_one_and_each_is_its_tokens_sum(vocab_size, num_groups):
    probs = torch.rand(2, 3, vocab_size, dtype=torch.float64).softmax(-1)
    mass = group_mass(probs, num_groups)
    assert mass.shape == (2, 3, num_groups)
    torch.testing.assert_close(mass.sum(-1), torch.ones(2, 3, dtype=torch.float64))
    size = group_size(vocab_size, num_groups)
    for group in range(num_groups):
        expected = probs[..., size * group : size * (group + 1)].sum(-1)
        torch.testing.assert_close(mass[..., group], expected)


@torch.no_grad()
def test_each_text_of_a_batch_reads_groups_of_its_own():
    torch.manual_seed(0)
    features, log_path = torch.randn(3, 4, HIDDEN).double(), torch.zeros(3, 4)
    routed = RoutedHead(make_head(50), make_router(7), 1)
    together = routed.children(features, log_path, 3)
    logits = routed.logits(features, log_path)
    for text in range(3):
        alone = routed.children(features[text : text + 1], log_path[:1], 3)
        assert together.tokens[text].equal(alone.tokens[0])
        torch.testing.assert_close(together.log_confidence[text], alone.log_confidence[0])
        one = routed.logits(features[text : text + 1], log_path[:1])
        torch.testing.assert_close(logits[text], one[0])
