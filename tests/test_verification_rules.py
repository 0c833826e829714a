"""Every rule gives the target's own distribution, summed over all that drafter and chance may do.

The worked example is the one of docs/understand/verification.md, number for number.
"""

import itertools
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import NamedTuple

import pytest
import torch
from reference_rules import (
    Accept,
    Outcome,
    Remainder,
    block,
    list_children,
    token_choice,
    token_walk,
    traversal,
)
from torch import Tensor

from coral_hf.decoding import rules
from coral_hf.decoding.chance import Chance
from coral_hf.decoding.drafting import DraftTree, Level
from coral_hf.decoding.rules import Step, chances_of, token_step, verify_token, verify_traversal

Prefix = tuple[int, ...]
Rule = Callable[..., Outcome]  # tokens, parents, target_probs, draft_probs, accept → Outcome

# ---- the worked example: one target and one drafter for all prefixes, a tree a → (b, c)

TARGET = torch.tensor([0.3, 0.4, 0.3], dtype=torch.float64)
DRAFT = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
A, B, C = 0, 1, 2
EXAMPLE = [A, A, B, C], [0, 0, 1, 1], TARGET.expand(4, 3), DRAFT.expand(4, 3)


def close(values: Tensor, *expected: float) -> bool:
    return torch.allclose(values, torch.tensor(expected, dtype=values.dtype), atol=1e-12)


def test_traversal_asks_for_the_chances_of_the_worked_example():
    asked = []

    def never(chance: float) -> bool:
        asked.append(chance)
        return False

    outcome = traversal(*EXAMPLE, never)
    assert asked == pytest.approx([2 / 3, 7 / 11, 0])  # a b, a c, a
    assert outcome.path == [0]
    assert close(outcome.probs, 0, 1 / 3, 2 / 3)


def test_the_worked_example_step_by_step():
    a = Remainder(1.0, TARGET, DRAFT).chance(A)
    after_a = Remainder(a, TARGET, DRAFT)
    assert (a, after_a.chance(B)) == pytest.approx((0.5, 2 / 3))
    without_b = after_a.reject(B)
    assert without_b.reach == pytest.approx(0.05 / 0.55)
    assert close(without_b.target, 0, 0, 1)
    assert close(without_b.draft, 6 / 7, 0, 1 / 7)
    assert without_b.chance(C) == pytest.approx(7 / 11)
    assert without_b.reject(C).reach == 0


def test_the_worked_example_ends_in_one_of_three_ways():
    ways = [(tuple(o.path), chance) for chance, o in branches(partial(traversal, *EXAMPLE))]
    assert dict(ways) == pytest.approx({(0, 1, 2): 2 / 3, (0, 1, 3): 7 / 33, (0,): 4 / 33})
    ways = [(tuple(o.path), chance) for chance, o in branches(partial(token_walk, *EXAMPLE))]
    assert dict(ways) == pytest.approx({(0, 1, 2): 0.5, (0,): 0.5})


def test_traversal_may_accept_less_of_one_tree_but_accepts_more_of_all_that_could_be_drawn():
    def of_tree(rule: Rule, *words: int) -> float:
        run = partial(rule, [A, *words], *EXAMPLE[1:])
        return sum(chance * (len(outcome.path) - 1) for chance, outcome in branches(run))

    assert of_tree(token_walk, A, B, C) == pytest.approx(1.0)
    assert of_tree(traversal, A, B, C) == pytest.approx(58 / 33)
    assert of_tree(token_walk, A, A, B) == pytest.approx(31 / 36)
    assert of_tree(traversal, A, A, B) == pytest.approx(0.5)
    case = Case("the worked example", (0, 0, 1, 1), vocab=3, kind="worked example")
    assert mean_length(token_walk, case) == pytest.approx(1.3125)
    assert mean_length(traversal, case) == pytest.approx(1.35)


@pytest.mark.parametrize(
    ("parents", "walked", "traversed"),
    [((0, 0), 0.7, 0.7), ((0, 0, 1), 1.19, 1.25), ((0, 0, 1, 2, 3, 4), 1.94117, 2.41616)],
)
def test_a_longer_chain_of_the_worked_example_gains_more(parents, walked, traversed):
    case = Case("chain", parents, vocab=3, kind="worked example")
    assert mean_length(token_walk, case) == pytest.approx(walked)
    assert mean_length(traversal, case) == pytest.approx(traversed)
    assert mean_length(block, case) == pytest.approx(traversed)


# ---- losslessness: the distribution of texts, summed over every tree and every branch


