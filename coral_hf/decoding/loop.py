"""The decoding loop: draft trees, score them in one pass of the target, verify, commit.

In: prompts, and all that `generate` has prepared. Out: the target's own tokens, `DecodingStats`.
"""

import time
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from transformers import Cache
from transformers.generation.utils import GenerateDecoderOnlyOutput

from .caches.continuation import CACHE
from .caches.shared_keys import sharing_keys
from .drafting import Drafting, DraftTree, TreeShape, host_tensor, root_only
from .outputs import OutputCollector
from .plain.draft_policy import DraftPolicy, RoundSample
from .plain.own_loop import OwnLoop
from .sequences import Sequences
from .settings import Rule
from .target_runner import TargetRunner
from .verifier import Accepted, Verifier


@dataclass
class DecodingStats:
    """Counts and seconds of a call; the prompt's pass and the token it gives are in no round."""

    # tokens that each round emitted, row after row in a batch
    round_lengths: list[int] = field(default_factory=list)
    num_rounds: int = 0  # verification passes, each over all rows that have not ended
    num_levels: int = 0  # that were drafted, over all rounds; none in a plain round
    num_nodes: int = 0  # of a row, the root included, over all rounds
    is_stepped_back: bool = False  # whether drafting was given up, since it did not pay
    way: Literal["growing", "static", "compiled"] = "growing"  # how rounds are run
    warm_up_seconds: float = 0.0  # compiling, before the first token
    prefill_seconds: float = 0.0
    draft_seconds: float = 0.0  # growing trees, and reading what was accepted
    verify_seconds: float = 0.0
    other_seconds: float = 0.0

    def add_plain(self, counts: list[int]) -> None:
        """Count passes that gave one token each, so many of each row."""
        self.num_rounds += max(counts)
        self.num_nodes += max(counts)
        self.round_lengths += [1] * sum(counts)

    def add_round(self, tree: DraftTree, counts: list[int]) -> None:
        """Count a round over trees (batch, nodes), which gave so many tokens of each row."""
        self.num_rounds += 1
        self.num_levels += tree.levels
        self.num_nodes += tree.tokens.shape[1]
        self.round_lengths += [count for count in counts if count]

    @property
    def acceptance_length(self) -> float:
        """τ: tokens of a row per target pass, of the rounds; 0 if there was none."""
        return sum(self.round_lengths) / len(self.round_lengths) if self.round_lengths else 0.0

    @property
    def is_chain(self) -> bool:
        """Whether each drafted level had a single node."""
        return self.num_levels > 0 and self.num_nodes == self.num_rounds + self.num_levels

    @property
    def round_seconds(self) -> float:
        """Seconds of all rounds, without the pass over the prompt."""
        return self.draft_seconds + self.verify_seconds + self.other_seconds


@dataclass
class CoralGenerateOutput(GenerateDecoderOnlyOutput):
    """transformers' output of `generate`, and what the drafter did."""

    stats: DecodingStats | None = None  # rounds, accepted tokens and times of the call


def decode_plainly(own_loop: OwnLoop) -> Tensor | CoralGenerateOutput:
    """Decode as plain `generate` does: token ids (batch, length), or all that was asked for."""
    output, passes = own_loop.decode_all()
    if isinstance(output, Tensor):
        return output
    stats = DecodingStats(prefill_seconds=passes.times[0] - passes.start)
    stats.add_plain([count - 1 for count in passes.counts])  # the first pass reads the prompt
    stats.verify_seconds = passes.times[-1] - passes.times[0]
    return CoralGenerateOutput(**output, stats=stats)


class Plan(NamedTuple):
    """What a call has decided before its first round."""

    rule: Rule
    max_length: int  # of a sequence, in tokens
    keep_memory: bool = False  # whether the drafter reads the last tokens too, for a later call


