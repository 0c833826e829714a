"""All that is read from a target: features, embeddings, LM head, what its attention supports.

In: any decoder of transformers, unmodified. Out: a `Target`, gathered when a call begins and never
kept in a drafter, so that `state_dict` stays clean and threads may share one drafter.
"""

import inspect
from dataclasses import dataclass

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.integrations.fsdp import is_fsdp_managed_module

from .lm_head import LMHead, execution_device

# the feature is the last of a target's `hidden_states`, taken after the final norm; given as an
# index, newer versions of transformers keep that one alone and older ones keep them all
FEATURE = -1
# attention functions that add a 4-D float mask to their scores
MASKED_ATTENTION = ("eager", "sdpa")
# layer types whose mask follows from positions alone
MASKED_LAYERS = ("full_attention", "sliding_attention")


@dataclass(frozen=True)
class Target:
    """What a drafter reads of its target, for one call."""

    model: PreTrainedModel
    head: LMHead
    embeddings: nn.Module  # (batch, length) → (batch, length, hidden)
    embedding_scale: float

    @property
    def device(self) -> torch.device:
        """Where its tokens belong."""
        return execution_device(self.embeddings)

    def embed(self, tokens: Tensor) -> Tensor:
        """(batch, length) → (batch, length, hidden), as the target's first layer sees them."""
        embeddings = self.embeddings(tokens.to(self.device))
        return embeddings if self.embedding_scale == 1.0 else embeddings * self.embedding_scale


def read_target(model: PreTrainedModel) -> Target:
    """Gather what a drafter reads of `model`.

    Raises:
        ValueError: if the target has no LM head.
    """
    output, text = model.get_output_embeddings(), text_config(model)
    if output is None:
        raise ValueError(
            f"The target {type(model).__name__} has no LM head; load it with AutoModelForCausalLM."
        )
    return Target(
        model=model,
        head=LMHead(output, logit_scale(text), logit_softcap(text)),
        embeddings=model.get_input_embeddings(),
        embedding_scale=embedding_scale(text),
    )


def embedding_scale(text: PreTrainedConfig) -> float:
    """What a target (Granite) multiplies its embeddings by, outside of its embedding module."""
    return float(getattr(text, "embedding_multiplier", None) or 1.0)


def logit_scale(text: PreTrainedConfig) -> float:
    """What a target (Granite, Cohere) multiplies its LM head's output by."""
    divisor = getattr(text, "logits_scaling", None) or 1.0
    factor = getattr(text, "logit_scale", None) or 1.0
    if isinstance(factor, str):  # MPT names a rule, which transformers does not apply
        factor = 1.0
    return float(factor / divisor)


def logit_softcap(text: PreTrainedConfig) -> float | None:
    """The cap c of a target (Gemma 2) with c·tanh(logits / c), None without one."""
    softcap = getattr(text, "final_logit_softcapping", None)
    return None if softcap is None else float(softcap)


def text_config(model: PreTrainedModel) -> PreTrainedConfig:
    """The config of the part of a target that decodes text."""
    return model.config.get_text_config(decoder=True)


@torch.no_grad()
def read_features(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    position_ids: Tensor | None = None,
) -> Tensor:
    """The target's features of a padded batch, without its LM head.

    Args:
        input_ids, attention_mask: (batch, length).
        position_ids: (batch, length), of rows that hold several documents: they begin at 0 with
            each of them, and no document sees another. See [`reads_packed_rows`].

    Returns:
        (batch, length, hidden), after the final norm.
    """
    # of packed rows transformers reads the documents from the positions, if there is no mask
    rows = (
        {"attention_mask": attention_mask}
        if position_ids is None
        else {"position_ids": position_ids}
    )
    output = model.get_decoder()(input_ids=input_ids, use_cache=False, **rows)
    return output.last_hidden_state


def reads_packed_rows(model: PreTrainedModel, device: torch.device) -> bool:
    """Whether a target keeps the documents of a packed row apart, found by trying.

    Most of transformers' models do; some take no positions, others look across documents.
    """
    if "position_ids" not in inspect.signature(model.get_decoder().forward).parameters:
        return False
    lengths = (5, 8)
    # two rows, since some kinds of attention tell documents apart in a single row only
    ids = torch.arange(2 * sum(lengths), device=device).view(2, -1) % text_config(model).vocab_size
    mask = torch.ones_like(ids)
    positions = torch.cat([torch.arange(length, device=device) for length in lengths])
    positions = positions.expand_as(ids)
    second = slice(lengths[0], None)
    alone = read_features(model, ids[:, second], mask[:, second])
    packed = read_features(model, ids, mask, positions)[:, second]
    as_one = read_features(model, ids, mask)[:, second]
    # what the first document would change, were it seen, is the measure of what is rounding
    return bool((packed - alone).abs().mean() < 0.1 * (as_one - alone).abs().mean())


