"""Everything that is read from a target: features, embeddings, LM head, and what it supports.

In: any decoder of transformers, unmodified. Out: a `Target`, gathered when a call begins and never
kept in a drafter, so that `state_dict` stays clean and threads can share a drafter; and obstacles,
which say what a target cannot do.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.integrations.fsdp import is_fsdp_managed_module
from transformers.utils import logging

from .identity import full_name
from .lm_head import LMHead, execution_device

logger = logging.get_logger(__name__)

# index of the feature in a target's `hidden_states`, taken after the final norm; given this index,
# newer versions of transformers keep that one only and older ones keep them all
FEATURE = -1
# attention functions that add a float mask (batch, 1, queries, keys) to their scores
MASKED_ATTENTION = ("eager", "sdpa")
# layer types whose mask follows from positions alone
MASKED_LAYERS = ("full_attention", "sliding_attention")


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
    softcap = getattr(text, "final_logit_softcapping", None)
    return Scales(
        embedding=float(getattr(text, "embedding_multiplier", None) or 1.0),
        logit=float(factor / divisor),
        softcap=None if softcap is None else float(softcap),
    )


def may_scale(text: PreTrainedConfig) -> bool:
    """Whether targets with this kind of config can have [`Scales`], whatever its values are."""
    names = ("embedding_multiplier", "logit_scale", "logits_scaling", "final_logit_softcapping")
    return any(hasattr(text, name) for name in names)


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
    return Target(
        model=model,
        head=LMHead(output, scales.logit, scales.softcap),
        embeddings=model.get_input_embeddings(),
        embedding_scale=scales.embedding,
    )


def text_config(model: PreTrainedModel) -> PreTrainedConfig:
    """Return the config of the part of a target that decodes text."""
    return model.config.get_text_config(decoder=True)


@torch.no_grad()
def read_features(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    position_ids: Tensor | None = None,
) -> Tensor:
    """Compute the target's features of a padded batch, without its LM head.

    Args:
        input_ids, attention_mask: (batch, length).
        position_ids: (batch, length), for packed rows: positions begin at 0 with each document, and
            no document attends to another. See [`reads_packed_rows`].

    Returns:
        (batch, length, hidden), after the final norm.
    """
    # transformers finds the documents of packed rows by their positions, if there is no mask
    rows = (
        {"attention_mask": attention_mask}
        if position_ids is None
        else {"position_ids": position_ids}
    )
    output = model.get_decoder()(input_ids=input_ids, use_cache=False, **rows)
    return output.last_hidden_state


def reads_packed_rows(model: PreTrainedModel, device: torch.device) -> bool:
    """Whether a target keeps the documents of a packed row apart, found by trying.

    Most models of transformers do; some take no positions, others attend across documents.
    """
    if not takes_positions(model.get_decoder().forward):
        return False
    lengths = (5, 8)
    # (2, length): some kinds of attention tell documents apart in a single row only
    ids = torch.arange(2 * sum(lengths), device=device).view(2, -1) % text_config(model).vocab_size
    mask = torch.ones_like(ids)
    positions = torch.cat([torch.arange(length, device=device) for length in lengths])
    positions = positions.expand_as(ids)
    second = slice(lengths[0], None)
    alone = read_features(model, ids[:, second], mask[:, second])
    packed = read_features(model, ids, mask, positions)[:, second]
    as_one = read_features(model, ids, mask)[:, second]
    # a difference far below what attending to the first document makes is rounding
    return bool((packed - alone).abs().mean() < 0.1 * (as_one - alone).abs().mean())


def takes_positions(forward: Callable) -> bool:
    """Whether a model's `forward` can be told the positions of its tokens."""
    return "position_ids" in inspect.signature(forward).parameters


def stream_obstacle(model: PreTrainedModel) -> str | None:
    """Say why a target has no single feature per token, or return None."""
    streams = getattr(text_config(model), "altup_num_inputs", 1)
    if streams == 1:
        return None
    return f"it has {streams} hidden states per token (`altup_num_inputs`), and a drafter reads one"


def tree_obstacle(model: PreTrainedModel) -> str | None:
    """Say why a target cannot verify a tree, from what it declares, or return None."""
    attention, text = model.config._attn_implementation, text_config(model)
    if attention not in MASKED_ATTENTION:
        return f"its attention {attention!r} takes no 4-D mask (of {MASKED_ATTENTION})"
    if not takes_positions(model.forward):
        return "its forward takes no `position_ids`"
    if getattr(text, "alibi", False):
        return "its positions are ALiBi biases, which follow the order of the KV slots"
    foreign = sorted(set(getattr(text, "layer_types", None) or ()) - set(MASKED_LAYERS))
    if foreign:
        return f"its layers of type {', '.join(foreign)} attend to other slots than a mask allows"
    if "local" in getattr(text, "attention_layers", ()):  # GPT-Neo
        return "the window of its local attention counts KV slots, not positions"
    return None


