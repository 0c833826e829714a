"""Verification emits the target's own tokens, or draws of the target's own distribution, exactly.

The running example, "The cat sat …", is the one of docs/verification.md, number for number.
"""

import itertools
from collections.abc import Callable

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from coral_hf.decoding.tree import DraftTree, root_only
from coral_hf.decoding.verification import (
    Siblings,
    Verdict,
    draw_token,
    share_among_siblings,
    verify,
)

WORDS = ["The", "cat", "sat", "on", "down", "the", "a", "mat", "sofa", "."]
NODES = ["sat", "on", "down", "the", "a", "on", "mat", "sofa"]
PARENTS = [0, 0, 0, 1, 1, 2, 3, 3]
DEPTHS = [0, 1, 1, 2, 2, 2, 3, 3]
# the target's distribution after each node
TARGET = [
    {"on": 0.5, "down": 0.2, ".": 0.2, "a": 0.1},
    {"the": 0.6, "a": 0.3, "mat": 0.1},
    {".": 0.75, "on": 0.25},
    {"sofa": 0.5, "mat": 0.4, "cat": 0.1},
    {"mat": 0.8, "sofa": 0.2},
    {"the": 0.9, "a": 0.1},
    {".": 0.8, "on": 0.2},
    {".": 0.7, "on": 0.3},
]
GREEDY = ["on", "the", "sofa", "."]


def running_example() -> DraftTree:
    tokens = [WORDS.index(word) for word in NODES]
    return DraftTree(*(torch.tensor([row]) for row in (tokens, PARENTS, DEPTHS)))


def target_probs(node: int) -> Tensor:
    """(vocab,) in float64."""
    probs = torch.zeros(len(WORDS), dtype=torch.float64)
    for word, value in TARGET[node].items():
        probs[WORDS.index(word)] = value
    return probs


def share(node: int, *children: str) -> Siblings:
    tokens = torch.tensor([WORDS.index(word) for word in children], dtype=torch.long)
    return share_among_siblings(target_probs(node), tokens)


# ---- the running example


def test_greedy_takes_the_path_of_the_targets_argmaxes():
    verdict = verify(running_example(), 0, lambda node, *_: int(target_probs(node).argmax()))
    assert verdict.path == [0, 1, 3, 7]
    assert [WORDS[token] for token in verdict.tokens] == GREEDY


def test_the_first_child_is_accepted_with_its_probability_the_next_with_what_is_left():
    chances, residual = share(0, "on", "down")
    torch.testing.assert_close(chances, torch.tensor([0.5, 0.4], dtype=torch.float64))
    left = {WORDS[token]: residual[token].item() for token in residual.nonzero()[:, 0]}
    assert left == pytest.approx({".": 2 / 3, "a": 1 / 3})


def test_each_word_comes_out_as_often_as_the_target_says():
    chances, residual = share(0, "on", "down")
    on = chances[0]
    down = (1 - chances[0]) * chances[1]
    rest = (1 - chances[0]) * (1 - chances[1])
    out = {
        "on": on,
        "down": down,
        ".": rest * residual[WORDS.index(".")],
        "a": rest * residual[WORDS.index("a")],
    }
    assert {word: value.item() for word, value in out.items()} == pytest.approx(TARGET[0])


def test_with_the_plain_target_as_residual_a_word_comes_out_too_often():
    chances, _ = share(0, "on", "down")
    rest = (1 - chances).prod().item()
    assert chances[0].item() + rest * TARGET[0]["on"] == pytest.approx(0.65)


def test_a_draw_walks_down_the_tree_until_a_token_is_no_node_of_it():
    luck = iter([0.7, 0.3, 0.6])  # "on" is refused, "down" taken, then its child "on" refused

    def rule(node: int, drafted: list[int], children: list[int]) -> int:
        chances, residual = share(node, *(WORDS[child] for child in children))
        for child, chance in zip(children, chances.tolist(), strict=True):
            if next(luck) < chance:
                return child
        return int(residual.argmax())

    verdict = verify(running_example(), 0, rule)
    assert verdict.path == [0, 2]
    assert [WORDS[token] for token in verdict.tokens] == ["down", "."]


def test_the_running_example_emits_nearly_two_and_a_half_tokens_a_pass():
    reached = [1.0] * len(NODES)
    for node, parent in enumerate(PARENTS[1:], start=1):
        reached[node] = reached[parent] * TARGET[parent][NODES[node]]
    assert sum(reached) == pytest.approx(2.47)


# ---- the walk


def test_the_rule_is_asked_once_for_each_emitted_token_in_order():
    asked = []

    def rule(node: int, drafted: list[int], children: list[int]) -> int:
        asked.append((node, [WORDS[token] for token in drafted], [WORDS[c] for c in children]))
        return int(target_probs(node).argmax())

    verify(running_example(), 0, rule)
    assert asked == [
        (0, [], ["on", "down"]),
        (1, ["on"], ["the", "a"]),
        (3, ["on", "the"], ["mat", "sofa"]),
        (7, ["on", "the", "sofa"], []),
    ]


