"""Verification of a draft tree by the target: logits in, accepted tokens out.

In: a `DraftTree` and the target's output of each node. Out: `Accepted`, appended to `Sequences`.

    at once       a rule over tensors, read once a round; where scores follow from logits alone, and
                  only end tokens and lengths stop a row
    step by step  scores are processed where the walk arrives, once, in order; where a processor or
                  criterion needs order, or the caller wants scores of each token. Rules that look
                  at the whole tree cannot do so, and the token rule takes their place
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import LogitsProcessor
from transformers.utils import logging

from . import rules
from .chance import Chance, Draws
from .drafting import DraftTree, host_tensor
from .outputs import OutputCollector, TargetOutput
from .sequences import Sequences
from .watchers import processed

logger = logging.get_logger(__name__)


class Accepted(NamedTuple):
    """What a round has committed, trimmed where a row ended."""

    path: Tensor  # (batch, longest), the nodes before the new tokens, padded with the root
    tokens: list[list[int]]  # of each row

    @property
    def counts(self) -> list[int]:
        """New tokens of each row."""
        return [len(tokens) for tokens in self.tokens]


class Verifier:
    """Verifies trees for the rows of a call that have not ended, by a rule of `settings.RULES`."""

    def __init__(self, sequences: Sequences, collector: OutputCollector, rule: str):
        self.sequences, self.collector, self.rule = sequences, collector, rule
        self.chance = Chance()
        self.is_stepwise = collector.keeps_scores or collector.keeps_logits or not sequences.is_free
        if self.is_stepwise and rule in ("traversal", "block"):
            self.rule = "token"
            logger.info(f"Tokens are verified one after another, by the token rule: not {rule!r}.")

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

    def verdict(self, tree: DraftTree, logits: Tensor) -> rules.Verdict:
        """What the target accepts where nothing needs order; `logits` are (batch, nodes, vocab)."""
        return decide(self.rule, tree, logits, self.sequences.processors, self.chance)

    def _walk(self, tree: DraftTree, output: TargetOutput) -> Accepted:
        """Append one token of each row at a time, until each leaves its tree or ends.

        Rows are counted as in the pass. The path that is returned has shape (batch, longest).
        """
        sequences, active, logits = self.sequences, self.sequences.active, output.logits
        going, nodes = list(range(len(active))), [0] * len(active)  # where each walk stands
        path, accepted = ([[0][:0] for _ in active] for _ in range(2))
        while True:
            rows, stands = [active[row] for row in going], [nodes[row] for row in going]
            scores = sequences.scores(rows, logits[going, stands])  # (going, vocab)
            siblings = rules.siblings_at(tree, host_tensor(nodes).to(scores.device), going)
            if self.rule == "greedy":
                step = rules.Step(token := scores.argmax(-1), siblings.with_token(token))
            else:
                step = rules.token_step(siblings, scores.softmax(-1), self.chance)
            tokens, children = step.token.tolist(), step.child.tolist()
            if ended := sequences.padded:  # all rows are going
                padding = torch.full_like(step.token, sequences.pad_token)
                next_nodes = siblings.with_token(padding).tolist()
                for row in ended:
                    tokens[row], children[row] = sequences.pad_token, next_nodes[row]
            for row, token, child, own in zip(going, tokens, children, scores, strict=True):
                self.collector.add(active[row], logits[row, nodes[row]], own)
                path[row].append(nodes[row])
                accepted[row].append(token)
                nodes[row] = child
            # rows of a batch come to different depths
            depth = len(path[0]) if len(active) == 1 and children[0] else 0
            sequences.append(rows, tokens, self.collector.scores, depth)
            unstopped = [row for row in going if not sequences.is_stopped[active[row]]]
            going = [row for row in unstopped if nodes[row] > 0]
            if not going or (sequences.is_lockstep and len(going) < len(unstopped)):
                break
        longest = max(map(len, path))
        padded = [nodes + [0] * (longest - len(nodes)) for nodes in path]
        return Accepted(host_tensor(padded).to(logits.device), accepted)


def decide(
    rule: str, tree: DraftTree, logits: Tensor, processors: Sequence[LogitsProcessor], chance: Draws
) -> rules.Verdict:
    """What the target accepts by a rule, where scores follow from logits (batch, nodes, vocab)."""
    if rule == "greedy":
        is_coarse = not processors and logits.dtype != torch.float64  # `processed` changes nothing
        scores = logits if is_coarse else processed(processors, logits.flatten(0, 1))
        return rules.verify_greedy(tree, scores.view_as(logits))
    # on chains "block" is "traversal"; on tokens that were chosen both are the token rule
    if rule != "token" and tree.draft_probs is not None:
        probs = processed(processors, logits.flatten(0, 1)).softmax(-1)
        return rules.verify_traversal(tree, probs.view_as(logits), chance)
    rows = torch.arange(len(logits), device=logits.device)
    return rules.verify_token(
        tree, lambda node: processed(processors, logits[rows, node]).softmax(-1), chance
    )
