"""Who decides: the target's scores of a tree become tokens, row by row.

In: a tree and its `Scores`. Out: a `Verdict` a row, and the tokens appended to the `Texts`. Under
greedy search and the token rule each row walks down its tree while the target's own next token is a
child of the node; the scores of a node are processed when the walk arrives there, once, in order.
"""

from torch import Tensor

from .records import Records
from .scoring import Scores
from .texts import Texts
from .tree import DraftTree
from .verification import Verdict, draw_token


class Verifier:
    """Verifies trees for the rows of a call that have not ended."""

    def __init__(self, texts: Texts, records: Records, do_sample: bool):
        self._texts = texts
        self._records = records
        self._do_sample = do_sample

    def verify(self, tree: DraftTree, scores: Scores) -> list[Verdict]:
        """Verify one tree for each row of `Texts.active`."""
        return self._walk(tree, scores)

    def _walk(self, tree: DraftTree, scores: Scores) -> list[Verdict]:
        rows = self._texts.active
        tokens_of = tree.tokens.tolist()
        children = [tree.children(index) for index in range(len(rows))]
        verdicts = [Verdict([], []) for _ in rows]
        best = self._best_tokens(scores)
        node = [0] * len(rows)
        walking = list(range(len(rows)))
        while walking:
            child_of = {
                i: {tokens_of[i][child]: child for child in children[i][node[i]]} for i in walking
            }
            if best is None:
                tokens = self._next_tokens(rows, {i: node[i] for i in walking}, child_of, scores)
            else:
                tokens = [best[i][node[i]] for i in walking]
            for i, token in zip(walking, tokens, strict=True):
                verdicts[i].path.append(node[i])
                verdicts[i].tokens.append(token)
            self._texts.append([rows[i] for i in walking], tokens, self._seen_scores)
            going = [i for i in walking if not self._texts.is_stopped[rows[i]]]
            accepted = [i for i in going if verdicts[i].tokens[-1] in child_of[i]]
            if self._texts.is_lockstep and len(accepted) < len(going):
                break
            for i in accepted:
                node[i] = child_of[i][verdicts[i].tokens[-1]]
            walking = accepted
        return verdicts

    def _best_tokens(self, scores: Scores) -> list[list[int]] | None:
        """The target's choice after each node, where nothing else has a say."""
        if self._do_sample or self._texts.has_processors or self._keeps_something:
            return None
        # in fp32 as plain `generate` compares them: float64 can tie there, and bf16 is slow
        return scores.logits.float().argmax(-1).tolist()

    @property
    def _keeps_something(self) -> bool:
        return self._records.keeps_scores or self._records.keeps_logits

    def _seen_scores(self) -> tuple[Tensor, ...] | None:
        return self._records.scores() if self._records.keeps_scores else None

    def _next_tokens(
        self,
        rows: list[int],
        nodes: dict[int, int],
        child_of: dict[int, dict[int, int]],
        scores: Scores,
    ) -> list[int]:
        """The target's next token after one node of each row that still walks."""
        walking = list(nodes)
        logits = scores.logits[walking, list(nodes.values())]  # (walking, vocab)
        processed = self._texts.scores([rows[i] for i in walking], logits)
        for i, raw, final in zip(walking, logits, processed, strict=True):
            self._records.add(rows[i], raw, final)
        if not self._do_sample:
            return processed.argmax(-1).tolist()
        probs = processed.softmax(-1)
        return [draw_token(p, list(child_of[i])) for i, p in zip(walking, probs, strict=True)]
