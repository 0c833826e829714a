"""Drawn tokens in trees that grow where the drafter is confident keep the target's distribution.

The sum is over everything that drafting and verification may draw, on vocabularies of 3 and 4.
"""

import runpy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import scatter_weights, tiny_target
from reference_rules import token_walk, traversal
from test_verification_rules import Case, error, world
from torch import Tensor

from coral_hf import CoralDrafter, register_drafting
from coral_hf.decoding.drafting import TreeShape
from coral_hf.drafters.coral import CoralDrafting
from coral_hf.drafters.tree_builders import Beam
from coral_hf.drafters.tree_drafting import Grown, TreeDrafting
from coral_hf.measure.calls import sampling_arguments

EXAMPLE = Path(__file__).parents[1] / "examples" / "sampling_modes.py"
modes = SimpleNamespace(**runpy.run_path(str(EXAMPLE), run_name="sampling_modes"))


class Choices:
    """In place of `Chance`: answers as was laid down, then the first possible; others are noted."""

    def __init__(self, answers: list[int]):
        self.answers, self.asked = answers, 0
        self.weight = 1.0  # how likely these answers are
        self.others: list[list[int]] = []  # those that turn off from them

    def choose(self, probs: list[float]) -> int:
        possible = [index for index, prob in enumerate(probs) if prob > 0]
        if self.asked == len(self.answers):
            self.others += [[*self.answers, index] for index in possible[1:]]
            self.answers = [*self.answers, possible[0]]
        answer = self.answers[self.asked]
        self.asked += 1
        self.weight *= probs[answer] / sum(probs)
        return answer

    def accept(self, chance: float) -> bool:
        return bool(self.choose([1 - chance, chance]))

    def draw(self, probs: Tensor) -> Tensor:
        return torch.tensor([self.choose(probs[0].tolist())])

    def race(self, probs: Tensor) -> Tensor:
        """All in the order of draws without replacement, the last draw first in value."""
        left, values = probs.tolist(), torch.zeros_like(probs)
        for value in range(len(left), 0, -1):
            if sum(left) > 0:
                token = self.choose(left)
                values[token], left[token] = value, 0.0
        return values


def expander(draft: dict[tuple, Tensor]) -> Callable:
    prefixes: list[tuple] = []

    def expand(tokens: list[int], places: list[int]) -> Tensor:
        nonlocal prefixes
        pairs = zip(tokens, places, strict=True)
        prefixes = [(*prefixes[place], token) for token, place in pairs] if prefixes else [()]
        return torch.stack([draft[prefix] for prefix in prefixes])

    return expand


def name(value: object) -> str:
    return "-".join(map(str, value[:3])) if isinstance(value, tuple) else str(value)


def one_drawn(shape: TreeShape, draft: dict, chance: Choices, family=None):
    family = family or modes.one_drawn_family
    return modes.grow(expander(draft), shape, partial(family, shape.top_k, chance))


def replayed(shape: TreeShape, draft: dict, chance: Choices):
    planned = modes.grow(expander(draft), shape, partial(modes.chosen_family, shape.top_k))
    return modes.replay(expander(draft), planned.parents, chance)


def sum_up(drafting: Callable, rule: Callable, shape: TreeShape, case: Case) -> SimpleNamespace:
    """The chance of each text of depth + 1 tokens, and the mean number of accepted nodes."""
    target, draft, follows = world(case)
    texts, length = torch.zeros_like(follows[()]), 0.0
    scripts: list[list[int]] = [[]]
    while scripts:
        chance = Choices(scripts.pop())
        tree = drafting(shape, draft, chance)
        prefixes: list[tuple] = [()]
        for token, parent in list(zip(tree.tokens, tree.parents, strict=True))[1:]:
            prefixes.append((*prefixes[parent], token) if parent >= 0 else ())
        p = torch.stack([target[prefix] for prefix in prefixes])
        q = torch.zeros_like(p)
        for node, probs in tree.probs.items():
            q[node] = probs
        outcome = rule(tree.tokens, tree.parents, p, q, chance.accept)
        scripts += chance.others
        prefix = prefixes[outcome.path[-1]]
        length += chance.weight * (len(outcome.path) - 1)
        one = torch.ones((), dtype=torch.float64)
        tails = torch.stack([follows.get((*prefix, t), one) for t in range(case.vocab)])
        texts[prefix] += chance.weight * outcome.probs.view(-1, *[1] * (tails.dim() - 1)) * tails
    return SimpleNamespace(texts=texts, length=length)


