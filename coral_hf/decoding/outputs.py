"""Outputs of a call: what a pass of the target gives, and what the caller wants of each token.

In: logits and states of passes, and the nodes that were accepted. Out: the fields of transformers'
output of `generate`, one entry a token.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.utils import ModelOutput

from ..target import CONVOLUTION

OUTPUTS = ("output_scores", "output_logits", "output_hidden_states", "output_attentions")


class TargetOutput(NamedTuple):
    """What one pass of the target gives."""

    logits: Tensor  # (batch, nodes, vocab)
    features: Tensor  # (batch, nodes, layers · hidden), of the layers that the drafter reads
    lengths: Sequence[int] = ()  # committed slots of each row before the pass
    hidden_states: tuple[Tensor, ...] = ()  # where asked for: by layer, (batch, nodes, hidden)
    attentions: tuple[Tensor, ...] = ()  # where asked for: (batch, heads, nodes, slots + nodes)


ByLayer = tuple[Tensor, ...]


class OutputCollector:
    """Collects by row what the caller wants to see of each token.

    Its tuples have the shapes of plain `generate`: one entry a token, each over the whole batch. A
    row that ended earlier than others holds zeros from there on, where plain `generate` has those
    of its padding.

    Args:
        config: of the call.
        batch: rows of the call.
        windows: of the target's layers, where attentions may be asked for.
    """

    def __init__(self, config: GenerationConfig, batch: int, windows: Sequence[int | None] = ()):
        self.config, self.returns_dict = config, bool(config.return_dict_in_generate)
        self.wanted = [name for name in OUTPUTS if self.returns_dict and getattr(config, name)]
        self.keeps_scores, self.keeps_logits = (name in self.wanted for name in OUTPUTS[:2])
        # what the target's passes must give
        self.extras = tuple(name for name in OUTPUTS[2:] if name in self.wanted)
        self._windows = [window for window in windows if window != CONVOLUTION]
        # by row, and for each token: (vocab,), or by layer (1, hidden) and (heads, 1, slots)
        self._kept: dict[str, list[list[Any]]] = {
            name.removeprefix("output_"): [[] for _ in range(batch)] for name in OUTPUTS
        }
        # the pass over the prompts, which counts as the first token's
        self.prompt = TargetOutput(*(torch.empty(0, dtype=torch.float32, device="cpu"),) * 2)

    def add(self, row: int, logits: Tensor, processed: Tensor) -> None:
        """Keep a token's logits and processed scores, each of shape (vocab,)."""
        if self.keeps_logits:
            self._kept["logits"][row].append(logits.to(torch.float32, copy=True))
        if self.keeps_scores:
            self._kept["scores"][row].append(processed)

    def add_all(self, rows: list[int], counts: list[int], output: ModelOutput) -> None:
        """Keep what transformers' own loop has of the next tokens of some rows, `counts` of them.

        Its tuples have one entry a token, or one by layer, over (rows, ...).
        """
        for name, by_row in self._kept.items():
            for index, (row, count) in enumerate(zip(rows, counts, strict=True)):
                for one in (getattr(output, name) or ())[:count]:
                    is_state = isinstance(one, tuple)
                    by_row[row].append(tuple(x[index] for x in one) if is_state else one[index])

    def add_nodes(self, row: int, index: int, path: list[int], output: TargetOutput) -> None:
        """Keep the states of the nodes before a row's new tokens.

        Args:
            row: of the call.
            index: of the row in the pass.
            path: node by node from the root.
        """
        for depth, node in enumerate(path, start=1):
            states = tuple(state[index, node, None] for state in output.hidden_states)
            self._kept["hidden_states"][row].append(states)
            windows = self._windows if output.attentions else ()  # which may not be asked for
            layers = zip(output.attentions, windows, strict=True)
            prefix = path[:depth], output.lengths, index
            weights = tuple(_attended(one[index], *prefix, window) for one, window in layers)
            self._kept["attentions"][row].append(weights)

    def scores(self) -> tuple[Tensor, ...] | None:
        """Each (batch, vocab), one a token; None if the caller does not want them."""
        return _by_token(self._kept["scores"]) or None

    def outputs(self) -> dict[str, tuple | None]:
        """By the names of `GenerateDecoderOnlyOutput`."""
        logits = _by_token(self._kept["logits"]) or None
        states = {name: self._states(name) for name in ("hidden_states", "attentions")}
        return {"scores": self.scores(), "logits": logits, **states}

    def _states(self, name: str) -> tuple[ByLayer, ...] | None:
        prompt, rows = getattr(self.prompt, name), self._kept[name]
        if not prompt:
            return None
        layers = [_by_token([[one[i] for one in row] for row in rows]) for i in range(len(prompt))]
        return (prompt, *zip(*layers, strict=True))


def _attended(
    weights: Tensor, path: list[int], lengths: Sequence[int], index: int, window: int | None
) -> Tensor:
    """What the last node of a path attends to, in the order of its sequence.

    (heads, nodes, slots held + nodes) → (heads, 1, slots of the sequence)

    Args:
        lengths: committed slots of each row; the tree begins behind the longest.
        index: of the row.
    """
    if window == 0:  # no text
        return weights[:, path[-1] : path[-1] + 1]
    held = weights.shape[-1] - weights.shape[-2]
    dropped = max(lengths) - held  # slots that left a sliding window
    slots = [*range(lengths[index] - dropped), *(held + node for node in path)]
    # plain `generate` has no more than the window's slots in the cache
    return weights[:, path[-1] : path[-1] + 1, slots[-window:] if window else slots]


def _by_token(rows: list[list[Tensor]]) -> tuple[Tensor, ...]:
    """Stack the rows' entries of each token, (batch, ...) each; zeros where a row has none left.

    Entries of a token have one shape, such as (vocab,).
    """
    longest = max(rows, key=len)
    return tuple(
        torch.stack([row[i] if i < len(row) else torch.zeros_like(longest[i]) for row in rows])
        for i in range(len(longest))
    )
