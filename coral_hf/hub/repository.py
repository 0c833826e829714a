"""A drafter's folder, and the branch on the Hub that it goes to.

In: what `coral-hf train` or `save_pretrained` wrote; a repo id. Out: the drafter, the files to
upload, a config and code that others can load; the card that is there, a refusal, or a commit.
"""

import json
import re
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id
from transformers import PreTrainedConfig, utils

from ..atomic import write_text
from ..drafters.configuration import FamilyConfig
from ..drafters.model import FAMILIES, TRAINING_RECORD, Drafter

CARD = "README.md"
CODE = "modeling_coral.py"
# all that a repository holds of this package; without it transformers says what to install
CODE_TEXT = """\
# a drafter for speculative decoding; to load it and to generate with it: pip install coral_hf
from coral_hf import {}, {}  # noqa: F401
"""
# the weights that are loaded by default, whole or in shards; not a variant of them (fp16)
LOADED = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
# kinds of files: those that go along, and those that hold weights
KINDS = (".json", ".safetensors", ".jinja", ".model", ".txt", ".png", ".md")
WEIGHTS = {".safetensors", ".bin", ".gguf", ".pt", ".pth", ".ckpt", ".onnx", ".h5", ".msgpack"}
# what a training run leaves beside its checkpoint
LEFT_OUT = ("trainer_state.json", "all_results.json", "train_results.json", "eval_results.json")


def read_drafter(folder: str | Path) -> Drafter:
    """Read the drafter in a folder and check every tensor.

    Raises:
        ValueError: if something else is there, or two checkpoints, or weights that are not finite.
    """
    folder = Path(folder)
    if not (folder / utils.CONFIG_NAME).is_file():
        raise ValueError(
            f"{folder} holds no drafter. Give the folder that `coral-hf train --output` or"
            " `drafter.save_pretrained` wrote; if it is an adapter, merge it into its drafter."
        )
    model_type = PreTrainedConfig.get_config_dict(folder)[0].get("model_type")
    if model_type not in FAMILIES:
        raise ValueError(f"{folder} holds a {model_type} model, not a drafter.")
    weights = (utils.SAFE_WEIGHTS_NAME, utils.SAFE_WEIGHTS_INDEX_NAME)
    if all((folder / name).exists() for name in weights):
        raise ValueError(f"{folder} holds two checkpoints, one in shards; delete the older one.")
    drafter = FAMILIES[model_type].from_pretrained(folder).eval()
    broken = [name for name, values in drafter.state_dict().items() if not values.isfinite().all()]
    if broken:
        names = ", ".join(broken[:3])
        raise ValueError(f"{folder}: weights are not all finite ({names}); use an earlier one.")
    return drafter


def published_files(folder: str | Path) -> list[str]:
    """List the files to upload: checkpoint, tokenizer, card, code and pictures.

    Checkpoints of a training run, optimizer states and logs lie in folders or are of other kinds.
    """
    return sorted(
        path.name
        for path in Path(folder).iterdir()
        if path.is_file() and path.name not in LEFT_OUT
        if path.name == CODE or path.suffix in KINDS and path.name[0] not in "._"
    )


def stale_files(there: list[str], here: list[str]) -> list[str]:
    """List a repository's files that would be loaded with, or in place of, a new checkpoint.

    A single file of weights is loaded before shards, an adapter on top of its drafter. Where `here`
    has only a variant of the weights, nothing is stale.
    """
    if not any(LOADED.fullmatch(name) for name in here):
        return []
    extra = (utils.ADAPTER_CONFIG_NAME, utils.ADAPTER_SAFE_WEIGHTS_NAME, TRAINING_RECORD)
    loaded = [name for name in there if LOADED.fullmatch(name) or name in extra]
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
    published = deepcopy(config)
    names = type(config).__name__, FAMILIES[config.model_type].__name__
    # assistants are loaded as causal language models
    kinds = ("AutoConfig", "AutoModel", "AutoModelForCausalLM")
    classes = zip(kinds, [*names, names[1]], strict=True)
    published.target_name_or_path = base_model or hub_id(config.target_name_or_path)
    published.auto_map = {auto: f"modeling_coral.{name}" for auto, name in classes}
    published.save_pretrained(folder)
    write_text(Path(folder) / CODE, CODE_TEXT.format(*names))
    return published.target_name_or_path


