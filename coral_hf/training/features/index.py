"""The index of a feature cache: what it holds, of which target, in which files."""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ..runs.files import replace_json
from .formats import Error

INDEX = "features.json"
UNFINISHED = f"{INDEX}.new"  # what a kill leaves of an index that was being written
# what must be the same for a cache to be written on
IDENTITY = (
    "target",
    "dtype",
    "quantization",
    "format",
    "hidden_size",
    "fingerprint",
    "num_rows",
    "num_tokens",
    "shard_bytes",
)


@dataclass
class Shard:
    """One file of whole rows."""

    file: str
    first_row: int
    num_rows: int
    num_tokens: int
    num_bytes: int = 0
    sha256: str = ""

    def check_size(self, folder: Path) -> None:
        """That its file is there, with all of its bytes."""
        path = folder / self.file
        size = path.stat().st_size if path.is_file() else None
        if size != self.num_bytes:
            raise damaged(path, f"should have {self.num_bytes} bytes and has {size}")

    def check_bytes(self, folder: Path) -> None:
        """That its file is as it was written, which reads it all."""
        path = folder / self.file
        if sha256_of(path) != self.sha256:
            raise damaged(path, "does not have the checksum that it was written with")


@dataclass
class FeatureIndex:
    """The contents of `features.json`; `shards` are those that are written."""

    target: str  # name or path
    target_digest: str  # of its weights
    dtype: str  # that they had
    quantization: str | None  # how they were packed
    format: str  # of `formats.BYTES`
    hidden_size: int
    fingerprint: str  # of all tokens and labels
    num_rows: int
    num_tokens: int
    shard_bytes: int  # of a file, about
    shards: list[Shard] = field(default_factory=list)
    error: Error = Error()  # what storing lost

    @property
    def is_complete(self) -> bool:
        """Whether every row is there."""
        return sum(shard.num_rows for shard in self.shards) == self.num_rows

    def write(self, folder: Path) -> None:
        """Replace the index of a folder in one move."""
        replace_json(folder / INDEX, asdict(self))

    @classmethod
    def read(cls, folder: Path) -> "FeatureIndex":
        """The index of a folder."""
        if not (folder / INDEX).is_file():
            raise _no_cache(folder)
        try:
            fields = json.loads((folder / INDEX).read_text(encoding="utf-8"))
            shards = [Shard(**shard) for shard in fields["shards"]]
            return cls(**{**fields, "shards": shards, "error": Error(*fields["error"])})
        except (ValueError, TypeError, KeyError) as error:
            other = f"is damaged, or of another version ({error})"
            raise damaged(folder / INDEX, other) from error

    def check_same(self, other: "FeatureIndex", folder: Path) -> None:
        """That a cache which is being written goes on as it began."""
        for name in IDENTITY:
            found, expected = getattr(self, name), getattr(other, name)
            if found != expected:
                raise ValueError(
                    f"{folder} holds features with `{name}` {found!r}, but {expected!r} is to be"
                    " written; give another folder, or delete this one with `coral-hf features"
                    " --delete`."
                )
        if self.target_digest != other.target_digest:
            raise ValueError(
                f"{folder} holds features of {self.target}, whose weights were others than now;"
                " give another folder, or delete this one with `coral-hf features --delete`."
            )

    def check_files(self, folder: Path, checksums: bool = False) -> None:
        """That every shard is there and whole; with `checksums` to the byte, which reads it all."""
        for shard in self.shards:
            shard.check_size(folder)
            if checksums:
                shard.check_bytes(folder)


def damaged(path: Path, what: str) -> ValueError:
    """The error for a file of a cache that is not as it was written."""
    return ValueError(
        f"{path} {what}; delete the cache with `coral-hf features --delete` and write it again"
        " (`--check` looks at every file)."
    )


def sha256_of(path: Path) -> str:
    """The checksum of a file."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        for part in iter(lambda: file.read(1 << 24), b""):
            digest.update(part)
        return digest.hexdigest()


def delete_features(folder: str | Path) -> int:
    """Delete a feature cache, and nothing else that lies in its folder; returns its bytes.

    What a kill or a full disk left of one is deleted too.
    """
    folder = Path(folder)
    indices = [path for path in (folder / INDEX, folder / UNFINISHED) if path.is_file()]
    if not indices:
        raise _no_cache(folder)
    # the index last, so that what is broken off can be deleted again
    files = [*folder.glob("features-*.safetensors*"), *indices]
    size = sum(path.stat().st_size for path in files)
    for path in files:
        path.unlink()
    if not any(folder.iterdir()):
        folder.rmdir()
        folder.with_name(f"{folder.name}.lock").unlink(missing_ok=True)
    return size


def _no_cache(folder: Path) -> ValueError:
    return ValueError(
        f"{folder} holds no {INDEX}, so it is no feature cache; write one with `coral-hf features"
        " --output`."
    )
