"""Layers of drafters: Llama's, with attention over whatever a context holds.

In: hidden states, rotary positions, a context (a cache in decoding, past steps in training). Out:
hidden states of the same shape.
"""

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, rotate_half

from ..decoding.caches.fixed_cache import FixedCache
from ..decoding.caches.ragged_cache import RaggedCache
from ..decoding.caches.shared_keys import attend


class Context(Protocol):
    """What a drafter step attends to besides itself: a cache, or past steps in training."""

    def attend(self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend with this step's queries to the context and to this step's own keys and values.

        Args:
            query: (batch, heads, length, head_dim).
            key, value: (batch, kv_heads, length, head_dim).

        Returns:
            (batch, heads, length, head_dim).
        """


class CacheContext:
    """A drafter's own cache as the context of a step; None: only the step itself.

    `mask`: (batch, 1, length, slots + length), added to scores; None: plainly causal.
    """

    def __init__(self, cache: RaggedCache | FixedCache | None = None, mask: Tensor | None = None):
        self.cache, self.mask = cache, mask

    def attend(self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Append to the cache and attend to it: (batch, heads, length, head_dim)."""
        if self.cache is not None:
            key, value = self.cache.update(key, value, layer_idx)
        if self.mask is not None:
            return attend(query, key, value, self.mask.to(query.dtype))
        is_causal = query.shape[2] > 1
        return F.scaled_dot_product_attention(
            query, key, value, is_causal=is_causal, enable_gqa=True
        )


class Attention(nn.Module):
    """Grouped-query attention with rotary positions over whatever the context holds.

    `width`: of what is projected to queries, keys and values.
    """

    def __init__(self, config: PreTrainedConfig, layer_idx: int, width: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        # q: (batch, length, heads * head_dim); k, v: (batch, length, kv_heads * head_dim)
        inner = config.num_attention_heads * config.head_dim
        kv_inner = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(width, inner, bias=config.attention_bias)
        self.k_proj = nn.Linear(width, kv_inner, bias=config.attention_bias)
        self.v_proj = nn.Linear(width, kv_inner, bias=config.attention_bias)
        self.o_proj = nn.Linear(inner, config.hidden_size, bias=config.output_bias)
        self.q_norm, self.k_norm = (
            LlamaRMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None
            for _ in "qk"
        )

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor, context: Context) -> Tensor:
        """(batch, length, width) → (batch, length, hidden).

        `cos`, `sin`: (batch or 1, 1, length, rotary_dim).
        """
        query, key, value = (
            self._heads(project(hidden)) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        attended = context.attend(self.layer_idx, query, key, value)
        return self.o_proj(attended.transpose(1, 2).flatten(-2))

    def _heads(self, projected: Tensor) -> Tensor:
        """(batch, length, heads * head_dim) → (batch, heads, length, head_dim)."""
        return projected.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary positions to the first rotary_dim channels.

    `states`: (batch, heads, length, head_dim); `cos`, `sin`: (batch or 1, 1, length, rotary_dim).
    """
    rotary_dim = cos.shape[-1]
    if rotary_dim == states.shape[-1]:
        return states * cos + rotate_half(states) * sin
    turned, passed = states[..., :rotary_dim], states[..., rotary_dim:]
    return torch.cat([turned * cos + rotate_half(turned) * sin, passed], dim=-1)


class ResidualBlock(GradientCheckpointingLayer):
    """x + SiLU(Wx + b), of heads; the identity where W and b are 0."""

    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        """(*batch, width) → the same."""
        return hidden + F.silu(self.linear(hidden))


class DecoderLayer(GradientCheckpointingLayer):
    """A Llama-style decoder layer; the first one has no input norm, as in EAGLE-1."""

    def __init__(self, config: PreTrainedConfig, layer_idx: int):
        super().__init__()
        self.self_attn = Attention(config, layer_idx, config.hidden_size)
        self.mlp = LlamaMLP(config)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        if layer_idx > 0:
            self.input_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor, context: Context) -> Tensor:
        """(batch, length, hidden) → the same."""
        normed = self.input_layernorm(hidden) if self.self_attn.layer_idx > 0 else hidden
        hidden = hidden + self.self_attn(normed, cos, sin, context)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))
