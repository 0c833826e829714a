"""A drafter on the Hub: its repository, its model card, its code."""

from .benchmark_results import Results, read_results
from .card import CardFacts, make_card, write_card
from .drafter_folder import finish_config
from .publish import bring_card, publish, push, upload_saved
from .repository import Branch

__all__ = [
    "Branch",
    "CardFacts",
    "Results",
    "bring_card",
    "finish_config",
    "make_card",
    "publish",
    "push",
    "read_results",
    "upload_saved",
    "write_card",
]
