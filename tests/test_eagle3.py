"""The EAGLE-3 drafter: which layers it reads, its norms, its draft vocabulary, and its files."""

import pytest
import torch
from conftest import VOCAB, scatter_weights, slowly, tiny_target
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaConfig

import coral_hf
from coral_hf import Eagle3Config, Eagle3Drafter
from coral_hf.drafters.eagle3 import Eagle3Drafting

DRAFT_VOCAB = 12
SWITCHES = {
    "3": {},
    "3.1": {"fc_norm": True, "norm_output": True},
    "residual": {"norm_before_residual": True, "norm_before_fc": True},
    "own embeddings": {"has_embeddings": True, "hidden_size": 24, "head_dim": 6},
    "two layers": {"num_hidden_layers": 2, "fc_bias": True, "attention_bias": True},
    "extras": {"output_bias": True, "mlp_bias": True, "qk_norm": True},
}


def made(target, **overrides):
    """A drafter whose draft vocabulary is no run of tokens."""
    torch.manual_seed(0)
    overrides = {"draft_vocab_size": DRAFT_VOCAB, **overrides}
    drafter = Eagle3Drafter.from_target(target, **overrides).eval()
    scatter_weights(drafter, seed=1)
    drafter.set_draft_vocabulary(torch.arange(DRAFT_VOCAB) * 3 + 2)
    return drafter


@pytest.fixture(scope="module")
def target():
    return tiny_target("llama")


@pytest.mark.parametrize(
    ("depth", "layers"),
    [(32, [2, 16, 29]), (61, [2, 30, 58]), (7, [2, 3, 4]), (6, [1, 3, 5]), (4, [1, 2, 3])]
    + [(3, [1, 2, 3]), (2, [0, 1, 2]), (1, [0, 1])],
)
def test_the_layers_of_a_target_are_the_published_ones_and_different_in_a_shallow_one(
    depth, layers
):
    config = Eagle3Config.from_target(LlamaConfig(num_hidden_layers=depth))
    assert list(config.target_layers) == layers


def test_a_config_takes_the_published_draft_vocabulary_or_all_of_a_small_one():
    assert Eagle3Config.from_target(LlamaConfig(vocab_size=128256)).draft_vocab_size == 32000
    assert Eagle3Config.from_target(LlamaConfig(vocab_size=100)).draft_vocab_size == 100


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"draft_vocab_size": VOCAB + 1}, "`draft_vocab_size` is 41; use 1 to 40"),
        ({"hidden_size": 24}, "target's embeddings have 32 channels"),
        ({"target_layers": [1, 3]}, "`target_layers` are .1, 3., and the target has 2 layers"),
        ({"target_layers": []}, "use hidden states from 0 to 2, such as .0, 1, 2."),
    ],
)
def test_fields_that_do_not_fit_together_are_refused(target, fields, message):
    with pytest.raises(ValueError, match=message):
        Eagle3Config.from_target(target.config, **fields)


def test_a_target_of_another_depth_is_refused(target):
    other = tiny_target("llama", num_hidden_layers=3)
    with pytest.raises(ValueError, match="`num_hidden_layers` of the target is 3, .* with 2"):
        other.generate(torch.tensor([[5, 9]]), assistant_model=made(target), max_new_tokens=4)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.arange(DRAFT_VOCAB) + VOCAB - 3, "names 3 different tokens"),
        (torch.zeros(DRAFT_VOCAB, dtype=torch.long), "names 1 different tokens"),
        (torch.arange(3), "expected 12 different ids"),
    ],
)
def test_a_draft_vocabulary_names_different_tokens_of_the_target(target, tokens, message):
    with pytest.raises(ValueError, match=message):
        made(target).set_draft_vocabulary(tokens)


def test_both_maps_of_the_vocabulary_say_the_same(target):
    drafter = made(target)
    assert drafter.t2d.nonzero()[:, 0].equal(drafter.draft_tokens)


def test_embeddings_of_its_own_start_from_what_the_target_sees():
    target = tiny_target("granite")
    drafter = Eagle3Drafter.from_target(target, has_embeddings=True)
    assert drafter.embed_tokens.weight.equal(3.0 * target.get_input_embeddings().weight)


@pytest.mark.parametrize("switches", SWITCHES)
def test_a_saved_drafter_loads_as_it_was_by_every_auto_class(target, tmp_path, switches):
    drafter = made(target, **SWITCHES[switches])
    drafter.training_record = [{"stage": "drafter"}]
    drafter.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is Eagle3Config
    for auto in (AutoModel, AutoModelForCausalLM):
        loaded = auto.from_pretrained(tmp_path, dtype="auto")
        assert loaded.training_record == drafter.training_record
        for name, tensor in drafter.state_dict().items():
            assert loaded.state_dict()[name].equal(tensor), name


def test_a_file_whose_maps_leave_the_vocabulary_is_refused(target, tmp_path):
    drafter = made(target)
    drafter.d2t += VOCAB
    drafter.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`draft_tokens` .* expected 12 different ids"):
        AutoModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("switches", SWITCHES)
def test_greedy_tokens_are_the_targets_own(target, switches):
    ids = torch.tensor([[5, 9, 3, 17], [0, 7, 22, 8]])
    settings = {"attention_mask": (ids != 0).long(), "max_new_tokens": 20, "pad_token_id": 0}
    plain = target.generate(ids, do_sample=False, **settings)
    drafter = made(target, **SWITCHES[switches])
    settings |= {"assistant_model": drafter, "speculation": "always", "do_sample": False}
    assert target.generate(ids, **settings).equal(plain)


@pytest.mark.parametrize("way", [*slowly({}), {"cache_implementation": "static"}])
@pytest.mark.parametrize(
    "family", ["qwen2", "qwen3", "gemma3", "phi3", "gpt2", "gpt_oss", "mixtral", "granite"]
)
def test_targets_of_many_families_are_read_layer_by_layer(family, way, monkeypatch):
    target = tiny_target(family)
    drafter, read, begin = made(target), [], Eagle3Drafting.begin
    monkeypatch.setattr(
        Eagle3Drafting,
        "begin",
        lambda own, tokens, features, *rest: (
            read.append(features),
            begin(own, tokens, features, *rest),
        )[1],
    )
    ids = torch.tensor([[5, 9, 3, 17]])
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 20, "pad_token_id": 0}
    plain = target.generate(ids, do_sample=False, **settings)
    settings |= {"assistant_model": drafter, "speculation": "always", "do_sample": False, **way}
    assert target.generate(ids, **settings).equal(plain)
    with torch.no_grad():
        states = target(ids, output_hidden_states=True).hidden_states
    expected = torch.cat([states[layer] for layer in drafter.config.target_layers], -1)
    torch.testing.assert_close(read[0], expected)


def test_it_cannot_generate_alone(target):
    with pytest.raises(TypeError, match="An? Eagle3Drafter reads hidden states of its target"):
        made(target).generate()


def test_its_names_are_public():
    assert coral_hf.Eagle3Drafter is Eagle3Drafter and "Eagle3Config" in coral_hf.__all__
