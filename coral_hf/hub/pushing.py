"""`drafter.push_to_hub`: what transformers' own does, and a card, a tokenizer, errors that help.

In: a drafter, a repo id. Out: checks before and files beside what transformers uploads.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationDelete, HfApi, ModelCard
from transformers import PreTrainedTokenizerBase

from ..drafters.coral.modeling import CoralDrafter
from ..identity import check_tokenizer, tokenizer_hash
from .card import CARD, CardFacts, hub_id, write_card
from .folder import name_target, stale_weights
from .repository import check_vacant, explained, full_name

# whether the tokenizer of the push that is going on has a chat template
HAS_CHAT_TEMPLATE: ContextVar[bool | None] = ContextVar("has_chat_template", default=None)


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
        drafter.config.tokenizer_hash = tokenizer_hash(tokenizer)
    token = options.get("token")
    chats = None if tokenizer is None else tokenizer.chat_template is not None
    before = HAS_CHAT_TEMPLATE.set(chats)
    try:
        with explained(repo_id):
            private = options.get("private")
            check_vacant(full_name(repo_id, token, private), token, private)
            yield
            if tokenizer is not None:
                tokenizer.push_to_hub(repo_id, token=token, revision=options.get("revision"))
    finally:
        HAS_CHAT_TEMPLATE.reset(before)


def finish_folder(drafter: CoralDrafter, folder: str | Path, repo_id: str) -> None:
    """Put our card in place of transformers' template into a folder that is uploaded next.

    What transformers found on the Hub or made up lies in the folder as README.md.
    """
    tags: list[str] = []
    if (path := Path(folder) / CARD).exists():
        tags = ModelCard.load(path).data.tags or []
    facts = CardFacts(repo_id, tags=tags, has_chat_template=HAS_CHAT_TEMPLATE.get())
    write_card(folder, drafter, facts)
    name_target(drafter.config, folder, hub_id(drafter.config.target_name_or_path))


def drop_stale(folder: str | Path, pushed: CommitInfo, options: dict[str, Any]) -> None:
    """Delete weights of an earlier push that would be loaded in place of the new ones.

    Args:
        folder: whose files were pushed.
        options: of the push.
    """
    api, repo_id = HfApi(token=options.get("token")), pushed.repo_url.repo_id
    revision = pushed.pr_revision or options.get("revision")
    here = [path.name for path in Path(folder).iterdir()]
    names = stale_weights(api.list_repo_files(repo_id, revision=revision), here)
    if names:
        operations = [CommitOperationDelete(name) for name in names]
        message = "Delete earlier weights"
        api.create_commit(repo_id, operations, commit_message=message, revision=revision)