def stream_obstacle(model: PreTrainedModel) -> str | None:
    """Why a target has no single feature a token, or None if it has."""
    streams = getattr(text_config(model), "altup_num_inputs", 1)
    if streams == 1:
        return None
    return (
        f"it carries {streams} hidden states a token (`altup_num_inputs`), and a drafter reads one"
    )


def tree_obstacle(model: PreTrainedModel) -> str | None:
    """Why a target cannot verify a tree, or None if it can; read from what it declares."""
    attention, text = model.config._attn_implementation, text_config(model)
    if attention not in MASKED_ATTENTION:
        return f"its attention {attention!r} takes no 4-D mask (of {MASKED_ATTENTION})"
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return "its forward takes no `position_ids`"
    if _has_alibi(text):
        return "its positions are ALiBi biases, which follow the order of the rows"
    foreign = sorted(set(getattr(text, "layer_types", None) or ()) - set(MASKED_LAYERS))
    if foreign:
        return f"its layers of type {', '.join(foreign)} look at other rows than a mask says"
    if "local" in getattr(text, "attention_layers", ()):  # GPT-Neo
        return "the window of its local attention counts rows, not positions"
    return None


def cache_obstacle(model: PreTrainedModel) -> str | None:
    """Why a target's cache cannot drop rejected rows, or None if it can."""
    kinds = {type(layer) for layer in DynamicCache(config=model.config).layers}
    foreign = sorted(kind.__name__ for kind in kinds - {DynamicLayer, DynamicSlidingWindowLayer})
    if foreign:
        kinds_found = ", ".join(foreign)
        return f"its cache has layers of kind {kinds_found}, which cannot drop rejected tokens"
    if model._is_stateful:
        return "its recurrent state cannot drop rejected tokens"
    return None


def adapter_obstacle(model: PreTrainedModel) -> str | None:
    """Why an adapter of PEFT's cannot be followed by a drafter, or None if it can."""
    # around a target whose prompt it learns, PEFT binds a method of its own for the time of a call
    wrapper = getattr(model.prepare_inputs_for_generation, "__self__", model)
    around = getattr(wrapper, "active_peft_config", None)
    if around is not None and around.is_prompt_learning:
        return f"its adapter ({around.peft_type.value}) puts virtual tokens before the text"
    within = getattr(model, "peft_config", {}).values()
    if any(getattr(adapter, "alora_invocation_tokens", None) for adapter in within):
        return "its adapter (aLoRA) starts to act at a place in the text"
    return None


def sharding_obstacle(model: PreTrainedModel) -> str | None:
    """Why processes that share out a target's weights cannot draft, or None if they can.

    Each of them would run another number of passes, and wait for the others' weights.
    """
    # FSDP2 may hold a target's layers alone; ZeRO-3 marks the weights that it shares out
    is_shared_out = (
        is_fsdp_managed_module(model)
        or any(isinstance(module, FSDPModule) for module in model.modules())
        or any(hasattr(weight, "ds_id") for weight in model.parameters())
    )
    if not is_shared_out:
        return None
    count = distributed.get_world_size() if distributed.is_initialized() else 1
    return None if count == 1 else f"its weights are shared out over {count} processes"


def position_limit(model: PreTrainedModel) -> int | None:
    """Positions of a target that looks them up in a table, None for any other.

    Rotary positions and ALiBi go on beyond what a target is made for, as in plain `generate`.
    """
    text = text_config(model)
    has_formula = getattr(text, "rope_parameters", None) is not None or _has_alibi(text)
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters
    return None if has_formula or not takes_positions else max_positions(text)


def max_positions(text: PreTrainedConfig) -> int | None:
    """Tokens that a target is made for, None where it does not say (BLOOM).

    MPT calls it `max_seq_len`.
    """
    for name in ("max_position_embeddings", "max_seq_len"):
        if getattr(text, name, None) is not None:
            return getattr(text, name)
    return None


def _has_alibi(text: PreTrainedConfig) -> bool:
    return getattr(text, "alibi", False)


def sliding_windows(model: PreTrainedModel) -> list[int | None]:
    """The attention window of each layer of a target, None for full attention."""
    layers = DynamicCache(config=model.config).layers
    return [layer.sliding_window if layer.is_sliding else None for layer in layers]
