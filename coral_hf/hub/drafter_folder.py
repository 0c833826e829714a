"""The folder of a drafter before it is published: its checkpoint, its config, its code.

In: what `coral-hf train` or `save_pretrained` wrote. Out: the drafter, names of files to upload.
"""

import re
from copy import deepcopy
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_SAFE_WEIGHTS_NAME,
    CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
)

from ..atomic import write_text
from ..drafters.configuration import FamilyConfig
from ..drafters.families import FAMILIES
from ..drafters.model import TRAINING_RECORD, Drafter

TOKENIZER = "tokenizer_config.json"
CODE = "modeling_coral.py"
# all that a repository holds of this package; without it transformers says what to install
CODE_TEXT = """\
# a drafter for speculative decoding; to load it and to generate with it: pip install coral_hf
from coral_hf import {config}, {model}  # noqa: F401
"""
AUTO_MAP = {
    "AutoConfig": "modeling_coral.{config}",
    "AutoModel": "modeling_coral.{model}",
    "AutoModelForCausalLM": "modeling_coral.{model}",  # assistants are loaded by it
}
# the weights that are loaded by default, whole or in shards; not a variant of them (fp16)
WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
KINDS = (".json", ".safetensors", ".jinja", ".model", ".txt", ".png", ".md")
# what a training run leaves beside its checkpoint
LEFT_OUT = ("trainer_state.json", "all_results.json", "train_results.json", "eval_results.json")


def read_drafter(folder: str | Path) -> Drafter:
    """Read the drafter in a folder and check every tensor.

    Raises:
        ValueError: if something else is there, or two checkpoints, or weights that are not finite.
    """
    folder = Path(folder)
    if not (folder / CONFIG_NAME).is_file():
        raise ValueError(
            f"{folder} holds no drafter. Give the folder that `coral-hf train --output` or"
            " `drafter.save_pretrained` wrote; if it is an adapter, merge it into its drafter."
        )
    model_type = PreTrainedConfig.get_config_dict(folder)[0].get("model_type")
    if model_type not in FAMILIES:
        raise ValueError(f"{folder} holds a {model_type} model, not a drafter.")
    if all((folder / name).exists() for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)):
        raise ValueError(
            f"{folder} holds two checkpoints, {SAFE_WEIGHTS_NAME} and shards; delete the older one."
        )
    drafter = FAMILIES[model_type].model.from_pretrained(folder).eval()
    broken = [name for name, values in drafter.state_dict().items() if not values.isfinite().all()]
    if broken:
        raise ValueError(
            f"The weights in {folder} are not all finite ({', '.join(broken[:3])}); publish an"
            " earlier checkpoint."
        )
    return drafter


def read_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase | None:
    """Read the tokenizer in a folder, None where there is none.

    Raises:
        ValueError: if it cannot be read.
    """
    if not (Path(folder) / TOKENIZER).exists():
        return None
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"The tokenizer in {folder} cannot be read ({error}); save the target's there again, or"
            " take it away."
        ) from error


def published_files(folder: str | Path) -> list[str]:
    """List the files to upload: checkpoint, tokenizer, card, code and pictures.

    Checkpoints of a training run, optimizer states and logs lie in folders or are of other kinds.
    """
    paths = [path for path in Path(folder).iterdir() if path.is_file()]
    return sorted(
        path.name
        for path in paths
        if path.name == CODE or path.suffix in KINDS and path.name[0] not in "._"
        if path.name not in LEFT_OUT
    )


def stale_files(there: list[str], here: list[str]) -> list[str]:
    """List a repository's files that would be loaded with, or in place of, a new checkpoint.

    A single file of weights is loaded before shards, an adapter on top of its drafter. Where `here`
    has only a variant of the weights, nothing is stale.
    """
    if not any(WEIGHTS.fullmatch(name) for name in here):
        return []
    extra = (ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME, TRAINING_RECORD)
    loaded = [name for name in there if WEIGHTS.fullmatch(name) or name in extra]
    return [name for name in loaded if name not in here]


def finish_config(
    config: FamilyConfig, folder: str | Path, base_model: str | None = None
) -> str | None:
    """Write a config.json that others can load, and the code beside it.

    Args:
        config: the drafter's.
        base_model: the target's Hub id; the config's own by default.

    Returns:
        The target's id that config.json has, None where there is none: a folder of this machine
        loads nothing for others, and its path is private.
    """
    target = base_model or hub_id(config.target_name_or_path)
    published = deepcopy(config)
    names = {
        "config": type(config).__name__,
        "model": FAMILIES[config.model_type].model.__name__,
    }
    published.target_name_or_path = target
    published.auto_map = {auto: name.format(**names) for auto, name in AUTO_MAP.items()}
    published.save_pretrained(folder)
    write_text(Path(folder) / CODE, CODE_TEXT.format(**names))
    return target


def hub_id(name: str | None) -> str | None:
    """Return a target's name if it can be an id on the Hub; None for a folder of this machine."""
    if name is None or Path(name).exists():
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name
