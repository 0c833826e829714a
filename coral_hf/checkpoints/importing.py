"""Import of drafters of EAGLE-1, 2 and 3, P-EAGLE and HASS, Medusa heads, Recurrent Drafters.

In: a target and a folder or Hub id. Out: a drafter with the predictions of the checkpoint, of the
family that it is of. Each tensor has its place, is compared with the target's own and dropped, or
is an error.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME

from ..drafters.coral import CoralConfig, CoralDrafter
from ..drafters.eagle3 import Eagle3Drafter, ParallelDrafter
from ..drafters.medusa import MedusaDrafter
from ..drafters.model import FAMILIES, Drafter
from ..drafters.recurrent import RecurrentConfig, RecurrentDrafter
from ..identity import record_tokenizer
from ..target import check_target, read_target, text_config
from . import eagle, eagle3, other_families
from .files import WEIGHTS, Checkpoint, config_folder, read_config, read_dtype, read_weights

# patterns of the file names that saving a drafter and its target's tokenizer writes
DRAFTER_FILES = (
    *("config.json", "generation_config.json", "training_record.json"),
    *("model.safetensors*", "model-*-of-*.safetensors"),
    *("tokenizer*", "*_tokens*.json", "chat_template.jinja", "vocab.*", "merges.txt", "*.model"),
)
# what the config of a family that is not imported holds
OTHER_FAMILIES = {"dflash": "DFlash", "dspark": "DSpark", "domino": "Domino", "mtp": "MTP"}
# of a family: what reads its fields in a config.json, and what makes a drafter of its tensors
FORMATS: dict[type[Drafter], tuple[Callable, Callable]] = {
    CoralDrafter: (eagle.read_eagle_shape, eagle.eagle_drafter),
    Eagle3Drafter: (eagle3.read_eagle3_shape, eagle3.eagle3_drafter),
    ParallelDrafter: (eagle3.read_eagle3_shape, eagle3.eagle3_drafter),
    MedusaDrafter: (other_families.read_medusa_shape, other_families.medusa_drafter),
    RecurrentDrafter: (other_families.read_recurrent_shape, other_families.recurrent_drafter),
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
    said = str([config.get(name) for name in kinds]).lower()
    names = [name for word, name in OTHER_FAMILIES.items() if word in said]
    for fields in (config, config.get("eagle_config") or {}):
        if fields.get("use_aux_hidden_state") is False:
            names.append("one that fuses no hidden states (`use_aux_hidden_state`)")
    if names:
        raise ValueError(
            f"{folder} holds a drafter of another kind, {names[0]}; import one of EAGLE-1, EAGLE-2,"
            " EAGLE-3, P-EAGLE, HASS, Medusa or the Recurrent Drafter."
        )
    kind = _kind_of(config)
    try:
        return Checkpoint(folder, config, FORMATS[kind][0](config), kind)
    except Exception as error:  # transformers raises any, wherever it meets a field
        raise ValueError(
            f"{folder / CONFIG_NAME} lacks a field, or has one that makes no sense"
            f" ({type(error).__name__}: {error}). Correct it, or download the file again."
        ) from error


def _kind_of(config: dict[str, Any]) -> type[Drafter]:
    """The family of a config.json; one that names none is of EAGLE-1, or of old EAGLE-3."""
    if config.get("model_type") == other_families.RELEASED:
        return RecurrentDrafter
    if other_families.names_medusa(config):
        return MedusaDrafter
    return eagle3.named_kind(config) or CoralDrafter


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
    found = read_shape(folder)
    _check_shape(target, found)
    names = (*other_families.MEDUSA_WEIGHTS, *WEIGHTS) if found.kind is MedusaDrafter else WEIGHTS
    tensors = read_weights(source, folder, names, **download)
    is_eagle3 = any(name.startswith(eagle3.OWN_TENSORS) for name in tensors)
    kind = Eagle3Drafter if found.kind is CoralDrafter and is_eagle3 else found.kind
    drafter: Drafter = FORMATS[kind][1](target, found, tensors).to(dtype)
    eagle.check_tensors(tensors, drafter.state_dict(), f"The checkpoint {folder}")
    if isinstance(drafter, CoralDrafter | RecurrentDrafter):
        scale = eagle.table_scale(read_target(target))
        tensors = eagle.scale_embeddings(tensors, 1 / scale)
    drafter.load_state_dict(tensors)
    if tokenizer is not None:
        record_tokenizer(tokenizer, drafter.config)
    is_local = Path(source).is_dir()  # a path of this machine means nothing elsewhere
    origin = (None, None) if is_local else (str(source), folder.name)
    drafter.training_record = [{"stage": "import", "source": origin[0], "revision": origin[1]}]
    return drafter.eval()


from_eagle = import_drafter  # by the name of the first family that was read


def _check_shape(target: PreTrainedModel, found: Checkpoint) -> None:
    """Raise a ValueError if a config says that the drafter is another target's."""
    if issubclass(found.kind, Eagle3Drafter):
        eagle3.fitted_shape(found.fields, found.config, target)
    elif found.kind is RecurrentDrafter:
        check_target(RecurrentConfig(**found.fields), target)
    elif found.kind is CoralDrafter:  # whose tensors tell of the vocabulary
        own = {"vocab_size": text_config(target).vocab_size}
        check_target(CoralConfig(**found.fields | own), target)
