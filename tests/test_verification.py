"""The running example, "The cat sat …": the numbers of docs/understand/verification.md.

The rules themselves are shown lossless in test_verification_rules.py.
"""

import pytest
import torch
from reference_rules import greedy_walk, token_choice, token_walk
from torch import Tensor
from torch.nn.functional import one_hot

from coral_hf.decoding.drafting import DraftTree
from coral_hf.decoding.rules import verify_greedy

WORDS = ["The", "cat", "sat", "on", "down", "the", "a", "mat", "sofa", "."]
NODES = ["sat", "on", "down", "the", "a", "on", "mat", "sofa"]
PARENTS = [0, 0, 0, 1, 1, 2, 3, 3]
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


def running_example() -> list[int]:
    """The token of each node."""
    return [WORDS.index(word) for word in NODES]


def target_probs(node: int) -> Tensor:
    """(vocab,) in float64."""
    probs = torch.zeros(len(WORDS), dtype=torch.float64)
    for word, value in TARGET[node].items():
        probs[WORDS.index(word)] = value
    return probs


def chances_asked(node: int, *children: str) -> tuple[list[float], Tensor]:
    """The chance that each child is tried with when all are refused, and the residual."""
    asked = []
    choice = token_choice(
        target_probs(node),
        [WORDS.index(word) for word in children],
        lambda p: bool(asked.append(p)),
    )
    return asked, choice.probs


# ---- the running example


def test_greedy_takes_the_path_of_the_targets_argmaxes():
    tokens, best = running_example(), [int(target_probs(node).argmax()) for node in range(8)]
    path = path_of_both(tokens, PARENTS, best)
    assert path == [0, 1, 3, 7]
    assert [WORDS[best[node]] for node in path] == GREEDY


def test_the_first_child_is_accepted_with_its_probability_the_next_with_what_is_left():
    chances, residual = chances_asked(0, "on", "down")
    assert chances == pytest.approx([0.5, 0.4])
    left = {WORDS[token]: residual[token].item() for token in residual.nonzero()[:, 0]}
    assert left == pytest.approx({".": 2 / 3, "a": 1 / 3})


def test_each_word_comes_out_as_often_as_the_target_says():
    chances, residual = chances_asked(0, "on", "down")
    rest = (1 - chances[0]) * (1 - chances[1])
    out = {
        "on": chances[0],
        "down": (1 - chances[0]) * chances[1],
        ".": rest * residual[WORDS.index(".")].item(),
        "a": rest * residual[WORDS.index("a")].item(),
    }
    assert out == pytest.approx(TARGET[0])


def test_with_the_plain_target_as_residual_a_word_comes_out_too_often():
    chances, _ = chances_asked(0, "on", "down")
    rest = (1 - chances[0]) * (1 - chances[1])
    assert chances[0] + rest * TARGET[0]["on"] == pytest.approx(0.65)


def test_a_draw_walks_down_the_tree_until_a_token_is_no_node_of_it():
    dice = iter([0.7, 0.3, 0.6])  # "on" is refused, "down" taken, then its child "on" refused
    probs = torch.stack([target_probs(node) for node in range(8)])
    outcome = token_walk(running_example(), PARENTS, probs, None, lambda p: next(dice) < p)
    assert outcome.path == [0, 2]
    assert WORDS[int(outcome.probs.argmax())] == "." and outcome.probs.max() == 1


def test_the_running_example_emits_nearly_two_and_a_half_tokens_a_pass():
    reached = [1.0] * len(NODES)
    for node, parent in enumerate(PARENTS[1:], start=1):
        reached[node] = reached[parent] * TARGET[parent][NODES[node]]
    assert sum(reached) == pytest.approx(2.47)


# ---- the greedy walk


