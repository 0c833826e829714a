"""A text goes on from the cache that a call returned: only what is new is read."""

import copy
from types import SimpleNamespace

import pytest
import torch
from conftest import VOCAB, WINDOW, noted_passes, scatter_weights, slowly, tiny_target
from transformers import DynamicCache

from coral_hf import CoralDrafter
from coral_hf.decoding.caches.continuation import CACHE
from coral_hf.drafters.cached_drafting import CachedDrafting

TREE = {"tree_depth": 3, "tree_top_k": 3, "tree_nodes": 8}
SETTINGS = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0, "eos_token_id": None}


@pytest.fixture(scope="module")
def target():
    return tiny_target("llama", torch.float64)


@pytest.fixture(scope="module")
def drafter(target):
    torch.manual_seed(0)
    drafter = CoralDrafter.from_target(target).eval()
    scatter_weights(drafter, seed=1)
    return drafter


def words(length, seed):
    return torch.randint(3, VOCAB, (1, length), generator=torch.Generator().manual_seed(seed))


def reply(target, text, cache=None, **settings):
    return target.generate(
        text,
        attention_mask=torch.ones_like(text),
        **{CACHE: cache},
        return_dict_in_generate=True,
        **SETTINGS,
        **settings,
    )


class TokensRead:
    """How many tokens each pass of a module has read."""

    def __init__(self, module, name):
        self.lengths, self.module, self.name = [], module, name

    def __enter__(self):
        def note(module, args, kwargs):
            given = kwargs.get(self.name, args[0] if args else None)
            self.lengths.append(given.shape[1])

        self.watch = noted_passes(self.module, note)
        self.watch.__enter__()
        return self

    def __exit__(self, *exception):
        self.watch.__exit__(*exception)


def test_the_second_turn_reads_only_what_is_new_in_target_and_drafter(target, drafter):
    assistant = {"assistant_model": drafter, **TREE}
    first = reply(target, words(7, 0), **assistant)
    text = torch.cat([first.sequences, words(5, 1)], dim=1)  # 7 + 12 + 5
    with TokensRead(target, "input_ids") as by_target, TokensRead(drafter, "x") as by_drafter:
        second = reply(target, text, first[CACHE], **assistant)
    # the last token of the first turn was emitted and not read
    assert by_target.lengths[0] == by_drafter.lengths[0] == 6
    assert second.sequences.equal(reply(target, text).sequences)
    assert second[CACHE] is first[CACHE]


