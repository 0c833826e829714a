"""Publishing: a folder or a drafter goes to the Hub with a model card, in one commit.

In: a drafter, a repo id. Out: the commit.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import CommitInfo, HfApi
from transformers import PreTrainedTokenizerBase

from ..drafters.model import TRAINING_RECORD, Drafter
from ..identity import record_tokenizer
from .card import CardFacts, Results, bring_card, check_results, read_results, write_card
from .drafter_folder import finish_config, published_files, read_drafter, read_tokenizer
from .repository import CARD, Branch

logger = logging.getLogger(__name__)


def publish(
    folder: str | Path,
    repo_id: str,
    reports: Sequence[str | Path] = (),
    facts: CardFacts | None = None,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> CommitInfo:
    """Write the card of a drafter into its folder and upload both.

    A card that was written by hand, in the folder or on the Hub, stays.

    Args:
        folder: what `coral-hf train` or `save_pretrained` wrote.
        repo_id: `"organisation/name"`, made if it does not exist.
        reports: report.json files of `coral-hf benchmark`, shown in the card and uploaded.
        facts: what the card says beside what the drafter knows; its `base_model` becomes the
            drafter's target.
        private: of a new repository.
        revision: a branch, made if it does not exist; `main` by default.
        token: as in `HfApi`, by default that of `hf auth login` or HF_TOKEN.

    Raises:
        ValueError: if the folder holds no whole drafter, a report is of another one, or something
            else is at `repo_id`.
        HfHubHTTPError: if the Hub refuses.
    """
    if "/" not in repo_id:
        raise ValueError(f"`repo_id` is {repo_id!r}; give it as organisation/name.")
    branch, folder = Branch(repo_id, revision, token), Path(folder)
    drafter = read_drafter(folder)
    facts = (facts or CardFacts(repo_id))._replace(repo_id=repo_id)
    facts = _with_tokenizer(facts, drafter, read_tokenizer(folder))
    results = [read_results(report) for report in reports]
    for result in results:
        check_results(result, drafter, [drafter.config.target_name_or_path, facts.base_model])
    branch.check_vacant(private)
    _prepare(folder, drafter, branch, facts, results)
    HfApi(token=token).create_repo(repo_id, private=private, exist_ok=True)
    files = {name: folder / name for name in published_files(folder)}
    for number, report in enumerate(reports, 1):
        files[f"results/report{f'-{number}' if number > 1 else ''}.json"] = Path(report)
    return branch.upload(files)


def push(
    drafter: Drafter,
    repo_id: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    private: bool | None = None,
    tags: str | Sequence[str] | None = None,
    max_shard_size: int | str = "50GB",
    **commit,
) -> CommitInfo:
    """Save a drafter, its tokenizer and its card, and upload them: `drafter.push_to_hub`.

    Args:
        commit: `revision`, `token`, and what `HfApi.create_commit` takes.
    """
    tags = [tags] if isinstance(tags, str) else tags or []
    facts = CardFacts(repo_id, tags=[*(drafter.model_tags or []), *tags])
    facts = _with_tokenizer(facts, drafter, tokenizer)
    token = commit.pop("token", None)
    # a name without its owner is completed by the Hub
    repo_id = HfApi(token=token).create_repo(repo_id, private=private, exist_ok=True).repo_id
    branch = Branch(repo_id, commit.pop("revision", None), token)
    branch.check_vacant(private)
    with TemporaryDirectory() as name:
        folder = Path(name)
        drafter.save_pretrained(folder, max_shard_size=max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        _prepare(folder, drafter, branch, facts._replace(repo_id=repo_id))
        paths = [path for path in folder.rglob("*") if path.is_file()]
        return branch.upload({str(path.relative_to(folder)): path for path in paths}, **commit)


def upload_saved(
    drafter: Drafter,
    folder: str | Path,
    repo_id: str,
    timestamps: Mapping[str, float],
    token: str | bool | None = None,
    **commit,
) -> CommitInfo:
    """Upload what `save_pretrained(push_to_hub=True)` has written into a folder, and the card.

    Args:
        timestamps: name → time of the last change, of the files that were there before.
        commit: what `HfApi.create_commit` takes.
    """
    folder, branch = Path(folder), Branch(repo_id, None, token)
    branch.check_vacant()
    _prepare(folder, drafter, branch, CardFacts(repo_id))
    files = {path.name: path for path in folder.iterdir() if path.is_file()}
    for name in files.keys() - {TRAINING_RECORD}:
        if files[name].stat().st_mtime <= timestamps.get(name, 0):
            del files[name]
    return branch.upload(files, **commit)


def _with_tokenizer(
    facts: CardFacts, drafter: Drafter, tokenizer: PreTrainedTokenizerBase | None
) -> CardFacts:
    """Read off the tokenizer that is published along; its hash goes into the drafter's config.

    Raises:
        ValueError: if it is not the one that the drafter was trained with.
    """
    if tokenizer is None:
        return facts
    record_tokenizer(tokenizer, drafter.config)
    return facts._replace(has_chat_template=tokenizer.chat_template is not None)


def _prepare(
    folder: Path,
    drafter: Drafter,
    branch: Branch,
    facts: CardFacts,
    results: Sequence[Results] = (),
) -> None:
    """Make the folder of a drafter what its repository will be: card, config and code.

    Raises:
        ValueError: if `results` have no place in a card that was written by hand.
    """
    bring_card(folder, branch)
    if not write_card(folder, drafter, facts, results) and results:
        raise ValueError(
            f"{folder / CARD} was written by hand, so the report has no place in it; move it away,"
            " on the Hub too, and publish again, or publish without a report."
        )
    if finish_config(drafter.config, folder, facts.base_model) is None:
        logger.warning(
            "The card of %s names no target that others can load; publish again with `base_model`"
            " (`--base-model`), its id on the Hub.",
            branch.repo_id,
        )