def cache_obstacle(model: PreTrainedModel) -> str | None:
    """Say why a target's cache cannot drop rejected tokens, or return None."""
    kinds = {type(layer) for layer in DynamicCache(config=model.config).layers}
    foreign = sorted(kind.__name__ for kind in kinds - {DynamicLayer, DynamicSlidingWindowLayer})
    if foreign:
        kinds_found = ", ".join(foreign)
        return f"its cache has layers of kind {kinds_found}, which cannot drop rejected tokens"
    if model._is_stateful:
        return "its recurrent state cannot drop rejected tokens"
    return None


def adapter_obstacle(model: PreTrainedModel) -> str | None:
    """Say why a drafter cannot follow a target's PEFT adapter, or return None."""
    # where PEFT learns a prompt, it replaces this method of the target for the time of a call
    wrapper = getattr(model.prepare_inputs_for_generation, "__self__", model)
    around = getattr(wrapper, "active_peft_config", None)
    if around is not None and around.is_prompt_learning:
        return f"its adapter ({around.peft_type.value}) puts virtual tokens before the prompt"
    within = getattr(model, "peft_config", {}).values()
    if any(getattr(adapter, "alora_invocation_tokens", None) for adapter in within):
        return "its adapter (aLoRA) starts to act at a position in the sequence"
    return None


def sharding_obstacle(model: PreTrainedModel) -> str | None:
    """Say why processes that each hold a shard of a target cannot draft, or return None.

    They would run different numbers of forward passes, and wait for each other's weights.
    """
    # FSDP2 may wrap only a target's layers; ZeRO-3 marks the weights that it shards
    is_sharded = (
        is_fsdp_managed_module(model)
        or any(isinstance(module, FSDPModule) for module in model.modules())
        or any(hasattr(weight, "ds_id") for weight in model.parameters())
    )
    if not is_sharded:
        return None
    count = distributed.get_world_size() if distributed.is_initialized() else 1
    return None if count == 1 else f"its weights are sharded over {count} processes"


def position_limit(model: PreTrainedModel) -> int | None:
    """Return the number of positions of a target that looks them up in a table, else None.

    Rotary positions and ALiBi have no limit, as in plain `generate`.
    """
    text = text_config(model)
    has_rope, has_alibi = getattr(text, "rope_parameters", None), getattr(text, "alibi", False)
    is_looked_up = takes_positions(model.forward) and has_rope is None and not has_alibi
    return max_positions(text) if is_looked_up else None


def max_positions(text: PreTrainedConfig) -> int | None:
    """Return the longest sequence a target is made for; None where it does not say (BLOOM)."""
    for name in ("max_position_embeddings", "max_seq_len"):  # the latter in MPT
        if getattr(text, name, None) is not None:
            return getattr(text, name)
    return None


def sliding_windows(model: PreTrainedModel) -> list[int | None]:
    """Return the attention window of each layer of a target, None for full attention."""
    layers = DynamicCache(config=model.config).layers
    return [layer.sliding_window if layer.is_sliding else None for layer in layers]


def check_target(config: PreTrainedConfig, model: PreTrainedModel) -> None:
    """Raise a ValueError if a drafter with `config` does not fit a target.

    It was made for a target of other sizes, the target has no single feature per token, or the
    target has an adapter that no drafter can follow.
    """
    text = text_config(model)
    for name in ("hidden_size", "vocab_size"):
        expected, found = getattr(config, name), getattr(text, name)
        if expected != found:
            raise ValueError(
                f"`{name}` of the target is {found}, but the drafter was made for a target with"
                f" {expected} ({config.target_name_or_path or 'unnamed'}). Use the drafter's own"
                " target, or train a drafter for this one with CoralDrafter.from_target(target)."
            )
    obstacle = stream_obstacle(model) or adapter_obstacle(model)
    if obstacle is not None:
        raise ValueError(f"The target {type(model).__name__} cannot take a drafter: {obstacle}.")
    _warn_of_other_target(model.config, config)


def _warn_of_other_target(found: PreTrainedConfig, config: PreTrainedConfig) -> None:
    """Warn of a target of another family than the drafter was made for.

    Another name is not an error: a drafter still does well for a fine-tuned target.
    """
    if config.target_model_type not in (None, found.model_type):
        logger.warning_once(
            f"The drafter was made for a {config.target_model_type} target and is used with a"
            f" {found.model_type} target of the same sizes. The output is still the target's own;"
            " expect few accepted tokens."
        )
    # a folder may be given by its whole path or from where one stands
    names = (None, found._name_or_path, full_name(found._name_or_path))
    if config.target_name_or_path not in names:
        logger.info(f"The drafter was made for {config.target_name_or_path}, not for {names[1]}.")
