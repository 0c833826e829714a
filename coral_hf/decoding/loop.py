"""The decoding loop: draft trees, score them in one pass of the target, verify, commit.

In: prompts and everything `generate` has prepared. Out: tokens that are exactly the target's own,
and `DecodingStats`.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig
from transformers.generation.utils import GenerateDecoderOnlyOutput

from .continuation import CACHE
from .costs import Spent
from .drafting import Drafting
from .pace import Pace
from .records import Records
from .settings import Rule
from .stats import DecodingStats
from .target_runner import TargetOutput, TargetRunner
from .texts import Texts
from .tree import DraftTree, TreeShape, root_only
from .verification import Verdict
from .verifier import Verifier


@dataclass
class CoralGenerateOutput(GenerateDecoderOnlyOutput):
    """transformers' output of `generate`, and what the drafter did.

    Args:
        stats: rounds, accepted tokens and times of the call.
    """

    stats: DecodingStats | None = None


class DecodingLoop:
    """One call of `generate` with a drafter."""

    def __init__(
        self,
        drafting: Drafting,
        target: TargetRunner,
        texts: Texts,
        records: Records,
        config: GenerationConfig,
        pace: Pace,
        rule: Rule,
        max_length: int,
        remembers: bool = False,
    ):
        """One loop a call.

        Args:
            pace: how much to draft in each round.
            rule: how trees are drafted and verified.
            max_length: bounds the texts in tokens.
            remembers: whether the drafter reads the last tokens too, for a text that goes on.
        """
        self.drafting = drafting
        self.target = target
        self.texts = texts
        self.records = records
        self.verifier = Verifier(texts, records, rule.name)
        self.config = config
        self.pace = pace
        self.warp = texts.warp if rule.is_drawn else None
        self.max_length = max_length
        self.remembers = remembers
        self.stats = DecodingStats()

    def run(self, model_kwargs: dict) -> None:
        """Decode until every row has ended; `model_kwargs` are what `generate` prepared."""
        with self.stats.timed("prefill"):
            self.prefill(model_kwargs)
        if self.pace.is_plain:
            self.stop_drafting()
        while self.texts.active:
            self.round()
        self.texts.end()

    def prefill(self, model_kwargs: dict) -> None:
        """Read the prompts, emit each row's first token, and start the drafter."""
        prompts = self.texts.ids
        scores = self.target.prefill(
            prompts,
            model_kwargs,
            self.config.prefill_chunk_size,
            with_features=not self.pace.is_plain,
        )
        self.records.add_prompt(scores)
        rows = self.texts.active
        first = self.verifier.verify(root_only(prompts[:, -1]), scores)
        kept = self.kept(rows)
        if self.pace.is_plain:
            return self.drop(rows, kept)
        if not kept and not self.remembers:
            return
        new = scores.features.shape[1]
        tokens = torch.cat([prompts[:, prompts.shape[1] - new :], _column(first, prompts)], 1)
        positions = self.target.cache.positions[:, -new:]
        self.drafting.begin(tokens, scores.features, positions)
        self.drop(rows, kept)

    def round(self) -> None:
        """Draft, score, verify, commit."""
        rows, reads, clock = self.texts.active, not self.pace.is_plain, [self.stats.round_seconds]
        with self.stats.timed("draft"):
            trees = self.propose(rows)
        clock.append(self.stats.round_seconds)
        with self.stats.timed("verify"):
            scores = self.target.score(trees, with_features=reads)
            verdicts = self.verifier.verify(trees, scores)
        with self.stats.timed("other"):
            self.note(rows, trees, verdicts, scores)
            nodes, counts = _padded(verdicts)
            self.target.cache.commit(counts.tolist(), nodes)
            kept = self.kept(rows)
            self.drop(rows, kept)
        clock.append(self.stats.round_seconds)
        if reads:
            with self.stats.timed("draft"):
                self.read(kept, verdicts, scores.features)
        clock.append(self.stats.round_seconds)
        seconds = [stop - start for start, stop in pairwise(clock)]
        self.pace.note(Spent.of(trees, verdicts, *seconds))
        if self.pace.is_plain and reads:
            self.stats.is_stepped_back = True
            self.stop_drafting()

    def propose(self, rows: list[int]) -> DraftTree:
        """A tree for each row, or its root alone where drafting does not pay or nothing fits."""
        shape = self.budget(self.pace.plan(len(rows)))
        if shape.depth == 0:
            return root_only(self.texts.last(rows))
        return self.drafting.propose(shape, self.warp)

    def budget(self, shape: TreeShape) -> TreeShape:
        """The largest tree of which every accepted token may still come out.

        A node of depth d is followed by one more token, so d + 1 of them must fit.
        """
        shortest = min(self.texts.lengths[row] for row in self.texts.active)
        depth = min(shape.depth, self.max_length - shortest - 1)
        return shape._replace(depth=max(depth, 0))

    def note(
        self, rows: list[int], trees: DraftTree, verdicts: list[Verdict], scores: TargetOutput
    ) -> None:
        """Remember what the round gave."""
        cache = self.target.cache
        self.stats.num_rounds += 1
        self.stats.num_levels += trees.levels
        self.stats.num_nodes += trees.tokens.shape[1]
        for index, (row, verdict) in enumerate(zip(rows, verdicts, strict=True)):
            self.stats.round_lengths.append(len(verdict.tokens))
            self.records.add_nodes(
                row, index, verdict.path, scores, (cache.lengths[index], cache.width)
            )

    def kept(self, rows: list[int]) -> list[int]:
        """Which of the pass's rows go on, by their index in it."""
        return [index for index, row in enumerate(rows) if not self.texts.is_stopped[row]]

    def drop(self, rows: list[int], kept: list[int]) -> None:
        """Go on without the rows that have ended: they cost nothing any more."""
        if kept and len(kept) < len(rows):
            self.target.select(kept)
            if not self.pace.is_plain:
                self.drafting.select(torch.tensor(kept))
            self.remembers = False  # the drafter forgets the rows that have ended

    def stop_drafting(self) -> None:
        """Leave the drafter alone for the rest of the call."""
        self.remembers = False  # it does not read the text to its end
        self.target.cache.use_plain_append()

    def read(self, kept: list[int], verdicts: list[Verdict], features: Tensor) -> None:
        """Let the drafter read the new tokens of the rows that go on."""
        # at the end of all texts it reads on if they may be continued
        rows = kept or (list(range(len(verdicts))) if self.remembers else [])
        if rows:
            self.commit([verdicts[i] for i in rows], features[rows])

    def commit(self, verdicts: list[Verdict], features: Tensor) -> None:
        """Hand the new tokens and the features before them to the drafter.

        path            root     a        b
        feature         f_root   f_a      f_b
        new token       a        b        next        each is paired with the feature before it
        """
        nodes, counts = _padded(verdicts)
        nodes = nodes.to(features.device)
        tokens = torch.zeros_like(nodes)
        for row, verdict in enumerate(verdicts):
            tokens[row, : len(verdict.tokens)] = torch.tensor(verdict.tokens)
        paired = features.gather(1, nodes[..., None].expand(-1, -1, features.shape[2]))
        self.drafting.commit(tokens, paired, counts)

    def memory(self) -> object | None:
        """What the drafter has read of all texts, None where it has not read every token."""
        return self.drafting.memory() if self.remembers else None

    def output(self, cache: Cache) -> Tensor | CoralGenerateOutput:
        """What `generate` returns: token ids (batch, length), or all that was asked for.

        `cache`: of all tokens but the last.
        """
        sequences = self.texts.ids.clone()
        if not self.config.return_dict_in_generate:
            return sequences
        return CoralGenerateOutput(
            sequences=sequences,
            stats=self.stats,
            **{CACHE: cache},
            **self.records.outputs(),
        )


def _column(verdicts: list[Verdict], like: Tensor) -> Tensor:
    """(batch, 1): the only token of each verdict."""
    return torch.tensor([verdict.tokens for verdict in verdicts], device=like.device)


def _padded(verdicts: list[Verdict]) -> tuple[Tensor, Tensor]:
    """The nodes of the paths, (batch, longest), padded with the root, and how many they are."""
    counts = [len(verdict.path) for verdict in verdicts]
    paths = [[*verdict.path, *[0] * (max(counts) - len(verdict.path))] for verdict in verdicts]
    return torch.tensor(paths), torch.tensor(counts)
