"""Warm starts: initial weights of a drafter from the target's last layer or another drafter.

In: a target and a source: "layer", a drafter of another target, or the folder of a checkpoint.
Out: a drafter for the target, in fp32, to be trained. A tensor that fits nowhere is an error.

    the target    embedding → layers → input norm → the last layer → final norm → feature
    the drafter   fc [embedding; feature] →        layer without input norm →      feature
"""

import re
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.activations import ACT2FN

from ..checkpoints import check_tensors, config_folder, import_drafter, read_config, read_shape
from ..drafters.coral import CoralConfig, CoralDrafter
from ..drafters.model import Drafter
from ..identity import tokenizer_hash
from ..target import decoder_of, text_config
from .adapters import is_adapted
from .steps import TrainingStep, step_kind, step_kinds

LAYER = "layer"
# fields that the weights of a drafter depend on; the others follow from the target
OWN_SHAPE = (
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "rope_parameters",
    "attention_bias",
    "fc_bias",
)
# what a drafter proposes and embeds by itself: it is lost where the tokens are others
OF_TOKENS = re.compile(r"d2t|t2d|lm_heads?\.(\d+\.)?weight|embed_tokens\.weight")
# the first layer of a drafter does not normalise the output of `fc`
INPUT_NORM = "input_layernorm.weight"


