"""Who decides: the target's scores of a tree become tokens, row by row.

In: a tree and its `TargetOutput`. Out: a `Verdict` a row, and tokens appended to the `Texts`. A
rule either walks down the tree token by token, and then scores are processed where the walk
arrives, once, in order (`Walk`); or it looks at the whole tree before its first token is certain,
and then scores are processed at every node (`Planned`). Either way a row's tokens become certain
one by one.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .records import Records
from .target_runner import TargetOutput
from .texts import Texts
from .tree import DraftTree
from .verification import Outcome, Verdict, block, greedy_walk, token_choice, traversal

# rules that look at the whole tree
WHOLE_TREE = {"traversal": traversal, "block": block}


def chance(probability: float) -> bool:
    """True with the given probability: the `Accept` of a real draw."""
    return float(torch.rand(())) < probability


class Source(Protocol):
    """Where the tokens of a pass come from; rows are counted as in the pass."""

    nodes: list[int]  # of each row, the node that its next token follows

    def next_tokens(self, going: list[int]) -> list[int]:
        """The next token of each row that goes on."""
        ...

    def follow(self, row: int, token: int) -> bool:
        """Move to the node of a row's new token; False if the tree has none."""
        ...


class Verifier:
    """Verifies trees for the rows of a call that have not ended."""

    def __init__(self, texts: Texts, records: Records, rule: str):
        """`rule`: `"greedy"`, `"token"`, `"traversal"` or `"block"`."""
        self._texts = texts
        self._records = records
        self._rule = rule

    def verify(self, tree: DraftTree, scores: TargetOutput) -> list[Verdict]:
        """Verify one tree for each row of `Texts.active`."""
        return self._emit(self._source(tree, scores), len(tree.tokens))

    def _source(self, tree: DraftTree, scores: TargetOutput) -> Source:
        if self._rule in WHOLE_TREE:
            return Planned.by_rule(tree, scores, self._rule, self._texts, self._records)
        keeps_something = self._records.keeps_scores or self._records.keeps_logits
        if self._rule == "greedy" and not (self._texts.has_processors or keeps_something):
            return Planned.greedy(tree, scores, self._texts, self._records)
        return Walk(tree, scores, self._rule, self._texts, self._records)

    def _emit(self, source: Source, count: int) -> list[Verdict]:
        """Make tokens certain, one of each row at a time, until each leaves its tree or ends."""
        active = self._texts.active
        verdicts = [Verdict([], []) for _ in range(count)]
        going = list(range(count))
        while going:
            tokens = source.next_tokens(going)
            for row, token in zip(going, tokens, strict=True):
                verdicts[row].path.append(source.nodes[row])
                verdicts[row].tokens.append(token)
            self._texts.append([active[row] for row in going], tokens, self._seen_scores)
            unstopped = [row for row in going if not self._texts.is_stopped[active[row]]]
            going = [row for row in unstopped if source.follow(row, verdicts[row].tokens[-1])]
            if self._texts.is_lockstep and len(going) < len(unstopped):
                break
        return verdicts

    def _seen_scores(self) -> tuple[Tensor, ...] | None:
        return self._records.scores() if self._records.keeps_scores else None


class Walk:
    """Decides token by token: the target's own next token is, or is not, a child of the node."""

    def __init__(
        self, tree: DraftTree, scores: TargetOutput, rule: str, texts: Texts, records: Records
    ):
        self.nodes = [0] * len(tree.tokens)
        self._tree = tree
        self._scores = scores
        self._rule = rule
        self._texts, self._records = texts, records
        self._active = texts.active
        self._tokens = tree.tokens.tolist()
        self._children = [tree.children(row) for row in range(len(tree.tokens))]

    def next_tokens(self, going: list[int]) -> list[int]:
        """See [`Source`]."""
        logits = self._scores.logits[going, [self.nodes[row] for row in going]]  # (going, vocab)
        texts = [self._active[row] for row in going]
        processed = self._texts.scores(texts, logits)
        for text, raw, final in zip(texts, logits, processed, strict=True):
            self._records.add(text, raw, final)
        if self._rule == "greedy":
            return processed.argmax(-1).tolist()
        probs = processed.softmax(-1)
        return [self.draw(row, one) for row, one in zip(going, probs, strict=True)]

    def draw(self, row: int, target_probs: Tensor) -> int:
        """A token of the target's distribution (vocab,), trying the node's children first."""
        node, draft = self.nodes[row], self._tree.draft_probs
        siblings = [self._tokens[row][child] for child in self._children[row][node]]
        draft_probs = None if draft is None else draft[row, node]
        choice = token_choice(target_probs, siblings, chance, draft_probs)
        if choice.child is not None:
            return siblings[choice.child]
        return int(torch.multinomial(choice.probs, 1))

    def follow(self, row: int, token: int) -> bool:
        """See [`Source`]."""
        for child in self._children[row][self.nodes[row]]:
            if self._tokens[row][child] == token:
                self.nodes[row] = child
                return True
        return False


