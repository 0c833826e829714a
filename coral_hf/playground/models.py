"""The models of the page: a target, and the drafters that a reader may choose.

In: a prompt and what was chosen for it. Out: a `Race`, or a ValueError whose sentence is shown.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import get_args

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..measure.autotune import heads_of
from ..measure.calls import sampling_arguments
from ..measure.chat import restore_chat_options
from ..measure.prompts import encode_said, left_padded
from ..measure.settings import DraftingSettings, Head
from .race import Race, Turns


@dataclass
class Models:
    """A target, and drafters that are loaded when they are first chosen."""

    target: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    names: Sequence[str]
    load: Callable[[str], PreTrainedModel]  # by name
    turns: Turns = field(default_factory=Turns)
    loaded: dict[str, PreTrainedModel] = field(default_factory=dict)

    def __post_init__(self) -> None:
        restore_chat_options(self.tokenizer, self.drafter(self.names[0]).config)

    def drafter(self, name: str) -> PreTrainedModel:
        """Return a drafter."""
        with self.turns.enter():  # loading changes torch's defaults for a while
            if name not in self.loaded:
                self.loaded[name] = self.load(name)
            return self.loaded[name]

    def heads(self, name: str) -> list[str]:
        """List the draft heads of a drafter, those in eight bits too."""
        known = {"quantized", *heads_of(self.drafter(name), self.target)}
        return [one for one in get_args(Head) if "full" in known and one.split("_q")[0] in known]

    def race(
        self, prompt: str, max_new_tokens: int, sampling: dict, name: str, settings: dict
    ) -> Race:
        """Begin to answer a prompt.

        Args:
            sampling: `temperature`, `top_p`, `top_k` and `seed`.
            name: of the drafter.
            settings: of drafting, None where they are the drafter's own.

        Raises:
            ValueError: for a prompt that is empty or beyond the context, and settings out of range.
        """
        drafter, temperature = self.drafter(name), sampling["temperature"]
        if not temperature:
            settings = settings | {"verification": None}  # a greedy call has one rule
        drafting = DraftingSettings(**settings).drafting()
        with self.turns.enter():
            ids = encode_said(prompt, self.tokenizer, self.target, max_new_tokens)  # (1, length)
        pad = getattr(drafter.config, "pad_token_id", None) or 0
        arguments = sampling_arguments(temperature, max_new_tokens) | {"pad_token_id": pad}
        if temperature:
            arguments |= {"top_p": sampling["top_p"], "top_k": sampling["top_k"]}
        batch = left_padded([ids[0]], pad, self.target.device)
        plain = partial(self.target.generate, **batch, **arguments)
        own = {"assistant_model": drafter, "speculation": "always", "tokenizer": self.tokenizer}
        calls = [plain, partial(plain, **own, **drafting)]
        return Race(self.turns, self.tokenizer, calls, sampling["seed"], not temperature)
