"""Quantized heads on a CUDA device: products of int8 and fp8, and groups by the Triton kernel."""

import pytest
import torch
from test_quantized import dequantized

from coral_hf.heads.products import dtype_for, group_logits, quantize, quantized_logits, round_rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def dtypes() -> list[torch.dtype]:
    """int8, and what this device is given."""
    return list(dict.fromkeys([torch.int8, dtype_for(torch.device("cuda"))]))


@pytest.mark.parametrize("count", [1, 10, 40])
@pytest.mark.parametrize("size", [(50, 20), (4000, 256)])
def test_logits_are_products_of_what_was_rounded(size, count):
    torch.manual_seed(0)
    weight, features = torch.randn(size).cuda(), torch.randn(1, count, size[1]).cuda()
    for dtype in dtypes():
        rows = quantize(weight, dtype)
        values, scales = round_rows(features[0], dtype)
        expected = (values.double() * scales.double()[:, None]) @ dequantized(rows, size[1]).T
        found = quantized_logits(features, rows)
        torch.testing.assert_close(found[0].double(), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_groups_of_a_quantized_weight_are_read_by_the_kernel(dtype):
    torch.manual_seed(0)
    weight, features = torch.randn(300, 64).cuda(), torch.randn(2, 10, 64).cuda().to(dtype)
    active = torch.tensor([[[3, 0, -1]], [[4, 1, 2]]]).cuda()
    for stored in dtypes():
        rows = quantize(weight, stored)
        exact = dequantized(rows, 64)
        found = group_logits(features, rows, active, 70)
        expected = group_logits(features.double(), exact, active, 70)
        torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 10])
def test_groups_of_a_weight_are_read_by_the_kernel(rows, dtype):
    torch.manual_seed(0)
    weight, features = (torch.randn(size).cuda().to(dtype) for size in ((300, 64), (2, rows, 64)))
    active = torch.tensor([[[3, 0, -1]], [[4, 1, 2]]]).cuda()
    found = group_logits(features, weight, active, 70)
    expected = group_logits(features.cpu().double(), weight.cpu().double(), active.cpu(), 70)
    torch.testing.assert_close(found.double().cpu(), expected, rtol=2e-2, atol=2e-2)


@torch.no_grad()
def test_a_graph_reads_quantized_groups_of_the_day():
    torch.manual_seed(0)
    rows = quantize(torch.randn(300, 64).cuda())
    features, active = torch.randn(1, 10, 64).cuda(), torch.tensor([[[3, 0]]]).cuda()
    group_logits(features, rows, active, 70)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = group_logits(features, rows, active, 70)
    active.copy_(active.flip(-1))
    graph.replay()
    torch.testing.assert_close(logits, group_logits(features, rows, active, 70))
