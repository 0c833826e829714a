"""The commands of `coral-hf`, thin: each calls one public function."""

# each adds its commands
from . import (  # noqa: F401
    checkpoints,
    comparing,
    data,
    decoding,
    features,
    heads,
    measuring,
    publishing,
    timing,
    training,
)
from .app import app

__all__ = ["app"]
