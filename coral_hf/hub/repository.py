"""A branch of a repository on the Hub: whether a drafter may go there, and the upload.

In: a repo id, a branch, a token. Out: the card that is there, a refusal, or a commit.
"""

import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelInfo,
    hf_hub_download,
)
from huggingface_hub.errors import RepositoryNotFoundError
from transformers.utils import ADAPTER_CONFIG_NAME

from ..drafters.families import FAMILIES
from .drafter_folder import stale_files

CARD = "README.md"
# kinds of files that hold weights
WEIGHTS = {".safetensors", ".bin", ".gguf", ".pt", ".pth", ".ckpt", ".onnx", ".h5", ".msgpack"}


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
        other = self._other_model(found)
        if other is not None:
            raise ValueError(
                f"{self.repo_id} holds {other}, whose files a drafter's would replace; publish"
                " under another name."
            )
        if private and found.private is False:
            raise ValueError(
                f"{self.repo_id} exists and is public, and `private` only makes new repositories"
                " private; change its visibility in its settings on the Hub, or use another name."
            )

    def _other_model(self, found: ModelInfo) -> str | None:
        """Name what a repository holds that is neither a drafter nor an adapter of one."""
        model_type = (found.config or {}).get("model_type")
        names = [sibling.rfilename for sibling in found.siblings or []]
        is_drafter = model_type in FAMILIES
        if is_drafter or (ADAPTER_CONFIG_NAME in names and self._adapts_drafter()):
            return None
        if model_type is not None:
            return f"a {model_type} model"
        weights = [name for name in names if PurePosixPath(name).suffix in WEIGHTS]
        return f"another model's {weights[0]}" if weights else None

    def _adapts_drafter(self) -> bool:
        """Check whether the repository's adapter is of a drafter, as PEFT writes down."""
        adapted = json.loads(Branch(self.repo_id, None, self.token).read_text(ADAPTER_CONFIG_NAME))
        return str((adapted.get("auto_mapping") or {}).get("parent_library")).startswith("coral_hf")

    def read_text(self, name: str) -> str:
        """Read a small file as it is on the Hub now, whatever the cache holds of it."""
        options = {"revision": self.revision, "token": self.token, "force_download": True}
        return Path(hf_hub_download(self.repo_id, name, **options)).read_text(encoding="utf-8")

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
        self,
        files: Mapping[str, Path],
        commit_message: str | None = None,
        create_pr: bool = False,
        **options: Any,
    ) -> CommitInfo:
        """Commit files and delete those of an earlier drafter, at once: nobody loads half of one.

        Args:
            files: path in the repository → file here.
            create_pr: open a pull request.
            options: more keywords of `HfApi.create_commit`.
        """
        api = HfApi(token=self.token)
        is_branch = self.revision is not None and not self.revision.startswith("refs/")
        if is_branch and not create_pr:
            api.create_branch(self.repo_id, branch=self.revision, exist_ok=True)
        there = api.list_repo_files(self.repo_id, revision=self.revision)
        operations = [CommitOperationAdd(name, str(path)) for name, path in files.items()]
        operations += [CommitOperationDelete(name) for name in stale_files(there, list(files))]
        return api.create_commit(
            self.repo_id,
            operations,
            commit_message=commit_message or "Upload drafter",
            revision=self.revision,
            create_pr=create_pr,
            **options,
        )