class Case(NamedTuple):
    """A shape of tree, and what target and drafter say after each prefix."""

    name: str
    parents: tuple[int, ...]
    vocab: int
    kind: str = "random"
    how: str = "without replacement"  # or "with replacement", or "chosen"
    seed: int = 0

    @property
    def depth(self) -> int:
        depths = [0]
        for parent in self.parents[1:]:
            depths.append(depths[parent] + 1)
        return max(depths)

    def __str__(self) -> str:
        return f"{self.name}, {self.kind}, {self.how}"


class World(NamedTuple):
    """Target and drafter of a case; both (vocab,) after each prefix."""

    target: dict[Prefix, Tensor]
    draft: dict[Prefix, Tensor]
    # (vocab, …), the distribution of what follows a prefix, by the target itself
    follows: dict[Prefix, Tensor]


def rows(kind: str, vocab: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The target's and the drafter's distribution after a prefix, (vocab,) each, in float64."""
    p, q = torch.rand(2, vocab, generator=generator, dtype=torch.float64) ** 2
    order = torch.randperm(vocab, generator=generator)
    if kind == "worked example":
        return TARGET, DRAFT
    if kind in ("zeros in the draft", "disjoint"):
        q[order[: vocab // 2]] = 0
    if kind == "a zero in the draft":
        q[order[0]] = 0
    if kind == "zeros in the target":
        p[order[-(vocab // 2) :]] = 0
    if kind == "disjoint":
        p[order[vocab // 2 :]] = 0
    if kind == "one-hot draft":
        q[order[1:]] = 0
    if kind == "equal":
        q = p
    return p / p.sum(), q / q.sum()


@cache
def world(case: Case) -> World:
    generator = torch.Generator().manual_seed(case.seed)
    found = World({}, {}, {})
    prefixes = [
        prefix
        for length in range(case.depth + 1)
        for prefix in itertools.product(range(case.vocab), repeat=length)
    ]
    for prefix in prefixes:
        found.target[prefix], found.draft[prefix] = rows(case.kind, case.vocab, generator)
    for prefix in reversed(prefixes):
        rest = found.target[prefix]
        if len(prefix) < case.depth:
            tails = torch.stack([found.follows[(*prefix, token)] for token in range(case.vocab)])
            rest = rest.view(-1, *[1] * (tails.dim() - 1)) * tails
        found.follows[prefix] = rest
    return found


class Drawn(NamedTuple):
    """A tree that drafting may draw."""

    chance: float
    tokens: list[int]
    parents: list[int]  # -1 where the drafter had no token left
    prefixes: list[Prefix]


def drawn_trees(case: Case) -> Iterator[Drawn]:
    """All of them, node by node; the root's token is of no account."""
    growing = [Drawn(1.0, [0], [0], [()])]
    while growing:
        tree = growing.pop()
        if len(tree.tokens) == len(case.parents):
            yield tree
        else:
            growing += list(with_one_more(case, tree))


def with_one_more(case: Case, tree: Drawn) -> Iterator[Drawn]:
    node = len(tree.tokens)
    parent = case.parents[node]
    siblings = [tree.tokens[child] for child in range(1, node) if tree.parents[child] == parent]
    chances = next_child(case, tree.prefixes[parent], siblings)
    if tree.parents[parent] < 0 or not chances:
        chances, parent = {-1: 1.0}, -1
    for token, chance in chances.items():
        prefix = (*tree.prefixes[parent], token) if parent >= 0 else ()
        yield Drawn(
            tree.chance * chance,
            [*tree.tokens, token],
            [*tree.parents, parent],
            [*tree.prefixes, prefix],
        )


def next_child(case: Case, prefix: Prefix, siblings: list[int]) -> dict[int, float]:
    """How likely each token is to be drawn after its siblings."""
    q = world(case).draft[prefix]
    if case.how == "with replacement":
        left = q
    else:
        left = q.index_fill(0, torch.tensor(siblings).long(), 0)
    if case.how == "chosen" or (left.sum() == 0 and case.kind != "one-hot draft"):
        others = [token for token in range(case.vocab) if token not in siblings]
        # an order that differs between prefixes, and never looks at what was drawn elsewhere
        return {others[sum(prefix) % len(others)]: 1.0} if others else {}
    return {token: float(left[token] / left.sum()) for token in left.nonzero()[:, 0].tolist()}


class Script:
    """Answers as was laid down, then accepts whatever it can."""

    def __init__(self, answers: list[bool]):
        self.answers = answers
        self.asked = 0
        self.weight = 1.0  # how likely these answers are
        self.others: list[list[bool]] = []  # the scripts that turn off from this one

    def __call__(self, chance: float) -> bool:
        assert 0 <= chance <= 1
        if self.asked == len(self.answers):
            if 0 < chance < 1:
                self.others.append([*self.answers, False])
            self.answers = [*self.answers, chance > 0]
        answer = self.answers[self.asked]
        self.asked += 1
        self.weight *= chance if answer else 1 - chance
        return answer


def branches(run: Callable[[Accept], Outcome]) -> Iterator[tuple[float, Outcome]]:
    """Each way that chance may go, depth first, and how likely it is."""
    scripts: list[list[bool]] = [[]]
    while scripts:
        script = Script(scripts.pop())
        outcome = run(script)
        yield script.weight, outcome
        scripts += script.others


class Sum(NamedTuple):
    """What comes out of a rule, over all trees and branches."""

    texts: Tensor  # (vocab, …), the chance of each text of depth + 1 tokens
    length: float  # mean number of accepted nodes below the root


def sum_up(rule: Rule, case: Case) -> Sum:
    """Draft, verify, and let the target go on alone to the full length."""
    target, draft, follows = world(case)
    texts = torch.zeros_like(follows[()])
    ones = torch.ones(case.vocab, dtype=torch.float64)
    length = 0.0
    for tree in drawn_trees(case):
        p, q = (torch.stack([row[prefix] for prefix in tree.prefixes]) for row in (target, draft))
        q = None if case.how == "chosen" else q
        for chance, outcome in branches(partial(rule, tree.tokens, tree.parents, p, q)):
            weight, prefix = tree.chance * chance, tree.prefixes[outcome.path[-1]]
            length += weight * (len(outcome.path) - 1)
            tails = [follows.get((*prefix, token), ones[0]) for token in range(case.vocab)]
            tails = torch.stack(tails)  # (vocab, …)
            texts[prefix] += weight * outcome.probs.view(-1, *[1] * (tails.dim() - 1)) * tails
    return Sum(texts, length)


def run_rule(rule: Rule, case: Case) -> Sum:
    if case.how == "with replacement":
        rule = partial(rule, with_replacement=True)
    return sum_up(rule, case)


cached_sum = cache(run_rule)


def mean_length(rule: Rule, case: Case) -> float:
    return cached_sum(rule, case).length


def error(found: Sum, case: Case) -> float:
    return float((found.texts - world(case).follows[()]).abs().max())


# ---- the rule over tensors, which a call runs, as a rule over lists


class Scripted(Chance):
    """Asks a script for every draw of the rule over tensors, in a batch of one."""

    def __init__(self, accept: Accept):
        self.script = accept
        self.last: Tensor | None = None  # (vocab,), what the token after the path is drawn from

    def accept(self, chances: Tensor) -> Tensor:
        return torch.tensor([self.script(float(chances[0]))])

    def draw(self, probs: Tensor) -> Tensor:
        """The last token is left undrawn: the sum is over its whole distribution."""
        self.last = probs[0]
        return torch.zeros(1, dtype=torch.long)


def tensor_tree(tokens: list[int], parents: list[int], draws: str, draft_probs=None) -> DraftTree:
    depths = [0]
    for parent in parents[1:]:
        depths.append(depths[max(parent, 0)] + 1)
    draft_probs = None if draft_probs is None else draft_probs[None]
    rows = (torch.tensor([values]) for values in (tokens, parents, depths))
    return DraftTree(*rows, draft_probs, draws)


def tensor_walk(
    tokens: list[int],
    parents: list[int],
    target_probs: Tensor,
    draft_probs: Tensor | None,
    accept: Accept,
    with_replacement: bool = False,
) -> Outcome:
    """`verify_token` as a rule over lists."""
    if draft_probs is None:
        return chosen_walk(tokens, parents, target_probs, accept)
    draws = "independent" if with_replacement else "without_replacement"
    tree, chance = tensor_tree(tokens, parents, draws, draft_probs), Scripted(accept)
    verdict = verify_token(tree, lambda node: target_probs[node], chance)
    path = verdict.path[0, : verdict.lengths[0]].tolist()
    assert chance.last is not None
    return Outcome(path, chance.last)


def chosen_walk(
    tokens: list[int], parents: list[int], target_probs: Tensor, accept: Accept
) -> Outcome:
    """`verify_token` of chosen tokens: a token of the target's own is drawn at every node.

    The script decides whether it is the first child's, else the second's, … as `token_choice` asks,
    and what is left of the distribution is what the last token is drawn from.
    """
    tree, asked = tensor_tree(tokens, parents, "chosen"), []

    class ChildByChild(Chance):
        def draw(self, probs: Tensor) -> Tensor:
            node, left = asked[-1], probs[0].clone()
            for child in tree.children_of(torch.tensor([node]))[0].nonzero()[:, 0].tolist():
                mass = float(left.sum())
                if mass > 0 and accept(min(float(left[tokens[child]]) / mass, 1.0)):
                    return torch.tensor([tokens[child]])
                left[tokens[child]] = 0
            self.left = left / left.sum() if left.sum() > 0 else probs[0]
            return torch.tensor([-1])  # a token that no child has

    def probs_of(node: Tensor) -> Tensor:
        asked.append(int(node))
        return target_probs[node]

    chance = ChildByChild()
    verdict = verify_token(tree, probs_of, chance)
    return Outcome(verdict.path[0, : verdict.lengths[0]].tolist(), chance.left)


SHAPES = {
    "chain of one": (0, 0),
    "chain of two": (0, 0, 1),
    "chain of three": (0, 0, 1, 2),
    "siblings": (0, 0, 0),
    "binary": (0, 0, 0, 1, 1, 2, 2),
    "ternary": (0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3),
    "ternary, one branch": (0, 0, 0, 0, 1, 1, 1),
    "irregular": (0, 0, 0, 1, 1, 3),
    "second child first": (0, 0, 0, 2, 1, 2, 3),
}
KINDS = [
    "random",
    "zeros in the draft",
    "zeros in the target",
    "equal",
    "disjoint",
    "one-hot draft",
]
CHAINS = [
    Case(name, SHAPES[name], vocab, kind)
    for name, vocab in (("chain of one", 4), ("chain of two", 4), ("chain of three", 3))
    for kind in KINDS
]
BUSHES = [
    *(
        Case(name, SHAPES[name], 3, kind)
        for name in ("siblings", "binary", "irregular")
        for kind in KINDS
    ),
    *(
        Case(name, SHAPES[name], 2, kind, "with replacement")
        for name in ("siblings", "binary", "irregular")
        for kind in KINDS
    ),
    Case("siblings", SHAPES["siblings"], 4, "random"),
    Case("siblings", SHAPES["siblings"], 4, "random", "with replacement"),
    Case("irregular", SHAPES["irregular"], 3, "random", "with replacement"),
    Case("second child first", SHAPES["second child first"], 3),
    Case("ternary", SHAPES["ternary"], 3, "zeros in the draft"),
    Case("ternary", SHAPES["ternary"], 4, "a zero in the draft"),
    Case("ternary, one branch", SHAPES["ternary, one branch"], 4),
    Case("ternary, one branch", SHAPES["ternary, one branch"], 3, "random", "with replacement"),
]
CHOSEN = [
    Case(name, SHAPES[name], 4, kind, "chosen")
    for name in SHAPES
    for kind in ("random", "zeros in the target")
]
WALKS = (token_walk, tensor_walk, traversal)
RULES_AND_CASES = [
    *((rule, case) for rule in WALKS for case in CHAINS + BUSHES + CHOSEN),
    *((block, case) for case in CHAINS),
    *((block, case) for case in CHOSEN if case.name.startswith("chain")),
]


def name_of(value: object) -> str:
    return value.__name__ if callable(value) else str(value)


@pytest.mark.parametrize(("rule", "case"), RULES_AND_CASES, ids=name_of)
def test_output_distribution_is_exactly_the_targets(rule, case):
    found = cached_sum(rule, case)
    assert abs(float(found.texts.sum()) - 1) < 1e-12
    assert error(found, case) < 1e-12


def without_residual(left: Remainder, token: int, with_replacement: bool = False) -> Remainder:
    """The mistake: after a rejection the target's distribution is what it was."""
    return reject(left, token, with_replacement)._replace(target=left.target)


def without_new_reach(left: Remainder, token: int, with_replacement: bool = False) -> Remainder:
    """The mistake: a node is as likely to be accepted as before its child was rejected."""
    return reject(left, token, with_replacement)._replace(reach=left.reach)


reject = Remainder.reject
MISTAKEN = [
    *((token_walk, case) for case in CHAINS + BUSHES + CHOSEN),
    *((traversal, case) for case in CHAINS + BUSHES + CHOSEN),
    *((block, case) for case in CHAINS),
]
MISTAKEN = [(rule, case) for rule, case in MISTAKEN if case.kind == "random"]


@pytest.mark.parametrize(("rule", "case"), MISTAKEN, ids=name_of)
def test_a_rule_without_its_residual_changes_the_distribution(rule, case, monkeypatch):
    monkeypatch.setattr(Remainder, "reject", without_residual)
    assert error(run_rule(rule, case), case) > 1e-3


@pytest.mark.parametrize(
    ("rule", "case"),
    [(rule, case) for rule, case in MISTAKEN if rule is not token_walk and case.depth > 1],
    ids=name_of,
)
def test_a_path_rule_that_forgets_a_rejection_changes_the_distribution(rule, case, monkeypatch):
    monkeypatch.setattr(Remainder, "reject", without_new_reach)
    assert error(run_rule(rule, case), case) > 1e-3


@pytest.mark.parametrize("rule", [token_walk, tensor_walk, traversal])
@pytest.mark.parametrize("name", ["siblings", "binary", "irregular"])
def test_siblings_drawn_without_replacement_are_not_independent(rule, name):
    case = Case(name, SHAPES[name], 4 if name == "siblings" else 3)
    assert error(sum_up(partial(rule, with_replacement=True), case), case) > 1e-3


def step_without_residual(siblings, target_probs, chance):
    """The mistake: the token after a rejection is drawn from the target's distribution."""
    step = step_of(siblings, target_probs, chance)
    return Step(torch.where(step.child > 0, step.token, chance.draw(target_probs)), step.child)


step_of = token_step


@pytest.mark.parametrize(
    "case", [case for case in CHAINS + BUSHES if case.kind == "random"], ids=name_of
)
def test_a_tensor_rule_without_its_residual_changes_the_distribution(case, monkeypatch):
    monkeypatch.setattr(rules, "token_step", step_without_residual)
    assert error(run_rule(tensor_walk, case), case) > 1e-3


def random_row(nodes: int, vocab: int, generator: torch.Generator) -> tuple[list[int], list[int]]:
    """Tokens and parents of a random tree with padding, whose siblings may be equal."""
    parents = [0]
    for node in range(1, nodes):
        parent = int(torch.randint(-1, node, (1,), generator=generator))
        parents.append(parent if parent >= 0 and parents[parent] >= 0 else -1)
    return torch.randint(vocab, (nodes,), generator=generator).tolist(), parents


@pytest.mark.parametrize("with_replacement", [False, True])
@pytest.mark.parametrize(
    "seed", [*range(6), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(6, 15))]
)
def test_the_tensor_rule_gives_the_token_walks_verdict_for_the_same_uniforms(
    seed, with_replacement
):
    generator = torch.Generator().manual_seed(seed)
    nodes, vocab = 1 + 2 * seed, 6
    tokens, parents = random_row(nodes, vocab, generator)
    p, q = some_probs(nodes, vocab, seed), some_probs(nodes, vocab, seed + 100)
    uniforms = torch.rand(nodes, generator=generator).tolist()
    found = []
    for rule in (token_walk, tensor_walk):
        dice = iter(uniforms)
        outcome = rule(tokens, parents, p, q, lambda c, dice=dice: next(dice) < c, with_replacement)
        found.append((outcome, list(dice)))  # as many are left over
    assert found[0][0].path == found[1][0].path and found[0][1] == found[1][1]
    torch.testing.assert_close(found[0][0].probs, found[1][0].probs)


