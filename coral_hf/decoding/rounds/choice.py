"""Which calls run in rounds of constant shapes: those that ask for it and can.

In: the loop of a call, before its first pass. Out: the loop that runs it.
"""

from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import logging

from ...target import CONVOLUTION, all_modules, sliding_windows, takes_positions
from ..loop import DecodingLoop
from ..preparation.needs import rotary_switches
from ..target_runner import TargetRunner
from .loop import FixedLoop, FixedPlan, compile_config_of

logger = logging.get_logger(__name__)


def _can_capture(model: PreTrainedModel, config: GenerationConfig) -> bool:
    """Whether the rounds of a call can be captured in CUDA graphs; tells why not at INFO.

    Raises:
        ValueError: if the target is on no CUDA device, or the call asks to compile too.
    """
    if model.device.type != "cuda":
        raise ValueError(
            f"`capture` is True, but the target is on {str(model.device)!r} and CUDA graphs need a"
            " CUDA device; leave it out, or pass compile_config=CompileConfig()."
        )
    if config.compile_config is not None:
        raise ValueError("`capture` and `compile_config` were both passed; pass one of them.")
    quantizer = getattr(model, "hf_quantizer", None)
    reasons = {
        "a quantizer that cannot be captured": quantizer and not quantizer.is_compileable,
        "layers that are offloaded": any(hasattr(one, "_hf_hook") for one in all_modules(model)),
        "an active adapter": getattr(model, "_hf_peft_config_loaded", False),
        "autocast": torch.is_autocast_enabled("cuda"),
    }
    obstacle = next((reason for reason, is_so in reasons.items() if is_so), None)
    if obstacle is not None:
        logger.info(f"Rounds are not captured: the call has {obstacle}.")
    return obstacle is None


def with_constant_shapes(loop: DecodingLoop, how: FixedPlan, is_prepared: bool) -> DecodingLoop:
    """The loop of a call: with constant shapes where it asks for them and can have them.

    A call asks in the way in which it asks transformers, or for CUDA graphs.

    Args:
        is_prepared: whether the target prepares the inputs of each round itself, or takes no tree.

    Raises:
        ValueError: if it cannot, and is there to compile and no more.
    """
    config = loop.collector.config
    is_static = config.cache_implementation == "static" or compile_config_of(config) is not None
    if not (is_static or how.is_captured):
        return loop
    if how.is_captured:
        how = how._replace(is_captured=_can_capture(loop.target.model, config))
    obstacle = _obstacle(loop, is_prepared)
    if obstacle is None:
        sides: tuple[Any, TargetRunner] = loop.drafting, loop.target
        return FixedLoop(*sides, loop.sequences, loop.collector, loop.policy, loop.plan, fixed=how)
    if how.only_compiles:
        raise ValueError(f"There is nothing to compile: {obstacle}.")
    logger.info(f"The rounds of this call have varying shapes: {obstacle}.")
    return loop


def _obstacle(loop: DecodingLoop, is_prepared: bool) -> str | None:
    """Why the rounds of a call cannot have constant shapes; None if they can."""
    model = loop.target.model
    devices = {*getattr(model, "hf_device_map", {"": model.device}).values()}
    devices.add(getattr(loop.drafting, "device", model.device))
    reasons = {
        "the drafter has none of that kind": not hasattr(loop.drafting, "fix"),
        "something needs one token after another": not loop.sequences.is_free,
        "scores, logits or states of each token are asked for": loop.collector.wanted,
        "the target prepares the inputs of each round itself": is_prepared,
        "the target takes no positions": not takes_positions(model),
        "the target's rotary embedding changes with the length": rotary_switches(model),
        "a layer of the target holds no text": {0, CONVOLUTION} & {*sliding_windows(model)},
        "the models are on several devices": len(devices) > 1,
    }
    return next((reason for reason, is_so in reasons.items() if is_so), None)
