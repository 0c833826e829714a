"""Check that a drafter fits a target: sizes must agree, names may differ.

In: a drafter's config and a target. Out: nothing, a warning, or a ValueError.
"""

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from ..identity import full_name
from ..target import adapter_obstacle, stream_obstacle, text_config

logger = logging.get_logger(__name__)


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
