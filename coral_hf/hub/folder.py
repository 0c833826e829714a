"""A folder that is to be published: that it holds a drafter, and which of its files go.

In: what `coral-hf train` or `save_pretrained` wrote. Out: the drafter, names of files.
"""

import json
import re
from copy import deepcopy
from pathlib import Path

from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..drafters.coral.configuration import CoralConfig
from ..drafters.coral.modeling import CoralDrafter

CONFIG = "config.json"
CODE = "modeling_coral"
DOOR = '''"""A CORAL drafter, https://pypi.org/project/coral_hf."""

from coral_hf import CoralConfig, CoralDrafter  # noqa: F401
'''
# the weights that are loaded by default, whole or in shards, and no variant of them (fp16)
WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
# what an adapter left, pushed while it was trained, would be loaded on top of the drafter
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
# of a checkpoint's own level; runs, states of optimizers and logs lie in folders or are none of
# these
KINDS = (".json", ".safetensors", ".jinja", ".model", ".txt", ".py", ".png", ".md")
# what a run leaves beside them
LEFT_OUT = ("trainer_state.json", "all_results.json", "train_results.json", "eval_results.json")


def read_drafter(folder: str | Path) -> CoralDrafter:
    """The drafter in a folder, every tensor checked.

    Raises:
        ValueError: if something else is there, or not all of it.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{folder} holds no drafter: {_instead(folder)}. {EXPECTED}")
    try:
        model_type = json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("model_type")
    except (ValueError, AttributeError) as error:
        raise ValueError(
            f"{folder / CONFIG} is damaged ({error}); save the drafter again."
        ) from error
    if model_type != CoralDrafter.config_class.model_type:
        raise ValueError(f"{folder} holds a {model_type} model, not a drafter. {EXPECTED}")
    if all((folder / name).exists() for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)):
        raise ValueError(
            f"{folder} holds two checkpoints, {SAFE_WEIGHTS_NAME} and the shards of"
            f" {SAFE_WEIGHTS_INDEX_NAME}; delete the older one."
        )
    try:
        drafter = CoralDrafter.from_pretrained(folder).eval()
    except OSError as error:
        raise ValueError(
            f"The weights in {folder} cannot be read ({error}); save the drafter again."
        ) from error
    broken = [name for name, values in drafter.state_dict().items() if not values.isfinite().all()]
    if broken:
        raise ValueError(
            f"The weights in {folder} are not all finite ({', '.join(broken[:3])}); publish an"
            " earlier checkpoint."
        )
    return drafter


EXPECTED = "Give the folder that `coral-hf train --output` or `drafter.save_pretrained` wrote."


def _instead(folder: Path) -> str:
    """What there is in place of a checkpoint."""
    if not folder.exists():
        return "there is no such folder"
    if not folder.is_dir():
        return "it is a file"
    names = sorted(path.name for path in folder.iterdir())
    if "adapter_config.json" in names:
        return "it holds an adapter; merge it into its drafter (`merge_and_unload`) and save that"
    found = ", ".join(names[:5]) or "nothing"
    return f"there is no {CONFIG} in it, but {found}"


def published_files(folder: str | Path) -> list[str]:
    """Names of the files that go to the Hub: the checkpoint, tokenizer, card, code and pictures."""
    return sorted(
        path.name
        for path in Path(folder).iterdir()
        if path.is_file() and path.suffix in KINDS and path.name[0] not in "._"
        if path.name not in LEFT_OUT
    )


def stale_weights(there: list[str], here: list[str]) -> list[str]:
    """Weights on the Hub that are no longer part of the checkpoint.

    A single file goes before shards when a checkpoint is loaded, so it must not outlive them. Where
    only a variant was written, nothing is.
    """
    if not any(WEIGHTS.fullmatch(name) for name in here):
        return []
    loaded = [name for name in there if WEIGHTS.fullmatch(name) or name in ADAPTER]
    return [name for name in loaded if name not in here]


def name_target(config: CoralConfig, folder: str | Path, target: str | None) -> None:
    """Have config.json name the target by its Hub id, or not at all.

    A folder of this machine loads nothing for anybody else, and tells them of it.
    """
    if target != config.target_name_or_path:
        config = deepcopy(config)
        config.target_name_or_path = target
        config.save_pretrained(folder)


def save_code(drafter: CoralDrafter, folder: str | Path) -> None:
    """Let `AutoModel.from_pretrained(..., trust_remote_code=True)` load the drafter in a folder.

    The code is a door: it imports this library, which transformers asks for where it is missing.
    """
    (Path(folder) / f"{CODE}.py").write_text(DOOR)
    drafter.config.auto_map = {
        "AutoConfig": f"{CODE}.CoralConfig",
        "AutoModel": f"{CODE}.CoralDrafter",
    }
    drafter.config.save_pretrained(folder)
