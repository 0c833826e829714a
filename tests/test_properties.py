"""What holds for every tree, prompt, seed and stop: drawn by hypothesis, the same in every run."""

from functools import cache
from typing import NamedTuple
from unittest import mock

import torch
from conftest import scatter_weights, tiny_target
from hypothesis import given, settings
from hypothesis import strategies as st

from coral_hf import CoralDrafter
from coral_hf.decoding.caches.continuation import CACHE
from coral_hf.decoding.guard import CHAIN, Judgement

VOCAB = 12  # small, so that a random drafter is often right
PAD = 0
FAMILIES = ("llama", "gemma3")  # gemma3 has a sliding and a full layer


def examples(count: int) -> settings:
    """So many examples, the same in every run, however long each takes."""
    return settings(max_examples=count, derandomize=True, deadline=None, database=None)


words = st.integers(3, VOCAB - 1)
prompts = st.lists(st.lists(words, min_size=1, max_size=10), min_size=1, max_size=3)
trees = st.fixed_dictionaries(
    {
        "tree_depth": st.integers(1, 6),
        "tree_top_k": st.integers(1, 5),
        "tree_nodes": st.integers(1, 20),
    }
)
stops = st.lists(words, max_size=2, unique=True)
new_tokens = st.integers(1, 14)  # behind up to 10: the window of gemma3 is crossed
processors = st.fixed_dictionaries(
    {},
    optional={
        "repetition_penalty": st.sampled_from([0.8, 1.4]),
        "no_repeat_ngram_size": st.integers(2, 3),
        "min_new_tokens": st.integers(1, 6),
        "suppress_tokens": st.lists(words, min_size=1, max_size=3, unique=True),
        "sequence_bias": st.builds(lambda a, b: {(a,): 2.0, (a, b): -4.0}, words, words),
        "encoder_repetition_penalty": st.just(1.5),
    },
)
warpers = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0.5, 1.5]),
        "top_k": st.integers(1, 8),
        "top_p": st.sampled_from([0.3, 0.9]),
        "min_p": st.just(0.05),
    },
)


class Pair(NamedTuple):
    target: torch.nn.Module
    drafter: CoralDrafter


@cache
def pair_of(family: str) -> Pair:
    """A random target in float64 and a random drafter, made once."""
    target = tiny_target(family, torch.float64, vocab_size=VOCAB)
    target.generation_config.pad_token_id = PAD
    target.generation_config.eos_token_id = None
    torch.manual_seed(0)
    drafter = CoralDrafter.from_target(target).eval()
    scatter_weights(drafter, seed=1)
    return Pair(target, drafter)


