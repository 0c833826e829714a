"""The EAGLE-3 drafter: one step, (next token, hidden state) → the next hidden state, and its head.

    position          0        1        2        3
    token             x0       x1       x2       x3
    target features   g0       g1       g2       g3          three hidden states each, fused
    drafter reads              (x1,g0)  (x2,g1)  (x3,g2)     at positions 0, 1, 2
    and returns                a1       a2       a3          whose logits are for x2, x3, x4
    the next step reads                 (x̂2,a1)  …

The logits are of the draft vocabulary, the drafter's own choice of the target's tokens. Draft heads
read its LM head as a CORAL drafter's read the target's.

A parallel drafter (P-EAGLE) predicts several positions in one pass:

    position           0        1        2        3        4
    drafter reads      (x1,g0)  (x2,g1)  (x3,g2)  (m,h)    (m,h)
    whose logits are   of x2    of x3    of x4    of x5    of x6

m is the mask embedding and h the shared hidden state, the same at every position whose token and
features are not known yet. A position sees all before it, so those of one pass know that they
stand one after another, and nothing of each other's tokens: their logits are marginals.
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding

from ...heads.collection import DraftHeads
from ...heads.router import check_token_ids
from ...target import read_target
from ..layers import Attention, CacheContext, Context, DecoderLayer
from ..model import Drafter
from .configuration import Eagle3Config, ParallelConfig


class Eagle3Layer(GradientCheckpointingLayer):
    """The first decoder layer, whose attention reads the embedding and the hidden state."""

    def __init__(self, config: Eagle3Config):
        super().__init__()
        self.norms_residual = config.norm_before_residual
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hidden_norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, 0, 2 * config.hidden_size)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = LlamaMLP(config)

    def forward(
        self, hidden: Tensor, embeddings: Tensor, cos: Tensor, sin: Tensor, context: Context
    ) -> Tensor:
        """`hidden`, `embeddings`: (batch, length, hidden). Returns the same shape."""
        normed = self.hidden_norm(hidden)
        both = torch.cat([self.input_layernorm(embeddings), normed], dim=-1)
        residual = normed if self.norms_residual else hidden
        hidden = residual + self.self_attn(both, cos, sin, context)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class Eagle3Drafter(Drafter):
    """A light model that predicts a target's next tokens from hidden states of several layers.

    Example:

    ```python
    >>> drafter = Eagle3Drafter.from_target(target)  # fresh, to be trained
    >>> drafter = import_drafter(target, "org/EAGLE3-llama3")  # or import a trained one
    >>> target.generate(**inputs, assistant_model=drafter)
    ```
    """

    config_class = Eagle3Config
    config: Eagle3Config
    title, paper = "EAGLE-3", "[EAGLE-3 (NeurIPS 2025)](https://arxiv.org/abs/2503.01840)"
    _no_split_modules = ["Eagle3Layer", "DecoderLayer"]
    d2t: Tensor  # (draft_vocab,), the token id of each draft id, less the draft id
    t2d: Tensor  # (vocab,), whether a token can be proposed

    def __init__(self, config: Eagle3Config):
        super().__init__(config)
        width, epsilon = config.target_hidden_size, config.rms_norm_eps
        assert width and config.draft_vocab_size, "the config fills these in"
        fused = len(config.target_layers)
        # (batch, length, fused * target_hidden) → (batch, length, hidden)
        self.fc = nn.Linear(fused * width, config.hidden_size, bias=config.fc_bias)
        self.input_norm = LlamaRMSNorm(fused * width, epsilon) if config.norm_before_fc else None
        norms = [LlamaRMSNorm(width, epsilon) for _ in range(fused if config.fc_norm else 0)]
        self.fc_norm = nn.ModuleList(norms) if norms else None
        self.layers = nn.ModuleList(
            DecoderLayer(config, idx) if idx > 0 else Eagle3Layer(config)
            for idx in range(config.num_hidden_layers)
        )
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.norm = LlamaRMSNorm(config.hidden_size, epsilon)
        self.lm_head = nn.Linear(config.hidden_size, config.draft_vocab_size, bias=False)
        sizes = config.vocab_size, config.hidden_size
        self.embed_tokens = nn.Embedding(*sizes) if config.has_embeddings else None
        self.heads = DraftHeads(config)
        draft_ids = torch.arange(config.draft_vocab_size)
        self.register_buffer("d2t", torch.zeros_like(draft_ids))
        self.register_buffer("t2d", torch.arange(config.vocab_size) < config.draft_vocab_size)
        self.post_init()

    @classmethod
    def from_target(cls, target: PreTrainedModel, **overrides) -> "Eagle3Drafter":
        """Make an untrained drafter for `target`; embeddings of its own start from the target's.

        `overrides` are fields of [`Eagle3Config`].

        Raises:
            ValueError: for a target that cannot take a drafter.
        """
        drafter = super().from_target(target, **overrides)
        table = drafter.embed_tokens
        if table is not None and table.embedding_dim == drafter.config.target_hidden_size:
            with torch.no_grad():
                read = read_target(target)
                ids = torch.arange(table.num_embeddings, dtype=torch.int64, device=read.device)
                table.weight.copy_(read.embed(ids[None])[0])
        return drafter

    def check(self) -> None:
        """See [`Drafter.check`]: `d2t` and `t2d` name the same tokens, groups are the router's."""
        self.set_draft_vocabulary(self.draft_tokens)
        self.heads.check()

    @property
    def draft_tokens(self) -> Tensor:
        """The token id of each draft id, of shape (draft_vocab,)."""
        return self.d2t + torch.arange(len(self.d2t), device=self.d2t.device)

    def set_draft_vocabulary(self, tokens: Tensor) -> None:
        """Let the rows of `lm_head` stand for other tokens.

        Args:
            tokens: of shape (draft_vocab,), the token id of each row.

        Raises:
            ValueError: for another number of tokens, for one twice, for one that is none.
        """
        check_token_ids("draft_tokens", tokens, self.config.vocab_size, len(self.d2t))
        tokens = tokens.to(self.d2t.device)
        self.d2t.copy_(tokens - torch.arange(len(tokens), device=tokens.device))
        self.t2d.fill_(False)
        self.t2d[tokens] = True

    def check_whole(self) -> None:
        """Raise a ValueError unless the rows of `lm_head` are those of all tokens, in their order.

        Draft heads that read some rows name them by the tokens' ids.
        """
        if len(self.d2t) < self.config.vocab_size or bool(self.d2t.any()):
            raise ValueError(
                "A router and frequent tokens need an LM head with a row for each token, in order;"
                f" this one has {len(self.d2t)} rows for {self.config.vocab_size} tokens. Train one"
                " with `draft_vocab_size` (--draft-vocab-size), or use draft_head='full'."
            )

    def fuse(self, features: Tensor) -> Tensor:
        """Fuse the target's hidden states, side by side, to what a step reads.

        (batch, length, fused * target_hidden) → (batch, length, hidden)
        """
        features = features.to(self.fc.weight.dtype)
        if self.input_norm is not None:
            features = self.input_norm(features)
        if self.fc_norm is not None:
            parts = features.chunk(len(self.fc_norm), dim=-1)
            normed = [norm(part) for norm, part in zip(self.fc_norm, parts, strict=True)]
            features = torch.cat(normed, dim=-1)
        return self.fc(features)

    def embed(self, tokens: Tensor) -> Tensor:
        """Embed tokens (batch, length) by the drafter's own table: (batch, length, hidden).

        A token that the target has gained since is read as the last one.
        """
        assert self.embed_tokens is not None, "the drafter reads its target's embeddings"
        table = self.embed_tokens
        return table(tokens.to(table.weight.device).clamp(max=table.num_embeddings - 1))

    def forward(
        self,
        inputs_embeds: Tensor,
        hidden: Tensor,
        position_ids: Tensor | None = None,
        context: Context | None = None,
    ) -> Tensor:
        """Predict the hidden state after each pair of (next token, hidden state).

        Args:
            inputs_embeds: (batch, length, hidden), the embedding of the token after each `hidden`.
            hidden: (batch, length, hidden), of [`fuse`], or predicted by an earlier step.
            position_ids: (batch or 1, length), the positions of `hidden`; 0, 1, … by default.
            context: what can be attended to beside the inputs; causal attention among the inputs
                by default.

        Returns:
            (batch, length, hidden), before the final norm unless the config says `norm_output`.
        """
        if position_ids is None:
            position_ids = torch.arange(hidden.shape[1], device=hidden.device)[None]
        context, dtype = context or CacheContext(), self.fc.weight.dtype
        hidden, inputs_embeds = hidden.to(dtype), inputs_embeds.to(dtype)
        cos, sin = (part[:, None] for part in self.rotary_emb(hidden, position_ids))
        first, *others = self.layers
        hidden = first(hidden, inputs_embeds, cos=cos, sin=sin, context=context)
        for layer in others:
            hidden = layer(hidden, cos=cos, sin=sin, context=context)
        return self.norm(hidden) if self.config.norm_output else hidden

    def draft_logits(self, hidden: Tensor) -> Tensor:
        """Logits over the draft vocabulary: (*batch, hidden) → (*batch, draft_vocab)."""
        return self.lm_head(self.normed(hidden))

    def normed(self, hidden: Tensor) -> Tensor:
        """What `lm_head` reads of what `forward` returned: (*batch, hidden) → (*batch, hidden)."""
        return hidden if self.config.norm_output else self.norm(hidden)


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
    title, paper = "P-EAGLE", "[P-EAGLE (2026)](https://arxiv.org/abs/2602.01469)"

    def __init__(self, config: ParallelConfig):
        super().__init__(config)
        # norms follow both, so their size is of no account
        self.mask_hidden = nn.Parameter(torch.randn(1, 1, self.fc.in_features))
        self.mask_embedding = nn.Parameter(torch.randn(1, 1, config.hidden_size))
