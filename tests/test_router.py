"""The router says which groups hold the next token, and a routing which of them are read."""

import pytest
import torch
from head_inputs import make_level, make_router
from torch import nn

from coral_hf.heads.router import UNUSED, Routing

# mass of 4 groups for the 3 rows of a level, and the rows' path probabilities
MASS = torch.tensor([[[0.6, 0.3, 0.1, 0.0], [0.1, 0.2, 0.7, 0.0], [0.0, 0.1, 0.2, 0.7]]])
PATH = torch.tensor([[0.5, 0.4, 0.1]])
# Σ path × mass: 0.34, 0.24, 0.35, 0.07


def choose(name: str, num_active: int, mass=MASS, path=PATH, **limits) -> list:
    return Routing(name, num_active, **limits).choose(mass.log(), path.log()).tolist()


def test_the_router_is_a_residual_block_and_a_linear_map():
    router, (features, _) = make_router(5), make_level()
    inner = nn.functional.silu(features @ router.fc.weight.T) + features
    expected = (inner @ router.groups.weight.T).softmax(-1)
    torch.testing.assert_close(router(features).exp(), expected.float())


def test_shared_groups_have_the_largest_mass_over_the_paths():
    assert choose("shared", 1) == [[[2]]]
    assert choose("shared", 3) == [[[2, 0, 1]]]
    assert choose("shared", 9) == [[[2, 0, 1, 3]]]  # no more than there are


def test_a_sure_row_decides_which_groups_are_shared():
    assert choose("shared", 1, path=torch.tensor([[1.0, 0.01, 0.01]])) == [[[0]]]
    assert choose("shared", 1, path=torch.tensor([[0.01, 0.01, 1.0]])) == [[[3]]]


def test_each_row_reads_its_own_best_groups():
    assert choose("per_node", 1) == [[[0], [2], [3]]]
    assert choose("per_node", 2) == [[[0, 1], [2, 1], [3, 2]]]


def test_as_few_groups_are_read_as_hold_the_mass():
    assert choose("shared", 3, active_mass=0.3) == [[[2, UNUSED, UNUSED]]]
    assert choose("shared", 3, active_mass=0.5) == [[[2, 0, UNUSED]]]
    assert choose("shared", 3, active_mass=0.99) == [[[2, 0, 1]]]  # the cap
    assert choose("per_node", 2, active_mass=0.65) == [[[0, 1], [2, UNUSED], [3, UNUSED]]]


def test_a_group_is_always_read():
    assert choose("shared", 2, active_mass=1e-6) == [[[2, UNUSED]]]


def test_the_most_unlikely_path_reads_a_group_as_any_other():
    path = torch.full((1, 3), -500.0)
    for active_mass in (None, 0.5):
        routing = Routing("shared", 1, active_mass=active_mass)
        assert routing.choose(MASS.log(), path).tolist() == [[[2]]]
    assert Routing("shared", 1).choose(MASS.log(), path * float("inf")).min() >= 0


@pytest.mark.parametrize("name", ["shared", "per_node"])
def test_sequences_of_a_batch_choose_for_themselves(name):
    mass, path = torch.cat([MASS, MASS.flip(2)]), torch.cat([PATH, PATH])
    together = choose(name, 2, mass=mass, path=path)
    assert together[0] == choose(name, 2)[0]
    assert together[1] == choose(name, 2, mass=MASS.flip(2))[0]
