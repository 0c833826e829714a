"""`drafter.push_to_hub`: what transformers' own does, and a card, a tokenizer, errors that help.

In: a drafter, a repo id. Out: checks before and files beside what transformers uploads.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from transformers import PreTrainedTokenizerBase

from ..modeling_coral import CoralDrafter
from ..target import check_tokenizer
from .card import CARD, CardFacts, hub_id, write_card
from .folder import name_target
from .repository import check_vacant, explained


@contextmanager
def pushing(
    drafter: CoralDrafter,
    repo_id: str,
    tokenizer: PreTrainedTokenizerBase | None,
    options: dict[str, Any],
) -> Iterator[None]:
    """Check before a push, and push the tokenizer after it.

    Args:
        options: keywords of `push_to_hub`.
    """
    if tokenizer is not None:
        check_tokenizer(tokenizer, drafter.config)
        if options.get("create_pr"):
            raise ValueError(
                "`tokenizer` is pushed in a commit of its own, and `create_pr` would open a pull"
                " request for each; push the tokenizer with its own `push_to_hub`."
            )
    token = options.get("token")
    with explained(repo_id):
        check_vacant(repo_id, token, options.get("private"))
        yield
        if tokenizer is not None:
            tokenizer.push_to_hub(repo_id, token=token, revision=options.get("revision"))


def finish_folder(drafter: CoralDrafter, folder: str | Path, repo_id: str) -> None:
    """Put our card in place of transformers' template into a folder that is uploaded next.

    What transformers found on the Hub or made up lies in the folder as README.md.
    """
    tags: list[str] = []
    if (path := Path(folder) / CARD).exists():
        tags = ModelCard.load(path).data.tags or []
    write_card(folder, drafter, CardFacts(repo_id, tags=tags))
    name_target(drafter.config, folder, hub_id(drafter.config.target_name_or_path))
