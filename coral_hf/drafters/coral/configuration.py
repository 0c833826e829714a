"""Configuration of a CORAL drafter.

In: the config of a target. Out: `CoralConfig`: the drafter's own sizes, its draft heads, and the
identity of its target.
"""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from ...heads.settings import check_head_fields
from ...identity import cached_commit, full_name
from ...target import max_positions


@strict
class CoralConfig(PreTrainedConfig):
    """Configuration of a [`CoralDrafter`].

    The defaults describe EAGLE-1's drafter for a Llama-2-7B target. `CoralConfig.from_target`
    fills in everything that follows from a target.

    Args:
        vocab_size: rows of the target's LM head, padding included.
        hidden_size: width of the target's features and of the drafter.
        num_hidden_layers: decoder layers of the drafter.
        rope_parameters: rotary embedding, in the form transformers gives it to Llama.
        attention_bias: biases in the query, key and value projections.
        fc_bias: a bias in the projection of [embedding; feature].
        draft_head: `"full"` reads the whole LM head, `"quantized"` a copy of it in eight bits,
            `"routed"` the groups that the router picks, `"routed_quantized"` these in eight bits,
            `"frequency"` the most frequent tokens, `"low_rank"` a few channels of all tokens.
        num_groups: groups of the router, `None` for a drafter without one.
        num_active_groups: groups that a routed head reads at a time.
        grouping: what the groups were made from; all but `"contiguous"` have an order of the
            vocabulary in the checkpoint.
        grouping_hash: of that order; a router knows its own groups only.
        routing: whether the rows of a tree level share groups (`"shared"`), all read what any of
            them wants (`"union"`), or read each its own (`"per_node"`).
        max_active_groups: groups that `"union"` reads for a text at most; `None` for all wanted.
        active_mass: read only as many groups as hold this share of the router's mass; `None`
            always reads `num_active_groups`.
        is_router_trained: whether the router has been trained; only then is it read.
        num_hot_tokens: tokens of the frequency head, `None` for a drafter without one.
        head_rank: channels of the low-rank head, `None` for a drafter without one.
        target_name_or_path, target_revision, target_model_type: the target that the drafter was
            made for.
        tokenizer_hash, tokenizer_size: of the target's tokenizer, by
            `coral_hf.identity.tokenizer_hash`, and the number of its tokens; it may gain more.
        chat_template, chat_template_kwargs: how the chats were rendered that it was trained on,
            where that is not the tokenizer's own template, or needs options.

    Example:

    ```python
    >>> from transformers import LlamaConfig
    >>> from coral_hf import CoralConfig
    >>> CoralConfig.from_target(LlamaConfig(hidden_size=256, vocab_size=1000)).hidden_size
    256
    ```
    """

    model_type = "coral"

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 1
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    rope_parameters: dict | None = None
    attention_bias: bool = False
    fc_bias: bool = False

    draft_head: str = "full"
    num_groups: int | None = None
    num_active_groups: int = 2
    grouping: str = "contiguous"
    grouping_hash: str | None = None
    routing: str = "shared"
    max_active_groups: int | None = None
    active_mass: float | None = None
    is_router_trained: bool = False
    num_hot_tokens: int | None = None
    head_rank: int | None = None

    target_name_or_path: str | None = None
    target_revision: str | None = None
    target_model_type: str | None = None
    tokenizer_hash: str | None = None
    tokenizer_size: int | None = None

    chat_template: str | None = None
    chat_template_kwargs: dict | None = None

    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.rope_parameters is None:
            self.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}
        super().__post_init__(**kwargs)
        check_head_fields(self)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Do nothing: transformers would publish a copy of this file, without its package."""

    @classmethod
    def from_target(cls, target_config: PreTrainedConfig, **overrides) -> "CoralConfig":
        """Derive a drafter's config from its target's, EAGLE-1's shape with the target's sizes.

        Args:
            target_config: of any decoder; the text part of a composite one is read.
            overrides: fields of `CoralConfig` that shall differ.
        """
        text = target_config.get_text_config(decoder=True)
        fields = {
            **_sizes(text),
            "rope_parameters": _rope(text),
            # Qwen2 has a bias in q, k and v without a field that says so
            "attention_bias": bool(_field(text, "attention_bias")) or text.model_type == "qwen2",
            "target_name_or_path": full_name(target_config._name_or_path),
            "target_revision": getattr(target_config, "_commit_hash", None)
            or cached_commit(target_config._name_or_path),
            "target_model_type": target_config.model_type,
            # CodeGen's config has no pad token at all
            "bos_token_id": _first(getattr(text, "bos_token_id", None)),
            "eos_token_id": getattr(text, "eos_token_id", None),
            "pad_token_id": getattr(text, "pad_token_id", None),
        }
        return cls(**{**fields, **overrides})


def _field(text: PreTrainedConfig, *names: str) -> Any:
    """Read the first of some fields that is set; the last layer's own value where layers differ."""
    for name in names:
        try:
            value = getattr(text, name, None)
        except RuntimeError:  # newer versions of transformers name no one value for such layers
            value = getattr(text.per_layer_config[text.num_hidden_layers - 1], name)
        if value is not None:
            return value
    return None


def _sizes(text: PreTrainedConfig) -> dict:
    """Read the widths, heads and limits of a target's text config."""
    heads = _field(text, "num_attention_heads")
    if heads is None:
        raise ValueError(
            f"The target's config, {type(text).__name__}, has no attention heads; a CORAL drafter"
            " needs a target with attention."
        )
    epsilon = _field(text, "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon")
    return {
        "vocab_size": text.vocab_size,
        "hidden_size": text.hidden_size,
        "intermediate_size": _intermediate_size(text),
        "num_attention_heads": heads,
        "num_key_value_heads": _field(text, "num_key_value_heads") or heads,
        "head_dim": _field(text, "head_dim") or text.hidden_size // heads,
        "max_position_embeddings": max_positions(text) or CoralConfig.max_position_embeddings,
        "initializer_range": float(getattr(text, "initializer_range", 0.02)),
        "rms_norm_eps": float(1e-6 if epsilon is None else epsilon),
    }


def _intermediate_size(text: PreTrainedConfig) -> int:
    """Read the width of a feed-forward block, which GPT-2 leaves unset for four times the width.

    Gemma 3n lists one for each layer; the drafter takes the widest.
    """
    size = _field(text, "intermediate_size", "n_inner") or 4 * text.hidden_size
    return max(size) if isinstance(size, (list, tuple)) else size


def _rope(text: PreTrainedConfig) -> dict | None:
    """Read the target's rotary parameters, of full attention where layers differ; None without."""
    rope = getattr(text, "rope_parameters", None)
    if not rope:
        return None
    kinds = [kind for kind in rope.values() if isinstance(kind, dict)]
    # full attention may have no rotary positions at all, as in Beam
    rope = dict(rope.get("full_attention") or next(iter(kinds), rope))
    if rope.get("rope_type", "default") == "default":
        # the drafter rotates whole heads; only the wavelengths follow the target
        rope.pop("partial_rotary_factor", None)
    return rope


def _first(token_id: int | list[int] | None) -> int | None:
    return token_id[0] if isinstance(token_id, list) else token_id
