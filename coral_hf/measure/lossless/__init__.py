"""Losslessness of a drafter, checked on a user's own prompts: greedy tokens and samples."""

from .verify import Check as Check
from .verify import Verification as Verification
from .verify import verify as verify
