"""Configuration that drafters of all families share, and those with layers beside it.

In: the config of a target. Out: the identity of a drafter's target; sizes of its layers, and their
rotary embedding.
"""

from typing import Any, TypeVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from ..heads.settings import HeadFields, check_head_fields
from ..identity import cached_commit, full_name
from ..target import max_positions

Made = TypeVar("Made", bound="FamilyConfig")


@strict
class FamilyConfig(PreTrainedConfig):
    """What the config of every family begins with.

    Args:
        vocab_size: rows of the target's LM head, padding included.
        hidden_size: width of the drafter.
        target_name_or_path, target_revision, target_model_type: the target that the drafter was
            made for.
        tokenizer_hash, tokenizer_size: of the target's tokenizer, by
            `coral_hf.identity.tokenizer_hash`, and the number of its tokens; it may gain more.
        chat_template, chat_template_kwargs: how the chats were rendered that it was trained on,
            where that is not the tokenizer's own template, or needs options.
    """

    vocab_size: int = 32000
    hidden_size: int = 4096
    initializer_range: float = 0.02

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

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Do nothing: transformers would publish a copy of this file, without its package."""

    @classmethod
    def from_target(cls: type[Made], target_config: PreTrainedConfig, **overrides) -> Made:
        """Derive a drafter's config from its target's, with the target's sizes.

        Args:
            target_config: of any decoder; the text part of a composite one is read.
            overrides: fields of the config that shall differ.
        """
        text = target_config.get_text_config(decoder=True)
        return cls(**target_fields(target_config) | cls._own_fields(text) | overrides)

    @classmethod
    def own_names(cls) -> list[str]:
        """Names of the fields that a family declares beside those of all families."""
        kinds = [kind for kind in cls.__mro__ if issubclass(kind, FamilyConfig)]
        own = [kind for kind in kinds if kind.__module__ != __name__]
        return [name for kind in own for name in kind.__annotations__]

    @classmethod
    def _own_fields(cls, text: PreTrainedConfig) -> dict[str, Any]:
        """What a family takes beside that from a target's text config."""
        return {}


@strict
class DrafterConfig(HeadFields, FamilyConfig):
    """What the config of a family with layers begins with; draft heads are in `HeadFields`.

    Args:
        num_hidden_layers: decoder layers of the drafter.
        rope_parameters: rotary embedding, in the form transformers gives it to Llama.
        attention_bias: biases in the query, key and value projections.
    """

    intermediate_size: int = 11008
    num_hidden_layers: int = 1
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_parameters: dict | None = None
    attention_bias: bool = False
    # fields of the families whose layers may have more than Llama's
    output_bias = mlp_bias = qk_norm = False

    def __post_init__(self, **kwargs):
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        if self.rope_parameters is None:
            self.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}
        super().__post_init__(**kwargs)
        check_head_fields(self)

    @classmethod
    def _own_fields(cls, text: PreTrainedConfig) -> dict[str, Any]:
        """Widths, heads and limits of a target's text config, and its rotary parameters."""
        heads, hidden = _field(text, "num_attention_heads"), text.hidden_size
        if heads is None:
            raise ValueError(
                f"The target's config, {type(text).__name__}, has no attention heads; a drafter"
                " with layers needs a target with attention."
            )
        epsilon = _field(text, "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon")
        # GPT-2 leaves it unset for four times the width; Gemma 3n lists one for each layer
        inner = _field(text, "intermediate_size", "n_inner") or 4 * hidden
        return {
            "intermediate_size": max(inner) if isinstance(inner, (list, tuple)) else inner,
            "num_attention_heads": heads,
            "num_key_value_heads": _field(text, "num_key_value_heads") or heads,
            "head_dim": _field(text, "head_dim") or hidden // heads,
            "max_position_embeddings": max_positions(text) or cls.max_position_embeddings,
            "rms_norm_eps": float(1e-6 if epsilon is None else epsilon),
            "rope_parameters": _rope(text),
            # Qwen2 has a bias in q, k and v without a field that says so
            "attention_bias": bool(_field(text, "attention_bias")) or text.model_type == "qwen2",
        }


def target_fields(target_config: PreTrainedConfig) -> dict[str, Any]:
    """Read what the config of any drafter takes from its target's."""
    text = target_config.get_text_config(decoder=True)
    first = getattr(text, "bos_token_id", None)
    return {
        "vocab_size": text.vocab_size,
        "hidden_size": text.hidden_size,
        "initializer_range": float(getattr(text, "initializer_range", 0.02)),
        "target_name_or_path": full_name(target_config._name_or_path),
        "target_revision": getattr(target_config, "_commit_hash", None)
        or cached_commit(target_config._name_or_path),
        "target_model_type": target_config.model_type,
        "bos_token_id": first[0] if isinstance(first, list) else first,
        # CodeGen's config has no pad token at all
        "eos_token_id": getattr(text, "eos_token_id", None),
        "pad_token_id": getattr(text, "pad_token_id", None),
    }


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