class Plan(NamedTuple):
    """What one row of a tree gives, before anything that may stop the text has seen it."""

    path: list[int]
    tokens: list[int]  # len(path)
    scores: Tensor | None = None  # (nodes, vocab), processed


class Planned:
    """Hands out what was decided for a whole tree."""

    def __init__(self, plans: Sequence[Plan], scores: TargetOutput, texts: Texts, records: Records):
        self._plans = plans
        self._scores = scores
        self._active = texts.active
        self._records = records
        self._depth = 0
        self.nodes = [0] * len(plans)

    @classmethod
    def greedy(
        cls, tree: DraftTree, scores: TargetOutput, texts: Texts, records: Records
    ) -> "Planned":
        """Each row along the target's own choices."""
        # in fp32 as plain `generate` compares them: float64 can tie there, and bf16 is slow
        best = scores.logits.float().argmax(-1).tolist()
        rows = zip(tree.tokens.tolist(), tree.parents.tolist(), best, strict=True)
        paths = [greedy_walk(*row) for row in rows]
        plans = [Plan(path, [best[row][node] for node in path]) for row, path in enumerate(paths)]
        return cls(plans, scores, texts, records)

    @classmethod
    def by_rule(
        cls, tree: DraftTree, scores: TargetOutput, rule: str, texts: Texts, records: Records
    ) -> "Planned":
        """Each row by a rule of `WHOLE_TREE`."""
        rows = enumerate(zip(tree.tokens.tolist(), tree.parents.tolist(), strict=True))
        plans = []
        for row, (tokens, parents) in rows:
            after = texts.scores_after(
                texts.active[row], prefixes(tokens, parents), scores.logits[row]
            )
            draft = None if tree.draft_probs is None else tree.draft_probs[row]
            outcome = WHOLE_TREE[rule](tokens, parents, after.softmax(-1), draft, chance)
            plans.append(cls._plan(outcome, tokens, after))
        return cls(plans, scores, texts, records)

    @staticmethod
    def _plan(outcome: Outcome, tokens: list[int], scores: Tensor) -> Plan:
        last = int(torch.multinomial(outcome.probs, 1))
        return Plan(outcome.path, [*(tokens[node] for node in outcome.path[1:]), last], scores)

    def next_tokens(self, going: list[int]) -> list[int]:
        """See [`Source`]."""
        for row in going:
            processed = self._plans[row].scores
            if processed is not None:
                node = self.nodes[row]
                logits = self._scores.logits[row, node]
                self._records.add(self._active[row], logits, processed[node])
        tokens = [self._plans[row].tokens[self._depth] for row in going]
        self._depth += 1
        return tokens

    def follow(self, row: int, token: int) -> bool:
        """See [`Source`]."""
        path = self._plans[row].path
        if self._depth == len(path):
            return False
        self.nodes[row] = path[self._depth]
        return True


def prefixes(tokens: list[int], parents: list[int]) -> list[list[int]]:
    """The drafted tokens from the root's child to each node; parents come before children."""
    found: list[list[int]] = [[]]
    for token, parent in zip(tokens[1:], parents[1:], strict=True):
        found.append([*found[max(parent, 0)], token])
    return found
