"""A ragged cache holds what transformers' dynamic one holds, and knows whose slots are whose."""

import copy
import random
import weakref

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from coral_hf.decoding.caches.layers import GROWTH, SLACK, SPARE, RaggedLayer
from coral_hf.decoding.caches.ragged_cache import HIDDEN, RaggedCache

BATCH, HEADS, WIDTH = 2, 3, 4
KINDS = [*["update"] * 6, "crop", "crop", "repeat", "select", "reorder", "reset"]


def make_rows(count: int, seed: int = 0, batch: int = BATCH) -> tuple[Tensor, Tensor]:
    """Keys and values (batch, kv_heads, count, head_dim)."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, HEADS, count, WIDTH, generator=generator) for _ in range(2))


def filled(count: int = 10) -> RaggedLayer:
    layer = RaggedLayer()
    layer.update(*make_rows(count))
    return layer


def keep(layer: RaggedLayer, start: int, nodes: list[int]) -> None:
    """Keep the slots before `start`, and those of some nodes of the tree that begins there."""
    source = (start + torch.tensor(nodes, dtype=torch.long)).expand(len(layer.keys), -1)
    layer.move(source, torch.arange(start, start + len(nodes)).expand_as(source))
    layer.cut(start + len(nodes))


def assert_same(layer: DynamicLayer, other: DynamicLayer) -> None:
    assert layer.get_seq_length() == other.get_seq_length()
    if layer.get_seq_length():
        assert layer.keys.equal(other.keys)
        assert layer.values.equal(other.values)


@pytest.mark.parametrize("seed", range(6))
def test_random_updates_crops_and_batch_operations_give_what_the_dynamic_layer_gives(seed):
    luck = random.Random(seed)
    layers = [RaggedLayer(), DynamicLayer()]
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
            if layers[1].get_seq_length():  # older versions keep zeroed rows
                layers[1] = DynamicLayer()
            batch = 2
        assert_same(*layers)


def test_committed_slots_are_not_copied_while_there_is_room():
    layer = filled(10)
    address = layer.keys.data_ptr(), layer.values.data_ptr()
    for step in range(GROWTH):
        keys, values = layer.update(*make_rows(1, seed=step))
        assert (keys.data_ptr(), values.data_ptr()) == address
    assert layer.update(*make_rows(1))[0].data_ptr() != address[0]


def test_room_grows_in_bounded_steps_so_that_a_long_text_wastes_little():
    layer, addresses = RaggedLayer(), set()
    for step in range(1, 4 * SPARE):
        keys, _ = layer.update(*make_rows(1, seed=step))
        addresses.add(keys.data_ptr())
        assert layer._buffers[0].shape[2] <= keys.shape[2] + max(GROWTH, step // SPARE)
    assert len(addresses) <= 4 * SPARE / GROWTH


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


def test_rows_of_a_batch_keep_their_own_slots():
    layer = filled(4)
    keys, values = make_rows(3, seed=1)
    layer.update(keys, values)
    # row 0 keeps two nodes behind its four columns, row 1 one node behind its two
    layer.move(torch.tensor([[4, 6], [5, 4]]), torch.tensor([[4, 5], [2, 3]]))
    layer.cut(6)
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
    layer = RaggedLayer()
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


def test_a_cache_filled_in_inference_mode_can_be_extended_outside_of_it():
    with torch.inference_mode():
        layer = filled(10)
    keys, _ = layer.update(*make_rows(2, seed=1))
    assert keys.equal(torch.cat([make_rows(10)[0], make_rows(2, seed=1)[0]], dim=2))


# ---- which slots belong to whom


def filled_cache(windows, count=8, new=0, batch=BATCH, padded=0):
    """A cache that has read `count` slots a row, the first `padded` of row 0 hidden, and a tree."""
    cache = RaggedCache(windows)
    cache.begin(batch)
    positions = torch.arange(count).repeat(batch, 1)
    positions[0] = (positions[0] - padded).clamp(min=HIDDEN)
    for index in range(len(windows)):
        cache.update(*make_rows(count, seed=index, batch=batch), layer_idx=index)
    cache.append(positions)
    cache.set_recording(True)
    for index in range(len(windows)):
        cache.update(*make_rows(new, seed=100 + index, batch=batch), layer_idx=index)
    return cache


def test_all_layers_keep_the_same_nodes_and_empty_ones_stay_empty():
    cache = RaggedCache([None] * 3)
    cache.begin(BATCH)
    for index in (0, 2):  # layer 1 reads another layer's keys
        cache.update(*make_rows(8, seed=index), layer_idx=index)
    cache.append(torch.arange(3).repeat(BATCH, 1))
    cache.commit([1, 1], torch.tensor([[4], [4]]))
    assert cache.get_seq_length() == cache.width == 4
    for index in (0, 2):
        assert cache.layers[index].keys.equal(make_rows(8, seed=index)[0][:, :, [0, 1, 2, 7]])
    assert not cache.layers[1].is_initialized


def test_truncating_to_the_length_it_has_changes_nothing():
    cache = filled_cache([None])
    cache.truncate()
    assert cache.layers[0].keys.equal(make_rows(8)[0])


def test_rows_commit_different_numbers_of_tokens():
    cache = filled_cache([None], count=3, new=4, padded=1)
    cache.commit([3, 1], torch.tensor([[0, 2, 3], [0, 0, 0]]))
    assert cache.lengths == [6, 4] and cache.width == 6
    assert not cache.is_even and not cache.is_dense
    assert cache.positions.tolist() == [[-1, 0, 1, 2, 3, 4], [0, 1, 2, 3, -1, -1]]
    assert cache.next_positions.tolist() == [5, 4]
    cache.update(*make_rows(2, seed=7), layer_idx=0)
    cache.commit([1, 2])
    assert cache.positions[1].tolist() == [0, 1, 2, 3, 4, 5, -1]
    assert cache.layers[0].keys[1, :, 4:6].equal(make_rows(2, seed=7)[0][1])


def test_a_row_that_stays_alone_is_as_wide_as_it_is_long():
    cache = filled_cache([None, 4], count=6, new=3, padded=2)
    cache.commit([1, 3], torch.tensor([[0, 0, 0], [0, 1, 2]]))
    cache.select([1])
    assert cache.lengths == [9] and cache.is_dense
    cache.select([0])
    assert cache.positions.tolist() == [list(range(9))]


def random_tree(nodes, luck):
    """Which nodes each node attends to, (nodes, nodes), its depth, and a path from the root."""
    parents = [0] + [luck.randrange(node) for node in range(1, nodes)]
    own, depths = torch.zeros(nodes, nodes, dtype=torch.bool), [0]
    for node in range(nodes):
        own[node, node] = True
        if node:
            own[node] |= own[parents[node]]
            depths.append(depths[parents[node]] + 1)
    path = own[luck.randrange(nodes)].nonzero()[:, 0].tolist()
    return own, depths, path


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("window", [1, 2, 5, 40])
def test_a_sliding_layer_shows_what_a_full_one_shows_within_the_window(window, seed):
    """Rows of their own lengths, for long enough that the window leaves the beginning behind."""
    luck, count = random.Random(seed), 3 * seed + 1
    cache = RaggedCache([None, window])
    cache.begin(BATCH)
    for index in range(2):
        cache.update(*make_rows(count), layer_idx=index)
    cache.append(torch.tensor([[HIDDEN, *range(count - 1)], [*range(count)]]))
    cache.set_recording(True)
    for step in range(60):
        nodes = luck.randint(1, 6)
        own, depths, path = random_tree(nodes, luck)
        queries = cache.position_ids(torch.tensor([depths, depths]))
        owns = queries, own.expand(2, -1, -1), torch.float32
        masks = [cache.mask(*owns, w) == 0 for w in (None, window)]
        rows = make_rows(nodes, seed=step)
        (full, _), (held, _) = (cache.update(*rows, layer_idx=index) for index in range(2))
        assert masks[1].shape[2] == held.shape[2] <= full.shape[2]
        # slots of the queries at the end of their rows, and of what they attend to
        for row in range(2):
            for node in range(nodes):
                slot = cache.lengths[row] + depths[node]
                seen = masks[0][row, node].nonzero()[:, 0].tolist()
                slots = [
                    s if s < cache.width else cache.lengths[row] + depths[s - cache.width]
                    for s in seen
                ]
                near = [s for s, place in zip(seen, slots, strict=True) if place > slot - window]
                assert held[row][:, masks[1][row, node]].equal(full[row][:, near])
        counts = [len(path), luck.randint(1, len(path))]
        cache.commit(counts, torch.tensor([path, path]))
        spread = max(cache.lengths) - min(cache.lengths)
        assert cache.layers[1].held <= window + spread + SLACK
        assert cache.layers[1].get_seq_length() == cache.layers[0].get_seq_length()


def test_a_long_prompt_leaves_a_window_and_no_more_memory():
    layer = RaggedLayer(window=16)
    keys, _ = layer.update(*make_rows(1000))
    assert keys.shape[2] == 1000 and layer.start == 985
    assert layer.keys.equal(make_rows(1000)[0][:, :, 985:])
    assert layer.keys.untyped_storage().nbytes() == layer.keys.nbytes


def test_a_sliding_layer_refuses_a_crop_that_needs_dropped_slots():
    layer = RaggedLayer(window=16)
    layer.update(*make_rows(100))
    layer.crop(0)
    with pytest.raises(RuntimeError, match="window of 16 has dropped"):
        layer.crop(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_mask_adds_nothing_where_a_query_may_look_and_hides_the_rest(dtype):
    cache = filled_cache([None], count=2, padded=1)
    own = torch.tensor([[True, False], [True, True]]).expand(BATCH, -1, -1)
    added = cache.mask(cache.position_ids(torch.tensor([[0, 1]])), own, dtype)
    assert added.dtype == dtype
    seen = [[[0, 1, 1, 0], [0, 1, 1, 1]], [[1, 1, 1, 0], [1, 1, 1, 1]]]
    assert (added == 0).tolist() == torch.tensor(seen).bool().tolist()
    hidden = torch.zeros(2, dtype=dtype) + added[0, 0, 2:]
    assert hidden.softmax(-1).tolist() == [1.0, 0.0]


def test_a_layer_that_grows_holds_one_of_keys_and_values_twice(monkeypatch):
    layer, alive = filled(1000), []
    old = [weakref.ref(states.untyped_storage()) for states in layer._buffers]
    allocate = Tensor.new_empty

    def watched(tensor, *size, **kwargs):
        alive.append(sum(ref() is not None for ref in old))
        return allocate(tensor, *size, **kwargs)

    monkeypatch.setattr(Tensor, "new_empty", watched)
    layer.update(*make_rows(1000))
    assert alive == [2, 1]
