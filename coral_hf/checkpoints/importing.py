"""Import of drafters of EAGLE-1, 2 and 3, P-EAGLE and HASS, and of Medusa heads.

In: a target and a folder or Hub id. Out: a drafter with the predictions of the checkpoint, of the
family that it is of. Each tensor has its place, is compared with the target's own and dropped, or
is an error.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME

from ..drafters.coral import CoralDrafter
from ..drafters.eagle3 import Eagle3Drafter, ParallelDrafter
from ..drafters.medusa import MedusaDrafter
from ..drafters.model import FAMILIES, Drafter
from ..identity import record_tokenizer
from ..target import read_target
from . import eagle, eagle3, medusa
from .files import (
    WEIGHTS,
    Checkpoint,
    check_dense,
    config_folder,
    read_config,
    read_weights,
    renamed,
)

# what the config of a family that is not imported holds
OTHERS = re.compile("dflash|dspark|domino|mtp|recurrent")


class Format(NamedTuple):
    """How the checkpoints of a family are read."""

    read_shape: Callable[[dict], dict]  # config.json → fields of the drafter's config
    make: Callable[..., Drafter]  # a drafter of tensors, which are left in its form
    names: dict[str, str]  # patterns of tensors' names → ours
    weights: tuple[str, ...] = WEIGHTS  # files that are looked for


EAGLE3 = Format(eagle3.read_eagle3_shape, eagle3.eagle3_drafter, eagle3.NAMES)
FORMATS: dict[type[Drafter], Format] = {
    CoralDrafter: Format(eagle.read_eagle_shape, eagle.eagle_drafter, {}),
    Eagle3Drafter: EAGLE3,
    ParallelDrafter: EAGLE3,
    MedusaDrafter: Format(
        medusa.read_medusa_shape,
        medusa.medusa_drafter,
        medusa.NAMES,
        (*medusa.WEIGHTS, *WEIGHTS),
    ),
}


def read_shape(folder: Path) -> Checkpoint:
    """Read the family and the sizes of a drafter from its config.json.

    Raises:
        ValueError: if a field is missing or makes no sense, or the drafter is of another family.
    """
    config = read_config(folder)
    if family := FAMILIES.get(config.get("model_type", "")):
        raise ValueError(
            f"{folder} holds a drafter of coral_hf already ({family.title}); load it with"
            " AutoModel.from_pretrained."
        )
    kinds = ("speculators_model_type", "architectures", "model_type")
    if other := OTHERS.search(str([config.get(name) for name in kinds]).lower()):
        raise ValueError(
            f"{folder} holds a drafter of another kind, {other[0]}; import one of EAGLE-1, EAGLE-2,"
            " EAGLE-3, P-EAGLE, HASS or Medusa."
        )
    # one that names no family is of EAGLE-1, or of old EAGLE-3
    kind = eagle3.named_kind(config) or CoralDrafter
    kind = MedusaDrafter if medusa.names_medusa(config) else kind
    try:
        return Checkpoint(folder, config, FORMATS[kind].read_shape(config), kind)
    except Exception as error:  # transformers raises any, wherever it meets a field
        raise ValueError(
            f"{folder / CONFIG_NAME} lacks a field, or has one that makes no sense"
            f" ({type(error).__name__}: {error}). Correct it, or download the file again."
        ) from error


def import_drafter(
    target: PreTrainedModel,
    source: str | Path,
    *,
    dtype: torch.dtype | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **download: Any,
) -> Drafter:
    """Make a drafter for `target` from a checkpoint of any family that is read, or an export.

    Args:
        target: the target that the checkpoint was made for. Its vocabulary may have grown, shrunk
            or been padded since, if the checkpoint has the embeddings of its own.
        source: a folder or Hub id, with config.json and the weights in safetensors or a pickle,
            in one file or in shards; EAGLE-1, 2 or 3, P-EAGLE, HASS, Medusa heads.
        dtype: of the drafter; the target's by default.
        tokenizer: the target's, whose hash the drafter then remembers.
        download: `revision`, `cache_dir`, `token` and `local_files_only` of a Hub id, as in
            `from_pretrained`. The config is checked before the weights are downloaded.

    Raises:
        ValueError: if the checkpoint is damaged, of a family that is not read, or made for another
            target, naming the tensor, field or file.
        HfHubHTTPError, LocalEntryNotFoundError: as huggingface_hub raises them for a Hub id.
    """
    folder = config_folder(source, **download)
    found = read_shape(folder)
    tensors = read_weights(source, folder, FORMATS[found.kind].weights, **download)
    is_eagle3 = any(name.startswith(eagle3.OWN_TENSORS) for name in tensors)
    form = EAGLE3 if found.kind is CoralDrafter and is_eagle3 else FORMATS[found.kind]
    tensors = renamed(tensors, form.names)
    check_dense({n: one for n, one in tensors.items() if n not in ("d2t", "t2d")}, folder)
    drafter = form.make(target, found, tensors).to(target.dtype if dtype is None else dtype)
    eagle.check_tensors(tensors, drafter.state_dict(), f"The checkpoint {folder}")
    if isinstance(drafter, CoralDrafter):
        scale = eagle.table_scale(read_target(target))
        tensors = eagle.scale_embeddings(tensors, 1 / scale)
    drafter.load_state_dict(tensors)
    if tokenizer is not None:
        record_tokenizer(tokenizer, drafter.config)
    is_local = Path(source).is_dir()  # a path of this machine means nothing elsewhere
    origin = (None, None) if is_local else (str(source), folder.name)
    drafter.training_record = [{"stage": "import", "source": origin[0], "revision": origin[1]}]
    return drafter.eval()
