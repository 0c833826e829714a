"""A folder goes to the Hub: card, checkpoint, tokenizer and reports in one commit.

In: the folder of a drafter, a repo id. Out: the commit.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from transformers import AutoTokenizer

from ..drafters.coral.modeling import CoralDrafter
from ..identity import check_tokenizer, tokenizer_hash
from .card import CARD, CardFacts, has_card_by_hand, hub_id, is_by_hand, write_card
from .folder import name_target, published_files, read_drafter, save_code, stale_weights
from .repository import check_vacant, explained, text_on_hub
from .results import Results, check_results, read_results

logger = logging.getLogger(__name__)

TOKENIZER = "tokenizer_config.json"

NO_TARGET = (
    "The card of %s names no target that others can load; publish again with `base_model`"
    " (`--base-model`), its id on the Hub."
)


def publish(
    folder: str | Path,
    repo_id: str,
    reports: Sequence[str | Path] = (),
    facts: CardFacts | None = None,
    private: bool | None = None,
    code: bool = False,
    revision: str | None = None,
    token: str | None = None,
) -> CommitInfo:
    """Write the card of a drafter into its folder and upload both.

    A card that somebody wrote in the folder is uploaded as it is.

    Args:
        folder: that `coral-hf train` or `save_pretrained` wrote.
        repo_id: `"organisation/name"`, made if it is not there.
        reports: report.json files of `coral-hf benchmark`, shown in the card and uploaded.
        facts: what the card says beside what the drafter knows; its `base_model` becomes the
            drafter's target.
        private: of a new repository.
        code: upload the drafter's code too, for `trust_remote_code`.
        revision: a branch, made if it is not there; `main` by default.
        token: as in `HfApi`, by default that of `hf auth login` or HF_TOKEN.

    Raises:
        ValueError: if the folder holds no whole drafter, a report is of another one, or something
            else is at `repo_id`.
        HfHubHTTPError, ConnectionError: if the Hub refuses or cannot be reached, with a sentence
            on what to do.
    """
    if "/" not in repo_id:
        raise ValueError(f"`repo_id` is {repo_id!r}; give it as organisation/name.")
    validate_repo_id(repo_id)
    facts = (facts or CardFacts(repo_id))._replace(repo_id=repo_id)
    drafter = read_drafter(folder)
    results = [read_results(report) for report in reports]
    _check_target(drafter, facts, results)
    with explained(repo_id):
        check_vacant(repo_id, token, private)
        bring_card(Path(folder), repo_id, revision, token)
    _check_card(Path(folder), bool(results))
    target = facts.base_model or hub_id(drafter.config.target_name_or_path)
    if target is None:
        logger.warning(NO_TARGET, repo_id)
    facts = _with_tokenizer(facts, drafter, Path(folder))
    # code that went along before is brought up to date
    if code or hasattr(drafter.config, "auto_map"):
        save_code(drafter, folder)
        facts = facts._replace(has_code=True)
    name_target(drafter.config, folder, target)
    write_card(folder, drafter, facts, results)
    with explained(repo_id):
        return _upload(Path(folder), repo_id, reports, private, revision, token)


def bring_card(folder: Path, repo_id: str, revision: str | None, token: str | None) -> None:
    """Fetch the Hub's card: one that somebody wrote stays, and of ours the metadata are kept."""
    text = _card_on_hub(repo_id, revision, token)
    if text is None or has_card_by_hand(folder):
        return
    if is_by_hand(text) or not (folder / CARD).exists():
        (folder / CARD).write_text(text, encoding="utf-8")


def _card_on_hub(repo_id: str, revision: str | None, token: str | None) -> str | None:
    """The card of a branch, of the main one where it is yet to be made; None where there is none.

    Raises:
        ConnectionError: if it cannot be told whether there is one.
    """
    try:
        return text_on_hub(repo_id, CARD, revision, token)
    except LocalEntryNotFoundError as error:
        raise ConnectionError(
            f"The card of {repo_id} cannot be read ({error.__cause__ or error}), and it may be one"
            " that somebody wrote; publish again when the Hub answers."
        ) from error
    except RevisionNotFoundError:
        return None if revision is None else _card_on_hub(repo_id, None, token)
    except (RepositoryNotFoundError, EntryNotFoundError):
        return None


def _check_card(folder: Path, has_results: bool) -> None:
    if has_results and has_card_by_hand(folder):
        raise ValueError(
            f"{folder / CARD} was written by hand, so the report has no place in it; move it away,"
            " on the Hub too, and publish again, or publish without a report."
        )


def _check_target(drafter: CoralDrafter, facts: CardFacts, results: Sequence[Results]) -> None:
    if facts.base_model is not None:
        validate_repo_id(facts.base_model)
    names = [drafter.config.target_name_or_path, facts.base_model]
    for result in results:
        check_results(result, drafter, names)


def _with_tokenizer(facts: CardFacts, drafter: CoralDrafter, folder: Path) -> CardFacts:
    """What the tokenizer in the folder says, where there is one; its hash goes into config.json.

    Raises:
        ValueError: if it is not the one that the drafter was trained with, or cannot be read.
    """
    if not (folder / TOKENIZER).exists():
        return facts
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"The tokenizer in {folder} cannot be read ({error}); save the target's there again, or"
            " take it away."
        ) from error
    check_tokenizer(tokenizer, drafter.config)
    if drafter.config.tokenizer_hash is None:
        drafter.config.tokenizer_hash = tokenizer_hash(tokenizer)
        drafter.config.save_pretrained(folder)
    if facts.has_chat_template is not None:
        return facts
    return facts._replace(has_chat_template=tokenizer.chat_template is not None)


def _upload(
    folder: Path,
    repo_id: str,
    reports: Sequence[str | Path],
    private: bool | None,
    revision: str | None,
    token: str | None,
) -> CommitInfo:
    """All files in one commit, so that nobody loads half of a drafter."""
    api = HfApi(token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    names = published_files(folder)
    paths = {name: folder / name for name in names} | _report_names(reports)
    there = api.list_repo_files(repo_id, revision=revision)
    operations = [CommitOperationAdd(name, str(path)) for name, path in paths.items()]
    operations += [CommitOperationDelete(name) for name in stale_weights(there, names)]
    return api.create_commit(
        repo_id, operations, commit_message="Upload drafter", revision=revision
    )


def _report_names(reports: Sequence[str | Path]) -> dict[str, Path]:
    """Where the reports go: results/report.json, or numbered where there are several."""
    numbers = [""] if len(reports) == 1 else [f"-{n}" for n in range(1, len(reports) + 1)]
    return {
        f"results/report{number}.json": Path(report)
        for number, report in zip(numbers, reports, strict=True)
    }
