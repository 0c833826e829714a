"""The decoding loop: draft a tree, score it in one pass of the target, verify, commit.

In: a prompt and everything `generate` has prepared. Out: tokens that are exactly the target's own,
and `DecodingStats`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.utils import GenerateDecoderOnlyOutput

from .candidate_generator import Drafting
from .scoring import Scores, TargetScorer
from .sequence import Sequence
from .stats import DecodingStats
from .tree import TreeShape
from .verification import TokenRule, Verdict, draw_token, verify


@dataclass
class CoralGenerateOutput(GenerateDecoderOnlyOutput):
    """transformers' output of `generate`, and what the drafter did.

    Args:
        stats: rounds, accepted tokens and times of the call.
    """

    stats: DecodingStats | None = None


class DecodingLoop:
    """One call of `generate` with a drafter, for one row of text."""

    def __init__(
        self,
        drafting: Drafting,
        scorer: TargetScorer,
        sequence: Sequence,
        config: GenerationConfig,
        shape: TreeShape,
        max_length: int,
    ):
        """`max_length` bounds the text in tokens; `shape` is the largest tree."""
        self.drafting = drafting
        self.scorer = scorer
        self.sequence = sequence
        self.config = config
        self.shape = shape
        self.max_length = max_length
        self.stats = DecodingStats()
        self.scores: tuple[Tensor, ...] = ()  # each (1, vocab), processed, one a token
        self.logits: tuple[Tensor, ...] = ()

    def run(self, model_kwargs: dict) -> None:
        """Decode until a criterion stops; `model_kwargs` are what `generate` prepared."""
        with self.stats.timed("prefill"):
            self.prefill(model_kwargs)
        while not self.sequence.is_stopped:
            self.round()
        self.sequence.end()

    def prefill(self, model_kwargs: dict) -> None:
        """Read the prompt and emit the first token."""
        scores = self.scorer.prefill(self.sequence.ids, model_kwargs)
        self.emit([self.token_rule(scores)(0, [], [])], scores.logits[0])
        if not self.sequence.is_stopped:
            kept = model_kwargs.get("attention_mask")
            kept = slice(None) if kept is None else kept[0].bool()  # the drafter sees no padding
            tokens, features = self.sequence.ids[:, :-1][:, kept], scores.features[:, kept]
            self.drafting.begin(torch.cat([tokens, self.sequence.ids[:, -1:]], dim=1), features)

    def round(self) -> None:
        """Draft, score, verify, commit."""
        with self.stats.timed("draft"):
            tree = self.drafting.propose(self.budget())
        committed = self.scorer.length
        with self.stats.timed("verify"):
            scores = self.scorer.score(tree)
            verdict = verify(tree, 0, self.token_rule(scores))
        with self.stats.timed("other"):
            emitted = self.emit(verdict.tokens, scores.logits[0, verdict.path])
            self.stats.round_lengths.append(emitted)
            self.scorer.commit(verdict.path[:emitted], committed)
        if not self.sequence.is_stopped:
            with self.stats.timed("draft"):
                self.commit(verdict, scores)

    def budget(self) -> TreeShape:
        """The largest tree of which every accepted token may still come out.

        A node of depth d is followed by one more token, so d + 1 of them must fit.
        """
        depth = min(self.shape.depth, self.max_length - self.sequence.length - 1)
        return TreeShape(max(depth, 0), self.shape.top_k, self.shape.nodes)

    def commit(self, verdict: Verdict, scores: Scores) -> None:
        """Hand the new tokens and the features before them to the drafter.

        path            root     a        b
        feature         f_root   f_a      f_b
        new token       a        b        next        each is paired with the feature before it
        """
        tokens = torch.tensor([verdict.tokens], device=scores.features.device)
        self.drafting.commit(tokens, scores.features[:, verdict.path])

    def emit(self, tokens: list[int], logits: Tensor) -> int:
        """Make tokens certain one by one until a criterion stops; returns how many it took.

        `logits`: (len(tokens), vocab), of the position before each.
        """
        for count, (token, row) in enumerate(zip(tokens, logits, strict=True), start=1):
            if self.config.return_dict_in_generate and self.config.output_logits:
                self.logits += (row[None].to(torch.float32, copy=True),)
            self.sequence.append(token, self.scores or None)
            if self.sequence.is_stopped:
                return count
        return len(tokens)

    def token_rule(self, scores: Scores) -> TokenRule:
        """How the target's next token after a node comes about.

        Either the argmax, or a draw that tries the node's children.
        """
        if not (self.config.do_sample or self.sequence.has_processors or self.keeps_scores):
            # in fp32 as plain `generate` compares them: float64 can tie there, and bf16 is slow
            best = scores.logits[0].float().argmax(-1).tolist()
            return lambda node, drafted, children: best[node]

        def rule(node: int, drafted: list[int], children: list[int]) -> int:
            processed = self.sequence.scores(scores.logits[:, node], drafted)
            if self.keeps_scores:
                self.scores += (processed,)
            if self.config.do_sample:
                return draw_token(processed[0].softmax(-1), children)
            return int(processed[0].argmax(-1))

        return rule

    @property
    def keeps_scores(self) -> bool:
        """Whether the caller wants the processed scores of each token."""
        return bool(self.config.return_dict_in_generate and self.config.output_scores)

    def output(self) -> Tensor | CoralGenerateOutput:
        """What `generate` returns: token ids (1, length), or all that was asked for."""
        sequences = self.sequence.ids.clone()
        if not self.config.return_dict_in_generate:
            return sequences
        new = sequences.shape[1] - self.sequence.prompt_length
        return CoralGenerateOutput(
            sequences=sequences,
            scores=self.scores[:new] or None,
            logits=self.logits[:new] or None,
            past_key_values=self.scorer.cache,
            stats=self.stats,
        )