def warm_start(
    target: PreTrainedModel,
    source: str | Path | Drafter,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Drafter:
    """Make a drafter for `target` that starts from `source`, in fp32 on the target's device.

    All tensors of the source keep their shapes, such as (hidden, 2 * hidden) of `fc`.

    Args:
        source: `"layer"` for the target's own last layer; a drafter of another target of the same
            width, or its folder or Hub id; the folder or Hub id of a checkpoint of EAGLE, HASS or
            Medusa. The drafter is of the same family, of `"layer"` a CORAL one.
        tokenizer: the target's; draft heads of the source are kept if they were made for it.

    Raises:
        ValueError: if a tensor of the source has no place in the drafter, or the reverse.
    """
    if isinstance(source, Drafter):
        return from_drafter(target, source, tokenizer)
    if str(source) == LAYER:
        return from_layer(target)
    if (own := read_config(config_folder(source)).get("model_type")) in step_kinds():
        other = step_kind(own).drafter.from_pretrained(source, dtype=torch.float32)
        return from_drafter(target, other, tokenizer)
    return import_drafter(target, source, dtype=torch.float32, tokenizer=tokenizer).train()


def kind_of_source(source: str | Path) -> type[TrainingStep]:
    """The training step of a drafter in a folder or on the Hub, ours or another library's."""
    folder = config_folder(source)
    own = read_config(folder).get("model_type")
    if own not in step_kinds():
        own = read_shape(folder).kind.config_class.model_type
    return step_kind(own)


def from_drafter(
    target: PreTrainedModel, other: Drafter, tokenizer: PreTrainedTokenizerBase | None = None
) -> Drafter:
    """Make a drafter with the weights of another target's drafter; see [`warm_start`]."""
    if is_adapted(other):
        raise ValueError(
            "The drafter to start from has an adapter; merge it first: model.merge_and_unload()."
        )
    config, text = other.config, text_config(target)
    width = getattr(config, "target_hidden_size", config.hidden_size)
    if width != text.hidden_size:
        raise ValueError(
            f"`hidden_size` of the target is {text.hidden_size}, but the drafter to start from is"
            f" one of a target with {width}; use warm_start(target, 'layer')."
        )
    shape = {name: getattr(config, name) for name in OWN_SHAPE if hasattr(config, name)}
    # what stands for tokens, such as a router's groups, is of its tokenizer
    is_same_size = config.vocab_size == text.vocab_size
    hashes = {config.tokenizer_hash, tokenizer and tokenizer_hash(tokenizer)}
    if not isinstance(other, CoralDrafter):
        is_same = is_same_size and len(hashes - {None}) < 2
        return _with_own_head(target, other, shape, is_same)
    drafter = CoralDrafter.from_target(target, **shape).float()
    if is_same_size and len(hashes) == 1 and tokenizer is not None:
        drafter.heads.adopt(config)
    kept = drafter.state_dict().keys()
    drafter.load_state_dict({k: v for k, v in other.state_dict().items() if k in kept})
    return drafter


def _with_own_head(target: PreTrainedModel, other: Drafter, shape: dict, is_same: bool) -> Drafter:
    """`from_drafter` of one with LM heads of its own; `is_same`: no token is known to be another's.

    Where tokens are others, heads begin anew, and so does the draft vocabulary of EAGLE-3.
    """
    config, lost = other.config, {"target_num_layers"}
    if not is_same:
        lost |= {"draft_vocab_size", "has_embeddings", "mask_token_id"}
    depth = getattr(config, "target_num_layers", None)
    if depth not in (None, text_config(target).num_hidden_layers):
        lost |= {"target_layers"}
    shape |= {n: getattr(config, n) for n in config.own_names() if n not in lost}
    state = other.state_dict()
    tensors = {k: v for k, v in state.items() if is_same or not OF_TOKENS.fullmatch(k)}
    drafter = type(other).from_target(target, **shape).float()
    drafter.load_state_dict(tensors, strict=is_same)
    return drafter


def from_layer(
    target: PreTrainedModel, fc: tuple[float, float] | None = (0.0, 1.0)
) -> CoralDrafter:
    """Make a drafter with the weights of the target's last layer, in the units of features.

    Args:
        fc: a and b of fc(embedding, feature) = a · embedding + b · feature, whose weight has shape
            (hidden, 2 * hidden); `None` for a random one.
    """
    drafter, decoder = CoralDrafter.from_target(target).float(), decoder_of(target)
    _check_layers(target, drafter.config)
    theirs, final_gain = decoder.layers[-1], decoder.norm.weight.detach().float()
    tensors = {name: tensor.float() for name, tensor in theirs.state_dict().items()}
    wanted = {**drafter.layers[0].state_dict(), INPUT_NORM: final_gain}
    check_tensors(tensors, wanted, f"The target's last layer ({type(theirs).__name__})")
    input_gain = tensors.pop(INPUT_NORM)
    tensors = in_feature_units(tensors, input_gain, final_gain, _stream_size(target))
    drafter.layers[0].load_state_dict(tensors)
    if fc is not None:
        unit = torch.eye(drafter.config.hidden_size, device=drafter.fc.weight.device)
        drafter.fc.load_state_dict({"weight": torch.cat([factor * unit for factor in fc], dim=1)})
    return drafter


def in_feature_units(
    tensors: dict[str, Tensor], input_gain: Tensor, final_gain: Tensor, size: float
) -> dict[str, Tensor]:
    """Rescale the weights of a layer so that it reads features and adds to them.

    A target's layer reads its stream x, of root mean square `size`, as g_in · x / size; a feature
    is g_final · x / size. So projections that read are multiplied by g_in / g_final, and those
    whose outputs are added to the stream by g_final / size; no input norm is needed.

    Args:
        tensors: of the layer, without its input norm; matrices (out, in).
        input_gain, final_gain: (hidden,), weights of the input norm and of the final norm.
        size: root mean square of the stream.
    """
    power = final_gain.square().mean()
    inverse = final_gain / (final_gain.square() + 1e-4 * power)  # a gain of 0 has none
    factors = {
        "post_attention_layernorm.weight": power.sqrt() * inverse,
        "self_attn.o_proj.weight": (final_gain / size)[:, None],
        "mlp.down_proj.weight": (final_gain / size)[:, None],
    }
    for name in ("q_proj", "k_proj", "v_proj"):
        factors[f"self_attn.{name}.weight"] = (input_gain * inverse)[None]
    return {name: tensor * factors.get(name, 1.0) for name, tensor in tensors.items()}


@torch.no_grad()
def _stream_size(target: PreTrainedModel, num_tokens: int = 64) -> float:
    """Measure the root mean square of the last layer's input, the median over random tokens."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(
        text_config(target).vocab_size, (1, num_tokens), generator=generator, device="cpu"
    )
    device = decoder_of(target).device
    output = decoder_of(target)(ids.to(device), output_hidden_states=True, use_cache=False)
    stream = output.hidden_states[-2].float()  # (1, num_tokens, hidden)
    return float(stream.square().mean(-1).sqrt().median())


def _check_layers(target: PreTrainedModel, config: CoralConfig) -> None:
    """Raise a ValueError for layers that compute something else from tensors of the same names.

    Tensors may have any shape, such as (hidden, hidden); shapes are checked later.
    """
    text, decoder, reason = text_config(target), decoder_of(target), None
    assert config.head_dim, "the config fills it in"
    scale = config.head_dim**-0.5
    activation = getattr(text, "hidden_activation", None) or getattr(text, "hidden_act", None)
    if not hasattr(decoder, "layers") or not hasattr(decoder, "norm"):
        reason = f"its decoder {type(decoder).__name__} has no `layers` or no `norm`"
    elif activation is None or type(ACT2FN[activation]) is not type(ACT2FN[config.hidden_act]):
        reason = f"its activation is {activation!r}, the drafter's {config.hidden_act!r}"
    elif getattr(text, "residual_multiplier", 1.0) != 1.0:
        reason = "it scales what a layer adds (`residual_multiplier`)"
    elif getattr(text, "attention_multiplier", scale) != scale:
        reason = "it scales its attention (`attention_multiplier`)"
    elif not (getattr(text, "no_rope_layers", None) or [1])[-1]:
        reason = "its last layer has no rotary positions (`no_rope_layers`)"
    elif any(tensor.is_meta for tensor in decoder.layers[-1].state_dict().values()):
        reason = "its last layer is offloaded"
    if reason is not None:
        raise ValueError(
            f"The last layer of {type(target).__name__} cannot start a drafter: {reason}; start"
            " from random weights, or from another drafter."
        )
