"""A draft tree keeps its best nodes, and each node sees its own ancestors and nothing else.

The running example, "The cat sat …", is that of docs/understand/draft_tree.md.
"""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coral_hf.decoding.drafting import PADDING, DraftTree, TreeShape, root_only
from coral_hf.drafters.tree_builders import Beam, TreeBuilder

DOCS = Path(__file__).parents[1] / "docs" / "understand"

WORDS = ["The", "cat", "sat", "on", "down", "the", "a", "mat", "sofa", "."]
ROOT = "sat"
SHAPE = TreeShape(depth=3, top_k=2, nodes=8)
# per level, for each node that is expanded: its children and how sure the drafter is of them
LEVELS = [
    [[("on", 0.6), ("down", 0.3)]],
    [[("the", 0.7), ("a", 0.22)], [("on", 0.5), (".", 0.3)]],
    [[("mat", 0.5), ("sofa", 0.3)], [("the", 0.8), ("a", 0.1)]],
]
# after each level: the two nodes that are expanded next, and the confidence of their paths
BEAMS = [
    [("on", 0.6), ("down", 0.3)],
    [("the", 0.42), ("on", 0.15)],
    [("mat", 0.21), ("sofa", 0.126)],
]
NODES = ["sat", "on", "down", "the", "a", "on", "mat", "sofa"]
PARENTS = [0, 0, 0, 1, 1, 2, 3, 3]
DEPTHS = [0, 1, 1, 2, 2, 2, 3, 3]
ANCESTRY = [
    [1, 0, 0, 0, 0, 0, 0, 0],
    [1, 1, 0, 0, 0, 0, 0, 0],
    [1, 0, 1, 0, 0, 0, 0, 0],
    [1, 1, 0, 1, 0, 0, 0, 0],
    [1, 1, 0, 0, 1, 0, 0, 0],
    [1, 0, 1, 0, 0, 1, 0, 0],
    [1, 1, 0, 1, 0, 0, 1, 0],
    [1, 1, 0, 1, 0, 0, 0, 1],
]
CHILDREN = [[1, 2], [3, 4], [5], [6, 7], [], [], [], []]


