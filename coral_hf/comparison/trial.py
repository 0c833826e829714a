"""One way to train a drafter, by name."""

from typing import NamedTuple


class Trial(NamedTuple):
    """Settings of `CoralTrainingArguments` as they are typed: `coral csra_weight=0.5`."""

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
        """As options of a command line."""
        return [part for word in self.settings for part in f"--{word}".split("=", 1)]
