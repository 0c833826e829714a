"""The model card of a drafter: what is known of it, and nothing else.

In: a drafter's config and tree, what its author adds, a benchmark's reports. Out: a `ModelCard` of
huggingface_hub. What is not known is said to be not recorded or not measured.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..modeling_coral import CoralDrafter
from .results import Results
from .sections import about_section, limits_section, target_section, training_section, use_section

CARD = "README.md"
LIBRARY = "coral_hf"
TAGS = ("coral", "speculative-decoding", "drafter")
# by which a card of ours is known; a card without it is somebody's own work
MARK = "<!-- Written by coral_hf from what the checkpoint and its reports hold. -->"
# what transformers writes where nobody has written anything
TEMPLATE = "This model card has been automatically generated"


class CardFacts(NamedTuple):
    """What a card says beside what the drafter itself knows."""

    repo_id: str  # or a folder's name, where there is no repository yet
    base_model: str | None = None  # the target's Hub id; the config's own by default
    license: str | None = None
    language: str | list[str] | None = None
    datasets: Sequence[str] = ()  # Hub ids, beside those that the training recorded
    tags: Sequence[str] = ()
    has_chat_template: bool | None = None  # of the tokenizer; as recorded by the training if None


def make_card(
    drafter: CoralDrafter, facts: CardFacts, results: Sequence[Results] = ()
) -> ModelCard:
    """The card of a drafter, with metadata that the Hub accepts.

    Args:
        results: of `coral-hf benchmark`, read by `read_results`.
    """
    stages = drafter.config.training_record or []
    target = facts.base_model or hub_id(drafter.config.target_name_or_path)
    recorded = stages[-1].get("has_chat_template", False) if stages else False
    chats = recorded if facts.has_chat_template is None else facts.has_chat_template
    speed = "\n".join(result.to_markdown() for result in results) or NOT_MEASURED
    sections = [
        about_section(facts.repo_id, target),
        use_section(facts.repo_id, target, chats),
        target_section(drafter, target),
        training_section(stages),
        f"## Speed\n\n{speed}",
        limits_section(drafter.config, stages, bool(results)),
        MARK,
    ]
    body = "\n\n".join(section.strip() for section in sections)
    return ModelCard(f"---\n{_metadata(facts, target, stages).to_yaml()}\n---\n\n{body}\n")


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
    return bool(text.strip()) and MARK not in text and TEMPLATE not in text


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

    License, language, datasets and tags of an earlier card of ours are kept; its results are not,
    since they are those of other weights.
    """
    path = Path(folder) / CARD
    if has_card_by_hand(folder):
        return False
    if path.exists():
        facts = with_earlier(facts, ModelCard.load(path).data)
    make_card(drafter, facts, results).save(path)
    return True
