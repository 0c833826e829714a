"""The parallel drafter: EAGLE-3's layers, which predict several positions in one pass (P-EAGLE).

    position           0        1        2        3        4
    token              x0       x1       x2       x3
    target features    g0       g1       g2
    drafter reads      (x1,g0)  (x2,g1)  (x3,g2)  (m,h)    (m,h)     at positions 0 … 4
    whose logits are   of x2    of x3    of x4    of x5    of x6

m is the mask embedding and h the shared hidden state, the same at every position whose token and
features are not known yet. A position sees all before it, so those of one pass know that they
stand one after another, and nothing of each other's tokens: their logits are marginals.
"""

import torch
from torch import nn

from ..eagle3 import Eagle3Drafter
from .configuration import ParallelConfig


class ParallelDrafter(Eagle3Drafter):
    """A light model that predicts a target's next tokens, all of a draft in one pass.

    `mask_hidden` is the shared hidden state before its fusion, `mask_embedding` what stands for a
    token that is not known; `forward` is [`Eagle3Drafter`]'s.

    Example:

    ```python
    >>> drafter = ParallelDrafter.from_target(target)  # fresh, to be trained
    >>> drafter = AutoModel.from_pretrained("org/parallel-llama3")  # or load a trained one
    >>> target.generate(**inputs, assistant_model=drafter)
    ```
    """

    config_class = ParallelConfig
    config: ParallelConfig

    def __init__(self, config: ParallelConfig):
        super().__init__(config)
        # norms follow both, so their size is of no account
        self.mask_hidden = nn.Parameter(torch.randn(1, 1, self.fc.in_features))
        self.mask_embedding = nn.Parameter(torch.randn(1, 1, config.hidden_size))
