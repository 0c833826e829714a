"""One way to train a drafter, by name."""

import json
from typing import Any, NamedTuple

from ...drafters.coral.configuration import CoralConfig

DRAFTER = "drafter."


class Trial(NamedTuple):
    """Settings of `CoralTrainingArguments` as they are typed: `coral csra_weight=0.5`.

    Those of the drafter's config have a prefix: `coral drafter.num_hidden_layers=2`.
    """

    settings: tuple[str, ...]  # `name=value` each

    @classmethod
    def parse(cls, text: str) -> "Trial":
        """Read `recipe name=value …`; the recipe may be left out."""
        words = text.split()
        if words and "=" not in words[0]:
            words[0] = f"recipe={words[0]}"
        wrong = [word for word in words if "=" not in word.strip("=")]
        if wrong or not words:
            raise ValueError(
                f"A trial is {text!r}; write a recipe and settings: 'coral csra_weight=0.5'."
            )
        return cls(tuple(words))

    @property
    def name(self) -> str:
        """As it was typed."""
        return " ".join(word.removeprefix("recipe=") for word in self.settings)

    @property
    def options(self) -> list[str]:
        """Those of the training, as options of a command line."""
        own = [word for word in self.settings if not word.startswith(DRAFTER)]
        return [part for word in own for part in f"--{word}".split("=", 1)]

    @property
    def drafter_fields(self) -> dict[str, Any]:
        """Those of the drafter's config, their values read as JSON.

        Raises:
            ValueError: for a field that `CoralConfig` lacks, and for a value that is no JSON.
        """
        own = [word for word in self.settings if word.startswith(DRAFTER)]
        pairs = (word.removeprefix(DRAFTER).split("=", 1) for word in own)
        return {name: _value(name, text) for name, text in pairs}


def _value(name: str, text: str) -> Any:
    """The value of a field of `CoralConfig`, from JSON."""
    # those that it declares itself; others are of transformers and shape no drafter
    known = CoralConfig.__annotations__
    if name not in known:
        raise ValueError(
            f"`{DRAFTER}{name}` is no field of CoralConfig; use one of {', '.join(known)}."
        )
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"`{DRAFTER}{name}` is {text!r}, which is no JSON ({error}); write a number, true,"
            ' false, null or "text".'
        ) from error
