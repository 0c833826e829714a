"""The model card of a drafter: what is known of it, and nothing else.

In: a drafter, what its author adds, report.json files of `coral-hf benchmark`. Out: a `ModelCard`
of huggingface_hub, made from card_template.md. What is not known is said to be not recorded or not
measured.
"""

import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import ModelCard, ModelCardData

from ..decoding.settings import TREE_DEFAULTS
from ..drafters.model import FAMILIES, Drafter
from ..identity import weights_digest
from ..measure.settings import DRAFTING
from .repository import CARD, Branch, hub_id

TEMPLATE = Path(__file__).with_name("card_template.md")
TAGS = ("speculative-decoding", "drafter")
# the end of a card of ours, with a number made from the text before it; any other card, and one
# whose text has another number, was written or edited by hand
MARK = "<!-- Written by coral_hf from what the checkpoint and its reports hold. Edit it: it stays. "
# in the card that transformers writes where there is none
GENERATED = "This model card has been automatically generated"
METHOD = "coral"  # of the drafter, in a benchmark's report
Report = Mapping[str, Any]  # what `read_results` returns


class CardFacts(NamedTuple):
    """What a card says beside what the drafter itself knows."""

    repo_id: str  # or a folder's name, where there is no repository yet
    base_model: str | None = None  # the target's Hub id; the config's own by default
    license: str | None = None
    language: str | list[str] | None = None
    datasets: Sequence[str] = ()  # Hub ids, beside those in the training record
    tags: Sequence[str] = ()
    has_chat_template: bool | None = None  # of the tokenizer; None: see the training record


def make_card(
    drafter: Drafter,
    facts: CardFacts,
    results: Sequence[Report] = (),
    earlier: Mapping[str, Any] | None = None,
) -> ModelCard:
    """Make the card of a drafter, with metadata that the Hub accepts.

    Args:
        results: of `coral-hf benchmark`, read by `read_results`.
        earlier: metadata of an earlier card, kept where nothing else is known.
    """
    config, own, stages = drafter.config, drafter.generation_config, drafter.training_record
    family, earlier = FAMILIES[config.model_type], earlier or {}
    bases, chats = earlier.get("base_model"), facts.has_chat_template
    known = bases[0] if isinstance(bases, list) else bases
    target = facts.base_model or hub_id(config.target_name_or_path) or known
    datasets = [name for stage in stages for name in stage.get("datasets", [])]
    datasets += [*facts.datasets, *earlier.get("datasets", [])]
    tags = [family.title.lower().replace(" ", "-"), *TAGS, *facts.tags, *earlier.get("tags", [])]
    metadata = {
        "base_model": target,
        # weights that work beside an unchanged base model; without a relation the Hub lists a
        # drafter as a finetuned target
        "base_model_relation": "adapter" if target else None,
        "datasets": [*dict.fromkeys(datasets)] or None,
        "language": facts.language or earlier.get("language"),
        "library_name": "coral_hf",
        "license": facts.license or earlier.get("license"),
        "pipeline_tag": "text-generation",
        "tags": [*dict.fromkeys(tags)],
        "model-index": None,  # results of other weights
    }
    if chats is None:
        chats = bool(stages) and stages[-1].get("has_chat_template", False)
    card = ModelCard.from_template(
        ModelCardData(**{**earlier, **metadata}),
        template_path=str(TEMPLATE),
        repo_id=facts.repo_id,
        target=target,
        target_folder=Path(config.target_name_or_path or "").name,
        config=config,
        paper=family.paper,
        num_parameters=drafter.num_parameters(),
        dtype=str(drafter.dtype).removeprefix("torch."),
        tree={name: getattr(own, name, value) for name, value in TREE_DEFAULTS.items()},
        has_chat_template=chats,
        stages=stages,
        results=results,
    )
    card.text = f"{card.text.rstrip()}\n\n{MARK}{_number(card.text)} -->\n"
    return card


def _number(text: str) -> str:
    """Hash a text, to tell whether it was edited; line ends do not count."""
    return sha256("\n".join(text.split()).encode()).hexdigest()[:16]


def is_by_hand(text: str) -> bool:
    """Check whether a card holds anything that neither we nor transformers' template wrote."""
    if not text.strip() or GENERATED in text:
        return False
    body, _, end = text.rpartition(MARK)
    if body.startswith("---\n"):
        body = body.partition("\n---\n")[2]
    return end.strip() != f"{_number(body)} -->"


def has_card_by_hand(folder: str | Path) -> bool:
    """Check whether the README.md in a folder was written by hand."""
    path = Path(folder) / CARD
    return path.exists() and is_by_hand(path.read_text(encoding="utf-8"))


def write_card(
    folder: str | Path, drafter: Drafter, facts: CardFacts, results: Sequence[Report] = ()
) -> bool:
    """Write README.md into a folder unless there is one written by hand; whether it was written.

    The metadata of an earlier card are kept, its results are not: they are those of other weights.
    """
    path = Path(folder) / CARD
    if has_card_by_hand(folder):
        return False
    earlier = ModelCard.load(path).data.to_dict() if path.exists() else None
    make_card(drafter, facts, results, earlier).save(path)
    return True


def bring_card(folder: Path, branch: Branch) -> None:
    """Fetch the Hub's card: one written by hand stays, and of ours the metadata are kept."""
    text = branch.card()
    if text is None or has_card_by_hand(folder):
        return
    if is_by_hand(text) or not (folder / CARD).exists():
        (folder / CARD).write_text(text, encoding="utf-8")


def read_results(path: str | Path) -> Report:
    """Read the parts of a report.json that a card shows: of its rows, those of the drafter.

    Raises:
        ValueError: if it is no report of `coral-hf benchmark`, or measured no drafter.
    """
    try:
        report = json.loads(Path(path).read_text(encoding="utf-8"))
        for part in ("rows", "acceptance"):
            report[part] = [row for row in report[part] if row["method"] == METHOD]
        settings = report["settings"]
        # what the call chose; the rest are the drafter's own settings
        chosen = {name: settings[name] for name in DRAFTING if settings.get(name) is not None}
        report["drafting"] = chosen
    except (OSError, ValueError, TypeError, KeyError) as error:
        what = f"{path} cannot be read as a report of `coral-hf benchmark` ({error!r})"
        raise ValueError(f"{what}. Pass the report.json of its --output.") from error
    if not report["rows"]:
        raise ValueError(f"{path} measured no drafter; run `coral-hf benchmark --method {METHOD}`.")
    return report


def check_results(results: Report, drafter: Drafter, targets: Sequence[str | None]) -> None:
    """Check that a report is of this drafter.

    Args:
        targets: names that the drafter's target goes by, ids and folders.

    Raises:
        ValueError: if other weights were measured, or another target.
    """
    measured, own = results["environment"], weights_digest(drafter)
    # the digest rounds to bf16; float16 rounds differently before that
    if measured["drafter_digest"] not in (own, weights_digest(deepcopy(drafter).half())):
        raise ValueError(f"The report measured other weights ({measured['drafter']}), not these.")
    names = {Path(target).name for target in targets if target is not None}
    if names and Path(measured["target"]).name not in names:
        found, own = measured["target"], " or ".join(sorted(names))
        raise ValueError(
            f"The report was measured on the target {found}, the drafter is for {own}."
        )