@dataclass
class DecodingLoop:
    """One call of `generate` with a drafter.

    Rows are counted in two ways: of the call, as in `sequences.active`, and by their index in the
    target's pass, as in trees, outputs and `kept`.
    """

    drafting: Drafting
    target: TargetRunner
    sequences: Sequences
    collector: OutputCollector
    policy: DraftPolicy
    plan: Plan
    stats: DecodingStats = field(default_factory=DecodingStats)

    def __post_init__(self):
        self.verifier = Verifier(self.sequences, self.collector, self.plan.rule.name)
        self.warp = self.sequences.warp if self.plan.rule.is_drawn else None
        self.keep_memory = self.plan.keep_memory
        self.lap_start = time.perf_counter()

    def run(self, model_kwargs: dict) -> None:
        """Decode until every row has ended; `model_kwargs` are what `generate` prepared."""
        self.prefill(model_kwargs)
        self.lap("prefill_seconds")
        config = self.collector.config
        own_loop = OwnLoop(self.target.model, self.sequences, config, model_kwargs)
        while self.sequences.active and not (self.policy.is_plain or self.target.is_at_switch):
            self.round()
        if self.sequences.active:
            return self.step_back(own_loop)
        self.sequences.end()

    def prefill(self, model_kwargs: dict) -> None:
        """Read the prompts (batch, length), emit each row's first token, start the drafter."""
        prompts, rows = self.sequences.ids, self.sequences.active
        chunk_size = self.collector.config.prefill_chunk_size
        output = self.target.prefill(prompts, model_kwargs, chunk_size)
        first = self.verifier.verify(root_only(prompts[:, -1]), output)
        kept = self.kept(rows)
        if kept or self.keep_memory:
            new = output.features.shape[1]
            unread = prompts[:, prompts.shape[1] - new :]
            tokens = torch.cat([unread, unread.new_tensor(first.tokens)], dim=1)
            self.drafting.begin(tokens, output.features, self.target.cache.positions[:, -new:])
        self.drop(rows, kept)

    def round(self) -> None:
        """Draft, score and verify, commit, let the drafter read what was accepted."""
        rows = self.sequences.active
        self.lap_start = time.perf_counter()
        tree = self.draft(rows)
        self.sequences.show(tree)
        draft = self.lap("draft_seconds")
        with sharing_keys():
            output = self.target.score(tree)
        accepted = self.verifier.verify(tree, output)
        decode = self.lap("verify_seconds")
        kept = self.commit(rows, tree, accepted)
        decode += self.lap("other_seconds")
        self.read(kept, output.features, accepted)
        read = self.lap("draft_seconds")
        batch, nodes = tree.tokens.shape
        levels = tree.levels or min(nodes - 1, 1)  # not every tree tells
        tokens = sum(accepted.counts) / batch
        self.policy.note(RoundSample(batch, levels, nodes, tokens, draft, decode, read))

    def draft(self, rows: list[int]) -> DraftTree:
        """A tree for each row, or its root alone where drafting does not pay or nothing fits."""
        shape, root = self.budget(self.policy.plan(len(rows))), self.sequences.last(rows)
        if shape.depth == 0 or shape.nodes == 1:
            return root_only(root)
        tree = self.drafting.propose(root, shape, self.warp)
        if padded := self.sequences.padded:
            tree = tree.with_padding(padded, self.sequences.pad_token)
        # whatever a drafter puts there, the target reads the token that was committed
        root = root[:, None].to(tree.tokens.device)  # (batch, 1)
        tree = tree._replace(tokens=torch.cat([root, tree.tokens[:, 1:]], dim=1))
        return self.target.checked(tree)

    def budget(self, shape: TreeShape) -> TreeShape:
        """The largest tree of which every accepted token may still come out.

        A node of depth d is followed by one more token, so d + 1 of them must fit.
        """
        shortest = min(self.sequences.lengths[row] for row in self.sequences.active)
        room = self.target.room()
        depth = min(shape.depth, room, self.plan.max_length - shortest - 1)
        return shape._replace(depth=max(depth, 0), nodes=min(shape.nodes, room + 1))

    def commit(self, rows: list[int], tree: DraftTree, accepted: Accepted) -> list[int]:
        """Keep what was accepted, drop the rows that have ended, and return the others."""
        self.stats.add_round(tree, accepted.counts)
        path = accepted.path if accepted.path.shape[1] > 1 else None  # the root is in its place
        self.target.commit(accepted.counts, path)
        kept = self.kept(rows)
        self.drop(rows, kept)
        return kept

    def read(self, kept: list[int], features: Tensor, accepted: Accepted) -> None:
        """Let the drafter read the new tokens of unfinished rows, and the features before them.

        path            root     a        b
        feature         f_root   f_a      f_b
        new token       a        b        next        each is paired with the feature before it

        `features`: (batch, nodes, width), of the drafter's layers side by side.
        """
        # at the end of all sequences it reads on if they may be continued
        rows = kept or (list(range(len(accepted.tokens))) if self.keep_memory else [])
        if not rows:
            return
        tokens = [accepted.tokens[row] for row in rows]
        counts = host_tensor([len(row) for row in tokens])
        new = int(counts.max())
        path = accepted.path[rows, :new].to(features.device)
        paired = features[rows].gather(1, path[..., None].expand(-1, -1, features.shape[2]))
        padded = host_tensor([row + [0] * (new - len(row)) for row in tokens])
        self.drafting.commit(padded.to(features.device), paired, counts)

    def lap(self, stage: str) -> float:
        """Count the seconds since the last lap to a stage of the stats, and return them."""
        now = time.perf_counter()
        seconds, self.lap_start = now - self.lap_start, now
        setattr(self.stats, stage, getattr(self.stats, stage) + seconds)
        return seconds

    def kept(self, rows: list[int]) -> list[int]:
        """Return the rows of the pass that have not ended, by their index in it."""
        return [index for index, row in enumerate(rows) if not self.sequences.is_stopped[row]]

    def drop(self, rows: list[int], kept: list[int]) -> None:
        """Drop the rows that have ended, so that they cost nothing any more."""
        if kept and len(kept) < len(rows):
            self.target.select(kept)
            if not self.stats.is_stepped_back:
                self.drafting.select(host_tensor(kept))
            self.keep_memory = False  # the drafter forgets the rows that have ended

    def step_back(self, own_loop: OwnLoop) -> None:
        """Decode the rest plainly, by transformers' own loop, which reads rows of one length."""
        self.stats.is_stepped_back, self.keep_memory = True, False
        del self.drafting  # and the memory that it holds
        while self.sequences.active and (behind := self.sequences.behind):
            self.catch_up(behind)
        if not (rows := self.sequences.active):
            return self.sequences.end()
        self.lap_start = time.perf_counter()
        output, passes = own_loop.decode_rest(self.target.cache, self.collector.scores())
        self.collector.add_all(rows, passes.counts, output)
        self.sequences.take(rows, output.sequences)
        self.target.cache = output[CACHE]
        self.stats.add_plain(passes.counts)
        self.lap("verify_seconds")

    def catch_up(self, behind: list[int]) -> None:
        """Read a token of the rows that are behind, (batch, 1) in one pass; the others wait."""
        rows = self.sequences.active
        tree = root_only(self.sequences.last(rows))
        output, where = self.target.score(tree), [rows.index(row) for row in behind]
        tokens: list[list[int]] = [[] for _ in rows]
        alone = root_only(tree.tokens[where, 0])
        waiting = [row for row in rows if row not in behind]
        for row in waiting:
            self.sequences.is_stopped[row] = True
        found = self.verifier.verify(alone, output._replace(logits=output.logits[where]))
        for row in waiting:
            self.sequences.is_stopped[row] = False
        for row, new in zip(where, found.tokens, strict=True):
            tokens[row] = new
        self.commit(rows, tree, Accepted(torch.zeros_like(tree.parents), tokens))

    def memory(self) -> object | None:
        """What the drafter has read of all sequences, None where it has not read every token."""
        return self.drafting.memory() if self.keep_memory else None

    def output(self, cache: Cache) -> Tensor | CoralGenerateOutput:
        """What `generate` returns: token ids (batch, length), or all that was asked for, and the
        `cache` of all tokens but the last.
        """
        sequences = self.sequences.ids.clone()
        if not self.collector.returns_dict:
            return sequences
        return CoralGenerateOutput(
            sequences=sequences, stats=self.stats, **{CACHE: cache}, **self.collector.outputs()
        )
