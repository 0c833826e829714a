"""A drafter on the Hub: its repository, its model card, its code.

In: a folder or a drafter, a repo id. Out: one commit with all files and a model card.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi
from transformers import AutoTokenizer

from ..drafters.model import Drafter
from ..identity import record_tokenizer
from .card import CardFacts, bring_card, check_results, make_card, read_results, write_card
from .repository import CARD, Branch, finish_config, published_files, read_drafter

logger = logging.getLogger(__name__)


def publish(
    folder: str | Path,
    repo_id: str,
    reports: Sequence[str | Path] = (),
    facts: CardFacts | None = None,
    private: bool | None = None,
    drafter: Drafter | None = None,
    **commit: Any,
) -> CommitInfo:
    """Write the card of a drafter into its folder and upload both.

    A card that was written by hand, in the folder or on the Hub, stays.

    Args:
        folder: what `coral-hf train` or `save_pretrained` wrote.
        repo_id: `"organisation/name"`, made if it does not exist; without the first, yours.
        reports: report.json files of `coral-hf benchmark`, shown in the card and uploaded.
        facts: what the card says beside what the drafter knows; its `base_model` becomes the
            drafter's target.
        private: of a new repository.
        drafter: the one in the folder, where it was just saved there; else it is read and checked.
        commit: `revision`, a branch that is made if it does not exist, `main` by default; `token`,
            as in `HfApi`, by default that of `hf auth login` or HF_TOKEN; and what
            `HfApi.create_commit` takes.

    Raises:
        ValueError: if the folder holds no whole drafter, a report is of another one, or something
            else is at `repo_id`.
        HfHubHTTPError: if the Hub refuses.
    """
    drafter = drafter or read_drafter(folder)
    folder, api = Path(folder), HfApi(token=commit.pop("token", None))
    if "/" not in repo_id:  # the Hub adds its owner
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    branch = Branch(repo_id, commit.pop("revision", None), api.token)
    facts = (facts or CardFacts(repo_id))._replace(repo_id=repo_id)
    if (folder / "tokenizer_config.json").exists():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        record_tokenizer(tokenizer, drafter.config)  # a ValueError if it is another one
        facts = facts._replace(has_chat_template=tokenizer.chat_template is not None)
    results = [read_results(report) for report in reports]
    for result in results:
        check_results(result, drafter, [drafter.config.target_name_or_path, facts.base_model])
    branch.check_vacant(private)
    bring_card(folder, branch)
    if not write_card(folder, drafter, facts, results) and results:
        what = f"{folder / CARD} was written by hand, so the report has no place in it"
        raise ValueError(f"{what}; move it away, on the Hub too, or publish without a report.")
    if finish_config(drafter.config, folder, facts.base_model) is None:
        what = f"The card of {repo_id} names no target that others can load"
        logger.warning(f"{what}; publish again with `base_model`, its id on the Hub.")
    api.create_repo(repo_id, private=private, exist_ok=True)
    files = {name: folder / name for name in published_files(folder)}
    for number, report in enumerate(reports, 1):
        files[f"results/report{f'-{number}' if number > 1 else ''}.json"] = Path(report)
    return branch.upload(files, **commit)