def as_level(level: list) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and log-confidence, (1, beam, top_k) each."""
    tokens = [[WORDS.index(word) for word, _ in siblings] for siblings in level]
    confidence = [[math.log(value) for _, value in siblings] for siblings in level]
    return torch.tensor([tokens]), torch.tensor([confidence])


def children(tree: DraftTree, row: int) -> list[list[int]]:
    """The children of each node of one row of the batch, best first."""
    batch, nodes = tree.tokens.shape
    found = [tree.children_of(torch.full((batch,), node))[row] for node in range(nodes)]
    return [is_child.nonzero()[:, 0].tolist() for is_child in found]


def build(shape: TreeShape = SHAPE, levels: list = LEVELS) -> tuple[DraftTree, list[Beam]]:
    builder = TreeBuilder(torch.tensor([WORDS.index(ROOT)]), shape)
    beams = [builder.add_level(*as_level(level)) for level in levels]
    return builder.build(), beams


def words(tokens: torch.Tensor) -> list[str]:
    return [WORDS[token] for token in tokens.tolist()]


# ---- the running example


def test_the_most_confident_nodes_of_a_level_are_expanded():
    _, beams = build()
    for beam, expected in zip(beams, BEAMS, strict=True):
        assert words(beam.tokens[0]) == [word for word, _ in expected]
        values = torch.tensor([value for _, value in expected])
        torch.testing.assert_close(beam.log_path[0].exp(), values)
    # "the" hangs on the first node of the beam before it, the second "on" on the second
    assert [beam.parents[0].tolist() for beam in beams] == [[0, 0], [0, 1], [0, 0]]


def test_the_most_confident_nodes_of_all_make_the_tree():
    tree, _ = build()
    assert words(tree.tokens[0]) == NODES
    assert tree.parents.tolist() == [PARENTS]
    assert tree.depths.tolist() == [DEPTHS]
    assert tree.draft_probs is None


def test_each_node_sees_its_ancestors_and_itself():
    tree, _ = build()
    assert tree.ancestry()[0].int().tolist() == ANCESTRY


def test_siblings_do_not_see_each_other():
    seen = build()[0].ancestry()[0]
    for node, parent in enumerate(PARENTS):
        for other in range(node):
            if PARENTS[other] == parent and other != parent and node != 0:
                assert not seen[node, other] and not seen[other, node]


def test_children_come_in_the_order_in_which_they_are_tried():
    assert children(build()[0], 0) == CHILDREN


@pytest.mark.parametrize("name", ["draft_tree.md", "verification.md"])
def test_the_docs_show_the_same_tree(name):
    text = (DOCS / name).read_text(encoding="utf-8")
    assert f"parents    {PARENTS}" in text
    if name == "draft_tree.md":
        assert f"depths     {DEPTHS}" in text
        rows = [" ".join(str(value) for value in row) for row in ANCESTRY]
        assert all(row in text for row in rows)


# ---- selection


def test_a_smaller_budget_keeps_the_first_of_the_same_order():
    order = ["on", "the", "down", "mat", "on", "a", "sofa", "the", ".", "a"]
    for nodes in range(1, 12):
        tree, _ = build(TreeShape(3, 2, nodes))
        assert sorted(words(tree.tokens[0, 1:])) == sorted(order[: nodes - 1])


def test_a_budget_beyond_the_pool_keeps_the_whole_pool():
    tree, _ = build(TreeShape(3, 2, 60))
    assert tree.tokens.shape == (1, 1 + 10)
    assert tree.parents.tolist() == [[0, 0, 0, 1, 1, 2, 2, 3, 3, 5, 5]]


def test_of_equal_nodes_the_earlier_is_kept():
    level = [[("on", 0.5), ("down", 0.5), ("a", 0.5)]]
    tree, _ = build(TreeShape(1, 3, 3), [level])
    assert words(tree.tokens[0]) == ["sat", "on", "down"]


def test_a_sure_child_is_never_kept_without_its_parent():
    sure = [[("on", 0.5), ("down", 0.5)]], [[("the", 1.0)], [("a", 1.0)]]
    for nodes in range(2, 6):
        tree, _ = build(TreeShape(2, 2, nodes), list(sure))
        assert words(tree.tokens[0]) == ["sat", "on", "down", "the", "a"][:nodes]


def test_tree_of_width_one_is_a_chain():
    levels = [[[("on", 0.6)]], [[("the", 0.7)]], [[("mat", 0.5)]]]
    tree, beams = build(TreeShape(3, 1, 4), levels)
    assert words(tree.tokens[0]) == ["sat", "on", "the", "mat"]
    assert tree.parents.tolist() == [[0, 0, 1, 2]]
    assert tree.depths.tolist() == [[0, 1, 2, 3]]
    assert tree.ancestry()[0].equal(torch.ones(4, 4).tril().bool())
    assert beams[-1].tokens.shape == (1, 1)


def test_a_level_narrower_than_top_k_is_expanded_whole():
    builder = TreeBuilder(torch.tensor([2]), TreeShape(2, top_k=5, nodes=9))
    beam = builder.add_level(*as_level([[("on", 0.6), ("down", 0.3)]]))
    assert beam.tokens.shape == (1, 2)


def test_the_root_alone_is_a_tree():
    tree = root_only(torch.tensor([4, 7]))
    assert tree.tokens.tolist() == [[4], [7]]
    assert tree.parents.tolist() == tree.depths.tolist() == [[0], [0]]
    assert tree.ancestry().tolist() == [[[True]], [[True]]]
    assert children(tree, 1) == [[]]


def test_each_row_of_a_batch_grows_its_own_tree():
    other = [
        [[("a", 0.9), ("the", 0.05)]],
        [[("mat", 0.9), ("sofa", 0.05)], [("mat", 0.6), ("sofa", 0.3)]],
        [[(".", 0.9), ("on", 0.05)], [("on", 0.5), (".", 0.4)]],
    ]
    builder = TreeBuilder(torch.tensor([WORDS.index(ROOT)] * 2), SHAPE)
    for levels in zip(LEVELS, other, strict=True):
        parts = [as_level(level) for level in levels]
        builder.add_level(*(torch.cat(part) for part in zip(*parts, strict=True)))
    both, alone = builder.build(), [build()[0], build(SHAPE, other)[0]]
    for row, tree in enumerate(alone):
        assert both.tokens[row].equal(tree.tokens[0])
        assert both.parents[row].equal(tree.parents[0])
        assert both.depths[row].equal(tree.depths[0])
        assert both.ancestry()[row].equal(tree.ancestry()[0])


# ---- any tree at all

# few values, and exact in fp32: ties and sure children abound
CONFIDENCES = [0.0, -0.25, -0.5, -1.0, -2.0, float("-inf")]


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    shape=st.builds(lambda *sizes: TreeShape(*sizes), *map(st.integers, (1,) * 3, (3, 3, 12))),
    choices=st.binary(min_size=21, max_size=21),
)
def test_the_kept_nodes_are_the_best_of_the_pool_and_form_a_tree(shape, choices):
    drawn = [CONFIDENCES[choice % len(CONFIDENCES)] for choice in choices]
    builder = TreeBuilder(torch.tensor([0]), shape)
    pool, beam = [], [(0.0, 0)]  # (log_path, parent's token); a node's token is its index + 1
    for _ in range(shape.depth):
        start, stop = len(pool), len(pool) + len(beam) * shape.top_k
        for index in range(start, stop):
            log_path, parent = beam[(index - start) // shape.top_k]
            pool.append((log_path + drawn[index], parent))
        tokens = torch.arange(start + 1, stop + 1).view(1, len(beam), -1)
        level = builder.add_level(tokens, torch.tensor(drawn[start:stop]).view_as(tokens))
        beam = [(pool[token - 1][0], token) for token in level.tokens[0].tolist()]
        assert level.log_path[0].tolist() == [log_path for log_path, _ in beam]
    tree = builder.build()
    best = sorted(range(len(pool)), key=lambda node: (-pool[node][0], node))[: shape.nodes - 1]
    tokens, parents, depths = (row[0].tolist() for row in tree[:3])
    assert tokens[1:] == [node + 1 for node in sorted(best)]
    for node in range(1, len(tokens)):
        if pool[tokens[node] - 1][0] == float("-inf"):  # what no head has read is no node
            assert parents[node] == PADDING
            continue
        assert 0 <= parents[node] < node
        assert tokens[parents[node]] == pool[tokens[node] - 1][1]
        assert depths[node] == depths[parents[node]] + 1