def test_a_continued_text_is_drafted_as_if_it_had_been_read_at_once(target, drafter):
    assistant = {"assistant_model": drafter, **TREE}
    first = reply(target, words(7, 0), **assistant)
    text = torch.cat([first.sequences, words(5, 1)], dim=1)
    second = reply(target, text, first[CACHE], **assistant)
    at_once = reply(target, text, **assistant)
    assert second.stats.round_lengths == at_once.stats.round_lengths
    for ours, theirs in zip(second[CACHE].layers, at_once[CACHE].layers, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_a_plain_calls_cache_is_continued_with_a_drafter_that_starts_cold(family):
    target = tiny_target(family, torch.float64)
    drafter = CoralDrafter.from_target(target).eval()
    first = reply(target, words(4, 0))
    text = torch.cat([first.sequences, words(5, 1)], dim=1)
    expected = reply(target, text).sequences
    second = reply(target, text, first[CACHE], assistant_model=drafter, **TREE)
    assert second.sequences.equal(expected)
    third = reply(target, torch.cat([expected, words(3, 2)], dim=1), second[CACHE])
    assert third.sequences.equal(reply(target, torch.cat([expected, words(3, 2)], 1)).sequences)


@pytest.mark.parametrize("family", ["mistral_window", "gemma2", "gemma3", "gpt_oss"])
@pytest.mark.parametrize("turns", ["drafted plain drafted", "plain drafted drafted plain"])
@pytest.mark.parametrize("rows", [2, *slowly(1)])
def test_a_text_far_longer_than_the_window_continues_over_many_turns(family, turns, rows):
    target, cache = tiny_target(family, torch.float64), None
    drafter = CoralDrafter.from_target(target).eval()
    text = words(5 * rows, 0).view(rows, 5)
    for turn in turns.split():
        assistant = {"assistant_model": drafter, **TREE} if turn == "drafted" else {}
        out = reply(target, text, cache, **assistant)
        assert out.sequences.equal(reply(target, text).sequences)
        text, cache = torch.cat([out.sequences, words(3 * rows, 1).view(rows, 3)], 1), out[CACHE]
    assert text.shape[1] > 4 * WINDOW
    assert min(layer.keys.shape[2] for layer in cache.layers) < 4 * WINDOW


def test_a_cache_that_dropped_what_a_text_attends_to_is_read_again_or_refused():
    target = tiny_target("gemma3", torch.float64)
    drafter = CoralDrafter.from_target(target).eval()
    first = reply(target, words(40, 0), assistant_model=drafter, **TREE)
    text = first.sequences[:, :30]  # the window before its last token is gone
    second = reply(target, text, first[CACHE], assistant_model=drafter, **TREE)
    assert second.sequences.equal(reply(target, text).sequences)
    first = reply(target, words(40, 0))
    sliding = first[CACHE].layers[0]
    sliding.keys, sliding.values = sliding.keys[:, :, 1:], sliding.values[:, :, 1:]
    with pytest.raises(ValueError, match="pass the whole text"):
        target.generate(
            words(2, 1),
            attention_mask=torch.ones(1, first.sequences.shape[1] + 1),
            **{CACHE: first[CACHE]},
            assistant_model=drafter,
            **SETTINGS,
        )


def test_the_callers_own_cache_is_filled(target, drafter):
    cache = DynamicCache(config=target.config)
    out = reply(target, words(7, 0), cache, assistant_model=drafter, **TREE)
    assert out[CACHE] is cache
    assert cache.get_seq_length() == out.sequences.shape[1] - 1


def test_one_cache_can_be_copied_and_continued_twice(target, drafter):
    assistant = {"assistant_model": drafter, **TREE}
    first = reply(target, words(7, 0), **assistant)
    for seed in (1, 2):
        text = torch.cat([first.sequences, words(5, seed)], dim=1)
        out = reply(target, text, copy.deepcopy(first[CACHE]), **assistant)
        assert out.sequences.equal(reply(target, text).sequences)


def test_new_tokens_alone_continue_a_text_with_the_mask_of_all_of_it(target, drafter):
    assistant = {"assistant_model": drafter, **TREE}
    first = reply(target, words(7, 0), **assistant)
    text = torch.cat([first.sequences, words(5, 1)], dim=1)
    out = target.generate(
        text[:, -6:],
        attention_mask=torch.ones_like(text),
        **{CACHE: first[CACHE]},
        **SETTINGS,
        **assistant,
    )
    assert out[0, 6:].equal(reply(target, text).sequences[0, text.shape[1] :])


def test_a_text_whose_tokens_are_all_cached_continues(target, drafter):
    assistant = {"assistant_model": drafter, **TREE}
    text = words(9, 0)
    cache = target(text, use_cache=True)[CACHE]
    out = reply(target, text, cache, **assistant)
    assert out.sequences.equal(reply(target, text).sequences)


def test_a_batch_continues_from_its_cache(target, drafter):
    assistant = {"assistant_model": drafter, **TREE}
    prompts = words(14, 3).view(2, 7)
    first = reply(target, prompts, **assistant)
    text = torch.cat([first.sequences, words(10, 4).view(2, 5)], dim=1)
    second = reply(target, text, first[CACHE], **assistant)
    assert second.sequences.equal(reply(target, text).sequences)


def test_the_drafter_of_another_call_starts_cold(target, drafter):
    other = CoralDrafter.from_target(target).eval()
    first = reply(target, words(7, 0), assistant_model=drafter, **TREE)
    text = torch.cat([first.sequences, words(5, 1)], dim=1)
    out = reply(target, text, first[CACHE], assistant_model=other, **TREE)
    assert out.sequences.equal(reply(target, text).sequences)


def test_memory_fits_only_where_the_text_continues(target, drafter):
    first = reply(target, words(7, 0), assistant_model=drafter, **TREE)
    memory = first[CACHE].drafter_memory
    end = first.sequences.shape[1] - 1

    def continues(own, start):
        reader = SimpleNamespace(drafter=own, _windows=[None])
        return CachedDrafting._continues(reader, memory, torch.tensor([start]))

    assert continues(drafter, end) and not continues(drafter, end + 1)
    assert not continues(CoralDrafter.from_target(target), end)


@pytest.mark.parametrize("chunk", [2, 3, 100])
def test_a_prompt_read_in_chunks_gives_the_same_text(target, drafter, chunk):
    text = words(10, 5)
    out = reply(target, text, assistant_model=drafter, prefill_chunk_size=chunk, **TREE)
    assert out.sequences.equal(reply(target, text).sequences)


def test_a_static_cache_is_asked_for_and_the_text_is_the_same(target, drafter):
    text = words(6, 6)
    out = reply(target, text, assistant_model=drafter, cache_implementation="static", **TREE)
    assert out.sequences.equal(reply(target, text).sequences)
