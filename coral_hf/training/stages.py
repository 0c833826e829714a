"""Training stages: what each trains, and the router or the adapter that a drafter gets for it.

stage        trains                                  with the rest
drafter      the drafter, or an adapter of it        -, frozen
router       its router                              frozen
joint        the drafter and its router              -

An adapter is PEFT's, usually LoRA (Hu et al. 2021), around the drafter.
"""

import copy
from typing import Any, TypeAlias

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from ..drafters.eagle3 import Eagle3Drafter
from ..drafters.model import Drafter
from ..target import text_config
from .arguments import MOST_GROUPS, CoralTrainingArguments

Trainable: TypeAlias = Drafter | PeftModel
ROUTER_STAGES = ("router", "joint")  # which train a router
ROUTER_SETTINGS = ("num_groups", "num_active_groups", "grouping")  # of a new one
# all linear layers but those of draft heads, which have their own stages; a pattern of whole
# names, since the plain name "fc" would also match `router.fc`
DRAFTER_LAYERS = r"fc|layers\.\d+\..+_proj|(blocks\..+|lm_head\.\d+)\.linear|rnn_[uw]|input_proj"


def follow_vocabulary(drafter: Any, target: PreTrainedModel, stage: str) -> None:
    """Give a drafter the size of its target's vocabulary, which may have gained or lost tokens.

    One with a router, or with frequent tokens that are lost, keeps those of the vocabulary before.
    """
    size, heads, config = text_config(target).vocab_size, drafter.heads, drafter.config
    if size == config.vocab_size:
        return
    if heads.router is not None and stage in ROUTER_STAGES:
        raise ValueError(
            f"`vocab_size` of the target is {size}, but the drafter's router has groups of"
            f" {config.vocab_size} tokens. Train a new one: heads.remove_router() or --fresh-head."
        )
    is_lost = heads.hot_tokens is not None and int(heads.hot_tokens.max()) >= size
    if heads.router is None and not is_lost:
        config.vocab_size = size


def default_groups(vocab_size: int) -> int:
    """Return the number of groups of a new router: 64, or fewer of at least 64 tokens, but 8."""
    return max(min(MOST_GROUPS, vocab_size // 64), min(8, vocab_size))


def check_head_settings(drafter: Trainable, args: CoralTrainingArguments) -> None:
    """Raise a ValueError for a router that the drafter cannot have, and for a setting of a new one
    that differs from the one to be trained.
    """
    if args.stage not in ROUTER_STAGES:
        return
    if isinstance(drafter, Eagle3Drafter):
        drafter.check_whole()
    for name in ROUTER_SETTINGS if drafter.config.num_groups is not None else ():
        own, given = getattr(drafter.config, name), getattr(args, name)
        if given not in (None, own):
            raise ValueError(
                f"`{name}` is {given!r}, but the drafter has a router with {own!r}, which this"
                " stage trains further. Leave it out, or remove it first (--fresh-head)."
            )


def freeze_others(model: nn.Module, stage: str) -> None:
    """Freeze the weights, of any shape, that the stage does not train; embeddings in all stages."""
    for name, parameter in model.named_parameters():
        if name.startswith("embed_tokens."):
            parameter.requires_grad_(False)
        elif name.startswith("heads."):
            parameter.requires_grad_(stage in ROUTER_STAGES)
        else:
            parameter.requires_grad_(stage in ("drafter", "joint"))


def lora(rank: int, alpha: int | None = None, targets: list[str] | None = None) -> LoraConfig:
    """Make the config of a LoRA; `alpha` is twice the rank by default, `targets` all but heads."""
    alpha = 2 * rank if alpha is None else alpha
    return LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets or DRAFTER_LAYERS)


def with_adapter(model: Trainable, stage: str, peft_config: PeftConfig | None) -> Trainable:
    """Return the model to train: the drafter itself, or a `PeftModel` that trains its adapter.

    Raises:
        ValueError: for an adapter that cannot be trained, with what to do instead.
    """
    if peft_config is None and not is_adapted(model):
        return model
    _check_adapter(model, stage, peft_config)
    if peft_config is not None:
        config = copy.deepcopy(peft_config)  # PEFT writes into it
        if config.target_modules is None and getattr(config, "target_parameters", None) is None:
            config.target_modules = DRAFTER_LAYERS
        model = get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if ".router." in name:  # this stage does not run them
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "The adapter trains nothing of the drafter: load one with `is_trainable=True`, or make"
            " one whose `target_modules` are layers of the drafter, such as fc and q_proj."
        )
    return model


def is_adapted(model: Trainable) -> bool:
    """Whether a drafter has an adapter, around it or loaded into it by transformers."""
    return isinstance(model, PeftModel) or model._hf_peft_config_loaded


def _check_adapter(model: Trainable, stage: str, peft_config: PeftConfig | None) -> None:
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
            " by which PEFT calls a model with tokens. Use a LoraConfig without `task_type`."
        )
