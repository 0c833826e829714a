"""Warm starts: initial weights of a drafter from a layer of its target or from another drafter.

In: a target and a source: "layer" or "mtp", a drafter of another target, or the folder of a
checkpoint. Out: a drafter for the target, in fp32, to be trained. A tensor that fits nowhere is an
error.
"""

import re
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..checkpoints import config_folder, import_drafter, read_config, read_shape
from ..drafters.coral import CoralDrafter
from ..drafters.model import Drafter
from ..identity import tokenizer_hash
from ..target import text_config
from .adapters import is_adapted
from .layer_start import from_layer, from_mtp
from .steps import TrainingStep, step_kind, step_kinds

LAYER, MTP = "layer", "mtp"
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


def warm_start(
    target: PreTrainedModel,
    source: str | Path | Drafter,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Drafter:
    """Make a drafter for `target` that starts from `source`, in fp32 on the target's device.

    All tensors of the source keep their shapes, such as (hidden, 2 * hidden) of `fc`.

    Args:
        source: `"layer"` for the target's own last layer, `"mtp"` for the MTP layer that its
            checkpoint ships; a drafter of another target of the same width, or its folder or Hub
            id; the folder or Hub id of a checkpoint of EAGLE, HASS, P-EAGLE or Medusa. The drafter
            is of the same family, of a layer a CORAL one.
        tokenizer: the target's; draft heads of the source are kept if they were made for it.

    Raises:
        ValueError: if a tensor of the source has no place in the drafter, or the reverse.
    """
    if isinstance(source, Drafter):
        return from_drafter(target, source, tokenizer)
    if str(source) in (LAYER, MTP):
        return from_layer(target) if str(source) == LAYER else from_mtp(target)
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
