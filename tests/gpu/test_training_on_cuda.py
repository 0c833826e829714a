"""Kernels of training on a CUDA device: attention of the unroll."""

import pytest
import torch
from test_flex_attention import document_by_document, positions_of, value_and_gradients

from coral_hf.training.steps.unroll import RowAttention, fits_flex

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("documents", [[[5, 1, 300, 94], [400]], [[400]]], ids=["packed", "whole"])
@pytest.mark.parametrize("head_dim", [16, 64])
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_the_kernel_gives_the_value_and_gradient_of_a_plain_mask(steps, head_dim, documents):
    torch.manual_seed(0)
    query = torch.randn(2, 4, 400, head_dim, device="cuda")
    pairs = [tuple(torch.randn(2, 2, 2, 400, head_dim, device="cuda")) for _ in range(1 + steps)]
    positions = positions_of(documents).cuda()
    assert fits_flex(query)
    found = value_and_gradients(RowAttention(positions).attend, query, pairs[0], pairs[1:])
    exact = [tuple(x.double() for x in pair) for pair in pairs]
    expected = value_and_gradients(
        lambda *given: document_by_document(positions, *given), query.double(), exact[0], exact[1:]
    )
    for ours, plain in zip(found, expected, strict=True):
        # kernels may multiply fp32 in tf32
        torch.testing.assert_close(ours.double(), plain, rtol=2e-2, atol=2e-2)
