"""Plain decoding: transformers' own loop, where nothing is drafted."""

from .own_loop import Passes, decode_all, decode_rest
from .pace import step_seconds

__all__ = ["Passes", "decode_all", "decode_rest", "step_seconds"]
