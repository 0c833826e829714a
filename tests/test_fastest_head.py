"""Of the draft heads that a drafter has, the fastest is read, and its card shows the figures."""

import time

import pytest
import torch
from bigram import BigramDrafter
from conftest import tiny_target
from datasets import Dataset

from coral_hf import CoralDrafter, CoralTrainingArguments, Eagle3Drafter
from coral_hf.heads import draft_heads
from coral_hf.hub.card import CardFacts, make_card
from coral_hf.measure.autotune import choose_head, heads_of
from coral_hf.training.pipeline import train

PROMPTS = [[5, 6, 7, 8], [9, 3, 4], [2, 2, 11, 12, 13]]


@pytest.fixture(autouse=True)
def _short_answers(monkeypatch):
    monkeypatch.setattr("coral_hf.measure.autotune.NEW_TOKENS", 8)


@pytest.fixture
def target():
    return tiny_target("llama", torch.float32)


@pytest.fixture
def drafter(target):
    torch.manual_seed(0)
    drafter = CoralDrafter.from_target(target).eval()
    drafter.heads.add_router(4, 2)
    drafter.heads.configure(is_router_trained=True, draft_head="routed")
    drafter.heads.add_frequency_head(torch.arange(20))
    drafter.training_record = [{"stage": "drafter"}, {"stage": "router"}]
    drafter.generation_config.update(tree_depth=1, tree_top_k=2, tree_nodes=3)
    return drafter


@pytest.mark.parametrize("fastest", ["full", "routed", "frequency"])
def test_the_fastest_head_is_read_from_now_on(target, drafter, fastest, monkeypatch):
    names = {"full": "FullHead", "routed": "RoutedHead", "frequency": "FrequencyHead"}
    seconds = [0.0]  # a clock that no other work on the machine disturbs

    def read():
        seconds[0] += 1e-6
        return seconds[0]

    monkeypatch.setattr(time, "perf_counter", read)
    for name in names.keys() - {fastest}:
        head = getattr(draft_heads, names[name])

        def slow(self, *args, whole=head.children, **kwargs):
            seconds[0] += 1
            return whole(self, *args, **kwargs)

        monkeypatch.setattr(head, "children", slow)
    found = choose_head(drafter, target, PROMPTS)
    assert drafter.config.draft_head == fastest == max(found, key=lambda n: found[n]["speedup"])
    assert [*found] == ["full", "routed", "frequency"]
    assert all(one["tau"] >= 1 for one in found.values())


def test_the_figures_of_all_heads_are_in_the_card(target, drafter):
    drafter.heads.configure(draft_head="routed")
    found = choose_head(drafter, target, PROMPTS)
    kept = drafter.training_record[-1]["heads"]
    assert kept["figures"] == found and kept["prompts"] == 3 and kept["dtype"] == "float32"
    card = str(make_card(drafter, CardFacts("org/drafter")))
    assert "Measured on 3 prompts, greedily" in card
    for name, one in found.items():
        assert f"| `{name}` | {one['tau']:.2f} | {one['speedup']:.2f}x |" in card


def test_no_head_is_chosen_where_there_is_one(target, drafter):
    drafter.heads.remove_router()
    assert heads_of(drafter, target) == ["full", "frequency"]
    eagle = Eagle3Drafter.from_target(target)
    bigram = BigramDrafter.from_texts(torch.tensor([[3, 4, 5, 6]]), vocab_size=40, top_k=2)
    alone = CoralDrafter.from_target(target)
    for one in (eagle, bigram, alone):
        assert choose_head(one, target, PROMPTS) == {}
    assert alone.config.draft_head == "full"


def test_the_head_stays_where_no_prompt_is_answered_beyond_its_first_token(target, drafter):
    drafter.heads.configure(draft_head="routed")
    target.generation_config.eos_token_id = [*range(40)]
    assert choose_head(drafter, target, PROMPTS) == {}
    assert drafter.config.draft_head == "routed"
    assert "heads" not in drafter.training_record[-1]


def test_a_failing_comparison_loses_no_drafter(target, tmp_path, monkeypatch, caplog):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("no memory is left")

    monkeypatch.setattr("coral_hf.training.pipeline.choose_head", full)
    text = {"input_ids": [*range(2, 22)], "attention_mask": [1] * 20, "labels": [*range(2, 22)]}
    rows = Dataset.from_list([text] * 4)
    own = {"output_dir": str(tmp_path), "max_steps": 1, "report_to": "none", "use_cpu": True}
    args = CoralTrainingArguments(**own, stage="router", save_strategy="no")
    drafter = train(target, None, rows, [args], CoralDrafter.from_target(target))
    assert drafter.config.is_router_trained and drafter.config.draft_head == "routed"
    assert "no memory is left" in caplog.text
