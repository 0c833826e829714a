"""Outputs of a call: what a pass of the target gives, and what the caller wants of each token.

In: logits of passes, and the scores of accepted tokens. Out: the fields of transformers' output of
`generate`, one entry a token.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig
from transformers.utils import ModelOutput

OUTPUTS = ("output_scores", "output_logits")


class TargetOutput(NamedTuple):
    """What one pass of the target gives."""

    logits: Tensor  # (batch, nodes, vocab)
    features: Tensor  # (batch, nodes, layers · hidden), of the layers that the drafter reads


class OutputCollector:
    """Collects by row what the caller wants to see of each token.

    Its tuples have the shapes of plain `generate`: one entry a token, each over the whole batch. A
    row that ended earlier than others holds zeros from there on, where plain `generate` has those
    of its padding.

    Args:
        config: of the call.
        batch: rows of the call.
    """

    def __init__(self, config: GenerationConfig, batch: int):
        self.config, self.returns_dict = config, bool(config.return_dict_in_generate)
        self.keeps_scores, self.keeps_logits = (
            self.returns_dict and bool(getattr(config, name)) for name in OUTPUTS
        )
        # by row, (vocab,) of each token
        self._scores: list[list[Tensor]] = [[] for _ in range(batch)]
        self._logits: list[list[Tensor]] = [[] for _ in range(batch)]

    def add(self, row: int, logits: Tensor, processed: Tensor) -> None:
        """Keep a token's logits and processed scores, each of shape (vocab,)."""
        if self.keeps_logits:
            self._logits[row].append(logits.to(torch.float32, copy=True))
        if self.keeps_scores:
            self._scores[row].append(processed)

    def add_all(self, rows: list[int], counts: list[int], output: ModelOutput) -> None:
        """Keep what transformers' own loop has of the next tokens of some rows, `counts` of them.

        Its tuples have one entry a token, (rows, vocab).
        """
        for kept, found in ((self._scores, output.scores), (self._logits, output.logits)):
            for index, (row, count) in enumerate(zip(rows, counts, strict=True)):
                kept[row] += [one[index] for one in (found or ())[:count]]

    def scores(self) -> tuple[Tensor, ...] | None:
        """Each (batch, vocab), one a token; None if the caller does not want them."""
        return _by_token(self._scores)

    def outputs(self) -> dict[str, tuple | None]:
        """By the names of `GenerateDecoderOnlyOutput`."""
        return {"scores": self.scores(), "logits": _by_token(self._logits)}


def _by_token(rows: list[list[Tensor]]) -> tuple[Tensor, ...] | None:
    """Stack the rows' entries (vocab,) of each token: (batch, vocab), zeros where one has none."""
    if not rows[0]:
        return None
    return pad_sequence([torch.stack(row) for row in rows], batch_first=True).unbind(1)
