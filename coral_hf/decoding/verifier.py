"""Verification of a draft tree by the target: logits in, accepted tokens out.

In: a `DraftTree` and the target's output of each node. Out: `Accepted`, appended to `Sequences`.

    at once       `verify_greedy`, `verify_token`: tensors over the batch, read once a round; where
                  scores follow from logits alone, and only end tokens and lengths stop a row
    step by step  scores are processed where the walk arrives, once, in order; where a processor or
                  criterion needs order, or the caller wants scores of each token
    whole tree    rules that look at every node before the first token is decided
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .acceptance_rules import Chance, Uniforms, traversal
from .drafting import PADDING, DraftTree, host_tensor
from .outputs import OutputCollector, TargetOutput
from .sequences import Sequences

# rules that look at the whole tree; on chains the second is the first
WHOLE_TREE = ("traversal", "block")


class Verdict(NamedTuple):
    """What the target accepts of a tree: a path, and one more token."""

    path: Tensor  # (batch, depth + 1), nodes from the root on; 0 behind `lengths`
    lengths: Tensor  # (batch,), nodes on the path, which is also how many tokens come out
    next_token: Tensor  # (batch,), the target's own, after the last node

    def tokens(self, tree: DraftTree) -> Tensor:
        """The tokens that come out: (batch, depth + 1), anything behind `lengths`."""
        drafted = tree.tokens.gather(1, self.path.roll(-1, dims=1))
        last = self.next_token[:, None].to(drafted.dtype)  # ids may be of any integer type
        return drafted.scatter(1, self.lengths[:, None] - 1, last)


class Accepted(NamedTuple):
    """What a round has committed, trimmed where a row ended."""

    path: Tensor  # (batch, longest), the nodes before the new tokens, padded with the root
    tokens: list[list[int]]  # of each row

    @property
    def counts(self) -> list[int]:
        """New tokens of each row."""
        return [len(tokens) for tokens in self.tokens]


class Siblings(NamedTuple):
    """The children of one node of each row, and how they came about."""

    tokens: Tensor  # (batch, nodes), of all nodes
    is_child: Tensor  # (batch, nodes)
    draft_probs: Tensor | None = None  # (batch, vocab), q that they were drawn from; None if chosen
    is_independent: bool = False  # whether they were drawn with replacement
    most: int = 0  # children of a node; 0: not known

    def with_token(self, token: Tensor) -> Tensor:
        """Find the first child that has a `token`, 0 if none has; both have shape (batch,)."""
        return first_true(self.is_child & (self.tokens == token[:, None]))


class Move(NamedTuple):
    """The next token of one row's walk, and where it leads."""

    token: int
    child: int  # the node that has the token; 0 where the walk leaves the tree
    scores: Tensor  # (vocab,), processed, that the token was chosen by


class Step(NamedTuple):
    """One token of the target's distribution, and the node of the tree that has it."""

    token: Tensor  # (batch,)
    child: Tensor  # (batch,), 0 where the walk leaves the tree


def verify_greedy(tree: DraftTree, logits: Tensor) -> Verdict:
    """Follow the target's most probable tokens; `logits` are (batch, nodes, vocab)."""
    best = logits.argmax(-1)  # (batch, nodes)
    agrees = (tree.tokens == best.gather(1, tree.parents.clamp(min=0))) & (tree.parents != PADDING)
    agrees[:, 0].fill_(False)  # an assignment would copy a number to the device
    path, lengths = follow(tree, agrees)
    last = path.gather(1, lengths[:, None] - 1)
    return Verdict(path, lengths, best.gather(1, last)[:, 0])


def follow(tree: DraftTree, leads_on: Tensor) -> tuple[Tensor, Tensor]:
    """Go down from the root, always to the first child that leads on.

    Args:
        leads_on: (batch, nodes), never True of the root.

    Returns:
        the path and its length, as in a [`Verdict`].
    """
    batch, nodes = leads_on.shape
    # the first such child of each node; `nodes` stands for none, and is its own child
    ids = torch.arange(nodes, device=leads_on.device).expand(batch, -1)
    child = ids.new_full((batch, nodes + 1), nodes)
    child.scatter_reduce_(1, tree.parents.clamp(min=0), ids.masked_fill(~leads_on, nodes), "amin")
    steps = [torch.zeros(batch, 1, dtype=torch.long, device=leads_on.device)]
    for _ in range(tree.max_depth):
        steps.append(child.gather(1, steps[-1]))
    path = torch.cat(steps, dim=1)  # (batch, depth + 1)
    is_node = path < nodes
    return path.masked_fill(~is_node, 0), is_node.sum(1)