def hub_id(name: str | None) -> str | None:
    """Return a target's name if it can be an id on the Hub; None for a folder of this machine."""
    if name is None or Path(name).exists():
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


class Branch(NamedTuple):
    """A branch of a repository on the Hub, and the token that reads and writes it."""

    repo_id: str
    revision: str | None = None  # `main` by default
    token: str | bool | None = None  # as in `HfApi`

    def check_vacant(self, private: bool | None = None) -> None:
        """Refuse a repository in which a drafter would replace something else.

        Args:
            private: whether a private repository is meant; the Hub reads it only when it makes one.

        Raises:
            ValueError: if another model is there, or a public repository where a private one is
                meant.
        """
        asked = ["config", "private", "siblings"]
        try:
            found = HfApi().model_info(self.repo_id, expand=asked, token=self.token)
        except RepositoryNotFoundError:
            return  # or one that this token cannot see, and cannot write to
        if (other := self._other_model(found)) is not None:
            raise ValueError(f"{self.repo_id} holds {other}; publish under another name.")
        if private and found.private is False:
            what = f"{self.repo_id} exists and is public, and `private` only makes new ones private"
            raise ValueError(f"{what}; change it in its settings on the Hub, or use another name.")

    def _other_model(self, found: Any) -> str | None:
        """Name what a repository holds that is neither a drafter nor an adapter of one."""
        model_type = (found.config or {}).get("model_type")
        names = [sibling.rfilename for sibling in found.siblings or []]
        if model_type in FAMILIES:
            return None
        if utils.ADAPTER_CONFIG_NAME in names:  # PEFT writes down of what it is one
            adapted = json.loads(self._replace(revision=None).read_text(utils.ADAPTER_CONFIG_NAME))
            library = (adapted.get("auto_mapping") or {}).get("parent_library")
            if str(library).startswith("coral_hf"):
                return None
        if model_type is not None:
            return f"a {model_type} model"
        weights = [name for name in names if PurePosixPath(name).suffix in WEIGHTS]
        return f"another model's {weights[0]}" if weights else None

    def read_text(self, name: str) -> str:
        """Read a small file as it is on the Hub now, whatever the cache holds of it."""
        api, options = HfApi(token=self.token), {"revision": self.revision, "force_download": True}
        return Path(api.hf_hub_download(self.repo_id, name, **options)).read_text(encoding="utf-8")

    def card(self) -> str | None:
        """Read the card of the branch, of `main` where the branch has none; None without one.

        Raises:
            HfHubHTTPError: if the Hub does not answer; there may be a card.
        """
        api = HfApi(token=self.token)
        for revision in (self.revision, None):
            if api.file_exists(self.repo_id, CARD, revision=revision):
                return self._replace(revision=revision).read_text(CARD)
        return None

    def upload(
        self, files: Mapping[str, Path], commit_message: str | None = None, **options: Any
    ) -> CommitInfo:
        """Commit files and delete those of an earlier drafter, at once: nobody loads half of one.

        Args:
            files: path in the repository → file here.
            commit_message: of the commit.
            options: more keywords of `HfApi.create_commit`, such as `create_pr`.
        """
        api = HfApi(token=self.token)
        is_branch = self.revision is not None and not self.revision.startswith("refs/")
        if is_branch and not options.get("create_pr"):
            api.create_branch(self.repo_id, branch=self.revision, exist_ok=True)
        there = api.list_repo_files(self.repo_id, revision=self.revision)
        operations = [CommitOperationAdd(name, str(path)) for name, path in files.items()]
        operations += [CommitOperationDelete(name) for name in stale_files(there, list(files))]
        message = commit_message or "Upload drafter"
        return api.create_commit(
            self.repo_id, operations, commit_message=message, revision=self.revision, **options
        )