def padded(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    """Ids and mask (batch, longest), padded on the left."""
    longest = max(map(len, rows))
    ids = [[PAD] * (longest - len(row)) + row for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def texts_of(out: torch.Tensor, start: int, eos: list[int]) -> list[list[int]]:
    """The new tokens of each row up to its own stop."""
    rows = []
    for row in out[:, start:].tolist():
        stop = next((i + 1 for i, token in enumerate(row) if token in eos), len(row))
        rows.append(row[:stop])
    return rows


def plain_rows(target, batch: dict, eos: list[int], **arguments) -> list[list[int]]:
    """The new tokens of plain greedy `generate` of each row, one row at a time."""
    found = []
    for index in range(len(batch["input_ids"])):
        row = {name: tensor[index : index + 1] for name, tensor in batch.items()}
        out = target.generate(**row, do_sample=False, eos_token_id=eos or None, **arguments)
        found += texts_of(out, batch["input_ids"].shape[1], eos)
    return found


@examples(60)
@given(st.sampled_from(FAMILIES), prompts, trees, stops, new_tokens, processors)
def test_greedy_tokens_of_each_row_are_those_of_the_target_alone(
    family, rows, tree, eos, length, processed
):
    target, drafter = pair_of(family)
    batch, arguments = padded(rows), {"max_new_tokens": length, **processed}
    if "min_new_tokens" in processed:  # transformers warns of more than there is room for
        arguments["min_new_tokens"] = min(length, processed["min_new_tokens"])
    out = target.generate(
        **batch,
        assistant_model=drafter,
        do_sample=False,
        eos_token_id=eos or None,
        **arguments,
        **tree,
    )
    start = batch["input_ids"].shape[1]
    assert out[:, :start].equal(batch["input_ids"])
    assert texts_of(out, start, eos) == plain_rows(target, batch, eos, **arguments)


@examples(40)
@given(
    st.sampled_from(FAMILIES),
    st.lists(st.lists(st.booleans(), min_size=14, max_size=14), min_size=1, max_size=3),
    st.integers(1, 15),
    st.integers(0, 5),
    trees,
    st.booleans(),
)
def test_any_mask_positions_and_chunks_give_the_tokens_of_the_target_alone(
    family, seen, chunk, start, tree, is_chain
):
    target, drafter = pair_of(family)
    mask = torch.tensor(seen).long()
    mask[:, -1] = 1
    ids = torch.arange(mask.numel()).view(mask.shape) * 7 % (VOCAB - 3) + 3
    positions = (mask.cumsum(1) - 1 + start).clamp(min=0)
    batch = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    settings_ = {"do_sample": False, "max_new_tokens": 12}
    expected = target.generate(**batch, **settings_)
    way = Judgement(CHAIN, ("a test",)) if is_chain else Judgement()
    tree = {**tree, "tree_top_k": 1} if is_chain else tree
    with mock.patch("coral_hf.decoding.guard.calls.accept_target", return_value=way):
        out = target.generate(
            **batch, **settings_, **tree, assistant_model=drafter, prefill_chunk_size=chunk
        )
    assert out.equal(expected)


@examples(60)
@given(
    st.sampled_from(FAMILIES),
    prompts,
    trees,
    stops,
    new_tokens,
    warpers,
    st.integers(0, 2**32 - 1),
)
def test_a_seed_repeats_a_sample_and_nothing_but_padding_follows_a_stop(
    family, rows, tree, eos, length, warped, seed
):
    target, drafter = pair_of(family)
    batch, start, texts = padded(rows), max(map(len, rows)), []
    for _ in range(2):
        torch.manual_seed(seed)
        texts.append(
            target.generate(
                **batch,
                assistant_model=drafter,
                do_sample=True,
                eos_token_id=eos or None,
                max_new_tokens=length,
                **warped,
                **tree,
            )
        )
    assert texts[0].equal(texts[1])
    new = texts[0][:, start:]
    kept = texts_of(texts[0], start, eos)
    # as long as its longest row, which ends at its stop or is all that was asked for
    assert new.shape[1] == max(map(len, kept)) <= length
    for row, text in zip(new.tolist(), kept, strict=True):
        assert row[len(text) :] == [PAD] * (new.shape[1] - len(text))
        assert len(text) == length or text[-1] in eos


@examples(60)
@given(st.sampled_from(FAMILIES), prompts, trees, stops, new_tokens)
def test_the_cache_after_a_call_is_a_prefill_of_all_but_the_last_tokens(
    family, rows, tree, eos, length
):
    target, drafter = pair_of(family)
    batch, start = padded(rows), max(map(len, rows))
    out = target.generate(
        **batch,
        assistant_model=drafter,
        do_sample=False,
        eos_token_id=eos or None,
        max_new_tokens=length,
        return_dict_in_generate=True,
        **tree,
    )
    assert out[CACHE].get_seq_length() == out.sequences.shape[1] - 1
    for row, text in enumerate(texts_of(out.sequences, start, eos)):
        first, stop = start - len(rows[row]), start + len(text) - 1
        with torch.no_grad():
            fresh = target(out.sequences[row : row + 1, first:stop])
        layers = zip(out[CACHE].layers, fresh[CACHE].layers, strict=True)
        for ours, theirs in layers:
            # a sliding layer keeps the end of a text only
            width = theirs.keys.shape[2]
            for name in ("keys", "values"):
                found = getattr(ours, name)[row, :, stop - width - ours.start : stop - ours.start]
                torch.testing.assert_close(found, getattr(theirs, name)[0])


@examples(40)
@given(
    st.sampled_from(FAMILIES),
    st.lists(words, min_size=1, max_size=10),
    trees,
    trees,
    new_tokens,
    st.lists(words, max_size=8),
    new_tokens,
)
def test_a_text_that_goes_on_from_its_cache_is_the_text_read_at_once(
    family, words_, first_tree, second_tree, first_length, added, second_length
):
    target, drafter = pair_of(family)
    settings_ = {"assistant_model": drafter, "do_sample": False, "return_dict_in_generate": True}
    batch = padded([words_])
    first = target.generate(**batch, max_new_tokens=first_length, **settings_, **first_tree)
    text = torch.cat([first.sequences, torch.tensor([added], dtype=torch.long)], dim=1)
    whole = {"input_ids": text, "attention_mask": torch.ones_like(text)}
    second = target.generate(
        **whole,
        **{CACHE: first[CACHE]},
        max_new_tokens=second_length,
        **settings_,
        **second_tree,
    )
    assert second.sequences.equal(
        target.generate(**whole, do_sample=False, max_new_tokens=second_length)
    )


@examples(40)
@given(prompts, trees, new_tokens, st.data())
def test_no_token_follows_a_stop_at_any_position(rows, tree, length, data):
    target, drafter = pair_of("llama")
    batch = padded(rows)
    free = plain_rows(target, batch, [], max_new_tokens=length)
    # a token that is certain to come
    row = data.draw(st.integers(0, len(rows) - 1))
    eos = [free[row][data.draw(st.integers(0, length - 1))]]
    out = target.generate(
        **batch,
        assistant_model=drafter,
        do_sample=False,
        eos_token_id=eos,
        max_new_tokens=length,
        **tree,
    )
    kept = texts_of(torch.tensor(free), 0, eos)
    assert texts_of(out, max(map(len, rows)), eos) == kept
    assert out.shape[1] == max(map(len, rows)) + max(map(len, kept))