def verify_token(
    tree: DraftTree, target_probs: Callable[[Tensor], Tensor], chance: Chance | Uniforms
) -> Verdict:
    """Walk down from the root, token by token, in all rows at once.

    Args:
        target_probs: nodes (batch,) → p after them, (batch, vocab): computed only where a walk
            arrives, since warpers such as top-p sort the vocabulary.
    """
    batch, device = len(tree.tokens), tree.tokens.device
    node = torch.zeros(batch, dtype=torch.long, device=device)
    is_walking = torch.ones_like(node, dtype=torch.bool)
    lengths, next_token, path = torch.zeros_like(node), torch.zeros_like(node), []
    for _ in range(tree.max_depth + 1):
        step = token_step(siblings_at(tree, node), target_probs(node), chance)
        path.append(node)
        lengths = lengths + is_walking
        next_token = torch.where(is_walking, step.token, next_token)
        is_walking = is_walking & (step.child > 0)
        node = torch.where(is_walking, step.child, 0)
        if chance.may_look(device) and not is_walking.any():
            break
    return Verdict(torch.stack(path, dim=1), lengths, next_token)


def siblings_at(tree: DraftTree, node: Tensor, rows: Sequence[int] | None = None) -> Siblings:
    """List the children of each row's `node`, of shape (batch,); of all rows or of `rows`."""
    tokens, is_child, draft = tree.tokens, tree.children_of(node), None
    if tree.draft_probs is not None:
        draft = tree.draft_probs[torch.arange(len(node), device=node.device), node]
    if rows is not None:
        tokens, is_child = tokens[list(rows)], is_child[list(rows)]
        draft = None if draft is None else draft[list(rows)]
    return Siblings(tokens, is_child, draft, tree.draws == "independent", tree.branching)


def token_step(siblings: Siblings, target_probs: Tensor, chance: Chance | Uniforms) -> Step:
    """A token of `target_probs` (batch, vocab), as often as possible one of the siblings'.

    Chosen siblings (q = 1) are accepted with p in all, so the target's own draw decides. Drawn ones
    are tried in turn, each accepted with min(1, p / q) (SpecInfer, Miao et al. 2024): on a
    rejection p ← norm([p - q]₊) and q ← norm(q without the child) (Traversal Verification,
    algorithm 2), or q as it is if they are independent.
    """
    tokens, is_child = siblings.tokens, siblings.is_child
    if siblings.draft_probs is None:
        token = chance.draw(target_probs)
        return Step(token, siblings.with_token(token))
    p, q = target_probs, siblings.draft_probs
    child = torch.zeros_like(tokens[:, 0])
    may_look = chance.may_look(tokens.device)
    for _ in range(siblings.most or int(is_child.sum(1).max())):
        tried = first_true(is_child)  # (batch,)
        is_tried = (tried > 0) & (child == 0)
        if may_look and not is_tried.any():
            break
        token = tokens.gather(1, tried[:, None])  # (batch, 1)
        own_q = q.gather(1, token)
        # a token of no draft probability comes only when all others were drawn: it was chosen
        chances = p.gather(1, token) / own_q.masked_fill(own_q == 0, 1)
        is_accepted = chance.accept(chances[:, 0].clamp(max=1)) & is_tried
        child = torch.where(is_accepted, tried, child)
        is_rejected = (is_tried & ~is_accepted)[:, None]
        p = torch.where(is_rejected, _normed((p - q).clamp(min=0), token, p), p)
        if not siblings.is_independent:
            q = torch.where(is_rejected, _normed(q, token, torch.zeros_like(q)), q)
        is_child = is_child.scatter(1, tried[:, None], False)
    drawn = chance.draw(p)
    return Step(torch.where(child > 0, tokens.gather(1, child[:, None])[:, 0], drawn), child)


def first_true(mask: Tensor) -> Tensor:
    """Find the first True of each row of a mask (batch, nodes), 0 if there is none: (batch,).

    Not by `argmax` of integers: what Inductor makes of it on a CPU reads lanes that nobody wrote
    where all are equal, and gives any number (torch 2.13).
    """
    nodes = mask.shape[1]
    ids = torch.arange(nodes, device=mask.device)
    first = torch.where(mask, ids, nodes).amin(1)
    return torch.where(first < nodes, first, 0)


def _normed(probs: Tensor, token: Tensor, otherwise: Tensor) -> Tensor:
    """`probs` (batch, vocab) without `token` (batch, 1), normed; else `otherwise`."""
    rest = probs.scatter(1, token, 0)
    mass = rest.sum(1, keepdim=True)
    tiny = torch.finfo(rest.dtype).tiny  # whose inverse would overflow
    return torch.where(mass < tiny, otherwise, rest / mass.clamp(min=tiny))


