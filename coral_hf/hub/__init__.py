"""A drafter on the Hub: its repository, its model card, its code."""

from .card import CardFacts, Results, bring_card, make_card, read_results, write_card
from .drafter_folder import finish_config
from .publish import publish, push
from .repository import Branch
