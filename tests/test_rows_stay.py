"""Rows that have ended stay in the pass where something may look at them."""

import pytest
import torch
from conftest import tiny_target
from test_targets import CHAIN, TREE, make_prompts, pad_left, random_drafter
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)


class LeansOnTheBatch(LogitsProcessor):
    """Moves each row's logits by those of all rows, ended ones included."""

    def __call__(self, input_ids, scores):
        return scores + scores.mean(0, keepdim=True)


class CountsByRow(StoppingCriteria):
    """Ends a row when it has seen its token of the prompt's end modulo 5 twice; counts by row."""

    def __init__(self, batch: int):
        self.seen = torch.zeros(batch, dtype=torch.long)

    def __call__(self, input_ids, scores, **kwargs):
        assert len(input_ids) == len(self.seen)
        self.seen += input_ids[:, -1] % 5 == 0
        return self.seen >= torch.tensor([1, 2, 3])


@pytest.fixture
def target():
    return tiny_target("llama")


@pytest.fixture
def given():
    tokens, mask = pad_left(make_prompts())
    return {"inputs": tokens, "attention_mask": mask, "do_sample": False, "max_new_tokens": 24}


def ends_of(target, given) -> list[int]:
    """Tokens that end the rows at different times."""
    text = target.generate(**given)[:, given["inputs"].shape[1] :]
    return [int(text[0, 3]), int(text[1, 9])]


@pytest.mark.parametrize("shape", [TREE, CHAIN], ids=["tree", "chain"])
def test_a_processor_sees_the_padding_of_rows_that_have_ended(target, given, shape):
    given["eos_token_id"] = ends_of(target, given)
    given["logits_processor"] = LogitsProcessorList([LeansOnTheBatch()])
    plain = target.generate(**given, return_dict_in_generate=True, output_scores=True)
    assert (plain.sequences == target.config.pad_token_id).any()
    given |= {"return_dict_in_generate": True, "output_scores": True, **shape}
    ours = target.generate(**given, assistant_model=random_drafter(target))
    assert ours.sequences.equal(plain.sequences)
    for one, other in zip(ours.scores, plain.scores, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("ends", [True, False], ids=["padded", "not padded"])
@pytest.mark.parametrize("shape", [TREE, CHAIN], ids=["tree", "chain"])
def test_a_criterion_counts_rows_of_its_own(target, given, shape, ends):
    if ends:
        given["eos_token_id"] = ends_of(target, given)

    def text(**settings):
        criteria = StoppingCriteriaList([CountsByRow(3)])
        return target.generate(**given, stopping_criteria=criteria, **settings)

    assert text(assistant_model=random_drafter(target), **shape).equal(text())


@pytest.mark.parametrize("rule", ["token", "traversal", "block"])
def test_rows_that_stay_are_sampled(target, given, rule):
    given |= {"do_sample": True, "eos_token_id": list(range(2, 12)), "verification": rule}
    given["stopping_criteria"] = StoppingCriteriaList([CountsByRow(3)])
    if rule != "block":
        given |= TREE
    text = target.generate(**given, assistant_model=random_drafter(target))
    assert len(text) == 3
