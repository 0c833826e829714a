"""Checkpoints of EAGLE-3 (Li et al. 2025), as four trainers write them, and of P-EAGLE.

In: a config and tensors. Out: an `Eagle3Drafter` or a `ParallelDrafter`, and its tensors.

                    first layer   config                     hidden states of the target
    SafeAILab       midlayer      top level                  inputs of layers 2, L // 2, L - 3
    SpecForge       midlayer      top level                  listed in `eagle_config`, or as above
    Model-Optimizer layers.0      top level                  listed in `eagle_config`
    speculators     layers.0      transformer_layer_config   listed at the top level

The list at the top level counts inputs of layers. One in `eagle_config` counts outputs, as both
trainers write it and as SGLang reads it for a Llama, unless it is the published default in inputs
or names the output of the last layer as one. P-EAGLE has beside that

                   shared hidden state              mask token, in config.json
    AWS            mask_hidden (1, 1, 3 · hidden)   ptd_token_id
    speculators    mask_hidden (1, 1, 3 · hidden)   mask_token_id, speculators_model_type "peagle"
    vLLM reads     mask_hidden, of any shape        pard_token, ptd_token_id, mask_token_id

The mask embedding is the mask token's row of `embed_tokens.weight` there, and a tensor of its own
here. This was read from the code of trainers and engines, and from published names and shapes, not
from a checkpoint.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedModel

from ..drafters.eagle3 import Eagle3Config, Eagle3Drafter, ParallelDrafter, default_layers
from ..target import Target, check_target, read_target, text_config
from .eagle import EMBEDDINGS, check_table, is_plain, read_eagle_shape, table_scale
from .files import Checkpoint

HIDDEN, EMBEDDING = "mask_hidden", "mask_embedding"
TOKEN = "ptd_token_id"  # as it is written
TOKENS = ("pard_token", TOKEN, "mask_token_id")
SWITCHES = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
LAYERS = "eagle_aux_hidden_state_layer_ids"
# what an EAGLE-3 drafter has and an EAGLE-1 drafter has not
OWN_TENSORS = ("d2t", "t2d", "midlayer.", "hidden_norm.", "layers.0.hidden_norm.")
# patterns of names, as older files have them → ours; the norms are of trainers before 3.1
NAMES = {
    r"^model\.": "",
    r"^midlayer\.": "layers.0.",
    r"^aux_norm_low\.": "fc_norm.0.",
    r"^aux_norm_mid\.": "fc_norm.1.",
    r"^aux_norm_high\.": "fc_norm.2.",
}
# fields that tensors decide; a norm that the config names must be there
FROM_TENSORS = {
    "fc_bias": "fc.bias",
    "attention_bias": "layers.0.self_attn.q_proj.bias",
    "output_bias": "layers.0.self_attn.o_proj.bias",
    "mlp_bias": "layers.0.mlp.down_proj.bias",
    "norm_before_fc": "input_norm.weight",
    "fc_norm": "fc_norm.0.weight",
    "qk_norm": "layers.0.self_attn.q_norm.weight",
    "has_embeddings": EMBEDDINGS,
}


def named_kind(config: dict[str, Any]) -> type[Eagle3Drafter] | None:
    """The family that a config.json says it is of; None for neither EAGLE-3 nor P-EAGLE."""
    kinds = str([config.get("speculators_model_type"), config.get("architectures")]).lower()
    is_eagle3 = config.get("draft_vocab_size") is not None or "eagle3" in kinds
    if "peagle" in kinds or (is_eagle3 and _mask_token(config) is not None):
        return ParallelDrafter
    return Eagle3Drafter if is_eagle3 else None


def _mask_token(config: dict[str, Any]) -> int | None:
    return next((int(config[name]) for name in TOKENS if config.get(name) is not None), None)


def read_eagle3_shape(config: dict[str, Any]) -> dict[str, Any]:
    """Read fields of `Eagle3Config` from a config.json.

    Returns:
        the fields, without those of [`FROM_TENSORS`], those that follow from the target, and what
        it does not say.
    """
    nested, layer = config.get("eagle_config") or {}, config.get("transformer_layer_config")
    said = {**nested, **{name: value for name, value in config.items() if value is not None}}
    fields = config
    if layer is not None:  # speculators leaves out what is its class's default
        fields = CONFIG_MAPPING[layer.get("model_type", "llama")](**layer).to_dict()
    # the tensors tell of biases
    shape = read_eagle_shape({**fields, "bias": None, "qkv_bias": None})
    switches = {name: bool(said[name]) for name in SWITCHES if said.get(name) is not None}
    if layer is not None:  # as vLLM reads an older one
        switches.setdefault("norm_before_residual", True)
    for name in ("draft_vocab_size", "target_hidden_size"):
        shape |= {name: int(said[name])} if said.get(name) is not None else {}
    is_wider = shape.get("target_hidden_size", shape["hidden_size"]) != shape["hidden_size"]
    shape |= {**switches, "has_embeddings": is_wider}
    if named_kind(config) is ParallelDrafter:
        shape["mask_token_id"] = _mask_token(config)
    Eagle3Config(**shape)
    return shape


def fitted_shape(
    shape: dict[str, Any], config: dict[str, Any], target: PreTrainedModel
) -> dict[str, Any]:
    """Add the hidden states that a drafter reads of a target.

    Raises:
        ValueError: if the drafter was made for a target of other sizes.
    """
    vocab_size, depth = text_config(target).vocab_size, text_config(target).num_hidden_layers
    shape = shape | {"target_layers": _target_layers(config, depth), "target_num_layers": depth}
    verifier = (config.get("speculators_config") or {}).get("verifier") or {}
    name = {"target_name_or_path": verifier.get("name_or_path")}
    own = {"vocab_size": max(vocab_size, shape.get("draft_vocab_size", 0))}
    check_target(Eagle3Config(**shape | own | name), target, takes_other_vocabulary=True)
    if depth in shape["target_layers"]:
        raise ValueError(
            f"The EAGLE-3 checkpoint reads the hidden state {depth} before the final norm, and"
            " transformers returns it after that only. Serve it with vLLM or SGLang."
        )
    return shape


def _target_layers(config: dict[str, Any], depth: int) -> list[int]:
    """The indices of hidden states of a target of `depth` layers that a config lists, or means."""
    if config.get(LAYERS):
        return list(config[LAYERS])
    listed = (config.get("eagle_config") or {}).get(LAYERS) or default_layers(depth)
    counts_inputs = list(listed) == default_layers(depth) or depth in listed
    return [layer + (not counts_inputs) for layer in listed]


def eagle3_drafter(
    target: PreTrainedModel, found: Checkpoint, tensors: dict[str, Tensor]
) -> Eagle3Drafter:
    """Make a drafter of a checkpoint's sizes, and bring its tensors into our form."""
    # of a config that does not tell EAGLE-3 from EAGLE-1, the fields were read as EAGLE-1's
    shape = fitted_shape(read_eagle3_shape(found.config), found.config, target)
    if "lm_head.weight" in tensors:
        shape = {"draft_vocab_size": len(tensors["lm_head.weight"])} | shape
    bound, kind, has_table = read_target(target), Eagle3Drafter, EMBEDDINGS in tensors
    if HIDDEN in tensors or "mask_token_id" in shape:
        kind = ParallelDrafter
        _split_table(tensors, bound, shape.get("mask_token_id"), found.folder)
    _settle_embeddings(tensors, bound, shape["has_embeddings"])
    shape |= {
        field: name in tensors or shape.get(field, False) for field, name in FROM_TENSORS.items()
    }
    drafter = kind.from_target(target, **shape)
    check_target(drafter.config, target, takes_other_vocabulary=has_table)
    vocab_size, size = drafter.config.vocab_size, drafter.config.draft_vocab_size
    if size == vocab_size:
        tensors.setdefault("d2t", torch.zeros(size, dtype=torch.long))
    if "d2t" in tensors and tensors["d2t"].shape == drafter.d2t.shape:
        drafter.set_draft_vocabulary(tensors["d2t"].cpu().long() + torch.arange(size))
        tensors["t2d"] = drafter.t2d  # which follows
    return drafter


