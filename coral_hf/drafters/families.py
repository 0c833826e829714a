"""Families of drafters that are trained, saved and published: what differs by name alone."""

from typing import NamedTuple

from .coral import CoralDrafter
from .eagle3 import Eagle3Drafter
from .medusa import MedusaDrafter
from .model import Drafter
from .parallel import ParallelDrafter
from .recurrent import RecurrentDrafter


class Family(NamedTuple):
    """A family, as users meet it."""

    name: str
    model: type[Drafter]
    paper: str  # the method and where it is described, in Markdown


# by `model_type` of the config
FAMILIES = {
    family.model.config_class.model_type: family
    for family in (
        Family("CORAL", CoralDrafter, "[CORAL (ACL 2025)](https://arxiv.org/abs/2502.16880)"),
        Family(
            "EAGLE-3", Eagle3Drafter, "[EAGLE-3 (NeurIPS 2025)](https://arxiv.org/abs/2503.01840)"
        ),
        Family("Medusa", MedusaDrafter, "[Medusa (ICML 2024)](https://arxiv.org/abs/2401.10774)"),
        Family("P-EAGLE", ParallelDrafter, "[P-EAGLE (2026)](https://arxiv.org/abs/2602.01469)"),
        Family(
            "Recurrent Drafter",
            RecurrentDrafter,
            "[Recurrent Drafter (2024)](https://arxiv.org/abs/2403.09919)",
        ),
    )
}
