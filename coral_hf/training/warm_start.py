"""Warm starts: initial weights of a drafter from another drafter.

In: a target, and a drafter of another one or the folder of a checkpoint. Out: a drafter for the
target, in fp32, to be trained. A tensor that fits nowhere is an error.
"""

import re
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils import logging

from ..checkpoints import config_folder, import_drafter, read_config, read_shape
from ..drafters.configuration import DrafterConfig, FamilyConfig, target_fields
from ..drafters.coral import CoralDrafter
from ..drafters.model import Drafter
from ..identity import tokenizer_hash
from ..target import text_config
from .stages import is_adapted
from .steps import KINDS, TrainingStep, step_kind

logger = logging.get_logger(__name__)
# what a drafter proposes and embeds by itself: it is lost where the tokens are others
OF_TOKENS = re.compile(r"d2t|t2d|lm_heads?\.(\d+\.)?weight|embed_tokens\.weight")


def warm_start(
    target: PreTrainedModel, source: str | Path | Drafter, tokenizer: Tokenizer | None = None
) -> Drafter:
    """Make a drafter for `target` that starts from `source`, in fp32 on the target's device.

    All tensors of the source keep their shapes, such as (hidden, 2 * hidden) of `fc`.

    Args:
        source: a drafter of another target of the same width, or its folder or Hub id; the folder
            or Hub id of a checkpoint of EAGLE, HASS, P-EAGLE or Medusa. The drafter is of the same
            family.
        tokenizer: the target's; draft heads of the source are kept if they were made for it.

    Raises:
        ValueError: if a tensor of the source has no place in the drafter, or the reverse.
    """
    if isinstance(source, Drafter):
        return from_drafter(target, source, tokenizer)
    if own_config(source) is not None:
        return from_drafter(target, _load(source), tokenizer)
    return import_drafter(target, source, dtype=torch.float32, tokenizer=tokenizer).train()


def start_from(target: PreTrainedModel, source: str, tokenizer: Tokenizer) -> Drafter:
    """Make the drafter of a source one of `target`, to be trained: whole if it fits, else anew.

    One fits a target of its own sizes, family and tokenizer, such as a fine-tune: heads, tree and
    training record stay. Of another only the weights do, see [`warm_start`].
    """
    if own_config(source) is None:
        return warm_start(target, source, tokenizer)
    drafter = _load(source)
    if not _fits(drafter, target, tokenizer):
        logger.info(f"{source} is of another target: a new drafter starts from its weights.")
        return from_drafter(target, drafter, tokenizer)
    logger.info(f"{source} fits the target: it is trained further, with its heads and its tree.")
    sizes = {"vocab_size", "hidden_size", "initializer_range"}
    fields = target_fields(target.config)
    drafter.config.update({name: fields[name] for name in fields.keys() - sizes})
    return drafter.to(target.device)


def _fits(drafter: Drafter, target: PreTrainedModel, tokenizer: Tokenizer) -> bool:
    """Whether a drafter may go on, whole, as one of `target`."""
    config, text = drafter.config, text_config(target)
    known = config.tokenizer_hash
    # heads of a CORAL drafter keep the vocabulary that they were made for, if it has grown since
    may_grow = isinstance(drafter, CoralDrafter) and known is not None
    return (
        (may_grow or config.vocab_size == text.vocab_size)
        and known in (None, tokenizer_hash(tokenizer, config.tokenizer_size))
        and config.target_model_type in (None, target.config.model_type)
        and getattr(config, "target_hidden_size", config.hidden_size) == text.hidden_size
        and getattr(config, "target_num_layers", None) in (None, text.num_hidden_layers)
    )


def _load(source: str | Path) -> Drafter:
    return kind_of_source(source).drafter.from_pretrained(source, dtype=torch.float32)


def own_config(source: str | Path) -> FamilyConfig | None:
    """The config of a drafter in a folder or on the Hub; None if it is another library's."""
    own = read_config(folder := config_folder(source)).get("model_type", "")
    kind = KINDS.get(own)
    return None if kind is None else kind.drafter.config_class.from_pretrained(folder)


def kind_of_source(source: str | Path) -> type[TrainingStep]:
    """The training step of a drafter in a folder or on the Hub, ours or another library's."""
    config = own_config(source)
    own = read_shape(config_folder(source)).kind.config_class if config is None else config
    return step_kind(own.model_type)


def from_drafter(
    target: PreTrainedModel, other: Drafter, tokenizer: Tokenizer | None = None
) -> Drafter:
    """Make a drafter with the weights of another target's drafter; see [`warm_start`]."""
    if is_adapted(other):
        raise ValueError("The drafter to start from has an adapter; merge it by merge_and_unload.")
    config, text = other.config, text_config(target)
    width = getattr(config, "target_hidden_size", config.hidden_size)
    if width != text.hidden_size:
        raise ValueError(
            f"`hidden_size` of the target is {text.hidden_size}, but the drafter to start from is"
            f" one of a target with {width}; start afresh."
        )
    is_coral = isinstance(other, CoralDrafter)
    # what stands for tokens, such as a router's groups, is of its tokenizer; heads of a CORAL
    # drafter alone stand for them, so that they are kept only if both tokenizers are known
    hashes = {config.tokenizer_hash, tokenizer and tokenizer_hash(tokenizer)}
    is_same = config.vocab_size == text.vocab_size and len(hashes - {None}) < 2
    keeps_heads = is_same and not (is_coral and None in hashes)
    lost = {"max_position_embeddings", "target_num_layers"}  # they follow from the target
    if not is_same:  # heads begin anew, and so does the draft vocabulary of EAGLE-3
        lost |= {"draft_vocab_size", "has_embeddings", "mask_token_id"}
    if getattr(config, "target_num_layers", None) not in (None, text.num_hidden_layers):
        lost |= {"target_layers"}
    names = {*DrafterConfig.__annotations__, *config.own_names()} - lost
    shape = {name: getattr(config, name) for name in names if hasattr(config, name)}
    drafter = type(other).from_target(target, **shape).float()
    if keeps_heads and hasattr(drafter, "heads"):
        drafter.heads.adopt(config)
    state, kept = other.state_dict(), drafter.state_dict().keys()
    is_whole = is_coral or is_same  # all tensors of the drafter have a source
    tensors = {k: v for k, v in state.items() if is_whole or not OF_TOKENS.fullmatch(k)}
    if is_coral:  # heads may be left out
        tensors = {name: tensors[name] for name in tensors.keys() & kept}
    drafter.load_state_dict(tensors, strict=is_whole)
    return drafter
