"""Attention of the unroll on CUDA: whole packed rows, held to the plain mask of each document."""

import pytest
import torch
from conftest import tiny_config
from torch import Tensor
from torch.nn.attention import flex_attention as flex

from coral_hf import CoralConfig, CoralDrafter
from coral_hf.training.steps import unroll as module
from coral_hf.training.steps.attention import merged_attention, plain_mixed_attention
from coral_hf.training.steps.unroll import BLOCK, RowAttention, block_mask, fits_flex, unroll

# lengths of the documents of each row
PACKED = [[5, 1, 9], [2, 13]]
WHOLE = [[15]]


def positions_of(documents: list[list[int]]) -> Tensor:
    """(batch, length), from 0 in each document."""
    return torch.stack([torch.cat([torch.arange(n) for n in row]) for row in documents])


def make_inputs(steps: int, heads: int = 4, kv_heads: int = 2, length: int = 15):
    """Query, the target's keys and values, and those of each later step, of two rows."""
    generator = torch.Generator().manual_seed(steps)

    def randn(heads: int) -> Tensor:
        return torch.randn(2, heads, length, 8, generator=generator, dtype=torch.float64)

    pairs = [(randn(kv_heads), randn(kv_heads)) for _ in range(1 + steps)]
    return randn(heads), pairs[0], pairs[1:]


def document_by_document(positions: Tensor, query: Tensor, target, own) -> Tensor:
    """`plain_mixed_attention` of each document alone, (batch, heads, length, head_dim)."""
    out = torch.zeros_like(query)
    rows = positions.expand(len(query), -1)
    for row in range(len(query)):
        starts = [*(rows[row] == 0).nonzero()[:, 0].tolist(), query.shape[2]]
        for start, stop in zip(starts, starts[1:], strict=False):
            part = (slice(row, row + 1), slice(None), slice(start, stop))
            pairs = [tuple(x[part] for x in pair) for pair in (target, *own)]
            if own:
                out[part] = plain_mixed_attention(query[part], pairs[0], pairs[1:])
            else:
                out[part] = torch.nn.functional.scaled_dot_product_attention(
                    query[part], *pairs[0], is_causal=True, enable_gqa=True
                )
    return out


def value_and_gradients(attention, query: Tensor, target, own) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in (query, *target, *sum(own, ()))]
    pairs = [*zip(leaves[1::2], leaves[2::2], strict=True)]
    attended = attention(leaves[0], pairs[0], pairs[1:])
    weights = torch.linspace(-1, 1, attended.numel(), dtype=attended.dtype).view_as(attended)
    return [attended, *torch.autograd.grad((attended * weights).sum(), leaves)]


def dense_far(positions: Tensor):
    """`FarAttention` in plain words, for keys of the same document."""
    documents = (positions == 0).cumsum(1)

    def far(query, target, lag):
        keys, values = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in target)
        t = torch.arange(query.shape[2])
        is_seen = (documents[:, :, None] == documents[:, None]) & (t <= t[:, None] - lag)
        scores = query @ keys.mT * query.shape[-1] ** -0.5
        is_blind = ~is_seen.any(-1)[:, None]  # near the beginning of a document
        scores = scores.masked_fill(~is_seen[:, None] & ~is_blind[..., None], float("-inf"))
        weights = scores.softmax(-1).masked_fill(is_blind[..., None], 0)
        return weights @ values, scores.logsumexp(-1).masked_fill(is_blind, float("-inf"))

    return far


@pytest.fixture
def eager_flex(monkeypatch):
    """Flex attention as torch computes it without compiling, with its gradient, on the CPU too."""
    monkeypatch.setattr(module, "_kernel", lambda: flex.flex_attention)
    monkeypatch.setattr(flex, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)


@pytest.mark.parametrize("documents", [PACKED, WHOLE], ids=["packed", "whole"])
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_diagonals_merge_with_what_is_far_in_value_and_gradient(steps, documents):
    positions = positions_of(documents)
    inputs = make_inputs(steps)

    def merged(query, target, own):
        return merged_attention(query, target, own, positions, dense_far(positions))

    expected = value_and_gradients(lambda *given: document_by_document(positions, *given), *inputs)
    for ours, plain in zip(value_and_gradients(merged, *inputs), expected, strict=True):
        torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (2, 2), (6, 1)])
@pytest.mark.parametrize("documents", [PACKED, WHOLE], ids=["packed", "whole"])
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_flex_attention_is_the_plain_one_of_each_document(
    steps, documents, heads, kv_heads, eager_flex, monkeypatch
):
    monkeypatch.setattr(module, "fits_flex", lambda query: True)
    positions = positions_of(documents)
    inputs = make_inputs(steps, heads, kv_heads)
    found = value_and_gradients(RowAttention(positions).attend, *inputs)
    expected = value_and_gradients(lambda *given: document_by_document(positions, *given), *inputs)
    for ours, plain in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, plain)


def test_documents_that_are_far_apart_are_skipped():
    sparsity = block_mask(positions_of([[BLOCK] * 16]), 1).sparsity()
    assert sparsity > 90  # percent: one block of sixteen


@torch.no_grad()
def test_the_unroll_of_packed_rows_is_the_same_through_flex_attention(eager_flex, monkeypatch):
    torch.manual_seed(0)
    config = CoralConfig.from_target(tiny_config("llama"), num_hidden_layers=2)
    drafter = CoralDrafter(config).double()
    embeddings, features = torch.randn(2, 2, 15, 32, dtype=torch.float64)
    for positions in (positions_of(PACKED), None):
        expected = unroll(drafter, embeddings, features, 4, positions)
        with monkeypatch.context() as patch:
            patch.setattr("coral_hf.training.steps.unroll.fits_flex", lambda query: True)
            found = unroll(drafter, embeddings, features, 4, positions)
        torch.testing.assert_close(found, expected)


def test_the_kernel_is_for_cuda_and_heads_of_its_size():
    assert not fits_flex(torch.zeros(1, 1, 3, 64))


@torch.no_grad()
def test_one_graph_serves_all_lags(monkeypatch):
    torch.compiler.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    monkeypatch.setattr(module, "fits_flex", lambda query: True)
    monkeypatch.setattr(module, "_kernel", lambda: compiled)
    compiled = torch.compile(flex.flex_attention, backend=backend)
    positions = positions_of(PACKED)
    attention = RowAttention(positions)
    for steps in (0, 1, 3):
        inputs = make_inputs(steps)
        expected = document_by_document(positions, *inputs)
        # the context of a step is no part of a compiled drafter, and compiles its attention alone
        found = torch.compiler.disable(attention.attend)(*inputs)
        torch.testing.assert_close(found, expected)
    assert len(graphs) == 1