@pytest.mark.parametrize("draws", ["chosen", "without_replacement", "independent"])
def test_each_row_of_a_batch_is_verified_as_if_it_were_alone(draws):
    generator, batch, nodes, vocab = torch.Generator().manual_seed(0), 12, 40, 2
    pairs = [random_row(nodes, vocab, generator) for _ in range(batch)]
    p = some_probs(batch * nodes, vocab, 1).view(batch, nodes, vocab)
    q = some_probs(batch * nodes, vocab, 2).view(batch, nodes, vocab)

    class Sure(Chance):
        """Accepts what is likely, and draws the most probable token: the same for every row."""

        def accept(self, chances):
            return chances > 0.3

        def draw(self, probs):
            return probs.argmax(-1)

    trees = [
        tensor_tree(*pair, draws, None if draws == "chosen" else q[row])
        for row, pair in enumerate(pairs)
    ]
    whole = DraftTree(
        *(torch.cat([tree[part] for tree in trees]) for part in range(3)),
        None if draws == "chosen" else q,
        draws,
    )
    together = verify_token(whole, lambda node: p[torch.arange(batch), node], Sure())
    for row, tree in enumerate(trees):
        alone = verify_token(tree, lambda node, row=row: p[row, node], Sure())
        length = int(alone.lengths)
        assert together.lengths[row] == length and together.next_token[row] == alone.next_token
        assert together.path[row, :length].equal(alone.path[0, :length])
        assert together.tokens(whole)[row, :length].equal(alone.tokens(tree)[0, :length])
    assert len(set(together.lengths.tolist())) > 2


