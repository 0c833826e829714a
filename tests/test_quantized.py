"""An LM head rounded to eight bits: each row with a scale of its own, features as they come."""

import pytest
import torch
from head_inputs import make_head, make_level
from torch import Tensor

from coral_hf.heads.draft_heads import QuantizedHead
from coral_hf.heads.products import (
    ALIGNMENT,
    QuantizedRows,
    quantize,
    quantized_logits,
    round_rows,
)

# rows, channels: whole blocks, and sizes that have to be filled up
SIZES = [(48, 16), (50, 16), (7, 20), (257, 96)]


def dequantized(rows: QuantizedRows, hidden: int) -> Tensor:
    """The numbers that quantized rows stand for, (rows, hidden) in float64."""
    values = rows.values[: len(rows.scales), :hidden]
    return values.double() * rows.scales.double()[:, None]


@pytest.mark.parametrize("size", SIZES)
def test_each_row_is_rounded_to_its_own_largest_number(size):
    torch.manual_seed(0)
    weight = torch.randn(size) * torch.logspace(-6, 6, size[0])[:, None]
    rows = quantize(weight)
    assert rows.values.dtype == torch.int8 and all(n % ALIGNMENT == 0 for n in rows.values.shape)
    found, largest = dequantized(rows, size[1]), weight.abs().amax(1, keepdim=True)
    assert ((found - weight).abs() <= largest / 254 * 1.0001).all()  # half of a step of 127
    assert found.abs().amax(1).allclose(largest[:, 0].double(), rtol=1e-6)


@pytest.mark.parametrize("size", SIZES)
def test_logits_are_products_of_what_was_rounded(size):
    torch.manual_seed(0)
    rows, features = quantize(torch.randn(size)), torch.randn(2, 3, size[1])
    values, scales = round_rows(features.flatten(0, 1))
    expected = (values.double() * scales.double()[:, None]) @ dequantized(rows, size[1]).T
    found = quantized_logits(features, rows)
    assert found.shape == (2, 3, size[0]) and found.dtype == torch.float32
    torch.testing.assert_close(found.flatten(0, 1).double(), expected, rtol=1e-5, atol=1e-5)


def test_the_largest_integers_add_up():
    rows = quantize(torch.full((3, 4096), -2.0))
    features = torch.full((1, 4096), -3.0)
    torch.testing.assert_close(quantized_logits(features, rows), torch.full((1, 3), 4096 * 6.0))


def test_a_row_of_zeros_has_logits_of_zero():
    rows = quantize(torch.zeros(3, 16))
    assert quantized_logits(torch.randn(2, 16), rows).eq(0).all()
    assert quantized_logits(torch.zeros(2, 16), quantize(torch.randn(3, 16))).eq(0).all()


@pytest.mark.parametrize("finish", [{}, {"scale": 0.3}, {"softcap": 1.5}])
@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_the_head_finishes_rounded_logits_as_the_target_does(bias, finish):
    head, level = make_head(50, bias, **finish), make_level()
    found = QuantizedHead(head, quantize(head.weight)).logits(*level)
    torch.testing.assert_close(found, head.logits(level[0]).float(), rtol=0, atol=0.03)
    if bias:  # which is not rounded
        with torch.no_grad():
            head.module.bias += 1000
        raw = head._replace(scale=1.0, softcap=None)
        logits = QuantizedHead(raw, quantize(head.weight)).logits(*level)
        torch.testing.assert_close(logits, raw.logits(level[0]).float(), rtol=0, atol=0.03)
