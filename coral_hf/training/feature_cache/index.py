"""The index of a feature cache: what it holds, of which target, in which files."""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ..files import replace_json
from .formats import Error

INDEX = "features.json"
# what must be the same for a cache to be written on
IDENTITY = (
    "target",
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


@dataclass
class FeatureIndex:
    """The contents of `features.json`; `shards` are those that are written."""

    target: str  # name or path
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
            raise ValueError(
                f"{folder} holds no {INDEX}, so it is no feature cache; write one with `coral-hf"
                " features --output`."
            )
        fields = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        shards = [Shard(**shard) for shard in fields["shards"]]
        return cls(**{**fields, "shards": shards, "error": Error(*fields["error"])})

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

    def check_files(self, folder: Path, checksums: bool = False) -> None:
        """That every shard is there and whole; with `checksums` to the byte, which reads it all."""
        for shard in self.shards:
            path = folder / shard.file
            size = path.stat().st_size if path.is_file() else None
            if size != shard.num_bytes:
                raise ValueError(
                    f"{path} should have {shard.num_bytes} bytes and has {size}; delete the cache"
                    " with `coral-hf features --delete` and write it again."
                )
            if checksums and sha256_of(path) != shard.sha256:
                raise ValueError(
                    f"{path} does not have the checksum that it was written with; delete the cache"
                    " with `coral-hf features --delete` and write it again."
                )


def sha256_of(path: Path) -> str:
    """The checksum of a file."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        for part in iter(lambda: file.read(1 << 24), b""):
            digest.update(part)
        return digest.hexdigest()


def delete_features(folder: str | Path) -> int:
    """Delete a feature cache, and nothing else that lies in its folder; returns its bytes."""
    folder = Path(folder)
    index = FeatureIndex.read(folder)
    for path in folder.glob("features-*.safetensors*"):  # with one that was not finished
        path.unlink()
    (folder / INDEX).unlink()
    if not any(folder.iterdir()):
        folder.rmdir()
        folder.with_name(f"{folder.name}.lock").unlink(missing_ok=True)
    return sum(shard.num_bytes for shard in index.shards)
