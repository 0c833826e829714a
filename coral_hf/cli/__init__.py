"""The commands of `coral-hf`, thin: each calls one public function."""

# each adds its commands
from . import checkpoints, comparing, data, decoding, features, measuring, training  # noqa: F401
from .app import app

__all__ = ["app"]
