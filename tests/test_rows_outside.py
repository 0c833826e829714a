"""Something outside counts rows: adapters, hooks, processors and criteria with state by row.

Three rows that end at different times: none leaves a pass before all have ended, and what watches
them sees what it sees in plain `generate`.
"""

import pytest
import torch
from conftest import OTHERS, make_target, tiny_target
from peft import LoraConfig, get_peft_model
from transformers import LogitsProcessor, StoppingCriteria

from coral_hf import CoralDrafter
from coral_hf.decoding.plain import draft_policy

TREE = {"speculation": "always", "tree_depth": 3, "tree_top_k": 2, "tree_nodes": 8}
SETTINGS = {"do_sample": False, "max_new_tokens": 24, "pad_token_id": 0}
IDS = torch.tensor([[0, 0, 14, 3, 22], [7, 7, 31, 12, 4], [0, 25, 6, 38, 9]])
MASK = (IDS != 0).long()


def make_drafter(target):
    torch.manual_seed(1)
    return CoralDrafter.from_target(target).eval()


@pytest.fixture(scope="module")
def target():
    return tiny_target("llama")


@pytest.fixture(scope="module")
def drafter(target):
    return make_drafter(target)


def late_ends(ids: torch.Tensor) -> list[int]:
    """End tokens for which the rows of a text (3, length) end at different times, but for one."""
    new = ids[:, IDS.shape[1] :].tolist()
    first, second = new[0][4], new[1][9]
    places = [min((row.index(t) for t in (first, second) if t in row), default=99) for row in new]
    assert len(set(places)) > 1
    return [first, second]


def both(model, drafter, watch=dict, **settings):
    """What plain `generate` gives and what it gives with a drafter, rows ending one by one.

    `watch`: makes what watches a call, anew for each, as keywords.
    """
    given = {"attention_mask": MASK, **SETTINGS, **settings}
    whole = model.generate(input_ids=IDS, **given, **watch())
    given["eos_token_id"] = late_ends(getattr(whole, "sequences", whole))
    plain = model.generate(input_ids=IDS, **given, **watch())
    tree = {name: TREE[name] for name in ("speculation", "tree_depth")}  # else the guard's own
    return plain, model.generate(input_ids=IDS, **given, **watch(), assistant_model=drafter, **tree)


def with_adapters(target, parts):
    """A target with two adapters in some parts of it."""
    config = LoraConfig(r=4, target_modules=parts)
    model = get_peft_model(target, config, adapter_name="first")
    model.add_adapter("second", config)
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.3)
    return model.eval()


# PEFT asks for a property that newer versions of transformers have renamed
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is dep:FutureWarning")
@pytest.mark.parametrize("parts", [["q_proj", "v_proj", "down_proj"], ["embed_tokens", "lm_head"]])
@pytest.mark.parametrize("tree", [{}, {"tree_top_k": 1}])
def test_rows_with_adapters_of_their_own_have_their_own_text(tree, parts):
    target = tiny_target("llama")
    drafter, base = make_drafter(target), target.generate(IDS, attention_mask=MASK, **SETTINGS)
    model = with_adapters(target, parts)
    given = {"attention_mask": MASK, **SETTINGS, "adapter_names": ["first", "__base__", "second"]}
    whole = model.generate(input_ids=IDS, **given)
    given["eos_token_id"] = late_ends(whole)
    plain = model.generate(input_ids=IDS, **given)
    drafted = model.generate(input_ids=IDS, **given, assistant_model=drafter, **TREE | tree)
    assert drafted.equal(plain)
    assert whole[1].equal(base[1]) and not whole[0].equal(base[0])