# ---- how far each rule gets


@pytest.mark.parametrize("case", CHAINS + BUSHES, ids=name_of)
def test_traversal_accepts_at_least_as_much_as_the_token_walk(case):
    assert mean_length(traversal, case) >= mean_length(token_walk, case) - 1e-12
    if case.kind == "random" and case.depth > 1:
        assert mean_length(traversal, case) > mean_length(token_walk, case) + 1e-3


@pytest.mark.parametrize("case", CHAINS, ids=name_of)
def test_block_is_traversal_of_a_chain(case):
    assert mean_length(block, case) == pytest.approx(mean_length(traversal, case), abs=1e-12)


@pytest.mark.parametrize("case", CHOSEN, ids=name_of)
def test_on_chosen_tokens_all_rules_accept_the_same(case):
    assert mean_length(traversal, case) == pytest.approx(mean_length(token_walk, case), abs=1e-12)


@pytest.mark.parametrize("rule", [token_walk, traversal])
@pytest.mark.parametrize("how", ["without replacement", "with replacement"])
@pytest.mark.parametrize("name", ["chain of two", "binary", "irregular"])
def test_a_drafter_that_equals_the_target_is_always_accepted(name, how, rule):
    case = Case(name, SHAPES[name], 3, "equal", how)
    assert mean_length(rule, case) == pytest.approx(case.depth)


