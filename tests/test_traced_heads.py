"""Draft heads in a compiled round: one graph whose shapes depend on no value."""

import pytest
import torch
from head_inputs import HIDDEN, make_head, make_level, make_order, make_router
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from coral_hf.heads.draft_heads import (
    FrequencyHead,
    FullHead,
    QuantizedHead,
    RoutedHead,
)
from coral_hf.heads.products import BLOCK, quantize
from coral_hf.heads.router import Routing
from coral_hf.lm_head import LMHead

READS = 40 * BLOCK + 3  # enough that blocks are ranked first
ROUTINGS = {
    "shared": Routing("shared", 2),
    "per_node": Routing("per_node", 2),
    "shared_until_sure": Routing("shared", 3, active_mass=0.5),
}
# each waits for the device, gives a shape that depends on values, or copies from the host
FORBIDDEN = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.lift_fresh.default,
    torch.ops.aten.is_nonzero.default,
}


class Recorded(TorchDispatchMode):
    """Collects the operators of a region."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(func)
        indices = args[1] if func == torch.ops.aten.index.Tensor else ()
        assert not any(x is not None and x.dtype == torch.bool for x in indices), "by a mask"
        return func(*args, **(kwargs or {}))


def make_routed(head: LMHead, routing: Routing, has_order: bool) -> RoutedHead:
    order = make_order(READS) if has_order else None
    weight = head.weight[order] if has_order else None
    return RoutedHead(head, make_router(64, order), routing, weight)


HEADS = {
    "full": FullHead,
    "quantized": lambda head: QuantizedHead(head, quantize(head.weight)),
    "frequency": lambda head: FrequencyHead(head, make_order(READS), head.weight.detach()),
    **{
        f"routed, {name}": lambda head, routing=routing: make_routed(head, routing, False)
        for name, routing in ROUTINGS.items()
    },
    "routed by an order": lambda head: make_routed(head, ROUTINGS["shared"], True),
}


def make_children(name: str):
    """A head's children of features and their log-paths, and its logits of them."""
    draft_head = HEADS[name](make_head(READS, bias=True, softcap=3.0))

    def children(features: Tensor, log_path: Tensor) -> tuple[Tensor, ...]:
        return *draft_head.children(features, log_path, 10), draft_head.logits(features, log_path)

    return children


@pytest.fixture(autouse=True)
def _fresh_graphs():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("name", HEADS)
@torch.no_grad()
def test_a_head_is_one_graph(name):
    children, level = make_children(name), make_level(batch=2)
    traced = torch.compile(children, fullgraph=True, backend="eager", dynamic=False)
    for features in (level[0], -level[0]):  # other features choose other groups
        for found, expected in zip(
            traced(features, level[1]), children(features, level[1]), strict=True
        ):
            assert found.equal(expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Inductor itself
@pytest.mark.parametrize("name", ["full", "routed, shared", "quantized"])
@torch.no_grad()
def test_a_compiled_head_proposes_the_same_tokens(name):
    children, level = make_children(name), make_level(batch=2)
    compiled = torch.compile(children, fullgraph=True, dynamic=False)
    for features in (level[0], -level[0]):
        expected = children(features, level[1])
        tokens, *rest = compiled(features, level[1])
        assert tokens.equal(expected[0])
        for found, own in zip(rest, expected[1:], strict=True):
            torch.testing.assert_close(found, own, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", HEADS)
@torch.no_grad()
def test_nothing_waits_for_a_value(name):
    children, level = make_children(name), make_level(batch=2)
    with Recorded() as recorded:
        children(*level)
    assert torch.ops.aten.topk.default in recorded.seen
    assert not FORBIDDEN & recorded.seen


@torch.no_grad()
def test_what_waits_for_a_value_is_noticed():
    with Recorded() as recorded:
        torch.ones(3).nonzero()
        torch.tensor([1.0])
        torch.ones(()).item()
    assert len(FORBIDDEN & recorded.seen) == 3
    with Recorded(), pytest.raises(AssertionError, match="by a mask"):
        torch.ones(3)[torch.ones(3) > 0]


def test_a_level_of_broken_features_proposes_tokens():
    features, log_path = make_level()
    for name in HEADS:
        draft_head = HEADS[name](LMHead(nn.Linear(HIDDEN, READS).double()))
        tokens = draft_head.children(torch.full_like(features, float("nan")), log_path, 4).tokens
        assert tokens.min() >= 0 and tokens.max() < READS
