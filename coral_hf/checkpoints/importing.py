"""Import of EAGLE-1, EAGLE-2 and HASS drafters.

In: a target and a folder or Hub id. Out: a CORAL drafter with the predictions of the checkpoint.
Each tensor has its place, is compared with the target's own and dropped, or is an error.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..drafters.coral.configuration import CoralConfig
from ..drafters.coral.modeling import CoralDrafter
from ..identity import tokenizer_hash
from ..target import check_target, read_target
from .copies import check_copies, scale_embeddings, table_scale
from .eagle import check_tensors, read_eagle, read_shape
from .files import Download, config_folder, read_dtype, weights_folder

if TYPE_CHECKING:
    from typing_extensions import Unpack

# patterns of the file names that saving a drafter and its target's tokenizer writes
DRAFTER_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "training_record.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.*",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)


def from_eagle(
    target: PreTrainedModel,
    source: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **download: Unpack[Download],
) -> CoralDrafter:
    """Make a drafter for `target` from an EAGLE-1, EAGLE-2 or HASS checkpoint, or from an export.

    Args:
        target: the target that the checkpoint was made for.
        source: a folder or Hub id, with config.json and the weights in safetensors or a pickle,
            in one file or in shards.
        dtype: of the drafter; the target's by default.
        tokenizer: the target's, whose hash the drafter then remembers.
        download: `revision`, `cache_dir`, `token` and `local_files_only` of a Hub id, as in
            `from_pretrained`. The config is checked before the weights are downloaded.

    Raises:
        ValueError: if the checkpoint is damaged, of another kind, or made for another target,
            naming the tensor, field or file.
        HfHubHTTPError, LocalEntryNotFoundError: as huggingface_hub raises them for a Hub id.
    """
    dtype = target.dtype if dtype is None else read_dtype(dtype)
    folder = config_folder(source, **download)
    check_target(CoralConfig(**read_shape(folder)), target)
    checkpoint = read_eagle(weights_folder(source, folder, **download))
    drafter = CoralDrafter.from_target(target, **checkpoint.shape).to(dtype)
    check_tensors(checkpoint.tensors, drafter.state_dict(), f"The EAGLE checkpoint {source}")
    bound = read_target(target)
    check_copies(checkpoint, bound, drafter)
    # EAGLE's fc reads rows of the embedding table, ours what the target's first layer sees
    drafter.load_state_dict(scale_embeddings(checkpoint.tensors, 1 / table_scale(bound)))
    if tokenizer is not None:
        drafter.config.tokenizer_hash = tokenizer_hash(tokenizer)
    is_local = Path(source).is_dir()  # a path of this machine means nothing elsewhere
    origin = (None, None) if is_local else (str(source), folder.name)
    drafter.training_record = [{"stage": "import", "source": origin[0], "revision": origin[1]}]
    return drafter.eval()
