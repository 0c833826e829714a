"""The CORAL drafter: one step, (next token, feature) → predicted next feature.

EAGLE-1's shape (Li et al. 2024): `fc` on [embedding; feature], one Llama-style decoder layer
without an input norm, no final norm; the embeddings and the LM head are the target's and are not
held here.

    position          0        1        2        3
    token             x0       x1       x2       x3
    target feature    f0       f1       f2       f3          f_i has read x_0 … x_i
    drafter reads              (x1,f0)  (x2,f1)  (x3,f2)     at positions 0, 1, 2
    and predicts               f̂1       f̂2       f̂3          whose logits are for x2, x3, x4
"""

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from ..heads.collection import DraftHeads
from ..heads.draft_heads import DraftHead
from ..target import FEATURE
from .cached_drafting import FeatureDrafting
from .configuration import DrafterConfig
from .layers import CacheContext, Context, DecoderLayer
from .model import Drafter, register_family


@strict
class CoralConfig(DrafterConfig):
    """Configuration of a [`CoralDrafter`].

    The defaults describe EAGLE-1's drafter for a Llama-2-7B target. `CoralConfig.from_target`
    fills in everything that follows from a target. What it shares with other families is in
    `DrafterConfig`, its draft heads are in `HeadFields`.

    Args:
        fc_bias: a bias in the projection of [embedding; feature].

    Example:

    ```python
    >>> from transformers import LlamaConfig
    >>> from coral_hf import CoralConfig
    >>> CoralConfig.from_target(LlamaConfig(hidden_size=256, vocab_size=1000)).hidden_size
    256
    ```
    """

    model_type = "coral"

    fc_bias: bool = False


class CoralDrafter(Drafter):
    """A light model that predicts a target's next features, for the target's own LM head to read.

    Example:

    ```python
    >>> drafter = CoralDrafter.from_target(target)  # fresh; train it with CoralTrainer
    >>> drafter = AutoModel.from_pretrained("org/coral-llama3")  # or load a trained one
    >>> target.generate(**inputs, assistant_model=drafter)
    ```
    """

    config_class = CoralConfig
    config: CoralConfig
    title, paper = "CORAL", "[CORAL (ACL 2025)](https://arxiv.org/abs/2502.16880)"
    # modules that are called on their own need FSDP hooks of their own
    _no_split_modules = ["DecoderLayer", "Router"]

    def __init__(self, config: CoralConfig):
        super().__init__(config)
        # (batch, length, 2 * hidden) → (batch, length, hidden)
        self.fc = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=config.fc_bias)
        self.layers = nn.ModuleList(
            DecoderLayer(config, idx) for idx in range(config.num_hidden_layers)
        )
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.heads = DraftHeads(config)
        self.post_init()

    def check(self) -> None:
        """See [`Drafter.check`]: groups cover the vocabulary, and are those of the router."""
        self.heads.check()

    def forward(
        self,
        inputs_embeds: Tensor,
        features: Tensor,
        position_ids: Tensor | None = None,
        context: Context | None = None,
    ) -> Tensor:
        """Predict the feature that follows each pair of (next token, feature).

        Args:
            inputs_embeds: (batch, length, hidden), the target's embedding of the token after each
                feature.
            features: (batch, length, hidden), of the target, or predicted by an earlier step.
            position_ids: (batch or 1, length), the positions of the features; 0, 1, … by default.
            context: what can be attended to beside the inputs; causal attention among the inputs
                by default.

        Returns:
            (batch, length, hidden), the predicted next features.
        """
        if position_ids is None:
            position_ids = torch.arange(features.shape[1], device=features.device)[None]
        dtype = self.fc.weight.dtype
        hidden = self.fc(torch.cat([inputs_embeds.to(dtype), features.to(dtype)], dim=-1))
        cos, sin = (part[:, None] for part in self.rotary_emb(hidden, position_ids))
        for layer in self.layers:
            hidden = layer(hidden, cos=cos, sin=sin, context=context or CacheContext())
        return hidden


class CoralDrafting(FeatureDrafting):
    """Reads the target's last feature, and draft heads of its choice; see [`FeatureDrafting`].

    Example:

    ```python
    >>> drafting = CoralDrafting(drafter, read_target(target))
    >>> drafting.begin(tokens, features, positions)
    >>> tree = drafting.propose(tokens[:, -1], TreeShape(depth=6, top_k=10, nodes=60))
    ```
    """

    layers: tuple[int, ...] = (FEATURE,)
    drafter: CoralDrafter

    def _bind(self, name: str | None) -> DraftHead:
        return self.drafter.heads.bind(self.target.head, name)


register_family(CoralDrafter, CoralDrafting)
