"""A race: one prompt, answered by the target alone and with a drafter, at the same time.

In: two calls of `generate` that want a streamer. Out: for each what it has written so far, its
tokens, its seconds and its rounds.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from threading import Thread

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..decoding import DraftTree
from ..measure.terminal import ColouredStreamer
from .turns import Turn, Turns

logger = logging.getLogger(__name__)


@dataclass
class Round:
    """The draft tree of a round, node after node from the root, and what came of it."""

    tokens: list[int]
    parents: list[int]  # `PADDING` where there is no node
    confidences: list[float]  # of the path to each node but the root; [] if not known
    accepted: list[int] = field(default_factory=list)  # tokens, from depth 1 on
    own: int | None = None  # the target's own token after them

    def path(self) -> list[int]:
        """The nodes that were accepted, from the root on."""
        pairs, path = [*zip(self.tokens, self.parents, strict=True)], [0]
        for token in self.accepted:
            path.append(pairs.index((token, path[-1]), 1))
        return path


class Stopped(Exception):
    """Ends a call of `generate` for whose text nobody waits any more."""


class Side(ColouredStreamer):
    """What one call of `generate` writes; between tokens it passes its turn on."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, turn: Turn) -> None:
        self.parts: list[tuple[str, str]] = []  # characters and their colours
        super().__init__(tokenizer, True, self.parts.extend, skip_special_tokens=True)
        self.turn = turn
        self.tokens: list[int] = []
        self.rounds: list[Round] = []
        self.is_stopped = False

    @property
    def tokens_per_second(self) -> float:
        """The speed so far, the prompt included."""
        return len(self.tokens) / self.turn.seconds if self.turn.seconds else 0.0

    def take_tree(self, tree: DraftTree) -> None:
        """Keep the tree of a round, (1, nodes)."""
        known = tree.log_confidence
        confidences = [] if known is None else known[0].exp().tolist()
        self.rounds.append(Round(tree.tokens[0].tolist(), tree.parents[0].tolist(), confidences))

    def put(self, value: Tensor) -> None:
        """Take the prompt, (1, length), or the next token, (1,)."""
        is_prompt = self.next_tokens_are_prompt
        super().put(value)
        if is_prompt:
            return
        self.tokens += (new := value.tolist())
        if self.rounds and self.depth:
            self.rounds[-1].accepted += new
        elif self.rounds:
            self.rounds[-1].own = new[0]
        if self.is_stopped:
            raise Stopped
        self.turn.pass_on()

    def end(self) -> None:
        """Write what is left, without the end of the line."""
        super().end()
        self.parts.pop()


class Race:
    """Two calls of `generate` on one prompt, each in a thread of its own."""

    def __init__(
        self,
        turns: Turns,
        tokenizer: PreTrainedTokenizerBase,
        calls: Sequence[Callable],
        seed: int = 0,
        is_greedy: bool = True,
    ) -> None:
        """Start.

        Args:
            calls: of the target alone, and with a drafter; each takes `streamer`.
            seed: of both.
        """
        self.is_greedy, self.error, self._seed = is_greedy, "", seed
        self.plain, self.drafted = (Side(tokenizer, turns.enter()) for _ in calls)
        pairs = zip((self.plain, self.drafted), calls, strict=True)
        self._threads = [Thread(target=self._run, args=pair, daemon=True) for pair in pairs]
        for thread in self._threads:
            thread.start()

    def _run(self, side: Side, call: Callable) -> None:
        with side.turn:
            try:
                torch.manual_seed(self._seed)
                call(streamer=side)
            except Stopped:
                pass
            except Exception as error:
                self.error = str(error)
                self.stop()
                if not isinstance(error, ValueError):
                    logger.exception("A call of `generate` has failed.")

    @property
    def is_running(self) -> bool:
        """Whether one of the two is not done."""
        return any(thread.is_alive() for thread in self._threads)

    @property
    def ratio(self) -> float:
        """How many times the speed of the target alone; 0 if that is not known yet."""
        alone = self.plain.tokens_per_second
        return self.drafted.tokens_per_second / alone if alone else 0.0

    def stop(self) -> None:
        """End both after their next token."""
        self.plain.is_stopped = self.drafted.is_stopped = True