def test_the_target_never_accepts_draft_tokens():
    verdict = verify(running_example(), 0, lambda *_: WORDS.index("cat"))
    assert verdict == Verdict(path=[0], tokens=[WORDS.index("cat")])


def test_the_target_always_accepts_draft_tokens():
    chain = DraftTree(*(torch.tensor([row]) for row in ([5, 6, 7], [0, 0, 1], [0, 1, 2])))
    assert verify(chain, 0, lambda node, *_: node + 6) == Verdict([0, 1, 2], [6, 7, 8])


def test_the_root_alone_emits_one_token():
    assert verify(root_only(torch.tensor([3])), 0, lambda *_: 4) == Verdict([0], [4])


def test_each_row_of_a_batch_is_walked_by_itself():
    rows = [[2, 3, 4], [2, 4, 3]], [[0, 0, 0], [0, 0, 1]], [[0, 1, 1], [0, 1, 2]]
    tree = DraftTree(*(torch.tensor(row) for row in rows))
    assert verify(tree, 0, lambda node, *_: 4) == Verdict([0, 2], [4, 4])
    assert verify(tree, 1, lambda node, *_: 4) == Verdict([0, 1], [4, 4])


@pytest.mark.parametrize("seed", range(10))
def test_greedy_accepts_the_longest_path_that_agrees(seed):
    generator = torch.Generator().manual_seed(seed)
    tree = random_tree(12, vocab=4, generator=generator)
    best = torch.randint(0, 4, (12,), generator=generator).tolist()
    tokens, parents = tree.tokens[0].tolist(), tree.parents[0].tolist()
    agreeing = [[0]]
    for node in range(1, 12):
        for path in list(agreeing):
            if path[-1] == parents[node] and tokens[node] == best[parents[node]]:
                agreeing.append([*path, node])
    longest = max(agreeing, key=len)
    verdict = verify(tree, 0, lambda node, *_: best[node])
    assert verdict.path == longest
    assert verdict.tokens == [best[node] for node in longest]


def random_tree(nodes: int, vocab: int, generator: torch.Generator) -> DraftTree:
    """A random tree whose siblings are distinct."""
    tokens, parents, depths, taken = [0], [0], [0], {node: set() for node in range(nodes)}
    while len(tokens) < nodes:
        parent = int(torch.randint(0, len(tokens), (1,), generator=generator))
        token = int(torch.randint(0, vocab, (1,), generator=generator))
        if token not in taken[parent]:
            taken[parent].add(token)
            tokens.append(token)
            parents.append(parent)
            depths.append(depths[parent] + 1)
    return DraftTree(*(torch.tensor([row]) for row in (tokens, parents, depths)))


# ---- losslessness: the distribution of three tokens, summed over every way to get them

# vocabulary, the tokens of the nodes below the root, and their parents
TREES = {
    "root alone": (4, [], []),
    "chain": (4, [2, 0, 3], [0, 1, 2]),
    "a chain that repeats a token": (5, [1, 1, 1], [0, 1, 2]),
    "binary": (4, [1, 3, 0, 2, 3, 1], [0, 0, 1, 1, 2, 2]),
    "ternary": (6, [5, 0, 2, 1, 2, 3, 4, 5, 0, 0, 1, 5], [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]),
    "the whole vocabulary": (4, [3, 2, 1, 0], [0, 0, 0, 0]),
    "irregular": (5, [4, 1, 0, 3, 2, 2, 0, 4], [0, 0, 1, 1, 1, 3, 6, 6]),
    "deeper than three": (4, [0, 1, 2, 3, 1], [0, 1, 2, 3, 0]),
}
LENGTH = 3
Prefix = tuple[int, ...]


def make_tree(name: str) -> tuple[DraftTree, int]:
    vocab, tokens, parents = TREES[name]
    depths = [0]
    for parent in parents:
        depths.append(depths[parent] + 1)
    rows = [0, *tokens], [0, *parents], depths
    return DraftTree(*(torch.tensor([row]) for row in rows)), vocab


