"""PEFT adapters of a drafter, trained instead of its own weights.

In: a drafter, or a `PeftModel` around one, and a PEFT config if the adapter is new. Out: the model
to train. The usual adapter is LoRA (Hu et al. 2021).
"""

import copy

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers.utils import logging

from ..drafters.model import Drafter

logger = logging.get_logger(__name__)

# all linear layers but those of draft heads, which have their own stages; a pattern of whole
# names, since the plain name "fc" would also match `router.fc`
OF_FAMILIES = (
    r"fc",
    r"layers\.\d+\..+_proj",
    r"(blocks\..+|lm_head\.\d+)\.linear",
    r"rnn_[uw]",
    "input_proj",
)
DRAFTER_LAYERS = "|".join(OF_FAMILIES)


def lora(rank: int, alpha: int | None = None, targets: list[str] | None = None) -> LoraConfig:
    """Make the config of a LoRA; `alpha` is twice the rank by default, `targets` all but heads."""
    alpha = 2 * rank if alpha is None else alpha
    return LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets or DRAFTER_LAYERS)


def with_adapter(
    model: Drafter | PeftModel, stage: str, peft_config: PeftConfig | None
) -> Drafter | PeftModel:
    """Return the model to train: the drafter itself, or a `PeftModel` that trains its adapter.

    Raises:
        ValueError: for an adapter that cannot be trained, with what to do instead.
    """
    if peft_config is None and not is_adapted(model):
        return model
    _check_adapter(model, stage, peft_config)
    if peft_config is not None:
        model = _wrapped(model, copy.deepcopy(peft_config))  # PEFT writes into it
    for name, parameter in model.named_parameters():
        if ".router." in name or ".low_rank." in name:  # this stage does not run them
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "The adapter trains nothing of the drafter: load one with"
            " PeftModel.from_pretrained(..., is_trainable=True); `target_modules` of a new one must"
            " name layers of the drafter, such as fc and q_proj."
        )
    return model


def is_adapted(model: Drafter | PeftModel) -> bool:
    """Whether a drafter has an adapter, around it or loaded into it by transformers."""
    return isinstance(model, PeftModel) or model._hf_peft_config_loaded


def _check_adapter(model: Drafter | PeftModel, stage: str, peft_config: PeftConfig | None) -> None:
    """Raise a ValueError for an adapter that cannot be trained, with what to do instead."""
    if stage != "drafter":
        raise ValueError(
            f"`stage` is {stage!r}, which takes no adapter; merge it first: drafter ="
            " trainer.model.merge_and_unload()."
        )
    if peft_config is not None and is_adapted(model):
        raise ValueError(
            "`peft_config` was passed for a drafter that has an adapter already; pass one of them,"
            " or merge the first: model.merge_and_unload()."
        )
    if peft_config is None and not isinstance(model, PeftModel):
        raise ValueError(
            "The drafter was loaded from the folder of an adapter, which transformers cannot merge"
            " or train beside frozen weights. Load it with PeftModel.from_pretrained("
            "AutoModel.from_pretrained(drafter), adapter, is_trainable=True)."
        )
    config = peft_config or model.active_peft_config
    if config.is_prompt_learning or config.task_type is not None:
        raise ValueError(
            f"The adapter is a {type(config).__name__} whose `task_type` is {config.task_type!r},"
            " with which PEFT calls a model with tokens, but a drafter reads features. Use an"
            " adapter of its layers, such as LoraConfig, and leave `task_type` out."
        )


def _wrapped(model: Drafter, config: PeftConfig) -> PeftModel:
    """Put a new adapter around a drafter, on all layers but its heads by default."""
    if config.target_modules is None and getattr(config, "target_parameters", None) is None:
        config.target_modules = DRAFTER_LAYERS
    if not model.name_or_path:
        logger.warning(
            "The drafter was not loaded from a folder, so that a saved adapter cannot name it; save"
            " the drafter too, or trainer.model.merge_and_unload()."
        )
    return get_peft_model(model, config)
