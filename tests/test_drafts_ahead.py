"""Adaptive rounds of constant shapes, and drafts that are launched ahead."""

import pytest
import torch
from fixed_calls import PLAIN, STATIC, costing, drafted, pair, prompts

from coral_hf.decoding.rounds import loop as loop_module
from coral_hf.decoding.rounds.steps import Steps


def test_drawn_text_follows_from_its_seed_and_no_clock(monkeypatch):
    monkeypatch.setattr(loop_module, "measure_costs", None)
    target, drafter = pair()
    settings = {**STATIC, "do_sample": True, "speculation": "adaptive", "max_new_tokens": 9}
    assert drafted(target, drafter, prompts(), **settings, pad_token_id=0).stats.num_rounds


@pytest.mark.parametrize(
    ("speculation", "sampling"), [("always", {}), ("always", {"do_sample": True}), ("adaptive", {})]
)
def test_the_next_draft_is_launched_before_a_round_is_read(speculation, sampling, monkeypatch):
    # as on a device that works by itself
    given, settings = prompts(rows=3), {**PLAIN, **STATIC, **sampling, "speculation": speculation}
    target, drafter = pair()
    monkeypatch.setattr(loop_module, "measure_costs", costing(0.5))
    torch.manual_seed(0)
    expected = drafted(target, drafter, given, **settings, eos_token_id=5)
    order, run, begin = [], Steps.run, loop_module.FixedLoop.begin_rounds

    def ahead(self):
        begin(self)
        self.drafts_ahead = True
        order.clear()

    def noted(self, name, rounds):
        order.append(name)
        return run(self, name, rounds)

    read = loop_module.HostCopy.read
    monkeypatch.setattr(loop_module.FixedLoop, "begin_rounds", ahead)
    monkeypatch.setattr(Steps, "run", noted)
    monkeypatch.setattr(
        loop_module.HostCopy, "read", lambda self: (order.append("read"), read(self))[1]
    )
    torch.manual_seed(0)
    found = drafted(target, drafter, given, **settings, eos_token_id=5)
    assert order == ["draft", *["verify", "draft", "read"] * found.stats.num_rounds]
    assert found.sequences.equal(expected.sequences)


def test_giving_up_while_a_draft_is_under_way_keeps_the_tokens(monkeypatch):
    monkeypatch.setattr(loop_module, "measure_costs", costing(9.0))
    begin = loop_module.FixedLoop.begin_rounds

    def ahead(self):
        begin(self)
        self.drafts_ahead = True

    monkeypatch.setattr(loop_module.FixedLoop, "begin_rounds", ahead)
    monkeypatch.setattr(loop_module, "LEAST_CAPACITY", 32)
    monkeypatch.setattr(loop_module, "FAR", 8)
    target, drafter = pair("gemma3")
    settings = {**PLAIN, **STATIC, "speculation": "adaptive", "max_new_tokens": 90}
    plain = target.generate(**prompts(), **PLAIN | {"max_new_tokens": 90})
    ours = drafted(target, drafter, prompts(), **settings)
    assert ours.sequences.equal(plain) and ours.stats.is_stepped_back
