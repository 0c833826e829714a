"""Import of EAGLE-1, EAGLE-2 and HASS drafters.

In: a target and a folder or Hub id. Out: a CORAL drafter with the predictions of the checkpoint.
Each tensor has its place, is compared with the target's own and dropped, or is an error.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..drafters.coral.configuration import CoralConfig
from ..drafters.coral.modeling import CoralDrafter
from ..identity import record_tokenizer
from ..target import Target, check_target, read_target, text_config
from .eagle import (
    EMBEDDINGS,
    HEAD,
    ROUNDING,
    check_tensors,
    is_plain,
    read_eagle,
    read_shape,
    scale_embeddings,
    table_scale,
)
from .files import config_folder, read_dtype, weights_folder

logger = logging.get_logger(__name__)

CHUNK = 4096  # rows that are compared at a time
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


def from_eagle(
    target: PreTrainedModel,
    source: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **download: Any,
) -> CoralDrafter:
    """Make a drafter for `target` from an EAGLE-1, EAGLE-2 or HASS checkpoint, or from an export.

    Args:
        target: the target that the checkpoint was made for. Its vocabulary may have grown, shrunk
            or been padded since, if the checkpoint has the embeddings of its own.
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
    own = {"vocab_size": text_config(target).vocab_size}
    check_target(CoralConfig(**read_shape(folder) | own), target)
    shape, tensors = read_eagle(weights_folder(source, folder, **download))
    drafter = CoralDrafter.from_target(target, **shape | own).to(dtype)
    bound = read_target(target)
    _drop_copies(tensors, bound, drafter, shape["vocab_size"])
    check_tensors(tensors, drafter.state_dict(), f"The EAGLE checkpoint {source}")
    drafter.load_state_dict(scale_embeddings(tensors, 1 / table_scale(bound)))
    if tokenizer is not None:
        record_tokenizer(tokenizer, drafter.config)
    is_local = Path(source).is_dir()  # a path of this machine means nothing elsewhere
    origin = (None, None) if is_local else (str(source), folder.name)
    drafter.training_record = [{"stage": "import", "source": origin[0], "revision": origin[1]}]
    return drafter.eval()


def _drop_copies(
    tensors: dict[str, Tensor], target: Target, drafter: CoralDrafter, vocab_size: int
) -> None:
    """Take out of a checkpoint's tensors what is the target's own or follows from the config.

    `vocab_size`: of the target when the checkpoint was made.

    Raises:
        ValueError: that names a tensor which differs, and how far it is off.
    """
    size = drafter.config.vocab_size
    if EMBEDDINGS not in tensors and HEAD not in tensors:
        if vocab_size != size:
            raise ValueError(
                f"`vocab_size` of the target is {size}, but the EAGLE checkpoint was made for one"
                f" with {vocab_size}, and has no `{EMBEDDINGS}` that would tell whether it is the"
                " same with other padding or more tokens. Use the checkpoint's own target."
            )
        logger.warning(
            f"The EAGLE checkpoint has no `{EMBEDDINGS}`, so only its sizes say that it belongs to"
            " this target. With another one few drafted tokens would be accepted."
        )
    for name, own in ((EMBEDDINGS, target.embeddings.weight), (HEAD, target.head.weight)):
        if name in tensors:
            _check_copy(name, tensors.pop(name), own, vocab_size)
    frequencies = drafter.rotary_emb.inv_freq.cpu().float()  # of shape (head_dim / 2,)
    for name in [name for name in tensors if name.endswith("rotary_emb.inv_freq")]:
        found = tensors.pop(name).float()
        if found.shape != frequencies.shape or not found.allclose(frequencies, rtol=ROUNDING):
            raise ValueError(
                f"`{name}` of the EAGLE checkpoint is not what its config's `rope_theta` gives; set"
                " `rope_theta` in config.json to what the drafter was trained with."
            )


def _check_copy(name: str, found: Tensor, own: Tensor, vocab_size: int) -> None:
    """Raise a ValueError if a copy (vocab, hidden) differs from the target's own, beyond rounding.

    Of a target with more or fewer than the copy's `vocab_size` rows, those count that both have.

    A number is compared with its own size and the table's typical one: the median over rows of the
    mean size, which a few large numbers do not move.
    """
    if not is_plain(own):
        logger.info(f"`{name}` is not compared: the target's own is quantised or offloaded.")
        return
    if len(found) == vocab_size:
        found = found[: len(own)]
    parts = own.detach()[:vocab_size].split(CHUNK)
    typical = float(torch.cat([part.float().abs().mean(-1) for part in parts]).median())
    near = {"rtol": ROUNDING, "atol": ROUNDING * typical}
    try:
        assert_close(found.split(CHUNK), parts, check_device=False, check_dtype=False, **near)
    except AssertionError as error:
        raise ValueError(
            f"`{name}` of the EAGLE checkpoint was made for another target. Use that one, or delete"
            f" the tensor to import the rest all the same. {error}"
        ) from error
