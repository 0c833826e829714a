"""What the page shows of a race, as HTML: texts, the result, acceptance by depth, draft trees.

In: a `Race`, or one of its rounds. Out: HTML without scripts, styled by `style.css`.
"""

from collections.abc import Iterable, Sequence
from html import escape
from itertools import groupby
from operator import itemgetter

from transformers import PreTrainedTokenizerBase

from ..decoding.drafting import PADDING
from ..measure.benchmark import num_same
from ..measure.calls import Call
from ..measure.summary import accepted_depths
from ..measure.terminal import COLOURS, colour_of
from .race import Race, Round, Side

VISIBLE = str.maketrans({" ": "·", "\n": "↵", "\t": "→"})
LONGEST = 8  # characters of a token that are drawn


def pane(name: str, side: Side | None = None) -> str:
    """What one side has written, its tokens coloured by depth, and how fast."""
    numbers, text = "", ""
    if side is not None:
        numbers = f"{len(side.tokens)} tokens, {side.tokens_per_second:.1f} tokens/s"
        if side.rounds:
            emitted = sum(len(one.accepted) + (one.own is not None) for one in side.rounds)
            numbers += f", τ {emitted / len(side.rounds):.2f}"
        # a copy: more is being written
        text = "".join(coloured([*side.parts]))
    box = f'<div class="box text" role="region" tabindex="0" aria-label="{name}">{text}</div>'
    return f'<h2>{name}</h2><p class="numbers">{numbers}&nbsp;</p>{box}'


def coloured(parts: Iterable[tuple[str, str]]) -> Iterable[str]:
    """Mark the characters of drafted tokens."""
    for colour, run in groupby(parts, itemgetter(1)):
        text = escape("".join(character for character, _ in run))
        depth = COLOURS.index(colour) + 1 if colour else 0
        yield f'<span class="{colour}" title="depth {depth}">{text}</span>' if colour else text


def legend() -> str:
    """What the colours mean."""
    shades = " ".join(
        f'<span class="{colour}">&nbsp;{depth}&nbsp;</span>'
        for depth, colour in enumerate(COLOURS, start=1)
    )
    return f'<p class="numbers">Coloured: drafted and accepted, by depth: {shades} and deeper.</p>'


def result(race: Race) -> str:
    """How fast the target is with the drafter, and of a greedy answer how much is the same."""
    if not race.ratio:
        return ""
    shown = f"<strong>{race.ratio:.2f}×</strong> the speed of the target alone"
    if race.is_greedy and not race.is_running and not race.plain.is_stopped:
        plain, drafted = race.plain.tokens, race.drafted.tokens
        shown += f", the same {num_same(plain, drafted)} of {len(plain)} tokens"
    return f'<p role="status">{shown}</p>'


def bars(rounds: Sequence[Round]) -> str:
    """In how many of the rounds a token of each depth was accepted."""
    lengths = [len(one.accepted) + 1 for one in rounds]
    call = Call(tokens=[], round_lengths=lengths, num_rounds=len(rounds))
    rows = [
        f"<tr><th scope='row'>depth {one.depth}</th><td class='bar'>"
        f"<span class='{colour_of(one.depth)}' style='width: {one.share:.0%}'></span></td>"
        f"<td>{one.share:.0%}</td></tr>"
        for one in (accepted_depths([call]) if rounds else [])
    ]
    return f"<h2>Acceptance by depth</h2><table class='bars'>{''.join(rows)}</table>"


def tree(rounds: Sequence[Round], number: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """The draft tree of a round, as nested lists: the accepted path, and confidences."""
    title = "<h2>Draft trees</h2>"
    if not rounds:
        return f"{title}<p>Each round of an answer has one; they are drawn here.</p>"
    number = min(max(number, 1), len(rounds))
    one = rounds[number - 1]
    path, num_drafted = one.path(), len(one.tokens) - 1 - one.parents[1:].count(PADDING)
    said = f"Round {number} of {len(rounds)}: {num_drafted} tokens drafted,"
    said += f" {len(path) - 1} accepted"
    if one.own is not None:
        said += f", then the target's own <code>{spelled(tokenizer, one.own)}</code>"

    def item(node: int) -> str:
        kind = "accepted" if node in path else "rejected"
        text = spelled(tokenizer, one.tokens[node])
        share = f"{one.confidences[node - 1]:.0%}" if node and one.confidences else ""
        below = [i for i, parent in enumerate(one.parents) if i and parent == node]
        below.sort(key=lambda i: i not in path)  # so that the path is a straight line
        children = f"<ul>{''.join(map(item, below))}</ul>" if below else ""
        short = spelled(tokenizer, one.tokens[node], LONGEST)
        node_box = f'<span title="{text} {share}"><b>{short}</b> {share}</span>'
        return f'<li class="{kind}">{node_box}{children}</li>'

    accepted = " ".join(spelled(tokenizer, token) for token in one.accepted) or "nothing"
    box = f'<div class="box" role="region" tabindex="0" aria-label="Accepted: {accepted}">'
    return f'{title}<p>{said}.</p>{box}<ul class="tree">{item(0)}</ul></div>'


def spelled(tokenizer: PreTrainedTokenizerBase, token: int, longest: int | None = None) -> str:
    """A token with its blanks made visible."""
    return escape(tokenizer.decode([token]).translate(VISIBLE)[:longest])
