"""Text on a terminal: accepted tokens coloured by the depth at which they were drafted.

In: tokens as `generate` streams them, or those of a finished call. Out: coloured text, and a line
that says how a call went. Without a terminal, or with NO_COLOR set, rich leaves the colours out.

    pass       0 (prefill)   1            2        3
    emitted    x0            x1 x2 x3     x4       x5 x6
    depth      0             1  2  0      0        1  0     0: the target's own
"""

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from rich.console import Console
from rich.segment import Segment, Segments
from rich.style import Style
from rich.text import Text
from torch import Tensor
from transformers import PreTrainedTokenizerBase, TextStreamer

from ..decoding import DecodingStats, DraftStreamer

# of depth 1, 2, … and deeper ones: colours that every terminal has
COLOURS = ("green", "cyan", "bright_blue", "magenta", "bright_red", "yellow")
UNFINISHED = "\ufffd"  # what the first bytes of a character decode to

Coloured = Iterable[tuple[str, str]]  # characters, each with its colour or ""


def colour_of(depth: int) -> str:
    """Return the colour of a token that was drafted at a depth; "" for the target's own."""
    return COLOURS[min(depth, len(COLOURS)) - 1] if depth else ""


@contextmanager
def unlogged(*modules: str) -> Iterator[None]:
    """Leave out what modules of the package log meanwhile, which would cut what is shown."""
    loggers = [logging.getLogger(f"coral_hf.{name}") for name in modules]
    for logger in loggers:
        logger.disabled = True
    try:
        yield
    finally:
        for logger in loggers:
            logger.disabled = False


def legend() -> Text:
    """Say what the colours mean."""
    shades = [(f" {depth}", colour) for depth, colour in enumerate(COLOURS, start=1)]
    return Text.assemble("coloured: drafted and accepted, by depth", *shades, " and deeper")


def print_coloured(console: Console, parts: Coloured) -> None:
    """Print characters as they stand; rich would break lines and expand tabs."""
    segments = Segment.simplify(Segment(text, Style.parse(colour)) for text, colour in parts)
    console.print(Segments(segments), soft_wrap=True, end="")


class ColouredStreamer(TextStreamer, DraftStreamer):
    """transformers' `TextStreamer`, whose text has the colours of its tokens.

    What is printed when, and which special tokens are left out, is `TextStreamer`'s choice. A
    character of several tokens has the colour of the last of them.

    Args:
        write: what the text is handed to; standard output by default.
        skip_prompt, decode_kwargs: see `TextStreamer`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        skip_prompt: bool = False,
        write: Callable[[Coloured], object] | None = None,
        **decode_kwargs,
    ):
        super().__init__(tokenizer, skip_prompt, **decode_kwargs)
        self._write = write or partial(print_coloured, Console())
        self._depths: deque[int] = deque()  # of the characters that are not written yet

    def put(self, value: Tensor) -> None:
        """Take the prompt, (1, length), or the tokens of a pass, (tokens,)."""
        if not (self.skip_prompt and self.next_tokens_are_prompt):
            ids = [*self.token_cache, *value.flatten().tolist()]
            text = self.tokenizer.decode(ids, **self.decode_kwargs).rstrip(UNFINISHED)
            num_new = len(text) - self.print_len - len(self._depths)
            self._depths.extend([self.depth] * num_new)
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Write a text in the colours of its tokens, and end the line behind the last one."""
        depths = [self._depths.popleft() if self._depths else 0 for _ in text]
        self._write(zip(text, map(colour_of, depths), strict=True))
        if stream_end:
            self._depths.clear()
            self._write([("\n", "")])


def coloured_text(
    tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], round_lengths: Sequence[int] = ()
) -> Text:
    """Return the tokens of a finished call as text, in the colours that they are streamed in.

    `round_lengths`: of the call's `DecodingStats`; none for a call without a drafter.
    """
    text = Text()
    streamer = ColouredStreamer(tokenizer, write=text.append_tokens, skip_special_tokens=True)
    depths = drafted_depths(round_lengths) or [0] * len(tokens)
    for token, streamer.depth in zip(tokens, depths, strict=True):
        streamer.put(torch.tensor([token], device="cpu"))
    streamer.end()
    return text[: len(text) - 1]


def drafted_depths(round_lengths: Sequence[int]) -> list[int]:
    """Return the depth at which each new token was drafted; the last of a round is the target's."""
    depths = [depth % length for length in round_lengths for depth in range(1, length + 1)]
    return [0, *depths] if depths else []


def call_line(stats: DecodingStats, num_tokens: int, head: str | None = None) -> str:
    """Say in one line how a call went: speed, τ, rounds, draft head, how rounds were run.

    Args:
        num_tokens: new tokens of the call.
        head: that the drafter read.
    """
    speed = num_tokens / (stats.prefill_seconds + stats.round_seconds)
    parts = [f"{num_tokens} tokens, {speed:.1f} tokens/s", f"τ {stats.acceptance_length:.2f}"]
    parts += [f"{stats.num_rounds} rounds", *([f"{head} head"] if head else [])]
    if stats.num_levels:
        parts.append(f"{stats.way} {'chains' if stats.is_chain else 'trees'}")
    if stats.is_stepped_back:
        parts.append("stepped back: drafting did not pay (autotune finds the tree that pays best)")
    if stats.warm_up_seconds:
        parts.append(f"compiled in {stats.warm_up_seconds:.0f} s before")
    return ", ".join(parts)