@pytest.mark.parametrize("rule", [token_walk, traversal])
@pytest.mark.parametrize("name", ["chain of two", "binary", "irregular"])
def test_a_drafter_that_never_says_what_the_target_says_is_never_accepted(name, rule):
    assert mean_length(rule, Case(name, SHAPES[name], 2, "disjoint", "with replacement")) == 0


# ---- single trees


def asked(rule: Rule, *args) -> tuple[list[float], Outcome]:
    """The chances that a rule asks for when everything is rejected, and its outcome."""
    chances: list[float] = []
    outcome = rule(*args, lambda chance: chances.append(chance) or False)
    return chances, outcome


def some_probs(rows: int, vocab: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """(rows, vocab), some of the tokens impossible."""
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(rows, vocab, generator=generator, dtype=dtype)
    logits[torch.rand(rows, vocab, generator=generator) < 0.3] = -torch.inf
    logits[:, 0] = 0
    return logits.softmax(-1)


@pytest.mark.parametrize("children", [[], [2], [4, 0], [1, 3, 0, 2], [0, 1, 2, 3, 4]])
def test_a_chosen_child_is_accepted_with_its_share_of_what_is_left(children):
    probs = some_probs(1, 5, seed=len(children))[0]
    chances, choice = asked(token_choice, probs, children)
    p = probs[children]
    left = 1 - (p.cumsum(0) - p)
    torch.testing.assert_close(torch.tensor(chances).double(), p / left)
    assert choice.child is None
    if len(children) < 5:  # else there is nothing left to draw from
        rest = probs.index_fill(0, torch.tensor(children).long(), 0)
        torch.testing.assert_close(choice.probs, rest / rest.sum())


def test_an_accepted_child_leaves_the_target_as_it_is():
    answers = iter([False, True])
    choice = token_choice(TARGET, [A, C, B], lambda chance: next(answers), DRAFT)
    assert choice.child == 1
    assert choice.probs is TARGET


@pytest.mark.parametrize("seed", range(10))
def test_one_hot_draws_are_choices(seed):
    """With q one-hot at its first child a node's further children can only have been chosen."""
    tokens, parents = [0, 3, 1, 2, 0, 4, 1], [0, 0, 0, 1, 1, 1, 3]
    p, q = some_probs(7, 5, seed), torch.zeros(7, 5, dtype=torch.float64)
    for node, first in ((0, 3), (1, 2), (3, 1)):
        q[node, first] = 1
    for rule in (token_walk, traversal):
        drawn, chosen = (asked(rule, tokens, parents, p, draft) for draft in (q, None))
        assert drawn[0] == pytest.approx(chosen[0])
        assert drawn[1].path == chosen[1].path == [0]
        torch.testing.assert_close(drawn[1].probs, chosen[1].probs)


@pytest.mark.parametrize("with_replacement", [False, True])
def test_on_siblings_alone_traversal_is_the_token_walk(with_replacement):
    tree = [0, 2, 1, 3], [0, 0, 0, 0]
    p, q = some_probs(4, 5, seed=1), some_probs(4, 5, seed=2).add(0.1).div(1.5)
    walked, traversed = (
        asked(partial(rule, with_replacement=with_replacement), *tree, p, q)
        for rule in (token_walk, traversal)
    )
    # traversal does not ask where the answer is certain to be no
    assert [chance for chance in walked[0] if chance > 0] == traversed[0]
    assert torch.equal(walked[1].probs, traversed[1].probs)


def test_traversal_takes_the_first_leaf_if_it_may_and_the_walk_the_same_path():
    p = torch.full((6, 3), 1 / 3)
    tree = [0, 1, 2, 0, 2, 1], [0, 0, 0, 1, 1, 3]
    for rule in (token_walk, traversal):
        assert rule(*tree, p, p, lambda chance: True).path == [0, 1, 3, 5]


@pytest.mark.parametrize("rule", [token_walk, traversal, block])
def test_the_root_alone_is_accepted_without_asking(rule):
    chances, outcome = asked(rule, [7], [0], TARGET[None], DRAFT[None])
    assert chances == []
    assert outcome.path == [0]
    assert close(outcome.probs, *TARGET.tolist())


@pytest.mark.parametrize("rule", [token_walk, tensor_walk, traversal, block])
def test_padding_and_the_drafter_after_a_leaf_are_never_looked_at(rule):
    p, q = some_probs(3, 4, seed=3), some_probs(3, 4, seed=4)
    q[2] = torch.nan
    plain = asked(rule, [0, 1, 0], [0, 0, 1], p, q)
    nowhere = torch.full((1, 4), torch.nan, dtype=p.dtype)
    padded_p, padded_q = (torch.cat([x[:2], nowhere, x[2:], nowhere]) for x in (p, q))
    padded = asked(rule, [0, 1, -1, 0, -1], [0, 0, -1, 1, -1], padded_p, padded_q)
    assert padded[0] == plain[0]
    assert torch.equal(padded[1].probs, plain[1].probs)


@pytest.mark.parametrize("seed", range(20))
def test_traversal_of_a_chain_decides_as_block_verification_for_the_same_uniforms(seed):
    generator = torch.Generator().manual_seed(seed)
    nodes, vocab = 2 + seed % 6, 5
    tokens = torch.randint(vocab, (nodes,), generator=generator).tolist()
    parents = [0, *range(nodes - 1)]
    p, q = some_probs(nodes, vocab, seed), some_probs(nodes, vocab, seed + 100)
    uniforms = torch.rand(nodes, generator=generator).tolist()
    for draft_probs in (q, None):
        found = []
        for rule in (block, traversal):
            # a certain answer takes no number: traversal does not ask for it
            dice = iter(uniforms)
            outcome = rule(
                tokens, parents, p, draft_probs, lambda c, dice=dice: c > 0 and next(dice) < c
            )
            found.append(outcome)
        assert found[0].path == found[1].path
        torch.testing.assert_close(found[0].probs, found[1].probs)


# ---- numbers


def hard_rows(dtype: torch.dtype) -> Tensor:
    """(rows, 6), distributions that a division or a difference may trip over."""
    tiny = torch.finfo(dtype).tiny
    close_to_one = 1 - torch.finfo(dtype).eps
    hard = torch.tensor(
        [
            [1, 0, 0, 0, 0, 0],
            [0, 0, 0, 0, 0, 1],
            [0.5, 0.5, 0, 0, 0, 0],
            [close_to_one, 1 - close_to_one, 0, 0, 0, 0],
            [1, tiny, tiny / 4, 0, tiny / 1000, 0],
            [tiny / 4, 1, 0, tiny, 0, tiny / 1000],
            [1 / 6] * 6,
            [0] * 6,
        ],
        dtype=dtype,
    )
    return torch.cat([hard, some_probs(4, 6, seed=0, dtype=dtype)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("with_replacement", [False, True])
def test_no_input_leads_to_anything_but_a_distribution(dtype, with_replacement):
    tokens, parents = [0, 1, 0, 5, 1, 0, 2], [0, 0, 0, 0, 1, 1, 4]
    generator = torch.Generator().manual_seed(0)
    hard = hard_rows(dtype)
    for _ in range(300):
        p = hard[torch.randint(len(hard), (7,), generator=generator)]
        q = hard[torch.randint(len(hard), (7,), generator=generator)]
        p[p.sum(1) == 0] = 1 / 6  # the target always says something
        before = p.clone(), q.clone()
        for rule in (token_walk, tensor_walk, traversal):
            chances, outcome = asked(
                partial(rule, with_replacement=with_replacement), tokens, parents, p, q
            )
            assert all(0 <= chance <= 1 for chance in chances)
            assert outcome.path == [0]
            assert (outcome.probs >= 0).all()
            assert abs(float(outcome.probs.sum()) - 1) < 1e-6
        assert torch.equal(p, before[0]) and torch.equal(q, before[1])


DTYPES = (torch.float64, torch.float32)


@pytest.mark.parametrize("rule", [token_walk, tensor_walk, traversal])
def test_single_precision_asks_for_nearly_the_same_chances(rule):
    tree = [0, 1, 0, 5, 1, 0, 2], [0, 0, 0, 0, 1, 1, 4]
    p, q = some_probs(7, 40, seed=5), some_probs(7, 40, seed=6).add(0.01).div(1.4)
    double, single = (asked(rule, *tree, p.to(dtype), q.to(dtype)) for dtype in DTYPES)
    assert single[0] == pytest.approx(double[0], abs=1e-5)
    torch.testing.assert_close(single[1].probs.double(), double[1].probs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("draws", ["without_replacement", "independent"])
@pytest.mark.parametrize("seed", range(6))
def test_traversal_on_tensors_asks_for_the_chances_of_the_rule_over_lists(draws, seed):
    generator = torch.Generator().manual_seed(seed)
    plan = (Level(1, 3), Level(2, 2), Level(2, 1)) if seed % 2 else (Level(1, 2), Level(2, 2))
    tree, probs = _planned_tree(plan, 5, draws, generator)
    found, compared = chances_of(tree, probs), 0
    for row in range(2):
        tokens, parents = tree.tokens[row].tolist(), tree.parents[row].tolist()
        accept = found.accept[row].tolist()
        tried = [node for node in _order_of_trying(parents) if accept[node] > 0 and node > 0]
        for count, end in enumerate([*tried, 0]):
            asked = []

            def answer(chance, asked=asked, count=count):
                asked.extend([chance] if chance > 0 else [])  # the rule may ask in vain
                return chance > 0 and len(asked) == count + 1

            of_row = tokens, parents, probs[row], tree.draft_probs[row], answer
            outcome = traversal(*of_row, draws == "independent")
            assert asked == pytest.approx([accept[node] for node in tried[: count + 1]])
            assert outcome.path[-1] == end
            assert torch.allclose(outcome.probs, _left(found, probs, row, end), atol=1e-12)
            compared += 1
    assert compared > 3


@pytest.mark.parametrize("draws", ["without_replacement", "independent"])
def test_traversal_of_trees_without_a_plan_is_that_of_planned_ones(draws):
    class Sure(Chance):
        def accept(self, chances):
            return chances > 0.4

        def draw(self, probs):
            return probs.argmax(-1)

    generator = torch.Generator().manual_seed(0)
    plan = (Level(1, 3), Level(2, 2), Level(2, 1))
    tree, probs = _planned_tree(plan, 5, draws, generator)
    planned = verify_traversal(tree, probs, Sure())
    found = verify_traversal(tree._replace(plan=(), levels=0), probs, Sure())
    assert all(one.equal(other) for one, other in zip(found, planned, strict=True))
    for row in range(2):
        own = DraftTree(*(part[row : row + 1] for part in tree[:4]), draws)
        alone = chances_of(own, probs[row : row + 1]).accept
        torch.testing.assert_close(alone, chances_of(tree, probs).accept[row : row + 1])


def _left(found, probs, row, end):
    """(vocab,), what the next token after a path's end is drawn from."""
    for families, left in found.left:
        for place in (families[row] == end).nonzero()[:, 0].tolist():
            return left[row, place]
    return probs[row, end]


def _order_of_trying(parents):
    children = list_children(parents)

    def visit(node):
        return [n for child in children[node] for n in visit(child)] + [node]

    return visit(0)


def _planned_tree(plan, vocab, draws, generator):
    """Two random trees of a plan, with q, and the target's p after each node."""
    nodes = 1 + sum(level.families * level.children for level in plan)
    shape = 2, nodes, vocab
    p, q = (torch.rand(shape, generator=generator, dtype=torch.float64) ** 3 for _ in range(2))
    p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
    tokens, parents = torch.zeros(2, nodes, dtype=torch.long), torch.zeros(2, nodes).long()
    depths, start, above = torch.zeros(2, nodes, dtype=torch.long), 1, [0]
    for depth, (families, children) in enumerate(plan, 1):
        for row in range(2):
            chosen = torch.tensor(above)[torch.randperm(len(above), generator=generator)]
            for family, parent in enumerate(chosen[:families].tolist()):
                places = slice(start + family * children, start + (family + 1) * children)
                kept = draws == "independent"
                drawn = torch.multinomial(q[row, parent], children, kept, generator=generator)
                tokens[row, places], parents[row, places] = drawn, parent
        depths[:, start : start + families * children] = depth
        above = list(range(start, start + families * children))
        start += families * children
    sizes = {"levels": len(plan), "branching": max(level.children for level in plan)}
    return DraftTree(tokens, parents, depths, q, draws, plan=tuple(plan), **sizes), p
