"""A dataset whose answers are the target's own.

dialogue (what is asked) → answers (what the target says) → answer_file (one line each, resumable).
"""

from .regenerate import RegenerationSettings, regenerate

__all__ = ["RegenerationSettings", "regenerate"]