def _split_table(
    tensors: dict[str, Tensor], target: Target, token: int | None, folder: Path
) -> None:
    """Make the mask embedding a tensor of its own, in the place of a row of a table.

    The table, (vocab, hidden), gets the target's own row there, so that one which is the target's
    is known as such.

    Raises:
        ValueError: if no token is named, or one that is none.
    """
    own, found = target.embeddings.weight, tensors.get(EMBEDDINGS)
    table = own.detach() if found is None else found
    if token is None or not 0 <= token < len(table):
        raise ValueError(
            f"{folder} is a P-EAGLE drafter: its config.json names its mask token as one of"
            f" {', '.join(TOKENS)}; expected a token from 0 to {len(table) - 1}, found {token}."
        )
    tensors[EMBEDDING] = table[token].cpu().reshape(1, 1, -1).clone()
    if HIDDEN in tensors:
        tensors[HIDDEN] = tensors[HIDDEN].reshape(1, 1, -1)
    if found is not None and is_plain(own) and token < len(own) and found.shape[1] == own.shape[1]:
        tensors[EMBEDDINGS] = found.clone()
        tensors[EMBEDDINGS][token] = own[token].detach().to(found)


def _settle_embeddings(tensors: dict[str, Tensor], target: Target, is_wider: bool) -> None:
    """Drop embeddings (vocab, hidden) that are the target's own, which the drafter reads then.

    Where the target scales its embeddings, the drafter gets a copy of the rows, as engines feed
    them.

    Raises:
        ValueError: if they are of another target.
    """
    own, found = target.embeddings.weight, tensors.get(EMBEDDINGS)
    if found is None:
        if table_scale(target) != 1.0 and not is_wider:
            tensors[EMBEDDINGS] = own.detach().cpu().clone()
    elif is_plain(own) and found.shape[-1] == own.shape[-1]:  # else there is nothing to compare
        check_table(EMBEDDINGS, found, own)
        rows = min(len(found), len(own))
        is_own = found[:rows].equal(own.detach()[:rows].to(found.device, found.dtype))
        if is_own and table_scale(target) == 1.0:
            del tensors[EMBEDDINGS]
