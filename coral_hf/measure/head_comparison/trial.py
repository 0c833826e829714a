"""One draft head and how it is read, by name."""

from typing import Any, NamedTuple

from ...drafters.coral.configuration import CoralConfig
from ...heads.settings import DRAFT_HEADS

# what a head is made with, by its name; the other settings are of reading it
MADE_WITH: dict[str, dict[str, type]] = {
    "full": {},
    "routed": {"grouping": str, "num_groups": int},
    "frequency": {"num_hot_tokens": int},
    "low_rank": {"head_rank": int},
}
READ_WITH = {
    "num_active_groups": int,
    "routing": str,
    "max_active_groups": int,
    "active_mass": float,
}

# how a head is read where a trial says nothing of it
READ_ALONE = {name: getattr(CoralConfig, name) for name in READ_WITH if name != "num_active_groups"}


class HeadTrial(NamedTuple):
    """`routed grouping=kmeans num_groups=32 num_active_groups=4`: fields of `CoralConfig`."""

    name: str  # as it was typed
    head: str
    made_with: dict[str, Any]
    read_with: dict[str, Any]

    @classmethod
    def parse(cls, text: str) -> "HeadTrial":
        """Read a head's name and settings.

        Raises:
            ValueError: for a head, a setting or a value that there is not.
        """
        head, *words = text.split() or [""]
        if head not in DRAFT_HEADS:
            raise ValueError(f"A trial is {text!r}; begin it with a head: {DRAFT_HEADS}.")
        types = {**MADE_WITH[head], **(READ_WITH if head == "routed" else {})}
        fields = {}
        for word in words:
            name, _, value = word.partition("=")
            if name not in types or not value:
                raise ValueError(f"{word!r} in {text!r}: write name=value with one of {[*types]}.")
            try:
                fields[name] = types[name](value)
            except ValueError as error:
                raise ValueError(
                    f"{word!r} in {text!r}: {name} is of type {types[name].__name__}."
                ) from error
        missing = [name for name in MADE_WITH[head] if name not in fields]
        if missing:
            raise ValueError(f"The trial {text!r} lacks {missing}; write them as name=value.")
        read_with = {name: fields[name] for name in READ_WITH if name in fields}
        made_with = {name: fields[name] for name in MADE_WITH[head]}
        return cls(" ".join([head, *words]), head, made_with, read_with)

    @property
    def trained_with(self) -> dict[str, Any]:
        """Settings of `CoralTrainingArguments` for a head that is trained."""
        active = self.read_with.get("num_active_groups")
        return {**self.made_with, **({} if active is None else {"num_active_groups": active})}

    @property
    def key(self) -> str:
        """What trials share whose heads are made alike: a folder's name."""
        return "-".join([self.head, *map(str, self.made_with.values())])