def random_target(vocab: int, seed: int, zeros: bool) -> dict[Prefix, Tensor]:
    """The target's next-token distribution (vocab,) after every text of up to two tokens."""
    generator = torch.Generator().manual_seed(seed)
    target = {}
    for length in range(LENGTH):
        for prefix in itertools.product(range(vocab), repeat=length):
            probs = torch.rand(vocab, generator=generator, dtype=torch.float64) ** 2
            if zeros:  # as after top-k or top-p: some tokens can never come
                probs[torch.randperm(vocab, generator=generator)[: vocab // 2]] = 0
            target[prefix] = probs / probs.sum()
    return target


def alone(target: dict[Prefix, Tensor], prefix: Prefix = ()) -> dict[Prefix, float]:
    """The distribution of texts of three tokens that go on from `prefix`, by the target itself."""
    if len(prefix) == LENGTH:
        return {prefix: 1.0}
    texts = {}
    for token, chance in enumerate(target[prefix].tolist()):
        for text, rest in alone(target, (*prefix, token)).items():
            texts[text] = chance * rest
    return texts


def drafted(
    tree: DraftTree,
    target: dict[Prefix, Tensor],
    share: Callable[[Tensor, Tensor], Siblings],
    node: int = 0,
    prefix: Prefix = (),
) -> dict[Prefix, float]:
    """The same distribution with the tree: every accept and every reject, weighted and summed."""
    if len(prefix) == LENGTH:
        return {prefix: 1.0}
    children, token_of = tree.children(0)[node], tree.tokens[0].tolist()
    tokens = [token_of[child] for child in children]
    chances, residual = share(target[prefix], torch.tensor(tokens, dtype=torch.long))
    branches, left = [], 1.0
    for child, token, chance in zip(children, tokens, chances.tolist(), strict=True):
        branches.append((left * chance, drafted(tree, target, share, child, (*prefix, token))))
        left *= 1 - chance
    for token, chance in enumerate(residual.tolist()):  # off the tree
        branches.append((left * chance, alone(target, (*prefix, token))))
    texts = dict.fromkeys(itertools.product(range(len(residual)), repeat=LENGTH), 0.0)
    for weight, branch in branches:
        for text, chance in branch.items():
            texts[text] += weight * chance
    return texts


def largest_difference(one: dict[Prefix, float], other: dict[Prefix, float]) -> float:
    return max(abs(one.get(text, 0.0) - other.get(text, 0.0)) for text in {*one, *other})


def without_a_residual(probs: Tensor, tokens: Tensor) -> Siblings:
    """The mistake: when all children are rejected, draw from the target as if nothing had been."""
    return Siblings(share_among_siblings(probs, tokens).chances, probs)


def without_renormalising(probs: Tensor, tokens: Tensor) -> Siblings:
    """The mistake: accept each child with its plain probability, whatever was rejected before."""
    return Siblings(probs[tokens], share_among_siblings(probs, tokens).residual)


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("name", TREES)
def test_output_distribution_is_exactly_the_targets(name, zeros):
    tree, vocab = make_tree(name)
    for seed in range(4 if vocab < 6 else 1):
        target = random_target(vocab, seed, zeros)
        ours = drafted(tree, target, share_among_siblings)
        assert sum(ours.values()) == pytest.approx(1.0, abs=1e-9)
        assert largest_difference(ours, alone(target)) < 1e-9


@pytest.mark.parametrize("name", ["chain", "binary", "ternary", "irregular"])
def test_drawing_from_the_plain_target_after_a_rejection_changes_the_distribution(name):
    tree, vocab = make_tree(name)
    target = random_target(vocab, seed=0, zeros=False)
    assert largest_difference(drafted(tree, target, without_a_residual), alone(target)) > 1e-3


@pytest.mark.parametrize("name", ["binary", "ternary", "irregular"])
def test_not_renormalising_between_siblings_changes_the_distribution(name):
    tree, vocab = make_tree(name)
    target = random_target(vocab, seed=0, zeros=False)
    assert largest_difference(drafted(tree, target, without_renormalising), alone(target)) > 1e-3


def test_a_sure_child_is_always_accepted_and_an_impossible_one_never():
    probs = torch.tensor([0.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    chances, residual = share_among_siblings(probs, torch.tensor([0, 1, 2]))
    assert chances.tolist() == [0.0, 1.0, 0.0]
    assert residual.isfinite().all() and residual.sum() == 1
    assert all(draw_token(probs, [0, 1, 2]) == 1 for _ in range(50))


def test_no_children_leave_the_target_as_it_is():
    probs = torch.tensor([0.1, 0.2, 0.7])
    chances, residual = share_among_siblings(probs, torch.tensor([], dtype=torch.long))
    assert chances.shape == (0,)
    torch.testing.assert_close(residual, probs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_children_that_hold_all_the_mass_leave_no_way_past_them(dtype):
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        probs = torch.zeros(8, dtype=dtype)
        probs[:5] = torch.rand(5, generator=generator, dtype=dtype).softmax(-1)
        chances, residual = share_among_siblings(probs, torch.arange(5))
        assert (1 - chances).prod() < 1e-5
        assert residual.isfinite().all()


@pytest.mark.parametrize("children", [[], [2], [4, 0], [1, 3, 0, 2], [0, 1, 2, 3, 4]])
def test_drawn_tokens_come_as_often_as_the_target_says(children):
    probs = torch.tensor([0.35, 0.25, 0.05, 0.2, 0.15])
    generator = torch.Generator().manual_seed(len(children))
    draws = [draw_token(probs, children, generator) for _ in range(1000)]
    counts = torch.bincount(torch.tensor(draws), minlength=5).numpy()
    assert chisquare(counts, 1000 * probs.double().numpy()).pvalue > 1e-3


def test_the_same_seed_draws_the_same_tokens():
    probs = torch.tensor([0.35, 0.25, 0.05, 0.2, 0.15])
    one, other = (torch.Generator().manual_seed(7) for _ in range(2))
    for _ in range(20):
        assert draw_token(probs, [1, 3], one) == draw_token(probs, [1, 3], other)
