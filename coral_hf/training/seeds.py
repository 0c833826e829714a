"""Seeds of random numbers that nothing else has drawn."""

import hashlib


def seed_of(*parts: int) -> int:
    """A seed for what some numbers name, such as (seed, row, turn)."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:6], "big")