def greedy_path(tokens, parents, logits) -> list[list[int]]:
    """The path of each row by the tensor rule, whose tokens are held to the target's choices."""
    tree = make_tree(tokens, parents)
    verdict, best = verify_greedy(tree, logits), logits.argmax(-1)
    paths = [path[:n] for path, n in zip(verdict.path.tolist(), verdict.lengths, strict=True)]
    for row, path in enumerate(paths):
        assert verdict.tokens(tree)[row, : len(path)].equal(best[row, path])
    return paths


def path_of_both(tokens: list[int], parents: list[int], best: list[int]) -> list[int]:
    """The path of one tree, by the plain rule and by the tensor rule alike."""
    path = greedy_walk(tokens, parents, best)
    logits = one_hot(torch.tensor(best), max(*tokens, *best) + 1)  # (nodes, vocab)
    assert greedy_path([tokens], [parents], logits[None]) == [path]
    return path


def make_tree(tokens: list[list[int]], parents: list[list[int]]) -> DraftTree:
    depths = torch.zeros(len(tokens), len(tokens[0]), dtype=torch.long)
    for row, family in enumerate(parents):
        for node, parent in enumerate(family[1:], start=1):
            depths[row, node] = depths[row, max(parent, 0)] + 1
    return DraftTree(torch.tensor(tokens), torch.tensor(parents), depths)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("are_distinct", [True, False])
def test_the_tensor_rule_takes_the_paths_of_the_greedy_walk(seed, are_distinct):
    generator, rows = torch.Generator().manual_seed(seed), []
    nodes, vocab = 1 + 2 * seed, 4 if are_distinct else 2
    for _ in range(5):
        tokens, parents = random_tree(nodes, vocab, generator, are_distinct)
        padding = torch.rand(nodes, generator=generator) < 0.2
        for node in range(1, nodes):
            if padding[node] or parents[node] < 0 or parents[parents[node]] < 0:
                parents[node] = -1
        rows.append((tokens, parents))
    logits = torch.randn(5, nodes, vocab, generator=generator)
    best = logits.argmax(-1).tolist()
    expected = [greedy_walk(*row, own) for row, own in zip(rows, best, strict=True)]
    assert greedy_path(*zip(*rows, strict=True), logits) == expected


def test_the_target_never_accepts_draft_tokens():
    assert path_of_both(running_example(), PARENTS, [WORDS.index("cat")] * 8) == [0]


def test_the_target_always_accepts_draft_tokens():
    assert path_of_both([5, 6, 7], [0, 0, 1], [6, 7, 8]) == [0, 1, 2]


def test_the_root_alone_is_a_path():
    assert path_of_both([3], [0], [4]) == [0]


def test_a_padding_node_is_never_accepted():
    assert path_of_both([3, 4, 4], [0, -1, 0], [4, 9, 9]) == [0, 2]


@pytest.mark.parametrize("seed", range(10))
def test_greedy_accepts_the_longest_path_that_agrees(seed):
    generator = torch.Generator().manual_seed(seed)
    tokens, parents = random_tree(12, vocab=4, generator=generator)
    best = torch.randint(0, 4, (12,), generator=generator).tolist()
    agreeing = [[0]]
    for node in range(1, 12):
        for path in list(agreeing):
            if path[-1] == parents[node] and tokens[node] == best[parents[node]]:
                agreeing.append([*path, node])
    assert path_of_both(tokens, parents, best) == max(agreeing, key=len)


def random_tree(
    nodes: int, vocab: int, generator: torch.Generator, are_distinct: bool = True
) -> tuple[list[int], list[int]]:
    """Tokens and parents of a random tree, whose siblings may be distinct."""
    tokens, parents, taken = [0], [0], {node: set() for node in range(nodes)}
    while len(tokens) < nodes:
        parent = int(torch.randint(0, len(tokens), (1,), generator=generator))
        token = int(torch.randint(0, vocab, (1,), generator=generator))
        if token not in taken[parent] or not are_distinct:
            taken[parent].add(token)
            tokens.append(token)
            parents.append(parent)
    return tokens, parents
