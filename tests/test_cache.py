"""A growing cache holds what transformers' dynamic one holds, without copying it."""

import copy
import random

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from coral_hf.decoding.cache import FIRST_CAPACITY, GrowingCache, GrowingLayer, visible

BATCH, HEADS, WIDTH = 2, 3, 4
KINDS = [*["update"] * 6, "crop", "crop", "repeat", "select", "reorder", "reset"]


def make_rows(count: int, seed: int = 0, batch: int = BATCH) -> tuple[Tensor, Tensor]:
    """Keys and values (batch, kv_heads, count, head_dim)."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, HEADS, count, WIDTH, generator=generator) for _ in range(2))


def filled(count: int = 10) -> GrowingLayer:
    layer = GrowingLayer()
    layer.update(*make_rows(count))
    return layer


def keep(layer: GrowingLayer | GrowingCache, start: int, nodes: list[int]) -> None:
    """Keep the columns before `start`, and those of some nodes of the tree that begins there."""
    batch = layer.layers[0].keys.shape[0] if isinstance(layer, GrowingCache) else len(layer.keys)
    source = (start + torch.tensor(nodes, dtype=torch.long)).expand(batch, -1)
    destination = torch.arange(start, start + len(nodes)).expand(batch, -1)
    layer.keep(source, destination, start + len(nodes))


def assert_same(layer: DynamicLayer, other: DynamicLayer) -> None:
    assert layer.get_seq_length() == other.get_seq_length()
    if layer.get_seq_length():
        assert layer.keys.equal(other.keys)
        assert layer.values.equal(other.values)


@pytest.mark.parametrize("seed", range(6))
def test_random_updates_crops_and_batch_operations_give_what_the_dynamic_layer_gives(seed):
    luck = random.Random(seed)
    layers = [GrowingLayer(), DynamicLayer()]
    batch = BATCH
    for step in range(60):
        length = layers[0].get_seq_length()
        kind = luck.choice(KINDS)
        if kind == "update":
            rows = make_rows(luck.choice([1, 1, 2, 7, 60, 300]), seed=step, batch=batch)
            returned = [layer.update(*rows) for layer in layers]
            assert all(ours.equal(theirs) for ours, theirs in zip(*returned, strict=True))
        elif kind == "crop":
            count = luck.randint(0, max(length - 1, 0))
            [layer.crop(-count) for layer in layers]
        elif kind == "repeat" and length and batch == 2:
            [layer.batch_repeat_interleave(2) for layer in layers]
            batch *= 2
        elif kind == "select" and length and batch == 4:
            [layer.batch_select_indices(torch.tensor([3, 0])) for layer in layers]
            batch = 2
        elif kind == "reorder" and length:
            order = torch.randperm(batch, generator=torch.Generator().manual_seed(step))
            [layer.reorder_cache(order) for layer in layers]
        elif kind == "reset" and length and luck.random() < 0.3:
            [layer.reset() for layer in layers]
            batch = batch if layers[1].get_seq_length() else 2  # older versions keep zeroed rows
        assert_same(*layers)


def test_committed_rows_are_not_copied_while_there_is_room():
    layer = filled(10)
    address = layer.keys.data_ptr(), layer.values.data_ptr()
    for step in range(FIRST_CAPACITY - 10):
        keys, values = layer.update(*make_rows(1, seed=step))
        assert (keys.data_ptr(), values.data_ptr()) == address
    assert layer.update(*make_rows(1))[0].data_ptr() != address[0]


def test_room_at_least_doubles_so_that_growing_is_rare():
    layer, addresses = GrowingLayer(), set()
    for step in range(4 * FIRST_CAPACITY):
        addresses.add(layer.update(*make_rows(1, seed=step))[0].data_ptr())
    assert len(addresses) <= 3


def test_rejected_nodes_leave_the_cache():
    layer = filled(4)
    before = layer.keys.clone()
    keys, values = make_rows(6, seed=1)
    layer.update(keys, values)
    address = layer.keys.data_ptr()
    keep(layer, 4, [0, 2, 5])
    assert layer.get_seq_length() == 7
    assert layer.keys[:, :, :4].equal(before)
    assert layer.keys[:, :, 4:].equal(keys[:, :, [0, 2, 5]])
    assert layer.values[:, :, 4:].equal(values[:, :, [0, 2, 5]])
    assert layer.keys.data_ptr() == address


def test_keeping_nothing_of_a_tree_leaves_the_committed_rows():
    layer = filled(10)
    keep(layer, 6, [])
    assert layer.keys.equal(make_rows(10)[0][:, :, :6])


def test_rows_written_after_a_commit_follow_the_kept_ones():
    layer = filled(6)
    keep(layer, 2, [1, 3])
    keys, _ = make_rows(2, seed=1)
    layer.update(*make_rows(2, seed=1))
    assert layer.keys.equal(torch.cat([make_rows(6)[0][:, :, [0, 1, 3, 5]], keys], dim=2))


def test_rows_of_a_batch_keep_columns_of_their_own():
    layer = filled(4)
    keys, values = make_rows(3, seed=1)
    layer.update(keys, values)
    # row 0 keeps two nodes behind its four columns, row 1 one node behind its two
    layer.keep(torch.tensor([[4, 6], [5, 4]]), torch.tensor([[4, 5], [2, 3]]), 6)
    before = make_rows(4)[0]
    assert layer.keys[0].equal(torch.cat([before[0], keys[0][:, [0, 2]]], dim=1))
    assert layer.keys[1, :, :3].equal(torch.cat([before[1, :, :2], keys[1][:, [1]]], dim=1))


def test_a_repeated_cache_can_be_cropped():
    layer = filled(10)
    layer.batch_repeat_interleave(3)
    layer.crop(-4)
    assert layer.keys.equal(make_rows(10)[0].repeat_interleave(3, dim=0)[:, :, :6])


def test_a_repeated_cache_keeps_the_rows_that_it_is_told_to():
    layer = filled(10)
    layer.batch_repeat_interleave(3)
    keep(layer, 4, [1, 4])
    repeated = make_rows(10)[0].repeat_interleave(3, dim=0)
    assert layer.keys.equal(repeated[:, :, [0, 1, 2, 3, 5, 8]])


def test_a_repeated_cache_can_be_updated():
    layer = filled(10)
    layer.batch_repeat_interleave(2)
    keys, _ = layer.update(*make_rows(3, seed=1, batch=4))
    assert keys[:, :, :10].equal(make_rows(10)[0].repeat_interleave(2, dim=0))
    assert keys[:, :, 10:].equal(make_rows(3, seed=1, batch=4)[0])


def test_cropping_more_rows_than_there_are_leaves_none():
    layers = [filled(10), DynamicLayer()]
    layers[1].update(*make_rows(10))
    for layer in layers:
        layer.crop(-11)
    assert_same(*layers)


def test_cropping_by_a_positive_number_does_what_transformers_makes_of_it():
    layers, errors = [filled(10), DynamicLayer()], set()
    layers[1].update(*make_rows(10))
    for layer in layers:
        try:
            layer.crop(4)  # newer versions raise, older ones keep 4 rows
        except ValueError as error:
            errors.add(str(error))
        else:
            errors.add("none")
    assert_same(*layers)
    assert len(errors) == 1


def test_cropping_an_empty_layer_does_nothing():
    layer = GrowingLayer()
    layer.crop(-3)
    assert layer.get_seq_length() == 0


def test_a_copy_shares_nothing_with_its_original():
    layer = filled(10)
    twin = copy.deepcopy(layer)
    assert_same(layer, twin)
    twin.update(*make_rows(1, seed=1))
    twin.keys.zero_()
    assert layer.get_seq_length() == 10
    assert layer.keys.equal(make_rows(10)[0])
    address = twin.keys.data_ptr()
    assert twin.update(*make_rows(1))[0].data_ptr() == address  # the copy has room of its own


def test_a_cache_filled_in_inference_mode_goes_on_outside_of_it():
    with torch.inference_mode():
        layer = filled(10)
    keys, _ = layer.update(*make_rows(2, seed=1))
    assert keys.equal(torch.cat([make_rows(10)[0], make_rows(2, seed=1)[0]], dim=2))


def test_all_layers_of_a_cache_keep_and_truncate_alike_and_empty_ones_stay_empty():
    cache = GrowingCache(3)
    for idx in (0, 2):  # layer 1 reads another layer's keys
        cache.update(*make_rows(8, seed=idx), layer_idx=idx)
    keep(cache, 3, [0, 4])
    cache.truncate(4)
    assert cache.get_seq_length() == 4
    for idx in (0, 2):
        assert cache.layers[idx].keys.equal(make_rows(8, seed=idx)[0][:, :, [0, 1, 2, 3]])
    assert not cache.layers[1].is_initialized


def test_truncating_to_the_length_it_has_changes_nothing():
    cache = GrowingCache(1)
    cache.update(*make_rows(8), layer_idx=0)
    cache.truncate(8)
    assert cache.layers[0].keys.equal(make_rows(8)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_mask_adds_nothing_where_a_query_may_look_and_hides_the_rest(dtype):
    mask = torch.tensor([[True, False], [True, True]])
    added = visible(mask, dtype)
    assert added.dtype == dtype
    assert added[mask].eq(0).all()
    assert (torch.zeros(2, dtype=dtype) + added[0]).softmax(-1).tolist() == [1.0, 0.0]
