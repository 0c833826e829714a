"""Import of drafters of EAGLE-1, 2 and 3, P-EAGLE and HASS, Medusa heads, Recurrent Drafters.

In: a target and a folder or Hub id. Out: a drafter with the predictions of the checkpoint, of the
family that it is of. Each tensor has its place, is compared with the target's own and dropped, or
is an error.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..drafters.coral import CoralConfig, CoralDrafter
from ..drafters.eagle3 import Eagle3Drafter, ParallelDrafter
from ..drafters.medusa import MedusaDrafter
from ..drafters.model import FAMILIES, Drafter
from ..drafters.recurrent import RecurrentConfig, RecurrentDrafter
from ..identity import record_tokenizer
from ..target import Target, check_target, read_target, text_config
from .eagle import (
    BIASES,
    EMBEDDINGS,
    HEAD,
    check_copy,
    check_num_tokens,
    check_tensors,
    drop_frequencies,
    read_eagle_shape,
    scale_embeddings,
    table_scale,
)
from .eagle3 import (
    OWN_TENSORS,
    eagle3_drafter,
    fitted_shape,
    names_eagle3,
    read_eagle3_shape,
)
from .files import (
    WEIGHTS,
    Checkpoint,
    check_dense,
    config_folder,
    read_config,
    read_dtype,
    read_weights,
    weights_folder,
)
from .medusa import MEDUSA_WEIGHTS, medusa_drafter, names_medusa
from .peagle import names_peagle
from .recurrent import RELEASED, read_recurrent_shape, recurrent_drafter

logger = logging.get_logger(__name__)

# patterns of the file names that saving a drafter and its target's tokenizer writes
DRAFTER_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors*",
    "model-*-of-*.safetensors",
    "training_record.json",
    "tokenizer*",
    "*_tokens*.json",
    "chat_template.jinja",
    "vocab.*",
    "merges.txt",
    "*.model",
)
# what the config of a family that is not imported holds
OTHER_FAMILIES = {
    "dflash": "DFlash",
    "dspark": "DSpark",
    "domino": "Domino",
    "mtp": "MTP",
}


class Shape(NamedTuple):
    """What a checkpoint's config.json says."""

    config: dict[str, Any]  # as it is written
    fields: dict[str, Any]  # of the drafter's config, those that do not follow from tensors
    kind: type[Drafter]


