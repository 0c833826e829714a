"""Adaptive drafting compares rounds with steps of transformers' own loop, which leave no trace."""

import pytest
import torch
from conftest import VOCAB, noted_passes, tiny_target
from transformers import (
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from coral_hf import CoralDrafter
from coral_hf.decoding import generate as door
from coral_hf.decoding.plain import own_loop
from coral_hf.decoding.plain.costs import PROBES, CostModel, Costs, RoundSample

LENGTH, NEW = 12, 30
CALL = {"do_sample": False, "max_new_tokens": NEW, "pad_token_id": 0}
PROCESSORS = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 5}
NAMES = ["llama", "mistral_window", "gemma3", "gpt2"]


@pytest.fixture
def prompts():
    ids = torch.randint(3, VOCAB, (3, LENGTH), generator=torch.Generator().manual_seed(0))
    ids[1, :3] = ids[2, 0] = 0
    return {"inputs": ids, "attention_mask": (ids != 0).long()}


@pytest.fixture
def trials(monkeypatch):
    """What transformers' own loop has written in trials: (batch, length) each."""
    found, sample = [], GenerationMixin._sample

    def noted(self, *args, **kwargs):
        output = sample(self, *args, **kwargs)
        if any(getattr(one, "most", None) for one in args):
            found.append(output)
        return output

    monkeypatch.setattr(GenerationMixin, "_sample", noted)
    return found


def drafted(target, given, **settings):
    drafter = CoralDrafter.from_target(target).eval()
    settings = {"speculation": "adaptive", **settings}
    return target.generate(**CALL, **given, assistant_model=drafter, **settings)


@pytest.mark.parametrize("settings", [{}, PROCESSORS], ids=["greedy", "processed"])
@pytest.mark.parametrize("name", NAMES)
def test_a_trial_takes_the_steps_of_plain_generate_and_changes_nothing(
    trials, prompts, name, settings
):
    target = tiny_target(name)
    plain = target.generate(**CALL, **prompts, **settings)
    assert drafted(target, prompts | settings).equal(plain)
    assert len(trials) == 1
    assert trials[0].equal(plain[:, : LENGTH + 1 + own_loop.TRIED])


def test_a_text_that_came_as_its_new_tokens_is_tried_too(trials):
    target = tiny_target("llama")
    ids = torch.randint(3, VOCAB, (1, LENGTH))
    plain = target.generate(ids, **CALL)
    first = target.generate(ids, **{**CALL, "max_new_tokens": 6}, return_dict_in_generate=True)
    name = "cache" if "cache" in first else "past_key_values"
    given = {"inputs": plain[:, LENGTH + 5 : LENGTH + 6], name: first[name]}
    given["attention_mask"] = torch.ones(1, LENGTH + 6, dtype=torch.long)
    text = drafted(target, given)
    assert text[:, 1 : NEW - 5].equal(plain[:, LENGTH + 6 :]) and len(trials) == 1


def test_a_kind_of_call_is_tried_once(trials, prompts):
    target = tiny_target("llama")
    for given, count in (
        (prompts, 1),
        (prompts, 1),
        (prompts | PROCESSORS, 2),
        ({"inputs": prompts["inputs"][:1]}, 3),
        ({"inputs": prompts["inputs"].repeat(1, 4)}, 4),
    ):
        drafted(target, given)
        assert len(trials) == count
    drafted(target, prompts, speculation="always", tree_depth=1)
    assert len(trials) == 4


class Remembers(LogitsProcessor):
    """A processor with state."""

    calls = 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        return scores + 0.3 * (self.calls % 2) * scores.roll(1, dims=1)


class Counts(StoppingCriteria):
    """A criterion with state."""

    calls = 0

    def __call__(self, input_ids, scores, **kwargs):
        self.calls += 1
        return torch.full((len(input_ids),), self.calls >= 20)


@pytest.mark.parametrize("kind", ["processor", "criterion", "hook", "room"])
def test_no_step_is_tried_where_somebody_would_notice(trials, prompts, kind):
    target = tiny_target("llama")

    def watchers():
        return {
            "processor": {"logits_processor": LogitsProcessorList([Remembers()])},
            "criterion": {"stopping_criteria": StoppingCriteriaList([Counts()])},
            "room": {"max_new_tokens": own_loop.TRIED},
        }.get(kind, {})

    seen = []
    if kind == "hook":
        target.model.layers[0].register_forward_hook(lambda *_: seen.append(1))
    given = {**CALL, **prompts}
    plain = target.generate(**{**given, **watchers()})
    drafter = CoralDrafter.from_target(target).eval()
    ours = target.generate(
        **{**given, **watchers()}, assistant_model=drafter, speculation="adaptive"
    )
    assert ours.equal(plain) and not trials


@pytest.mark.parametrize("name", ["llama", "mistral_window", "gemma3"])
def test_a_trial_holds_no_second_cache_and_leaves_the_first_as_it_was(name, monkeypatch):
    target, tried = tiny_target(name), []
    ids = torch.randint(3, VOCAB, (1, 200))
    step_seconds = own_loop.OwnLoop.step_seconds

    def spy(loop, cache):
        held = [(layer.start, layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
        seconds = step_seconds(loop, cache)
        for layer, (start, keys, values) in zip(cache.layers, held, strict=True):
            assert layer.start == start and layer.keys.equal(keys) and layer.values.equal(values)
            assert not layer._buffers and not layer.is_plain and layer.record_past
        tried.append(seconds)
        return seconds

    monkeypatch.setattr(own_loop.OwnLoop, "step_seconds", spy)
    drafted(target, {"inputs": ids})
    assert len(tried) == 1 and tried[0] > 0


def test_plain_passes_of_our_loop_count_as_what_a_step_of_plain_generate_costs():
    model = tiny_target("llama")

    def measured(kind, step, own):
        costs = CostModel(Costs(), model, kind)
        costs.begin(2, lambda: step)
        while costs.lacks_plain(2):
            costs.note(RoundSample(2, 0, 1, 1.0, 0.0, own, 0.5))
        return costs.plain(2)

    assert measured("short", 0.03, 0.01) == pytest.approx(0.03)
    assert measured("short", 99.0, 0.01) == pytest.approx(0.03)  # it is known
    assert measured("long", 0.02, 0.04) == pytest.approx(0.02)
    costs = CostModel(Costs(), model, "long")
    costs.forget_plain(2)
    for _ in range(PROBES):  # the machine is half as fast
        costs.note(RoundSample(2, 0, 1, 1.0, 0.0, 0.08, 0.5))
    assert costs.plain(2) == pytest.approx(0.04)
    assert measured(None, 99.0, 0.01) == pytest.approx(0.08)  # what our loop has told, as it is
    assert measured("unmeasurable", None, 0.01) == pytest.approx(0.08)
    assert door.choose_policy(None, None, "adaptive", Costs(), None)._model.is_clock is False


def test_a_call_without_adaptive_drafting_has_no_further_pass():
    target, passes = tiny_target("llama"), []
    drafter = CoralDrafter.from_target(target).eval()
    ids = torch.randint(3, VOCAB, (1, LENGTH))
    with noted_passes(target, lambda *_: passes.append(1)):
        output = target.generate(
            ids, **CALL, assistant_model=drafter, speculation="always", return_dict_in_generate=True
        )
    assert len(passes) == output.stats.num_rounds + 1
