"""Heads on a CUDA device: products of int8, and groups by the Triton kernel."""

import pytest
import torch
from test_quantized import dequantized

from coral_hf.heads.products import group_logits, quantize, quantized_logits, round_rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("count", [1, 10, 40])
@pytest.mark.parametrize("size", [(50, 20), (4000, 256)])
def test_logits_are_products_of_what_was_rounded(size, count):
    torch.manual_seed(0)
    weight, features = torch.randn(size).cuda(), torch.randn(1, count, size[1]).cuda()
    rows = quantize(weight)
    values, scales = round_rows(features[0])
    expected = (values.double() * scales.double()[:, None]) @ dequantized(rows, size[1]).T
    found = quantized_logits(features, rows)
    torch.testing.assert_close(found[0].double(), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 10])
def test_groups_of_a_weight_are_read_by_the_kernel(rows, dtype):
    torch.manual_seed(0)
    weight, features = (torch.randn(size).cuda().to(dtype) for size in ((300, 64), (2, rows, 64)))
    active = torch.tensor([[[3, 0, -1]], [[4, 1, 2]]]).cuda()
    found = group_logits(features, weight, active, 70)
    expected = group_logits(features.cpu().double(), weight.cpu().double(), active.cpu(), 70)
    torch.testing.assert_close(found.double().cpu(), expected, rtol=2e-2, atol=2e-2)