@pytest.mark.parametrize("is_before", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_neo"])
def test_a_hook_with_state_by_row_sees_all_rows_in_each_pass(name, is_before):
    target = make_target(OTHERS[name]) if name in OTHERS else tiny_target(name)
    drafter, seen = make_drafter(target), set()
    steering = 0.3 * torch.randn(3, 1, 32, dtype=torch.float64)

    def steer(module, inputs, outputs=None):
        hidden = inputs[0] if is_before else outputs
        seen.add(hidden.shape[0])
        return (hidden + steering,) if is_before else hidden + steering

    layer = next(part for name, part in target.named_modules() if name.endswith(".1.mlp"))
    register = layer.register_forward_pre_hook if is_before else layer.register_forward_hook
    straight = target.generate(IDS, attention_mask=MASK, **SETTINGS)
    handle = register(steer)
    try:
        plain, drafted = both(target, drafter)
    finally:
        handle.remove()
    assert drafted.equal(plain) and seen == {3}
    assert not plain[:, :12].equal(straight[:, :12])


class Quota(StoppingCriteria):
    """Ends a row when it has said even tokens so often: state of its own for each row."""

    def __init__(self):
        self.said = torch.zeros(3, dtype=torch.long)
        self.quota = torch.tensor([3, 9, 6])

    def __call__(self, input_ids, scores, **kwargs):
        self.said += input_ids[:, -1] % 2 == 0
        return self.said >= self.quota


class Habit(LogitsProcessor):
    """Favours what a row has been told before, and what the other rows are told now."""

    def __init__(self):
        self.state = torch.zeros(3, 40)

    def __call__(self, input_ids, scores):
        self.state = 0.5 * self.state + 0.1 * scores
        return scores + self.state + 0.3 * scores.roll(1, dims=0) - 0.1 * scores.mean(0)


WATCHERS = {
    "criterion": lambda: {"stopping_criteria": [Quota()]},
    "processor": lambda: {"logits_processor": [Habit()]},
    "both": lambda: {"stopping_criteria": [Quota()], "logits_processor": [Habit()]},
}


@pytest.mark.parametrize("kind", ["criterion", "both"])
def test_a_criterion_with_state_by_row_ends_rows_as_in_the_plain_call(target, drafter, kind):
    given = {"attention_mask": MASK, **SETTINGS}
    for ends in ({}, {"eos_token_id": 17}):
        plain = target.generate(IDS, **given, **ends, **WATCHERS[kind]())
        drafted = target.generate(
            IDS, **given, **ends, **WATCHERS[kind](), assistant_model=drafter, **TREE
        )
        assert drafted.equal(plain) and plain.shape[1] < IDS.shape[1] + 24


def test_a_processor_with_state_by_row_sees_the_scores_of_rows_that_have_ended(target, drafter):
    plain, drafted = both(target, drafter, WATCHERS["processor"], max_new_tokens=18)
    assert drafted.equal(plain)


@pytest.mark.parametrize(
    "rule",
    [{}, {"drawn_tree": True}, {"verification": "traversal"}, {"verification": "block"}],
    ids=str,
)
def test_rows_stay_by_every_rule(target, drafter, rule):
    rule = {"do_sample": True, "top_k": 1, **rule}  # which leaves one token to draw
    given = {"attention_mask": MASK, **SETTINGS, "eos_token_id": [17, 28]}
    steering = torch.tensor([0.0, 0.5, -0.5], dtype=torch.float64)[:, None, None]
    handle = target.model.layers[0].mlp.register_forward_hook(lambda _, __, out: out + steering)
    try:
        plain = target.generate(IDS, **given, **WATCHERS["criterion"]())
        drafted = target.generate(
            IDS, **{**given, **WATCHERS["criterion"](), **rule}, assistant_model=drafter
        )
    finally:
        handle.remove()
    assert drafted.equal(plain)


@pytest.fixture
def steps_back(monkeypatch):
    """Makes each call give up drafting after two rounds."""

    class Patient(draft_policy.DraftPolicy):
        rounds = 0

        def note(self, sample):
            self.rounds += 1
            self.is_plain = self.rounds == 2

    monkeypatch.setattr(
        "coral_hf.decoding.generate.choose_policy", lambda model, shape, *rest: Patient(shape)
    )


@pytest.mark.usefixtures("steps_back")
@pytest.mark.parametrize("kind", WATCHERS)
def test_rows_stay_after_drafting_has_stepped_back(target, drafter, kind):
    plain, drafted = both(
        target, drafter, WATCHERS[kind], max_new_tokens=18, return_dict_in_generate=True
    )
    assert drafted.sequences.equal(plain.sequences) and drafted.stats.is_stepped_back


@pytest.mark.usefixtures("steps_back")
def test_a_hook_sees_all_rows_after_drafting_has_stepped_back(target, drafter):
    steering, seen = torch.tensor([0.0, 0.5, -0.5], dtype=torch.float64)[:, None, None], set()

    def steer(module, inputs, output):
        seen.add(len(output))
        return output + steering

    handle = target.model.layers[0].mlp.register_forward_hook(steer)
    try:
        plain, drafted = both(target, drafter, return_dict_in_generate=True)
    finally:
        handle.remove()
    assert drafted.sequences.equal(plain.sequences) and seen == {3}
    assert drafted.stats.is_stepped_back


def test_outputs_of_rows_that_stay_are_those_of_the_plain_call(target, drafter):
    names = ("output_scores", "output_logits")
    given = {"return_dict_in_generate": True, **dict.fromkeys(names, True)}
    mask = {"attention_mask": MASK, **SETTINGS, **given}
    ends = late_ends(target.generate(IDS, **mask, **WATCHERS["processor"]()).sequences)
    mask["eos_token_id"] = ends
    plain = target.generate(IDS, **mask, **WATCHERS["processor"]())
    drafted = target.generate(
        IDS, **mask, **WATCHERS["processor"](), assistant_model=drafter, **TREE
    )
    assert drafted.sequences.equal(plain.sequences)
    for name in ("scores", "logits"):
        for found, expected in zip(getattr(drafted, name), getattr(plain, name), strict=True):
            assert torch.allclose(found, expected, atol=1e-5)


def test_a_hook_alone_keeps_no_row_of_a_batch_of_one(target, drafter):
    calls = []
    handle = target.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    try:
        plain = target.generate(IDS[1:2], **SETTINGS)
        count = len(calls)
        for _ in range(2):  # the hook was tried before the first one
            calls.clear()
            drafted = target.generate(IDS[1:2], **SETTINGS, assistant_model=drafter, **TREE)
    finally:
        handle.remove()
    assert drafted.equal(plain) and 0 < len(calls) <= count