class Listed(TreeDrafting):
    """The library's own drawing of trees, from a table of distributions by prefix."""

    drafter = SimpleNamespace(device=torch.device("cpu"))

    def __init__(self, draft: dict[tuple, Tensor]):
        self.draft, self.head = draft, self

    def _start(self, root: Tensor) -> Grown:
        return self.at([()])

    def _grow(self, grown: Grown, beam: Beam, depth: int) -> Grown:
        pairs = zip(beam.parents[0].tolist(), beam.tokens[0].tolist(), strict=True)
        # children of padding are padding, whatever is drawn for them
        return self.at([(*self.prefixes[parent], token) for parent, token in pairs])

    def at(self, prefixes: list[tuple]) -> Grown:
        self.prefixes = prefixes
        return Grown(torch.zeros(1, len(prefixes), 1))

    def logits(self, features: Tensor, log_path: Tensor) -> Tensor:
        return torch.stack([self.draft[prefix] for prefix in self.prefixes]).log()[None]


class Siblings:
    """Draws without replacement by `Choices`, of one row."""

    def __init__(self, chance: Choices):
        self.chance = chance

    def draw_siblings(self, probs: Tensor, children: int) -> tuple[Tensor, Tensor]:
        values = torch.stack([self.chance.race(family) for family in probs[0]])[None]
        order, tokens = values.topk(children, dim=2)
        return tokens, order > 0


def drawn(shape: TreeShape, draft: dict, chance: Choices):
    tree = Listed(draft).propose(torch.tensor([0]), shape, lambda one: one, Siblings(chance))
    probs = dict(enumerate(tree.draft_probs[0]))
    return SimpleNamespace(
        tokens=tree.tokens[0].tolist(), parents=tree.parents[0].tolist(), probs=probs
    )


def case_of(vocab: int, depth: int, seed: int, kind: str = "random") -> Case:
    return Case("any", (0, *range(depth)), vocab, kind, seed=seed)


SHAPES = [  # and vocabularies
    (TreeShape(1, 3, 3), 4),
    (TreeShape(2, 2, 4), 3),
    (TreeShape(2, 3, 5), 3),
    (TreeShape(3, 2, 6), 2),
    (TreeShape(3, 2, 5), 3),
    pytest.param(TreeShape(2, 2, 5), 4, marks=pytest.mark.slow),
    pytest.param(TreeShape(3, 2, 7), 3, marks=pytest.mark.slow),
]
KINDS = ["random", "zeros in the target", "a zero in the draft"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("shape", "vocab"), SHAPES, ids=name)
@pytest.mark.parametrize("seed", [0, 1])
def test_one_drawn_child_in_each_family_keeps_the_targets_distribution(shape, vocab, kind, seed):
    case = case_of(vocab, shape.depth, seed, kind)
    found = sum_up(one_drawn, modes.one_drawn_walk, shape, case)
    assert abs(float(found.texts.sum()) - 1) < 1e-12
    assert error(found, case) < 1e-12


@pytest.mark.parametrize("rule", [token_walk, traversal])
@pytest.mark.parametrize(("shape", "vocab"), SHAPES, ids=name)
def test_drawing_the_tokens_of_a_chosen_shape_keeps_the_targets_distribution(shape, vocab, rule):
    case = case_of(vocab, shape.depth, seed=0)
    found = sum_up(replayed, rule, shape, case)
    assert abs(float(found.texts.sum()) - 1) < 1e-12
    assert error(found, case) < 1e-12


