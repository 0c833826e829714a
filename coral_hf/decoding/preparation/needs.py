"""Which calls need the target's own preparation of inputs in every round.

In: a target, and what `generate` has prepared for it. Out: a `Preparation`. Where a target
uses transformers' own preparation and a call has none but known inputs, a round needs token ids,
mask and positions alone (`DIRECT`); else the target prepares each round itself (`OWN`), and what is
not known to work for several tokens at once is checked in each round (`CHECKED`) or read one token
a pass (`STEPS`).
"""

from collections.abc import Iterator
from numbers import Number
from typing import Any, NamedTuple

from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.utils import logging

from ..caches.continuation import CACHE
from .switches import is_reached, rotary_switches
from .tables import AT_A_SWITCH, CLASSES, DIRECT_INPUTS, INPUTS

logger = logging.get_logger(__name__)

DIRECT, OWN, CHECKED, STEPS = range(4)  # the later, the more careful

PREPARE, UPDATE = "prepare_inputs_for_generation", "_update_model_kwargs_for_generation"


class Preparation(NamedTuple):
    """How the inputs of rounds are made, and why."""

    way: int = DIRECT
    reason: str = ""

    @property
    def is_own(self) -> bool:
        """Whether the target prepares each round itself."""
        return self.way > DIRECT

    @property
    def obstacle(self) -> str | None:
        """Why no round may be a tree, if none may."""
        return self.reason if self.way == CHECKED else None

    def speculation(self, wanted: str) -> str:
        """How eagerly a call drafts: as it wants to, or never where a round has one token."""
        if self.way != STEPS or wanted == "never":
            return wanted
        logger.warning_once(
            f"The call is decoded token by token, as without a drafter: {self.reason}, of which"
            " nobody knows that several tokens at once get what each would get in turn."
        )
        return "never"


def choose_preparation(
    model: PreTrainedModel, model_kwargs: dict[str, Any], batch: int, max_length: int
) -> Preparation:
    """How the inputs of a call's rounds are made: in the most careful way that anything asks for.

    Args:
        model_kwargs: what `generate` has prepared for the target.
        batch: rows of the call.
        max_length: tokens that a row may have at its end.
    """
    found = [*_needs_of_class(model), *_needs_of_inputs(model_kwargs)]
    if batch > 1 and is_reached(rotary_switches(model), max_length):
        found.append(Preparation(OWN, "its rotary embedding looks at the longest row"))
    return max(found, default=Preparation())


def overridden(model: PreTrainedModel) -> dict[str, str]:
    """The two methods that a target has of its own: name → the class that defines it.

    A class outside of transformers is "".
    """
    found = {}
    for name in (PREPARE, UPDATE):
        own = vars(model).get(name) or getattr(type(model), name)
        if own is not getattr(GenerationMixin, name):
            is_known = getattr(own, "__module__", "").startswith("transformers.models.")
            found[name] = own.__qualname__.split(".")[0] if is_known else ""
    return found


def _needs_of_class(model: PreTrainedModel) -> Iterator[Preparation]:
    for name, owner in overridden(model).items():
        if owner in AT_A_SWITCH and not rotary_switches(model):
            continue
        reason = f"it has a `{name}` of its own"
        if owner in CLASSES:
            yield Preparation(OWN, reason)
        else:
            yield Preparation(CHECKED if name == PREPARE else STEPS, reason)


def _needs_of_inputs(model_kwargs: dict[str, Any]) -> Iterator[Preparation]:
    for name, value in model_kwargs.items():
        if value is None or name in DIRECT_INPUTS:
            continue
        is_same = name in INPUTS or isinstance(value, (Number, str))
        yield Preparation(OWN if is_same else STEPS, f"the call has `{name}`")


def agree(whole: dict[str, Any], steps: list[dict[str, Any]]) -> bool:
    """Whether the inputs of a pass over several tokens are those of single ones, put together.

    Each input must be the same in all steps, grow with the text, or have a part for each token.
    """
    names = (whole.keys() | steps[0].keys()) - {CACHE, "logits_to_keep"}
    return all(_agrees(whole.get(name), [step.get(name) for step in steps]) for name in names)


def _agrees(whole: Any, steps: list[Any]) -> bool:
    if isinstance(whole, Tensor) and all(isinstance(step, Tensor) for step in steps):
        is_same = all(step.equal(whole) for step in steps)
        return is_same or any(_joins(whole, steps, axis) for axis in range(whole.dim()))
    plain = (Number, str, type(None))
    return all(one is whole or (isinstance(one, plain) and one == whole) for one in steps)


def _joins(whole: Tensor, steps: list[Tensor], axis: int) -> bool:
    """Whether steps are parts of a whole along an axis: one each, or all up to their own."""
    if any(step.dim() != whole.dim() for step in steps):
        return False
    count, length = len(steps), whole.shape[axis]
    sizes, starts = [step.shape[axis] for step in steps], [0] * count
    if sizes == [1] * count and length == count:
        starts = list(range(count))
    elif sizes != list(range(length - count + 1, length + 1)):
        return False
    parts = zip(steps, starts, sizes, strict=True)
    return all(step.equal(whole.narrow(axis, *place)) for step, *place in parts)
