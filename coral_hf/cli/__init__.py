"""The commands of `coral-hf`, thin: each calls one public function."""

from . import data, decoding, measuring, training  # noqa: F401  each adds its commands
from .app import app

__all__ = ["app"]
