"""Caches of a continued sequence: the one a call takes over, and the one it returns.

In: the caller's cache, if any. Out: a `RaggedCache` with what can be used of it, and after the call
a cache that a later call, with or without a drafter, continues from.
"""

from collections.abc import Sequence
from copy import copy

from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from ...target import CONVOLUTION, NAMES_STATES
from .layers import ImageLayer, RaggedLayer, new_layer
from .ragged_cache import RaggedCache

# the keyword and the output of `generate` and of models: `past_key_values` before transformers 5.24
CACHE = "cache" if NAMES_STATES else "past_key_values"
# the attribute of a returned cache that holds what the drafter has read of the same sequences
MEMORY = "drafter_memory"


def is_user_cache(cache: Cache | None) -> bool:
    """Whether the caller has passed a cache, and so may continue from it after the call."""
    return cache is not None and (
        getattr(cache, "_is_user_defined", False) or cache.get_seq_length() > 0
    )


def given_cache(model_kwargs: dict) -> Cache | None:
    """The cache that came with a call, or the growing one that `generate` has made.

    One of fixed capacity that `generate` has made is given up: our own take its place, and its
    memory may be reserved already.
    """
    given = model_kwargs.get(CACHE)
    if given is None or is_user_cache(given) or _grows(given):
        return given
    given.layers.clear()  # `generate` still holds the cache itself
    model_kwargs[CACHE] = None
    return None


def _grows(cache: Cache) -> bool:
    """Whether all layers of a cache are such as ours can take the place of."""
    return all(isinstance(layer, DynamicLayer) for layer in getattr(cache, "layers", ()))


def continued_cache(
    input_ids: Tensor, model_kwargs: dict, windows: Sequence[int | None]
) -> RaggedCache:
    """Adopt the cache of a call, or make an empty one where it starts at the first token.

    Args:
        input_ids: (batch, length), whole sequences or only what is new in them.
        model_kwargs: what `generate` has prepared, the call's own cache included.
        windows: attention window of each layer of the target, None for full attention.

    Raises:
        ValueError: if the cache has another number of rows, or has dropped slots and the sequences
            do not come whole.
    """
    given, fresh = model_kwargs.get(CACHE), RaggedCache(windows)
    length, whole = input_ids.shape[1], whole_length(input_ids, model_kwargs)
    if given is None or given.get_seq_length() == 0:
        return fresh
    held = [getattr(layer, "keys", None) for layer in given.layers]
    rows = next((len(keys) for keys in held if isinstance(keys, Tensor)), len(input_ids))
    if rows != len(input_ids):
        raise ValueError(
            f"`{CACHE}` holds {rows} rows, but `input_ids` has {len(input_ids)}; continue the rows"
            f" of the earlier call, or leave out `{CACHE}`."
        )
    is_whole = length == whole
    # the last token at least is read, for its logits
    kept = min(given.get_seq_length(), length - 1 if is_whole else whole)
    layers = [_adopt(*pair) for pair in zip(given.layers, windows, strict=False)]
    if all(layer is not None and layer.holds(kept) for layer in layers):
        fresh.layers[: len(layers)] = layers
        for layer in fresh.layers:
            layer.cut(kept)
        return fresh
    if is_whole:
        return fresh  # read again from the first token: right, and slower once
    raise ValueError(
        f"`{CACHE}` is a {type(given).__name__} whose layers do not hold every token that"
        " is attended to, and `input_ids` only what is new; pass the whole text as `input_ids`."
    )


def _adopt(layer: DynamicLayer, window: int | None) -> RaggedLayer | ImageLayer | None:
    """A layer of ours with another one's slots; None if that one has them in another form."""
    if window == CONVOLUTION:
        return None
    if isinstance(layer, RaggedLayer) and layer.window == window:
        layer.is_plain = layer.record_past = False
        return layer
    adopted = new_layer(window)
    if layer.is_initialized and layer.get_seq_length():
        if window != 0:
            adopted.start = layer.get_seq_length() - layer.keys.shape[-2]
            adopted.record_past = True
        if not isinstance(layer, DynamicLayer) or adopted.start < 0:
            return None
        adopted.update(layer.keys, layer.values)
    return adopted


def returned_cache(given: Cache | None, cache: Cache) -> Cache:
    """The caller's own cache, filled, where it is one that grows; else ours."""
    if isinstance(cache, RaggedCache):  # a target that read its text again has made its own
        cache.set_recording(False)
    if given is None or not _grows(given):
        return cache
    given.layers = cache.layers
    return given


def part_of(cache: RaggedCache, row: int) -> RaggedCache:
    """Copy the committed slots of one row of a batch to another cache."""
    part = copy(cache)
    part.layers = [copy(layer) for layer in cache.layers]
    part.select([row])
    for layer in part.layers:
        layer._buffers = []  # which are the whole batch's
    return part


def join(parts: list[tuple[list[int], RaggedCache]]) -> RaggedCache:
    """Join caches, each of some rows of the batch, along it; zeros fill what a row lacks.

    Keys and values are (rows, kv_heads, slots, head_dim).
    """
    whole = RaggedCache([layer.window for layer in parts[0][1].layers])
    whole.set_recording(True)
    batch = sum(len(rows) for rows, _ in parts)
    for index, layer in enumerate(whole.layers):
        found = [(rows, part.layers[index]) for rows, part in parts]
        states = found[0][1]
        if not states.is_initialized:
            continue
        layer.start = min(one.start for _, one in found)
        width = max(one.get_seq_length() for _, one in found) - layer.start
        keys, values = (
            part.new_zeros(batch, part.shape[1], width, part.shape[3])
            for part in (states.keys, states.values)
        )
        for rows, one in found:
            first, stop = one.start - layer.start, one.get_seq_length() - layer.start
            keys[rows, :, first:stop], values[rows, :, first:stop] = one.keys, one.values
        layer.update(keys, values)
    return whole


def whole_length(input_ids: Tensor, model_kwargs: dict) -> int:
    """Tokens of the whole sequences, of which `input_ids` (batch, length) may be only the new ones.

    The mask or the positions, where `generate` has prepared them, are always those of all tokens.
    """
    for name in ("attention_mask", "position_ids"):
        if model_kwargs.get(name) is not None:
            return model_kwargs[name].shape[-1]
    return input_ids.shape[1]
