"""What the tests of group logits read: small heads, and groups of every kind.

`python group_cases.py FILE` writes what the Triton kernel makes of each case, interpreted on the
CPU: Triton asks for its interpreter once, when it is imported, so that takes a process of its own.
"""

import os
import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor


class Inputs(NamedTuple):
    """The arguments of `group_logits`."""

    features: Tensor  # (batch, nodes, hidden)
    weight: Tensor  # (vocab, hidden)
    active: Tensor  # (batch, 1, slots) or (batch, nodes, slots)
    size: int
    bias: Tensor | None
    order: Tensor | None


# not bfloat16: the interpreter multiplies the integers that it stores it in
INTERPRETED = (torch.float32, torch.float16)

# what is read → vocabulary, hidden size, tokens of a group, rows, active groups
CASES = {
    "shared": (40, 12, 5, 3, [[[6, 0]]]),
    "shared_by_one_row": (40, 12, 5, 1, [[[6, 0]]]),
    "union_with_unused_slots": (40, 12, 5, 3, [[[6, 0, -1]], [[7, 6, 1]], [[-1, -1, -1]]]),
    "per_node": (40, 12, 5, 3, [[[6, 0], [1, 6], [3, -1]], [[2, 1], [1, 2], [2, 1]]]),
    "last_group_is_shorter": (43, 12, 6, 3, [[[7, 0]], [[1, 7]]]),
    "last_groups_are_empty": (9, 12, 2, 3, [[[4, 7, 0]]]),
    "one_token_a_group": (8, 12, 1, 3, [[[7, 2, 0]]]),
    "larger_than_a_program": (300, 150, 70, 70, [[[4, 1]]]),
    "no_slots": (40, 12, 5, 3, [[[]]]),
}


def inputs(
    name: str, dtype: torch.dtype, has_bias: bool = False, has_order: bool = False
) -> Inputs:
    """A case with random features and weights."""
    vocab, hidden, size, rows, groups = CASES[name]
    generator = torch.Generator().manual_seed(0)
    active = torch.tensor(groups, dtype=torch.int64)
    return Inputs(
        torch.randn(len(groups), rows, hidden, generator=generator).to(dtype),
        torch.randn(vocab, hidden, generator=generator).to(dtype),
        active,
        size,
        torch.randn(vocab, generator=generator).to(dtype) if has_bias else None,
        torch.randperm(vocab, generator=generator) if has_order else None,
    )


def write_interpreted(path: str) -> None:
    """Save the kernel's logits, by case, dtype and whether there are bias and order."""
    os.environ["TRITON_INTERPRET"] = "1"
    # the modules of the package without its `__init__`, which imports transformers
    package = ModuleType("coral_hf")
    package.__path__ = [str(Path(__file__).parents[1] / "coral_hf")]
    sys.modules["coral_hf"] = package
    from coral_hf.heads import products as module

    module.has_kernel = lambda weight: True  # the interpreter works where no CUDA is
    logits = {
        (name, dtype, has_both): module.group_logits(*inputs(name, dtype, has_both, has_both))
        for name in CASES
        for dtype in INTERPRETED
        for has_both in (False, True)
    }
    torch.save(logits, path)


if __name__ == "__main__":
    write_interpreted(sys.argv[1])
