"""Everything that is read from a target: features, embeddings, LM head, positions, windows.

In: any decoder of transformers, unmodified. Out: a `Target`, gathered when a call begins and never
kept in a drafter, so that `state_dict` stays clean and threads can share a drafter.
"""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import LinearAttentionLayer
from transformers.generation.utils import GenerateDecoderOnlyOutput
from transformers.utils import logging

from .identity import full_name
from .lm_head import LMHead, execution_device

logger = logging.get_logger(__name__)

# index of the feature in a target's `hidden_states`, taken after the final norm; given this index,
# newer versions of transformers keep that one only and older ones keep them all
FEATURE = -1
# whether `output_hidden_states` may name several, as from transformers 5.24 on
NAMES_STATES = "cache" in GenerateDecoderOnlyOutput.__dataclass_fields__
CONVOLUTION = -1  # instead of a window: no slot is attended to, the states of a convolution are


class Scales(NamedTuple):
    """What a target does to embeddings and logits outside of its embedding and LM head modules."""

    embedding: float = 1.0  # embeddings are multiplied by it (Granite)
    logit: float = 1.0  # the LM head's output is multiplied by it (Granite, Cohere)
    softcap: float | None = None  # the cap c of c·tanh(logits / c) (Gemma 2)


def read_scales(text: PreTrainedConfig) -> Scales:
    """Read the scales of a target from its text config."""
    factor = getattr(text, "logit_scale", None) or 1.0
    if isinstance(factor, str):  # MPT names a rule, which transformers does not apply
        factor = 1.0
    divisor = getattr(text, "logits_scaling", None) or 1.0
    embedding = getattr(text, "embedding_multiplier", None) or 1.0
    softcap = getattr(text, "final_logit_softcapping", None)
    softcap = None if softcap is None else float(softcap)
    return Scales(float(embedding), float(factor / divisor), softcap)


@dataclass(frozen=True)
class Target:
    """What a drafter reads of its target, for one call."""

    model: PreTrainedModel
    head: LMHead
    embeddings: nn.Module  # (batch, length) → (batch, length, hidden)
    embedding_scale: float

    @property
    def device(self) -> torch.device:
        """The device that token ids belong on."""
        return execution_device(self.embeddings)

    def embed(self, tokens: Tensor) -> Tensor:
        """Embed tokens (batch, length) as the target's first layer sees them.

        Returns:
            (batch, length, hidden)
        """
        embeddings = self.embeddings(tokens.to(self.device))
        return embeddings if self.embedding_scale == 1.0 else embeddings * self.embedding_scale


def read_target(model: PreTrainedModel) -> Target:
    """Gather what a drafter reads of a target.

    Raises:
        ValueError: if the target has no LM head.
    """
    output, text = model.get_output_embeddings(), text_config(model)
    if output is None:
        raise ValueError(
            f"The target {type(model).__name__} has no LM head; load it with AutoModelForCausalLM."
        )
    scales = read_scales(text)
    head = LMHead(output, scales.logit, scales.softcap)
    return Target(model, head, model.get_input_embeddings(), scales.embedding)


def text_config(model: PreTrainedModel) -> PreTrainedConfig:
    """Return the config of the part of a target that decodes text."""
    return model.config.get_text_config(decoder=True)


@torch.no_grad()
def read_features(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor | dict[str, Tensor] | None,
    position_ids: Tensor | None = None,
    layers: tuple[int, ...] = (FEATURE,),
) -> Tensor:
    """Compute the target's features of a padded batch, without its LM head.

    Args:
        input_ids: (batch, length).
        attention_mask: of padding (batch, length), or what is added to the scores of each token
            (batch, 1, length, length), perhaps by layer type.
        position_ids: (batch, length). If there is no mask, transformers finds the documents of
            packed rows by them: positions begin at 0 with each, and none attends to another.
        layers: indices into `hidden_states`; -1 is the one after the final norm.

    Returns:
        (batch, length, len(layers) · hidden), side by side.
    """
    inner = tuple(layer for layer in layers if layer != FEATURE)
    given: dict = {"attention_mask": attention_mask, "use_cache": False}
    given["output_hidden_states"] = named_states(model, inner)
    if position_ids is not None:
        given["position_ids"] = position_ids
    output = decoder_of(model)(input_ids=input_ids, **given)
    last = output.last_hidden_state
    states = [last if n == FEATURE else output.hidden_states[n].to(last.device) for n in layers]
    return torch.cat(states, dim=-1) if inner else last


def named_states(model: PreTrainedModel, layers: tuple[int, ...]) -> bool | int | list[int]:
    """The value of `output_hidden_states` that returns at least the states of some layers.

    Newer versions of transformers return the named states alone; older ones return all for -1, and
    know no -1 in a list.
    """
    # a layer may be left out, which shifts the indices of hidden states
    is_named = counts_layers(model) and 0 not in sliding_windows(model)
    if not layers or not is_named:
        return bool(layers)
    if layers == (FEATURE,):
        return FEATURE
    return list(layers) if NAMES_STATES else True


def decoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """Return the part of a target that computes its features, without the LM head."""
    decoder = model.get_decoder()
    if not isinstance(decoder, PreTrainedModel):  # ModernBERT has an LM head of this name
        decoder = model.base_model
    if decoder.get_output_embeddings() is None:
        return decoder
    # the name of Llama 4's decoder is not the one that transformers looks for
    return next(part for part in decoder.children() if isinstance(part, PreTrainedModel))


def takes_positions(model: nn.Module) -> bool:
    """Whether a model's `forward` can be told the positions of its tokens.

    Where it takes any keyword, as a wrapper does, those are asked that it may hand them to.
    """
    own = [vars(kind)["forward"] for kind in type(model).__mro__ if "forward" in vars(kind)]
    for forward in (model.forward, *own):
        parameters = inspect.signature(forward).parameters
        if "position_ids" in parameters:
            return True
        if not any(one.kind is one.VAR_KEYWORD for one in parameters.values()):
            break
    return False


def all_modules(model: nn.Module) -> Iterator[nn.Module]:
    """A target and all that is within it, many times as fast as torch's own `modules`."""
    waiting = [model]
    while waiting:
        module = waiting.pop()
        yield module
        waiting.extend(part for part in module._modules.values() if part is not None)


def counts_layers(model: PreTrainedModel) -> bool:
    """Whether the layers of a target are as many as its config says; BART's counts an encoder's."""
    decoder = decoder_of(model)
    layers = getattr(decoder, "layers", None)
    return layers is None or len(layers) == getattr(decoder.config, "num_hidden_layers", None)


def position_limit(model: PreTrainedModel) -> int | None:
    """Return the number of positions of a target that looks them up in a table, else None.

    Rotary positions and ALiBi have no limit, as in plain `generate`.
    """
    text = text_config(model)
    has_rope, has_alibi = getattr(text, "rope_parameters", None), getattr(text, "alibi", False)
    is_looked_up = takes_positions(model) and has_rope is None and not has_alibi
    return max_positions(text) if is_looked_up else None


def max_positions(text: PreTrainedConfig) -> int | None:
    """Return the longest sequence a target is made for; None where it does not say (BLOOM)."""
    # the latter in MPT
    return getattr(text, "max_position_embeddings", None) or getattr(text, "max_seq_len", None)


def sliding_windows(model: PreTrainedModel) -> list[int | None]:
    """Return the attention window of each layer of a target, None for full attention.

    A layer that attends to no text, but to images alone (Mllama), has a window of 0, and one that
    holds the states of a convolution (LFM2) a window of `CONVOLUTION`.
    """
    windows: list[int | None] = []
    text, layers = text_config(model), DynamicCache(config=model.config).layers
    types = getattr(text, "layer_types", None) or [""] * len(layers)
    for layer, kind in zip(layers, types, strict=False):
        if isinstance(layer, LinearAttentionLayer):
            windows.append(CONVOLUTION)
        elif hasattr(layer, "is_sliding"):
            windows.append(layer.sliding_window if layer.is_sliding else None)
        else:  # one that shares another layer's keys, and so its window
            windows.append(text.sliding_window if kind == "sliding_attention" else None)
    images = getattr(text, "cross_attention_layers", None) or ()
    return [0 if index in images else window for index, window in enumerate(windows)]


def check_target(
    config: PreTrainedConfig, model: PreTrainedModel, takes_other_vocabulary: bool = False
) -> None:
    """Raise a ValueError if a drafter with `config` does not fit a target.

    What a target must be for any drafter is the guard's to say, `decoding.guard.accept_target`.

    Args:
        takes_other_vocabulary: whether the target may have gained or lost rows of its embedding
            since, as it does where its tokenizer gained tokens or a padding was added.
    """
    is_same_type = config.target_model_type in (None, model.config.model_type)
    width = getattr(config, "target_hidden_size", config.hidden_size)  # a drafter may differ
    expected_sizes = {
        "hidden_size": width,
        "vocab_size": config.vocab_size,
        "num_hidden_layers": getattr(config, "target_num_layers", None),  # None: of any number
    }
    for name, expected in expected_sizes.items():
        found = getattr(text_config(model), name, None)
        if expected in (None, found):
            continue
        if name == "vocab_size" and takes_other_vocabulary and is_same_type:
            logger.warning_once(
                f"`vocab_size` of the target is {found}, that of the drafter {expected}: the output"
                " is still the target's own, and what the draft head does not know is not drafted."
                " If this is another model than the drafter's own, expect few accepted tokens."
            )
            continue
        raise ValueError(
            f"`{name}` of the target is {found}, but the drafter was made for a target with"
            f" {expected} ({config.target_name_or_path or 'unnamed'}). Use the drafter's own"
            " target, or train a drafter for this one, from its `from_target(target)`."
        )
    if not is_same_type:
        logger.warning_once(
            f"The drafter was made for a {config.target_model_type} target and is used with a"
            f" {model.config.model_type} target of the same sizes. The output is still the target's"
            " own; expect few accepted tokens."
        )
    # no error: a drafter still does well for a fine-tuned target; and a folder may be given by its
    # whole path or from where one stands
    name = model.config._name_or_path
    names = (None, name, full_name(name))
    if config.target_name_or_path not in names:
        logger.info_once(f"The drafter was made for {config.target_name_or_path}, not for {name}.")
