"""Padding of a target with layers: the cost of a deep model with the output of a small one.

In: a target. Out: a new one whose appended decoder layers add nothing, because the matrices that
write into the residual stream are zero. The original layers are shared, the appended ones own their
weights: reading them is what makes a deep target expensive.
"""

from copy import deepcopy
from itertools import takewhile

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..target import decoder_of

# what writes attention and MLP into the residual stream, in Llama and its descendants
WRITERS = ("o_proj", "down_proj")


def pad_target(target: PreTrainedModel, num_layers: int) -> PreTrainedModel:
    """Build a target of `num_layers` layers that computes the same: those appended add nothing.

    Raises:
        ValueError: for fewer layers than the target has, and a target that is not built like Llama.
    """
    num_own = len(decoder_layers(target))
    if not 0 < num_own <= num_layers:
        raise ValueError(
            f"`num_layers` is {num_layers}, but {type(target).__name__} has a list of {num_own}"
            " `layers`; choose a target built like Llama and no fewer layers."
        )
    # its modules and config are its own, its tensors those of the target
    tensors = [*target.parameters(), *target.buffers()]
    padded = deepcopy(target, {id(tensor): tensor for tensor in tensors})
    extend_config(padded.config.get_text_config(), num_layers)
    layers = decoder_layers(padded)
    for index in range(num_own, num_layers):
        layers.append(silent_copy(layers[index % num_own], index))
    check_same_function(target, padded)
    return padded


def num_padded_layers(target: PreTrainedModel) -> int:
    """Count the last layers of a target that add nothing."""
    writers = map(writing_parameters, reversed(decoder_layers(target)))
    silent = takewhile(lambda own: own and not any(one.any() for one in own), writers)
    return len(list(silent))


def shown_depth(num_layers: int, num_padded: int) -> str:
    """Say how many layers a target has, and how many of them are padding."""
    padding = f", {num_padded} of them padding that costs time and changes nothing"
    return f"{num_layers} layers{padding if num_padded else ''}"


def decoder_layers(target: PreTrainedModel) -> nn.ModuleList:
    """Return the layers of the decoder, (batch, length, hidden) in and out; none if elsewhere."""
    layers = dict(decoder_of(target).named_children()).get("layers")
    return layers if isinstance(layers, nn.ModuleList) else nn.ModuleList()


def extend_config(config: PreTrainedConfig, num_layers: int) -> None:
    """Set the depth, and repeat what the config lists by layer (`layer_types`, ...) up to it."""
    num_own = config.num_hidden_layers
    for name, value in config.to_dict().items():
        if "layer" in name and isinstance(value, list) and len(value) == num_own:
            setattr(config, name, [value[i % num_own] for i in range(num_layers)])
    config.num_hidden_layers = num_layers


def silent_copy(layer: nn.Module, index: int) -> nn.Module:
    """Copy a layer so that it adds nothing to the residual stream, with its own cache index.

    The weights that write into the stream, (hidden, width), become zero.
    """
    copy = deepcopy(layer)
    for parameter in writing_parameters(copy):
        parameter.data.zero_()
    for module in copy.modules():
        # a plain attribute on the attention, here and there on the layer or the MLP too
        if "layer_idx" in vars(module):
            module.layer_idx = index
    return copy


def writing_parameters(layer: nn.Module) -> list[nn.Parameter]:
    """List the weights (hidden, width) that write into the residual stream, with their biases."""
    return [
        parameter
        for name, parameter in layer.named_parameters()
        if any(part.startswith(WRITERS) for part in name.split("."))
    ]


@torch.no_grad()
def check_same_function(target: PreTrainedModel, padded: PreTrainedModel) -> None:
    """Raise a ValueError if padding changes logits: the family writes elsewhere, or rescales."""
    vocab = target.config.get_text_config().vocab_size
    ids = torch.arange(1, 9, device=target.device)[None] % vocab  # (1, 8)
    expected, found = (
        model(input_ids=ids, use_cache=False).logits[:, -1].float() for model in (target, padded)
    )  # (1, vocab)
    difference = (expected - found).abs().max().item()
    if not difference <= 1e-6 * max(1.0, expected.abs().max().item()):
        raise ValueError(
            f"Padding {type(target).__name__} changes its logits by {difference:.3g}: it writes"
            f" into the residual stream by more than {WRITERS}; choose a target built like Llama."
        )
