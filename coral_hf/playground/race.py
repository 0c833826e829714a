"""A race: one prompt, answered by the target alone and with a drafter, at the same time.

In: a target and its drafters, a prompt and what was chosen for it. Out: two calls of `generate`;
for each what it has written so far, its tokens, its rounds, and its seconds as if it had had
the machine for itself: each has a thread, and they use it in turn, passed on between tokens.

    call 1    ████      ████      ██             seconds 10
    call 2        ██████    ████████  ██████     seconds 20: the other has ended

No two of them run at any time, so whatever transformers or a drafter keep is never shared.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from operator import attrgetter
from threading import Condition, Thread

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..decoding import DraftTree
from ..measure.calls import sampling_arguments
from ..measure.chat import restore_chat_options
from ..measure.prompts import encode_said, left_padded
from ..measure.settings import DraftingSettings
from ..measure.terminal import ColouredStreamer

logger = logging.getLogger(__name__)
SLICE = 0.03  # seconds of a turn at least
USED = attrgetter("used")


class Turns(Condition):
    """The machine: whoever has used it least goes next."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Turn] = []
        self.holder: Turn | None = None


class Turn:
    """The turns of one call, with its clock and its random numbers.

    Holds the machine within its `with` block, but for `pass_on`; others wait for a call that has
    joined, so whoever joins begins at once.
    """

    def __init__(self, turns: Turns) -> None:
        self.seconds = 0.0
        self._turns, self._random = turns, random_states()
        with turns:  # with as much used as who has used it least
            self._before = min((one.used for one in turns.calls), default=0.0)
            turns.calls.append(self)

    @property
    def used(self) -> float:
        """Seconds by which the next call is chosen."""
        return self._before + self.seconds

    def __enter__(self) -> "Turn":
        turns = self._turns
        with turns:
            turns.wait_for(
                lambda: not turns.holder and self.used <= min(c.used for c in turns.calls)
            )
            turns.holder = self
        torch.set_rng_state(self._random[0])
        torch.cuda.set_rng_state_all(self._random[1:])
        self._since = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        with self._turns:
            self._turns.calls.remove(self)
            self._end()

    def pass_on(self) -> None:
        """Let others use the machine, where this turn has lasted long enough."""
        if time.perf_counter() - self._since > SLICE:
            self._end()
            self.__enter__()

    def _end(self) -> None:
        self.seconds += time.perf_counter() - self._since
        self._random = random_states()
        with self._turns:
            self._turns.holder = None
            self._turns.notify_all()


def random_states() -> list[Tensor]:
    """The states of torch's generators, the CPU's first."""
    return [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]


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
        self.plain, self.drafted = (Side(tokenizer, Turn(turns)) for _ in calls)
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


@dataclass
class Models:
    """A target, and drafters by name; chats are rendered as for the first of them."""

    target: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    drafters: dict[str, PreTrainedModel]
    turns: Turns = field(default_factory=Turns)

    def __post_init__(self) -> None:
        restore_chat_options(self.tokenizer, next(iter(self.drafters.values())).config)

    def race(
        self, prompt: str, max_new_tokens: int, sampling: dict, name: str, settings: dict
    ) -> Race:
        """Begin to answer a prompt.

        Args:
            sampling: `temperature`, `top_p`, `top_k` and `seed`.
            name: of the drafter.
            settings: of drafting, None where they are the drafter's own.

        Raises:
            ValueError: for a prompt that is empty or beyond the context, and settings out of range.
        """
        drafter, temperature = self.drafters[name], sampling["temperature"]
        if not temperature:
            settings = settings | {"verification": None}  # a greedy call has one rule
        drafting = DraftingSettings(**settings).drafting()
        with Turn(self.turns):
            ids = encode_said(prompt, self.tokenizer, self.target, max_new_tokens)  # (1, length)
        pad = getattr(drafter.config, "pad_token_id", None) or 0
        arguments = sampling_arguments(temperature, max_new_tokens) | {"pad_token_id": pad}
        if temperature:
            arguments |= {"top_p": sampling["top_p"], "top_k": sampling["top_k"]}
        batch = left_padded([ids[0]], pad, self.target.device)
        plain = partial(self.target.generate, **batch, **arguments)
        own = {"assistant_model": drafter, "speculation": "always", "tokenizer": self.tokenizer}
        calls = [plain, partial(plain, **own, **drafting)]
        return Race(self.turns, self.tokenizer, calls, sampling["seed"], not temperature)
