"""Drafters of EAGLE-1, EAGLE-2 and HASS become CORAL drafters.

In: a target and a folder or Hub id. Out: a drafter that predicts what the checkpoint predicts. Each
tensor has its place, is compared with the target's own and dropped, or is an error.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..drafters.coral.modeling import CoralDrafter
from ..identity import tokenizer_hash
from ..target import read_target, text_config
from .copies import check_copies, scale_embeddings, table_scale
from .dtypes import read_dtype
from .eagle import check_tensors, read_eagle
from .fields import read_shape
from .source import Download, config_folder, weights_folder

# names, as patterns, of what saving a drafter and its target's tokenizer writes
DRAFTER_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)


def from_eagle(
    target: PreTrainedModel,
    source: str | Path,
    revision: str | None = None,
    dtype: str | torch.dtype | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> CoralDrafter:
    """A drafter for `target` from an EAGLE-1, EAGLE-2 or HASS checkpoint, or from an export.

    Args:
        target: that the checkpoint was made for.
        source: a folder or Hub id, with config.json and the weights in safetensors or a pickle,
            in one file or in shards.
        dtype: of the drafter; the target's by default.
        tokenizer: the target's, whose hash the drafter then remembers.
        revision, cache_dir, token, local_files_only: of a Hub id, as in `from_pretrained`. Its
            config is checked before its weights are downloaded.

    Raises:
        ValueError: if the checkpoint is broken, of another kind, or made for another target,
            naming the tensor, field or file.
        OSError: where the Hub refuses or the connection breaks, with a sentence on what to do.
    """
    dtype = target.dtype if dtype is None else read_dtype(dtype)
    download = Download(revision, cache_dir, token, local_files_only)
    folder = config_folder(source, download)
    _check_sizes(target, read_shape(folder), source)
    checkpoint = read_eagle(weights_folder(source, folder, download))
    drafter = CoralDrafter.from_target(target, **checkpoint.shape).to(dtype)
    check_tensors(checkpoint.tensors, drafter.state_dict(), f"The EAGLE checkpoint {source}")
    bound = read_target(target)
    check_copies(checkpoint, bound, drafter)
    own_scale = table_scale(bound)
    drafter.load_state_dict(scale_embeddings(checkpoint.tensors, 1 / own_scale))
    if tokenizer is not None:
        drafter.config.tokenizer_hash = tokenizer_hash(tokenizer)
    drafter.training_record = [_origin(source, folder)]
    return drafter.eval()


def _origin(source: str | Path, folder: Path) -> dict[str, str | None]:
    """What a model card says of where the weights come from; folders of a machine are not named."""
    is_local = Path(source).is_dir()
    return {
        "stage": "import",
        "source": None if is_local else str(source),
        "revision": None if is_local else folder.name,
    }


def _check_sizes(target: PreTrainedModel, shape: dict[str, Any], source: str | Path) -> None:
    """Raise a ValueError if a checkpoint's sizes are not those of the target."""
    text = text_config(target)
    for name, expected in (("hidden_size", text.hidden_size), ("vocab_size", text.vocab_size)):
        if shape[name] != expected:
            raise ValueError(
                f"`{name}` of the target is {expected}, but the EAGLE checkpoint {source} was made"
                f" for a target with {shape[name]}. Give the checkpoint's own target."
            )
