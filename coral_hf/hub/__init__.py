"""A drafter on the Hub: its repository, and a card that says what is known of it."""

from .card import CardFacts, make_card, write_card
from .folder import name_target
from .publish import bring_card, publish
from .pushing import drop_stale, finish_folder, pushing
from .repository import advice, check_vacant, explained, full_name
from .results import Results, read_results

__all__ = [
    "CardFacts",
    "Results",
    "advice",
    "bring_card",
    "check_vacant",
    "drop_stale",
    "explained",
    "finish_folder",
    "full_name",
    "make_card",
    "name_target",
    "publish",
    "pushing",
    "read_results",
    "write_card",
]
