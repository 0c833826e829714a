"""Targets whose cache holds states of convolutions (LFM2): chains keep their own text."""

import pytest
import torch
from conftest import any_target, as_drafter
from drafted_calls import Recorded
from test_targets import random_drafter

from coral_hf.decoding.caches.continuation import CACHE
from coral_hf.decoding.guard import CHAIN, judge_target

PROMPT = torch.arange(3, 14)[None]
GREEDY = {"do_sample": False, "max_new_tokens": 24}


@pytest.fixture(scope="module")
def target():
    return any_target("lfm2")


def words(count: int) -> dict:
    """A prompt of so many tokens."""
    return {"input_ids": PROMPT[:, :count], "attention_mask": torch.ones(1, count).long()}


def test_rejected_tokens_leave_the_states_of_a_convolution(target):
    """A drafter that knows the text is wrong at every fourth token, so that all is kept and cut."""
    for count in (1, 2, 3, 11):  # shorter than the convolution looks back, and longer
        plain = target.generate(**words(count), **GREEDY)
        drafter = as_drafter(Recorded(plain))
        call = {**GREEDY, "assistant_model": drafter, "return_dict_in_generate": True}
        drafted = target.generate(**words(count), **call, tree_depth=5)
        assert drafted.sequences.equal(plain)
        assert drafted.stats.acceptance_length > 2


def test_rows_that_end_early_stay_as_in_plain_generate(target):
    rows = torch.cat([PROMPT, PROMPT.flip(1), PROMPT * 2])
    call = {"attention_mask": torch.ones_like(rows), **GREEDY, "pad_token_id": 0}
    ends = target.generate(rows, **call)[:2, 14].tolist()
    plain = target.generate(rows, **call, eos_token_id=ends)
    drafter = as_drafter(Recorded(plain))
    assert target.generate(rows, **call, eos_token_id=ends, assistant_model=drafter).equal(plain)
    assert judge_target(target).keeps_rows and judge_target(target).way == CHAIN


@pytest.mark.parametrize("speculation", ["never", "adaptive", "always"])
def test_a_text_is_continued_from_a_returned_cache(target, speculation):
    ours = {"assistant_model": random_drafter(target), "speculation": speculation}
    whole = target.generate(**words(7), **{**GREEDY, "max_new_tokens": 20})
    for first, second in (({}, ours), (ours, {}), (ours, ours)):
        call = {**GREEDY, "max_new_tokens": 8, "return_dict_in_generate": True}
        begun = target.generate(**words(7), **call, **first)
        assert begun.sequences.equal(whole[:, :15])
        rest = {"attention_mask": torch.ones_like(begun.sequences), CACHE: begun[CACHE]}
        call = {**GREEDY, "max_new_tokens": 12}
        assert target.generate(begun.sequences, **rest, **call, **second).equal(whole)
