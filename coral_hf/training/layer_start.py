"""Drafters that start from a layer of their target: its last one, or an MTP layer that it ships.

In: a target. Out: a CORAL drafter in fp32, whose layer is the target's, in the units of features.

    the target    embedding → layers → input norm → the last layer → final norm → feature
    the drafter   fc [embedding; feature] →        layer without input norm →      feature

An MTP layer (multi-token prediction, DeepSeek-V3) has the data flow of a drafter and more norms:

    MTP           z = W [n_e(e(x_{t+1})); n_h(f_t)]   y = z + layer(n_in(z))   head(n_out(y))
    the drafter   z = fc [e(x_{t+1}); f_t]            f̂ = z + layer(z)         head(f̂)

Its norms become their gains over sizes that are measured on random tokens: n_e, n_h and n_in go
into the columns of the weights that read, n_out into the rows of those that write.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from ..checkpoints import check_tensors
from ..checkpoints.files import check_dense, read_beginning
from ..drafters.coral import CoralConfig, CoralDrafter
from ..target import decoder_of, read_features, read_target, text_config

# the first layer of a drafter does not normalise the output of `fc`
INPUT_NORM = "input_layernorm.weight"
NUM_TOKENS = 64  # random ones, on which sizes are measured


class MTPLayout(NamedTuple):
    """Names of the tensors of an MTP layer, in the files of a target."""

    beginning: str  # `{depth}`: the number of the target's layers
    embedding_norm: str
    feature_norm: str
    projection: str
    output_norm: str
    layer: str = ""  # what names of the decoder layer begin with
    is_feature_first: bool = False  # in what the projection reads


LAYOUTS = (
    # MiMo
    MTPLayout(
        "model.mtp_layers.0.",
        *("token_layernorm", "hidden_layernorm", "input_proj", "final_layernorm"),
        is_feature_first=True,
    ),
    # DeepSeek-V3, GLM-4.5
    MTPLayout("model.layers.{depth}.", "enorm", "hnorm", "eh_proj", "shared_head.norm"),
    # Qwen3-Next
    MTPLayout(
        "mtp.", "pre_fc_norm_embedding", "pre_fc_norm_hidden", "fc", "norm", layer="layers.0."
    ),
)
COPIES = ("embed_tokens.weight", "shared_head.head.weight")  # of the target's own


@torch.no_grad()
def from_layer(target: PreTrainedModel, fc: tuple[float, float] | None = (0, 1)) -> CoralDrafter:
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
    # the root mean square of the last layer's input, the median over random tokens
    output = decoder(_random_tokens(target), output_hidden_states=True, use_cache=False)
    size = float(_sizes(output.hidden_states[-2].float()).median())
    drafter.layers[0].load_state_dict(in_feature_units(tensors, input_gain, final_gain, size))
    if fc is not None:
        unit = torch.eye(drafter.config.hidden_size, device=drafter.fc.weight.device)
        drafter.fc.load_state_dict({"weight": torch.cat([factor * unit for factor in fc], dim=1)})
    return drafter


@torch.no_grad()
def from_mtp(target: PreTrainedModel) -> CoralDrafter:
    """Make a drafter with the weights of the MTP layer that a target's checkpoint ships.

    transformers does not load such layers: they are read from the target's files.

    Raises:
        ValueError: if there is none, or a tensor of it has no place in a drafter.
    """
    drafter = CoralDrafter.from_target(target).float()
    _check_layers(target, drafter.config)
    layout, found = _read_mtp(target)
    body, gain = drafter.layers[0].state_dict(), drafter.layers[0].post_attention_layernorm.weight
    wanted = {layout.layer + name: tensor for name, tensor in {**body, INPUT_NORM: gain}.items()}
    norms = [layout.embedding_norm, layout.feature_norm, layout.output_norm]
    wanted |= {f"{name}.weight": gain for name in norms}
    wanted[f"{layout.projection}.weight"] = drafter.fc.weight
    check_tensors(found, wanted, f"The MTP layer of {target.name_or_path}")
    found = {name: tensor.to(gain.device, torch.float32) for name, tensor in found.items()}
    embedding_gain, feature_gain, output_gain = (found.pop(f"{name}.weight") for name in norms)
    halves = found.pop(f"{layout.projection}.weight").chunk(2, dim=1)  # (hidden, hidden) each
    first, second = reversed(halves) if layout.is_feature_first else halves
    reads = first * embedding_gain, second * feature_gain
    ids = _random_tokens(target)
    features = read_features(target, ids, torch.ones_like(ids))[:, :-1].float()
    inputs = read_target(target).embed(ids[:, 1:]).float(), features  # (1, tokens, hidden) each
    parts = [one / _sizes(one) @ weight.T for one, weight in zip(inputs, reads, strict=True)]
    size = float(_sizes(parts[0] + parts[1]).median())
    columns = [w / float(_sizes(one).median()) for w, one in zip(reads, inputs, strict=True)]
    drafter.fc.weight.copy_((output_gain / size)[:, None] * torch.cat(columns, dim=1))
    layer = {name.removeprefix(layout.layer): tensor for name, tensor in found.items()}
    input_gain = layer.pop(INPUT_NORM)
    drafter.layers[0].load_state_dict(in_feature_units(layer, input_gain, output_gain, size))
    return drafter


def _read_mtp(target: PreTrainedModel) -> tuple[MTPLayout, dict[str, Tensor]]:
    """Find the MTP layer in a target's files: its layout, and its tensors by their names in it."""
    name, depth = target.name_or_path, text_config(target).num_hidden_layers
    beginnings = [layout.beginning.format(depth=depth) for layout in LAYOUTS]
    revision = getattr(target.config, "_commit_hash", None)
    found = {}
    if name:
        options = {} if Path(name).is_dir() or revision is None else {"revision": revision}
        found = read_beginning(name, tuple(beginnings), **options)
    for layout, beginning in zip(LAYOUTS, beginnings, strict=True):
        own = {n.removeprefix(beginning): t for n, t in found.items() if n.startswith(beginning)}
        if own:
            check_dense(own, Path(name))
            return layout, {n: tensor for n, tensor in own.items() if n not in COPIES}
    raise ValueError(
        f"The target's checkpoint ({name or 'it was loaded from none'}) ships no MTP layer:"
        f" expected tensors in safetensors that begin with one of {', '.join(beginnings)}."
    )


def _sizes(states: Tensor) -> Tensor:
    """Root mean squares: (..., hidden) → (..., 1)."""
    return states.square().mean(-1, keepdim=True).sqrt()


def _random_tokens(target: PreTrainedModel) -> Tensor:
    """Token ids, the same for each target of a vocabulary: (1, tokens)."""
    generator = torch.Generator().manual_seed(0)
    size = text_config(target).vocab_size
    ids = torch.randint(size, (1, NUM_TOKENS), generator=generator, device="cpu")
    return ids.to(decoder_of(target).device)


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
        raise ValueError(f"{type(target).__name__} cannot start a drafter: {reason}.")
