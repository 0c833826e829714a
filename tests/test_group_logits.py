"""Logits of the active groups: the plain form by all logits, the kernel by the plain form."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from group_cases import CASES, INTERPRETED, Inputs, inputs
from torch import Tensor
from torch.nn import functional as F

from coral_hf.heads.products import group_logits, plain_group_logits

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
EXTRAS = {"plain": {}, "bias": {"has_bias": True}, "order": {"has_order": True}}
EXTRAS["both"] = EXTRAS["bias"] | EXTRAS["order"]
# of the largest logit: half precision rounds each logit to its own bits
TOLERANCES = {torch.bfloat16: 1e-2, torch.float16: 1e-3, torch.float32: 1e-6, torch.float64: 1e-7}


def picked_from_all_logits(case: Inputs) -> Tensor:
    """The same in plain words: compute the logits of the whole vocabulary, pick the groups'."""
    features, weight, active, size, bias, order = case
    order = torch.arange(len(weight)) if order is None else order
    logits = F.linear(features.double(), weight.double(), None if bias is None else bias.double())
    picked = logits.new_full((*features.shape[:2], active.shape[-1], size), float("-inf"))
    for text in range(features.shape[0]):
        for row in range(features.shape[1]):
            for slot, group in enumerate(active[text, row % active.shape[1]].tolist()):
                tokens = order[group * size : (group + 1) * size] if group >= 0 else order[:0]
                picked[text, row, slot, : len(tokens)] = logits[text, row, tokens]
    return picked


def assert_same(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Equal up to the dtype's rounding, and -inf at the same places."""
    assert found.shape == expected.shape and found.dtype == torch.float32
    is_read = expected.isfinite()
    assert torch.equal(found == float("-inf"), ~is_read)
    scale = expected[is_read].abs().max().item() if is_read.any() else 0.0
    torch.testing.assert_close(
        found[is_read].double(), expected[is_read].double(), rtol=0, atol=TOLERANCES[dtype] * scale
    )


@pytest.mark.parametrize("extras", EXTRAS)
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("name", CASES)
def test_logits_of_the_groups_are_those_of_the_whole_head(name, dtype, extras):
    case = inputs(name, dtype, **EXTRAS[extras])
    assert_same(group_logits(*case), picked_from_all_logits(case), dtype)


def test_a_group_that_all_rows_share_equals_the_same_group_asked_by_each_row():
    shared = inputs("shared", torch.float64)
    per_node = shared._replace(active=shared.active.expand(1, 3, 2))
    torch.testing.assert_close(group_logits(*per_node), group_logits(*shared))


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory) -> dict[tuple[str, torch.dtype, bool], Tensor]:
    """What the kernel computes of every case under Triton's interpreter, from another process."""
    path = tmp_path_factory.mktemp("interpreted") / "logits.pt"
    root = Path(__file__).parents[1]
    subprocess.run(
        [sys.executable, str(root / "tests/group_cases.py"), str(path)],
        check=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    return torch.load(path)


@needs_triton
@pytest.mark.parametrize("has_both", [False, True], ids=["plain", "both"])
@pytest.mark.parametrize("dtype", INTERPRETED)
@pytest.mark.parametrize("name", CASES)
def test_the_kernel_computes_what_the_plain_form_does(name, dtype, has_both, interpreted):
    case = inputs(name, dtype, has_both, has_both)
    assert_same(interpreted[name, dtype, has_both], group_logits(*case), dtype)


@needs_triton
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_kernel_compiles_for_gpus(dtype, tmp_path, monkeypatch):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from coral_hf.heads import group_kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    pointers = {"features": f"*{dtype}", "weight": f"*{dtype}"}
    pointers |= {"bias": f"*{dtype}", "active": "*i64", "order": "*i64", "logits": "*fp32"}
    sizes = dict.fromkeys(("nodes", "hidden", "vocab", "slots", "size", "weight_stride"), "i32")
    constants = {
        "HAS_BIAS": True,
        "HAS_ORDER": True,
        "NODES": 16,
        "TOKENS": 32,
        "CHANNELS": 64,
    }
    signature = pointers | sizes | dict.fromkeys(constants, "constexpr")
    places = {name: (place,) for place, name in enumerate(signature)}
    source = ASTSource(
        group_kernel._group_logits,
        signature,
        {places[name]: value for name, value in constants.items()},
        {
            places[name]: [["tt.divisibility", 16]]
            for name in (*pointers, "hidden", "weight_stride")
        },
    )
    options = {"num_stages": group_kernel.NUM_STAGES, "enable_fp_fusion": True}
    target = GPUTarget("cuda", 80, 32)
    ptx = compile(source, target=target, options=options).asm["ptx"]
    assert ("mma.sync" in ptx) == (dtype == "bf16")  # fp32 is summed exactly
    assert "cp.async" in ptx  # what is read next is under way while this is summed


@needs_cuda
@needs_triton
@pytest.mark.parametrize("extras", EXTRAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_on_cuda_the_kernel_computes_what_the_plain_form_does(name, dtype, extras):
    case = inputs(name, dtype, **EXTRAS[extras])
    on_cuda = Inputs(*(x.cuda() if isinstance(x, Tensor) else x for x in case))
    assert_same(group_logits(*on_cuda).cpu(), group_logits(*case), dtype)


@needs_cuda
@needs_triton
def test_on_cuda_a_graph_reads_the_groups_of_the_day():
    case = inputs("union_with_unused_slots", torch.bfloat16, has_order=True)
    on_cuda = Inputs(*(x.cuda() if isinstance(x, Tensor) else x for x in case))
    group_logits(*on_cuda)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = group_logits(*on_cuda)
    on_cuda.active.copy_(on_cuda.active.flip(-1))
    graph.replay()
    flipped = case._replace(active=case.active.flip(-1))
    assert_same(logits.cpu(), plain_group_logits(*flipped), torch.bfloat16)
