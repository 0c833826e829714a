"""PEFT adapters of a drafter, trained instead of its own weights.

In: a drafter, or a `PeftModel` around one, and perhaps a PEFT config. Out: the model that the
trainer trains. The usual adapter is LoRA (Hu et al. 2021).
"""

import copy

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel
from transformers.utils import logging

from ..drafters.coral.modeling import CoralDrafter
from ..target import adapter_obstacle

logger = logging.get_logger(__name__)

# all linear layers but the draft heads', whose stages train them whole; a pattern of whole names,
# since the plain name "fc" would also find `router.fc`
DRAFTER_LAYERS = r"fc|layers\.\d+\..+_proj"


def lora(rank: int, alpha: int | None = None, targets: list[str] | None = None) -> LoraConfig:
    """Make the config of a LoRA; `alpha` is twice the rank by default, `targets` all but heads."""
    if rank < 1:
        raise ValueError(f"`rank` of a LoRA is {rank}; use at least 1.")
    alpha = 2 * rank if alpha is None else alpha
    return LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets or DRAFTER_LAYERS)


def with_adapter(
    model: CoralDrafter | PeftModel, stage: str, peft_config: PeftConfig | None
) -> CoralDrafter | PeftModel:
    """The model to train: the drafter as it is, or in a `PeftModel` of whose weights none but the
    adapter's are trained.

    Raises:
        ValueError: for an adapter that cannot be trained, with what to do instead.
    """
    if peft_config is None and not is_adapted(model):
        return model
    if stage != "drafter":
        raise ValueError(
            f"`stage` is {stage!r}, which trains a draft head itself and takes no adapter; merge it"
            " first: drafter = trainer.model.merge_and_unload()."
        )
    if peft_config is not None:
        return _wrapped(model, peft_config)
    if not isinstance(model, PeftModel):
        raise ValueError(
            "The drafter was loaded from the folder of an adapter, which transformers cannot merge"
            " or train beside frozen weights. Load it with PeftModel.from_pretrained("
            "AutoModel.from_pretrained(drafter), adapter, is_trainable=True)."
        )
    _check_kind(model.active_peft_config)
    return _frozen_but_for_adapter(model)


def is_adapted(model: CoralDrafter | PeftModel) -> bool:
    """Whether a drafter has an adapter, around it or loaded into it by transformers."""
    return isinstance(model, PeftModel) or model._hf_peft_config_loaded


def _wrapped(model: CoralDrafter | PeftModel, config: PeftConfig) -> PeftModel:
    if is_adapted(model):
        raise ValueError(
            "`peft_config` was passed for a drafter that has an adapter already; pass one of them,"
            " or merge the first: model.merge_and_unload()."
        )
    _check_kind(config)
    config = copy.deepcopy(config)  # PEFT writes into it
    if config.target_modules is None and getattr(config, "target_parameters", None) is None:
        config.target_modules = DRAFTER_LAYERS
    if not model.name_or_path:
        logger.warning(
            "The drafter was not loaded from a folder, so that a saved adapter cannot name it; save"
            " the drafter too, or trainer.model.merge_and_unload()."
        )
    return _frozen_but_for_adapter(get_peft_model(model, config))


def _check_kind(config: PeftConfig) -> None:
    """Refuse what a model without tokens of its own cannot have."""
    kind = getattr(config.peft_type, "value", config.peft_type)
    if config.is_prompt_learning:
        raise ValueError(
            f"`peft_config` is of type {kind}, which learns virtual tokens, but a drafter reads"
            " features and no tokens of its own; use an adapter of its layers, such as LoraConfig."
        )
    if config.task_type is not None:
        raise ValueError(
            f"`task_type` of the adapter is {config.task_type!r}, with which PEFT calls a model"
            " with tokens; a drafter is called with features. Leave `task_type` out."
        )


def _frozen_but_for_adapter(model: PeftModel) -> PeftModel:
    """Freeze what an adapter has on the draft heads, which this stage does not run."""
    for name, parameter in model.named_parameters():
        if ".router." in name or ".low_rank." in name:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "The adapter trains nothing of the drafter: load one with"
            " PeftModel.from_pretrained(..., is_trainable=True); `target_modules` of a new one must"
            " name layers of the drafter, such as fc and q_proj."
        )
    return model


def check_target_adapter(target: PreTrainedModel) -> None:
    """Raise a ValueError for a target whose own adapter cannot be followed by a drafter."""
    obstacle = adapter_obstacle(target)
    if obstacle is not None:
        raise ValueError(f"The target {type(target).__name__} cannot train a drafter: {obstacle}.")