@pytest.mark.parametrize("rule", [token_walk, traversal])
@pytest.mark.parametrize("floors", [(0.0, 0.0), (0.1, 0.0), (0.0, 0.7), (0.1, 0.5)])
@pytest.mark.parametrize(("shape", "vocab"), [((2, 2, 7), 3), ((3, 2, 15), 2), ((3, 1, 4), 3)])
def test_a_drawn_tree_that_grows_where_it_pays_keeps_the_targets_distribution(
    shape, vocab, floors, rule
):
    shape, case = TreeShape(*shape, *floors), case_of(vocab, shape[0], seed=3)
    found = sum_up(drawn, rule, shape, case)
    assert abs(float(found.texts.sum()) - 1) < 1e-12
    assert error(found, case) < 1e-12


@pytest.mark.parametrize("floors", [(0.1, 0.0), (0.0, 0.7)])
def test_what_does_not_pay_is_not_drawn(floors):
    sizes = set()
    _, draft, _ = world(case_of(3, 2, seed=3))
    scripts: list[list[int]] = [[]]
    while scripts:
        chance = Choices(scripts.pop())
        sizes.add(len(drawn(TreeShape(2, 2, 7, *floors), draft, chance).tokens))
        scripts += chance.others
    assert len(sizes) > 1 and max(sizes) <= 7


def ranked_by_identity(top_k: int, chance: Choices, probs: Tensor):
    """The mistake: a drawn child is ranked by its own probability."""
    children, own = modes.one_drawn_family(top_k, chance, probs)
    if own is not None:
        children[0] = (children[0][0], float(probs[children[0][0]]))
    return children, own


def walk_without_residual(tokens, parents, p, q, accept):
    """The mistake: after rejections the next token is drawn from what it was before."""
    outcome = modes.one_drawn_walk(tokens, parents, p, q, accept)
    return outcome._replace(probs=p[outcome.path[-1]])


@pytest.mark.parametrize("seed", [1, 3, 10])
def test_ranking_a_drawn_child_by_its_own_probability_changes_the_distribution(seed):
    shape, case = TreeShape(2, 2, 4), case_of(3, 2, seed)
    drafting = partial(one_drawn, family=ranked_by_identity)
    assert error(sum_up(drafting, modes.one_drawn_walk, shape, case), case) > 1e-3


def test_a_walk_without_its_residual_changes_the_distribution():
    shape, case = TreeShape(2, 2, 4), case_of(3, 2, seed=0)
    assert error(sum_up(one_drawn, walk_without_residual, shape, case), case) > 1e-3


@pytest.mark.parametrize("seed", range(4))
def test_a_drawn_child_is_accepted_more_often_than_a_chosen_one(seed):
    shape, case = TreeShape(1, 2, 3), case_of(4, 1, seed)
    chosen = partial(modes.grow, shape=shape, family=partial(modes.chosen_family, 2))
    lengths = [
        sum_up(drafting, modes.one_drawn_walk, shape, case).length
        for drafting in (one_drawn, lambda shape, draft, chance: chosen(expander(draft)))
    ]
    assert lengths[0] > lengths[1]


@pytest.fixture(scope="module")
def pair():
    target = tiny_target("llama", torch.float32)
    torch.manual_seed(0)
    drafter = CoralDrafter.from_target(target).eval()
    scatter_weights(drafter, seed=1)
    yield target, drafter
    register_drafting("coral", CoralDrafting, ("draft_head", "draft_window"))


@pytest.mark.parametrize("name", modes.MODES)
def test_each_mode_is_measured_through_generate(name, pair):
    target, drafter = pair
    tree = {"tree_depth": 2, "tree_top_k": 2, "tree_nodes": 5, "assistant_model": drafter}
    arguments = sampling_arguments(1.0, 8) | tree | {"speculation": "always"}
    prompts = {"stories": [torch.tensor([5, 9, 3])], "dialogues": [torch.tensor([7, 2])]}
    found = modes.measure(target, prompts, modes.MODES[name], arguments)
    assert found["num_tokens"] == 14 and found["tau"] == 14 / found["num_rounds"]
    again = modes.measure(target, prompts, modes.MODES[name], arguments)
    assert found == again