def read_shape(folder: Path) -> Shape:
    """Read the sizes of a drafter from its config.json.

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
    said = str([config.get(name) for name in kinds]).lower()
    if names := [name for word, name in OTHER_FAMILIES.items() if word in said]:
        raise ValueError(
            f"{folder} holds a drafter of another kind, {names[0]}; import one of EAGLE-1, EAGLE-2,"
            " EAGLE-3, P-EAGLE, HASS, Medusa or the Recurrent Drafter."
        )
    if config.get("model_type") == RELEASED:
        return Shape(config, read_recurrent_shape(config, folder), RecurrentDrafter)
    if names_medusa(config):
        return Shape(config, {}, MedusaDrafter)
    if names_eagle3(config):
        kind = ParallelDrafter if names_peagle(config) else Eagle3Drafter
        return Shape(config, read_eagle3_shape(config, folder), kind)
    return Shape(config, read_eagle_shape(config, folder), CoralDrafter)


def import_drafter(
    target: PreTrainedModel,
    source: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **download: Any,
) -> Drafter:
    """Make a drafter for `target` from a checkpoint of any family that is read, or an export.

    Args:
        target: the target that the checkpoint was made for. Its vocabulary may have grown, shrunk
            or been padded since, if the checkpoint has the embeddings of its own.
        source: a folder or Hub id, with config.json and the weights in safetensors or a pickle,
            in one file or in shards; EAGLE-1, 2 or 3, P-EAGLE, HASS, Medusa heads, a Recurrent
            Drafter.
        dtype: of the drafter; the target's by default.
        tokenizer: the target's, whose hash the drafter then remembers.
        download: `revision`, `cache_dir`, `token` and `local_files_only` of a Hub id, as in
            `from_pretrained`. The config is checked before the weights are downloaded.

    Raises:
        ValueError: if the checkpoint is damaged, of a family that is not read, or made for another
            target, naming the tensor, field or file.
        HfHubHTTPError, LocalEntryNotFoundError: as huggingface_hub raises them for a Hub id.
    """
    dtype = target.dtype if dtype is None else read_dtype(dtype)
    folder = config_folder(source, **download)
    shape = read_shape(folder)
    _check_shape(target, shape)
    names = (*MEDUSA_WEIGHTS, *WEIGHTS) if shape.kind is MedusaDrafter else WEIGHTS
    tensors = read_weights(weights_folder(source, folder, names, **download), names)
    found = Checkpoint(folder, shape.config, shape.fields, tensors, dtype)
    drafter = _drafter_of(shape.kind, target, found)
    if tokenizer is not None:
        record_tokenizer(tokenizer, drafter.config)
    is_local = Path(source).is_dir()  # a path of this machine means nothing elsewhere
    origin = (None, None) if is_local else (str(source), folder.name)
    drafter.training_record = [{"stage": "import", "source": origin[0], "revision": origin[1]}]
    return drafter.eval()


from_eagle = import_drafter  # by the name of the first family that was read


def _check_shape(target: PreTrainedModel, shape: Shape) -> None:
    """Raise a ValueError if a config says that the drafter is another target's."""
    if issubclass(shape.kind, Eagle3Drafter):
        fitted_shape(shape.fields, shape.config, target)
    elif shape.kind is RecurrentDrafter:
        check_target(RecurrentConfig(**shape.fields), target)
    elif shape.kind is CoralDrafter:  # whose tensors tell of the vocabulary
        own = {"vocab_size": text_config(target).vocab_size}
        check_target(CoralConfig(**shape.fields | own), target)


def _drafter_of(kind: type[Drafter], target: PreTrainedModel, found: Checkpoint) -> Drafter:
    """Make a drafter from a checkpoint whose config says that it is of a kind."""
    if kind is MedusaDrafter:
        return medusa_drafter(target, found)
    if kind is RecurrentDrafter:
        return recurrent_drafter(target, found)
    if kind is not CoralDrafter or any(name.startswith(OWN_TENSORS) for name in found.tensors):
        return eagle3_drafter(target, found)
    return _eagle_drafter(target, found)


def _eagle_drafter(target: PreTrainedModel, found: Checkpoint) -> CoralDrafter:
    """Make a CORAL drafter from an EAGLE-1 checkpoint."""
    folder, tensors = found.folder, found.tensors
    check_dense(tensors, folder)
    shape = found.fields | {
        field: name in tensors or found.fields.get(field, False) for field, name in BIASES.items()
    }
    own = {"vocab_size": text_config(target).vocab_size}
    drafter = CoralDrafter.from_target(target, **shape | own).to(found.dtype)
    bound = read_target(target)
    _drop_copies(tensors, bound, shape["vocab_size"])
    drop_frequencies(tensors, drafter.config)
    check_tensors(tensors, drafter.state_dict(), f"The EAGLE checkpoint {folder}")
    drafter.load_state_dict(scale_embeddings(tensors, 1 / table_scale(bound)))
    return drafter


def _drop_copies(tensors: dict[str, Tensor], target: Target, vocab_size: int) -> None:
    """Take out of a checkpoint's tensors what is the target's own.

    `vocab_size`: of the target when the checkpoint was made.

    Raises:
        ValueError: that names a tensor which differs, and how far it is off.
    """
    if EMBEDDINGS not in tensors and HEAD not in tensors:
        check_num_tokens(vocab_size, text_config(target.model).vocab_size, "EAGLE")
        logger.warning(
            f"The EAGLE checkpoint has no `{EMBEDDINGS}`, so only its sizes say that it belongs to"
            " this target. With another one few drafted tokens would be accepted."
        )
    for name, own in ((EMBEDDINGS, target.embeddings.weight), (HEAD, target.head.weight)):
        if name in tensors:
            check_copy(name, tensors.pop(name), own, vocab_size)
