"""Processors and criteria of transformers, by what each looks at: logits, a row or the batch.

Also a streamer that sees more than those of transformers: draft trees, and where tokens came from.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor
from transformers import generation as hf
from transformers.generation.stopping_criteria import MaxLengthCriteria, MaxTimeCriteria
from transformers.generation.streamers import BaseStreamer

from .drafting import DraftTree


class DraftStreamer(BaseStreamer):
    """A streamer of a single sequence that sees each draft tree, and where each token came from.

    `depth`, before a token: of the accepted node which has it; 0 for the target's own tokens.
    """

    depth = 0

    def take_tree(self, tree: DraftTree) -> None:
        """Take the tree of a round, (1, nodes), whose tokens follow; later rounds overwrite it."""


# processors whose scores follow from the logits alone
PREFIX_FREE = (
    hf.EpsilonLogitsWarper,
    hf.EtaLogitsWarper,
    hf.InfNanRemoveLogitsProcessor,
    hf.LogitNormalization,
    hf.MinPLogitsWarper,
    hf.SuppressTokensLogitsProcessor,
    hf.TemperatureLogitsWarper,
    hf.TopHLogitsWarper,
    hf.TopKLogitsWarper,
    hf.TopPLogitsWarper,
    hf.TypicalLogitsWarper,
)
# processors that look at a row and its own prefix
ROW_WISE = (
    *PREFIX_FREE,
    hf.ExponentialDecayLengthPenalty,
    hf.ForcedBOSTokenLogitsProcessor,
    hf.ForcedEOSTokenLogitsProcessor,
    hf.MinLengthLogitsProcessor,
    hf.MinNewTokensLengthLogitsProcessor,
    hf.NoBadWordsLogitsProcessor,
    hf.NoRepeatNGramLogitsProcessor,
    hf.RepetitionPenaltyLogitsProcessor,
    hf.SequenceBiasLogitsProcessor,
    hf.SuppressTokensAtBeginLogitsProcessor,
    hf.WatermarkLogitsProcessor,
)
# all processors that remember nothing
STATELESS = (
    *ROW_WISE,
    hf.EncoderNoRepeatNGramLogitsProcessor,
    hf.EncoderRepetitionPenaltyLogitsProcessor,
    hf.PrefixConstrainedLogitsProcessor,
)
# criteria that end all rows at once, where all are equally long
BATCH_CRITERIA = (MaxLengthCriteria, MaxTimeCriteria)
ROW_WISE_CRITERIA = (*BATCH_CRITERIA, hf.EosTokenCriteria, hf.StopStringCriteria)
# those that remember what they have seen
STATEFUL = hf.SynthIDTextWatermarkLogitsProcessor, hf.UnbatchedClassifierFreeGuidanceLogitsProcessor


def processed(processors: Sequence[LogitsProcessor], logits: Tensor) -> Tensor:
    """Scores of (rows, vocab) logits, by processors that look at nothing else.

    In fp32 whatever the target's dtype, as in plain `generate`: float64 can tie there.
    """
    scores = logits.to(torch.float32, copy=bool(processors))
    ids = torch.zeros(len(logits), 1, dtype=torch.long, device=logits.device)
    for processor in processors:
        scores = processor(ids, scores)
    return scores
