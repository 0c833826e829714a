"""A drafter on the Hub: its repository, its model card, its code."""

from .benchmark_results import Results, read_results
from .card import CardFacts, make_card, write_card
from .drafter_folder import finish_config
from .publish import bring_card, publish, push, upload_saved
from .repository import Branch
