"""One way to train a drafter, by name."""

import json
from typing import Any, NamedTuple

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
        """Those of the drafter's config, their values read as JSON."""
        own = [word for word in self.settings if word.startswith(DRAFTER)]
        pairs = (word.removeprefix(DRAFTER).split("=", 1) for word in own)
        return {name: json.loads(value) for name, value in pairs}
