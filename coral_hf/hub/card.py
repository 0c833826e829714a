"""The model card of a drafter: what is known of it, and nothing else.

In: a drafter's config and tree, what its author adds, a benchmark's reports. Out: a `ModelCard` of
huggingface_hub. What is not known is said to be not recorded or not measured.
"""

from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..drafters.coral.modeling import CoralDrafter
from .results import Results
from .sections import about_section, limits_section, target_section, training_section, use_section

CARD = "README.md"
LIBRARY = "coral_hf"
TAGS = ("coral", "speculative-decoding", "drafter")
# by which a card of ours is known, as long as its text has the number that stands behind this;
# any other card is somebody's own work
MARK = "<!-- Written by coral_hf from what the checkpoint and its reports hold. Edit it: it stays. "
# what transformers writes where nobody has written anything
TEMPLATE = "This model card has been automatically generated"
# metadata of ours, and results, which are those of other weights
WRITTEN_ANEW = {
    *("base_model", "base_model_relation", "datasets", "language", "library_name", "license"),
    *("pipeline_tag", "tags", "model-index"),
}


class CardFacts(NamedTuple):
    """What a card says beside what the drafter itself knows."""

    repo_id: str  # or a folder's name, where there is no repository yet
    base_model: str | None = None  # the target's Hub id; the config's own by default
    license: str | None = None
    language: str | list[str] | None = None
    datasets: Sequence[str] = ()  # Hub ids, beside those that the training recorded
    tags: Sequence[str] = ()
    has_chat_template: bool | None = None  # of the tokenizer; as recorded by the training if None
    has_code: bool = False  # whether the drafter's code goes along
    metadata: Mapping[str, Any] = {}  # of an earlier card, none of those that are written here


def make_card(
    drafter: CoralDrafter, facts: CardFacts, results: Sequence[Results] = ()
) -> ModelCard:
    """The card of a drafter, with metadata that the Hub accepts.

    Args:
        results: of `coral-hf benchmark`, read by `read_results`.
    """
    stages = drafter.training_record
    target = facts.base_model or hub_id(drafter.config.target_name_or_path)
    recorded = stages[-1].get("has_chat_template", False) if stages else False
    chats = recorded if facts.has_chat_template is None else facts.has_chat_template
    speed = "\n".join(result.to_markdown() for result in results) or NOT_MEASURED
    sections = [
        about_section(facts.repo_id, target),
        use_section(facts.repo_id, target, chats, facts.has_code),
        target_section(drafter, target),
        training_section(stages),
        f"## Speed\n\n{speed}",
        limits_section(drafter.config, stages, bool(results)),
    ]
    body = "\n\n".join(section.strip() for section in sections)
    head = f"---\n{_metadata(facts, target, stages).to_yaml()}\n---\n\n"
    return ModelCard(f"{head}{body}\n\n{MARK}{_number(body)} -->\n")


def _number(body: str) -> str:
    """What tells whether a card's text was edited since; line ends do not count."""
    return sha256("\n".join(body.split()).encode()).hexdigest()[:16]


NOT_MEASURED = """\
Not measured. `coral-hf benchmark` measures tokens per target pass and speed-up, and
`coral-hf publish --report` puts them here."""


def _metadata(facts: CardFacts, target: str | None, stages: Sequence[dict]) -> ModelCardData:
    trained_on = [name for stage in stages for name in stage.get("datasets", [])]
    datasets = list(dict.fromkeys([*trained_on, *facts.datasets]))
    return ModelCardData(
        base_model=target,
        # of the four relations that the Hub knows this is the one to weights that work beside an
        # unchanged base model; without a relation the Hub counts a drafter as a finetuned target
        base_model_relation="adapter" if target else None,
        datasets=datasets or None,
        language=facts.language,
        library_name=LIBRARY,
        license=facts.license,
        pipeline_tag="text-generation",
        tags=[*dict.fromkeys([*TAGS, *facts.tags])],
        **facts.metadata,
    )


def hub_id(name: str | None) -> str | None:
    """A name if the Hub may know it: that of a folder here is no id, and nobody else's business."""
    if name is None or Path(name).exists():
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def is_by_hand(text: str) -> bool:
    """Whether a card holds anything that neither we nor transformers' template wrote."""
    if not text.strip() or TEMPLATE in text:
        return False
    body, _, end = text.rpartition(MARK)
    if body.startswith("---\n"):
        body = body.partition("\n---\n")[2]
    return end.strip() != f"{_number(body)} -->"


def has_card_by_hand(folder: str | Path) -> bool:
    """Whether somebody wrote the README.md in a folder, which is then theirs."""
    path = Path(folder) / CARD
    return path.exists() and is_by_hand(path.read_text(encoding="utf-8"))


def with_earlier(facts: CardFacts, earlier: ModelCardData) -> CardFacts:
    """`facts`, and where they say nothing what the metadata of an earlier card say."""
    found = earlier.to_dict()
    return facts._replace(
        base_model=facts.base_model or _first(found.get("base_model")),
        license=facts.license or found.get("license"),
        language=facts.language or found.get("language"),
        datasets=[*facts.datasets, *found.get("datasets", [])],
        tags=[*facts.tags, *found.get("tags", [])],
        metadata={name: found[name] for name in found.keys() - WRITTEN_ANEW} | {**facts.metadata},
    )


def _first(names: str | list[str] | None) -> str | None:
    return names[0] if isinstance(names, list) else names


def write_card(
    folder: str | Path,
    drafter: CoralDrafter,
    facts: CardFacts,
    results: Sequence[Results] = (),
) -> bool:
    """Write README.md into a folder unless somebody wrote one there; whether it was written.

    The metadata of an earlier card of ours are kept; its results are not, since they are those of
    other weights.
    """
    path = Path(folder) / CARD
    if has_card_by_hand(folder):
        return False
    if path.exists():
        facts = with_earlier(facts, ModelCard.load(path).data)
    make_card(drafter, facts, results).save(path)
    return True