class Verifier:
    """Verifies trees for the rows of a call that have not ended, by a rule of `settings.RULES`."""

    def __init__(self, sequences: Sequences, collector: OutputCollector, rule: str):
        self.sequences, self.collector, self.rule = sequences, collector, rule
        self.chance = Chance()
        needs_order = collector.keeps_scores or collector.keeps_logits or not sequences.is_free
        self.is_stepwise = rule in WHOLE_TREE or needs_order

    def verify(self, tree: DraftTree, output: TargetOutput) -> Accepted:
        """Verify one tree for each row of `Sequences.active`, and append what comes out."""
        tree = tree.to(output.logits.device)
        if self.is_stepwise:
            return self._walk(tree, output)
        verdict = self.verdict(tree, output.logits)
        # the one read of a round: (batch, depth + 2)
        read = torch.cat([verdict.tokens(tree), verdict.lengths[:, None]], dim=1).tolist()
        tokens = self.sequences.emit([row[: row[-1]] for row in read])
        return Accepted(verdict.path[:, : max(map(len, tokens))], tokens)

    def verdict(self, tree: DraftTree, logits: Tensor) -> Verdict:
        """What the target accepts where nothing needs order; `logits` are (batch, nodes, vocab)."""
        process = self.sequences.process_free
        if self.rule == "greedy":
            return verify_greedy(tree, process(logits.flatten(0, 1)).view_as(logits))
        rows = torch.arange(len(logits), device=logits.device)
        return verify_token(tree, lambda node: process(logits[rows, node]).softmax(-1), self.chance)

    def _walk(self, tree: DraftTree, output: TargetOutput) -> Accepted:
        """Append one token of each row at a time, until each leaves its tree or ends.

        Rows are counted as in the pass. The path that is returned has shape (batch, longest).
        """
        sequences, active, logits = self.sequences, self.sequences.active, output.logits
        going, nodes = list(range(len(active))), [0] * len(active)  # where each walk stands
        looks_ahead = self.rule in WHOLE_TREE
        decided = [self._decide(tree, row, logits[row]) for row in going] if looks_ahead else []
        path, accepted = ([[0][:0] for _ in active] for _ in range(2))
        while going:
            rows = [active[row] for row in going]
            if looks_ahead:
                moves = [decided[row][nodes[row]] for row in going]
            else:
                stands = [nodes[row] for row in going]
                scores = sequences.scores(rows, logits[going, stands])  # (going, vocab)
                moves = self._next_moves(tree, nodes, going, scores)
            for row in sequences.padded:  # all rows are going
                moves[row] = self._padding_move(tree, row, nodes[row], moves[row])
            for row, move in zip(going, moves, strict=True):
                self.collector.add(active[row], logits[row, nodes[row]], move.scores)
                path[row].append(nodes[row])
                accepted[row].append(move.token)
                nodes[row] = move.child
            # rows of a batch come to different depths
            depth = len(path[0]) if len(active) == 1 and moves[0].child else 0
            sequences.append(rows, [move.token for move in moves], self.collector.scores, depth)
            unstopped = [row for row in going if not sequences.is_stopped[active[row]]]
            going = [row for row in unstopped if nodes[row] > 0]
            if sequences.is_lockstep and len(going) < len(unstopped):
                break
        longest = max(map(len, path))
        padded = [nodes + [0] * (longest - len(nodes)) for nodes in path]
        return Accepted(host_tensor(padded).to(logits.device), accepted)

    def _next_moves(
        self, tree: DraftTree, nodes: list[int], going: list[int], scores: Tensor
    ) -> list[Move]:
        """Decide token by token, with scores processed for the node where each walk stands.

        `nodes`: of each row; `going`: rows whose walk goes on; `scores`: theirs, (going, vocab).
        """
        siblings = siblings_at(tree, host_tensor(nodes).to(scores.device), going)
        if self.rule == "greedy":
            step = Step(token := scores.argmax(-1), siblings.with_token(token))
        else:
            step = token_step(siblings, scores.softmax(-1), self.chance)
        pairs = zip(step.token.tolist(), step.child.tolist(), scores, strict=True)
        return [Move(*pair) for pair in pairs]

    def _padding_move(self, tree: DraftTree, row: int, node: int, move: Move) -> Move:
        """The `move` in a tree (batch, nodes) of a row that has ended and stays: padding."""
        token = self.sequences.pad_token
        is_next = (tree.parents[row] == node) & (tree.tokens[row] == token)  # (nodes,)
        is_next[0] = False
        return move._replace(token=token, child=int(first_true(is_next[None])))

    def _decide(self, tree: DraftTree, row: int, logits: Tensor) -> dict[int, Move]:
        """Decide a row by the scores of every node: the move from each node of the accepted path.

        `logits`: (nodes, vocab), of the row.
        """
        tokens, parents = tree.tokens[row].tolist(), tree.parents[row].tolist()
        draft = None if tree.draft_probs is None else tree.draft_probs[row]
        scores = self.sequences.scores_after(self.sequences.active[row], tokens, parents, logits)
        probs, is_independent = scores.softmax(-1), tree.draws == "independent"
        path, rest = traversal(
            tokens, parents, probs, draft, self.chance.is_accepted, is_independent
        )
        emitted = [*(tokens[node] for node in path[1:]), int(self.chance.draw(rest[None]))]
        moves = zip(path, emitted, [*path[1:], 0], strict=True)
        # a row that has ended and stays goes where its padding leads
        others = enumerate(scores) if self.sequences.keeps_rows else ()
        elsewhere = {node: Move(0, 0, one) for node, one in others}
        return elsewhere | {node: Move(token, child, scores[node]) for node, token, child in moves}
