"""What a call returns beside its tokens: scores, logits, hidden states and attentions of each.

In: of each emitted token, what the target's pass gave. Out: tuples in the shapes of plain
`generate`: one entry a token, each over the whole batch. A row that ended earlier than others holds
zeros from there on, where plain `generate` has those of its padding.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import GenerationConfig

from .target_runner import TargetOutput

ByLayer = tuple[Tensor, ...]


class Records:
    """Collects by row what the caller wants to see of each token."""

    def __init__(self, config: GenerationConfig, batch: int, windows: Sequence[int | None] = ()):
        """`windows`: of the target's layers, where attentions may be asked for."""

        def wanted(name: str) -> bool:
            return bool(config.return_dict_in_generate and getattr(config, name))

        self.keeps_scores = wanted("output_scores")
        self.keeps_logits = wanted("output_logits")
        # what the target's passes must give
        self.wants = tuple(
            name for name in ("output_hidden_states", "output_attentions") if wanted(name)
        )
        self._windows = windows
        self._scores: list[list[Tensor]] = [[] for _ in range(batch)]  # (vocab,) a token
        self._logits: list[list[Tensor]] = [[] for _ in range(batch)]
        self._hidden: list[list[ByLayer]] = [[] for _ in range(batch)]  # (1, hidden) by layer
        self._attentions: list[list[ByLayer]] = [[] for _ in range(batch)]  # (heads, 1, columns)
        self._prompt = TargetOutput(*(torch.empty(0),) * 2)

    def add_prompt(self, scores: TargetOutput) -> None:
        """The pass over the prompts, which counts as the first token's."""
        self._prompt = scores

    def add(self, row: int, logits: Tensor, processed: Tensor) -> None:
        """A token's logits and processed scores, (vocab,) each."""
        if self.keeps_logits:
            self._logits[row].append(logits.to(torch.float32, copy=True))
        if self.keeps_scores:
            self._scores[row].append(processed)

    def add_nodes(
        self, row: int, index: int, path: list[int], scores: TargetOutput, sizes: tuple[int, int]
    ) -> None:
        """The states of the nodes before a row's new tokens.

        Args:
            index: of the row in the pass.
            path: node by node from the root.
            sizes: slots of the row, and of the longest row, behind which the tree begins.
        """
        for depth, node in enumerate(path, start=1):
            if scores.hidden_states:
                self._hidden[row].append(tuple(s[index, node, None] for s in scores.hidden_states))
            if scores.attentions:
                layers = zip(scores.attentions, self._windows, strict=True)
                self._attentions[row].append(
                    tuple(_attended(one[index], path[:depth], *sizes, w) for one, w in layers)
                )

    def scores(self) -> tuple[Tensor, ...] | None:
        """Each (batch, vocab), one a token."""
        return _by_token(self._scores) or None

    def outputs(self) -> dict[str, tuple | None]:
        """By the names of `GenerateDecoderOnlyOutput`."""
        return {
            "scores": self.scores(),
            "logits": _by_token(self._logits) or None,
            "hidden_states": self._states(self._prompt.hidden_states, self._hidden),
            "attentions": self._states(self._prompt.attentions, self._attentions),
        }

    @staticmethod
    def _states(prompt: ByLayer, rows: list[list[ByLayer]]) -> tuple[ByLayer, ...] | None:
        if not prompt:
            return None
        layers = [_by_token([[one[i] for one in row] for row in rows]) for i in range(len(prompt))]
        return (prompt, *zip(*layers, strict=True))


def _attended(
    weights: Tensor, path: list[int], length: int, width: int, window: int | None
) -> Tensor:
    """What the last node of a path attends to, in the order of its sequence.

    (heads, nodes, slots held + nodes) → (heads, 1, slots of the sequence)

    Args:
        length: committed slots of the row.
        width: those of the longest row.
    """
    held = weights.shape[-1] - weights.shape[-2]
    dropped = width - held  # slots that left a sliding window
    slots = [*range(length - dropped), *(held + node for node in path)]
    # plain `generate` has no more than the window's slots in the cache
    return weights[:, path[-1] : path[-1] + 1, slots[-window:] if window else slots]


def _by_token(rows: list[list[Tensor]]) -> tuple[Tensor, ...]:
    """Stack the rows' entries of each token; a row that has none left gives zeros."""
    longest = max(rows, key=len)
    return tuple(
        torch.stack([row[i] if i < len(row) else torch.zeros_like(longest[i]) for row in rows])
        for i in range(len(longest))
    )
