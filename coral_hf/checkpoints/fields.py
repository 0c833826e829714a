"""The config.json of an EAGLE drafter → the shape of a CORAL drafter.

In: a folder. Out: fields of `CoralConfig`, or an error that names the file, the field, what is in
it and what is expected. What a config leaves out is what EAGLE takes then, not what transformers
gives to a model of that type: a Mixtral's drafter rotates with a base of 10,000, a Mixtral with
1,000,000.
"""

import math
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from ..drafters.coral.configuration import CoralConfig
from .source import CONFIG, read_config

SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")
# fields that transformers writes as null where it means their default
MAY_BE_NULL = (
    "num_key_value_heads",
    "head_dim",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "bias",
    "qkv_bias",
)
ROTARY = ("default", *ROPE_INIT_FUNCTIONS)


class Fields(NamedTuple):
    """The fields of a config, each read as what it has to be."""

    file: Path
    values: dict[str, Any]

    def refuse(self, name: str, expected: str) -> NoReturn:
        """Raise the ValueError about a field."""
        found = self.values.get(name)
        raise ValueError(
            f"`{name}` in {self.file} is {found!r}; expected {expected}. Correct it, or download"
            " the file again."
        )

    def size(self, name: str, default: int) -> int:
        """A whole number above 0."""
        value = self.values.get(name, default)
        if type(value) is not int or value < 1:
            self.refuse(name, "a whole number above 0")
        return value

    def number(self, name: str, default: float) -> float:
        """A number above 0."""
        value = self.values.get(name, default)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            self.refuse(name, "a number above 0")
        return float(value)

    def flag(self, name: str) -> bool | None:
        """True or false, None where the field is missing."""
        value = self.values.get(name)
        if not (value is None or isinstance(value, bool)):
            self.refuse(name, "true or false")
        return value

    def choice(self, name: str, choices: tuple[str, ...], default: str) -> str:
        """One of several words."""
        value = self.values.get(name, default)
        if not isinstance(value, str) or value not in choices:
            self.refuse(name, f"one of {', '.join(choices)}")
        return value


def read_shape(folder: Path) -> dict[str, Any]:
    """The shape of a drafter as its config has it, before its tensors are looked at.

    Returns:
        fields of `CoralConfig`; `fc_bias` and `attention_bias` are None where the tensors decide.

    Raises:
        ValueError: if a field is missing or makes no sense, or the drafter is CORAL's or EAGLE-3's.
    """
    config = read_config(folder)
    if config.get("model_type") == CoralConfig.model_type:
        raise ValueError(
            f"{folder} is a CORAL drafter already; load it with AutoModel.from_pretrained."
        )
    if config.get("draft_vocab_size") is not None:
        refuse_eagle3(folder, "`draft_vocab_size`")
    if "eagle3" in str(config.get("architectures")).lower():
        refuse_eagle3(folder, "`architectures`")
    if config.get("model_type") == "eagle" and isinstance(config.get("model"), dict):
        config = config["model"]  # an older layout of vLLM
    kept = {k: v for k, v in config.items() if not (v is None and k in MAY_BE_NULL)}
    return _shape(Fields(folder / CONFIG, kept))


def refuse_eagle3(folder: Path, found: str) -> NoReturn:
    """Raise the ValueError about an EAGLE-3 drafter."""
    raise ValueError(
        f"{folder} is an EAGLE-3 drafter ({found}): it reads three of the target's layers and has"
        " norms and an LM head of its own, for which a CORAL drafter has no place. Import an"
        " EAGLE-1, EAGLE-2 or HASS drafter, or serve this one with vLLM or SGLang."
    )


def _shape(fields: Fields) -> dict[str, Any]:
    """The fields of a drafter's own shape, with EAGLE's defaults."""
    missing = [name for name in SIZES if fields.values.get(name) is None]
    if missing:
        raise ValueError(
            f"{fields.file} lacks {', '.join(missing)}, which an EAGLE drafter's config has; add"
            " them, or give another checkpoint."
        )
    shape = {
        **{name: fields.size(name, 0) for name in SIZES},
        **_attention(fields),
        "num_hidden_layers": fields.size("num_hidden_layers", 1),
        "hidden_act": fields.choice("hidden_act", tuple(ACT2FN), "silu"),
        "max_position_embeddings": fields.size("max_position_embeddings", 2048),
        "rms_norm_eps": fields.number("rms_norm_eps", 1e-6),
        "fc_bias": fields.flag("bias"),
        "attention_bias": fields.flag("qkv_bias"),
    }
    return {**shape, "rope_parameters": _rope(fields, shape)}


def _attention(fields: Fields) -> dict[str, int]:
    """The sizes of the attention, which have to divide each other."""
    hidden, heads = fields.size("hidden_size", 0), fields.size("num_attention_heads", 0)
    kv_heads = fields.size("num_key_value_heads", heads)
    if heads % kv_heads:
        fields.refuse("num_key_value_heads", f"a divisor of `num_attention_heads` = {heads}")
    if "head_dim" not in fields.values and hidden % heads:
        fields.refuse("num_attention_heads", f"a divisor of `hidden_size` = {hidden}")
    head_dim = fields.size("head_dim", hidden // heads)
    if head_dim % 2:
        name = "head_dim" if "head_dim" in fields.values else "num_attention_heads"
        fields.refuse(name, "heads of an even width, whose halves rotate")
    return {"num_key_value_heads": kv_heads, "head_dim": head_dim}


def _rope(fields: Fields, shape: dict[str, Any]) -> dict[str, Any]:
    """Rotary parameters in transformers' present form, from either form."""
    name = "rope_parameters" if fields.values.get("rope_parameters") else "rope_scaling"
    given = fields.values.get(name) or {}
    if not isinstance(given, dict):
        fields.refuse(name, "an object of fields, or null")
    inner = fields._replace(values=given)
    kind_name = "rope_type" if "rope_type" in given else "type"
    kind = inner.choice(kind_name, ROTARY, "default")
    theta = inner.number("rope_theta", fields.number("rope_theta", 10000.0))
    rope = {k: v for k, v in given.items() if k != "type"}
    rope |= {"rope_type": kind, "rope_theta": theta}
    problem = _rotary_problem(shape, rope)
    if problem is not None:
        fields.refuse(name, f"what {kind!r} rotary positions are made from ({problem})")
    return rope


def _rotary_problem(shape: dict[str, Any], rope: dict[str, Any]) -> str | None:
    """What transformers says of rotary parameters, whose fields differ from type to type."""
    known = {name: value for name, value in shape.items() if value is not None}
    try:
        rotary = LlamaRotaryEmbedding(CoralConfig(**known, rope_parameters=dict(rope)))
    except Exception as error:  # it checks little, and fails wherever it meets the field
        return f"{type(error).__name__}: {error}"
    return None if rotary.inv_freq.isfinite().all() else "the frequencies are not finite"
