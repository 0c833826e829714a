"""A drafter's config follows its target's, refuses contradictions, survives the disk."""

import pytest
from conftest import FAMILIES, SIZES, VOCAB, tiny_config
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    CohereConfig,
    Gemma3Config,
    Gemma3nTextConfig,
    LlamaConfig,
    MambaConfig,
    MptConfig,
    Phi3Config,
    Qwen2Config,
)

from coral_hf import CoralConfig

# family → what its drafter's config holds beside the sizes that all families share
EXPECTED = {
    "llama": {},
    "qwen2": {"attention_bias": True},
    "qwen3": {"head_dim": 16},
    "mistral": {},
    "mistral_window": {},
    "gemma2": {},
    "gemma3": {"rope_theta": 1_000_000.0},
    "phi3": {"rms_norm_eps": 1e-5},
    "olmo2": {"rms_norm_eps": 1e-5},
    "gpt_neox": {"num_key_value_heads": 4, "attention_bias": True, "rms_norm_eps": 1e-5},
    "gpt2": {"num_key_value_heads": 4, "intermediate_size": 4 * 32, "rms_norm_eps": 1e-5},
    "qwen3_moe": {},
    "mixtral": {"rms_norm_eps": 1e-5, "rope_theta": 1_000_000.0},
    "gemma": {},
    "granite": {},
    "cohere": {"rms_norm_eps": 1e-5, "rope_theta": 500_000.0},
    "cohere2": {"rms_norm_eps": 1e-5},
    "starcoder2_window": {},
    "stablelm": {"rms_norm_eps": 1e-5},
    "glm4": {
        "rms_norm_eps": 1.5625e-7,
        "attention_bias": True,
        "eos_token_id": [151329, 151336, 151338],
    },
    "smollm3": {"rope_theta": 2_000_000.0},
    "deepseek_v3": {"num_key_value_heads": 4},
    "bitnet": {"rms_norm_eps": 1e-5, "rope_theta": 500_000.0},
    "gemma4": {"head_dim": 16},
    "gpt_oss": {"rms_norm_eps": 1e-5, "attention_bias": True},
}
SHARED_BY_ALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "fc_bias": False,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_drafter_takes_its_targets_sizes_and_rotary_wavelengths(family):
    config = CoralConfig.from_target(tiny_config(family))
    found = {**config.to_dict(), "rope_theta": config.rope_parameters["rope_theta"]}
    expected = {**SHARED_BY_ALL, **EXPECTED[family]}
    assert {name: found[name] for name in expected} == expected
    assert config.rope_parameters["rope_type"] == "default"
    assert config.target_model_type == tiny_config(family).model_type


def test_a_target_whose_folder_is_gone_is_named_without_a_commit(tmp_path):
    target = tiny_config("llama")
    target._name_or_path = str(tmp_path / "gone")
    config = CoralConfig.from_target(target)
    assert (config.target_name_or_path, config.target_revision) == (str(tmp_path / "gone"), None)


def test_the_target_names_itself_by_its_id():
    target = tiny_config("llama")
    target._name_or_path = "org/model"
    target._commit_hash = "0123abc"
    config = CoralConfig.from_target(target)
    assert (config.target_name_or_path, config.target_revision) == ("org/model", "0123abc")


def test_a_target_made_in_memory_has_no_id():
    assert CoralConfig.from_target(tiny_config("llama")).target_name_or_path is None


def test_overrides_win_over_the_target():
    config = CoralConfig.from_target(tiny_config("llama"), num_hidden_layers=2, fc_bias=True)
    assert (config.num_hidden_layers, config.fc_bias, config.hidden_size) == (2, True, 32)


def test_a_layer_norms_epsilon_is_taken_where_there_is_no_rms_norm():
    assert CoralConfig.from_target(CohereConfig(**SIZES)).rms_norm_eps == 1e-5


def test_the_text_part_of_a_composite_config_is_read():
    text = tiny_config("gemma3")
    config = CoralConfig.from_target(Gemma3Config(text_config=text.to_dict()))
    assert (config.hidden_size, config.vocab_size) == (32, VOCAB)
    assert config.target_model_type == "gemma3"


def test_an_alibi_target_without_rotary_positions_gets_the_default_ones():
    config = CoralConfig.from_target(MptConfig(vocab_size=VOCAB, d_model=32, n_heads=4, n_layers=2))
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}
    assert (config.hidden_size, config.num_attention_heads) == (32, 4)


def test_longrope_keeps_its_factors():
    target = Phi3Config(**SIZES, rope_parameters=LONGROPE, original_max_position_embeddings=32)
    rope = CoralConfig.from_target(target).rope_parameters
    assert (rope["rope_type"], rope["long_factor"]) == ("longrope", [4.0] * 4)


def test_layers_without_rotary_positions_leave_those_of_the_others():
    sliding = {"rope_type": "default", "rope_theta": 500.0}
    text = tiny_config("gemma3")
    text.rope_parameters = {"full_attention": None, "sliding_attention": sliding}
    assert CoralConfig.from_target(text).rope_parameters == sliding


def test_a_drafter_of_a_partly_rotated_target_rotates_whole_heads():
    target = tiny_config("gpt_neox")
    assert target.rope_parameters["partial_rotary_factor"] == 0.25
    assert "partial_rotary_factor" not in CoralConfig.from_target(target).rope_parameters
    assert target.rope_parameters["partial_rotary_factor"] == 0.25  # the target keeps its own


def test_unset_widths_follow_from_the_others():
    config = CoralConfig(hidden_size=64, num_attention_heads=8)
    assert (config.num_key_value_heads, config.head_dim) == (8, 8)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hidden_size", "64"),
        ("vocab_size", 32000.5),
        ("fc_bias", "no"),
        ("num_groups", 4.5),
        ("rope_parameters", 10000.0),
        ("tokenizer_hash", 7),
    ],
)
def test_a_value_of_the_wrong_type_raises(name, value):
    with pytest.raises(StrictDataclassError, match=name):
        CoralConfig(**{name: value})


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"draft_head": "half"}, "`draft_head` is 'half'; use one of"),
        ({"draft_head": "routed"}, "`num_groups` is None"),
        ({"num_groups": 0}, "`num_groups` is 0; use 1 to 32000"),
        ({"num_groups": 32001}, "`num_groups` is 32001"),
        ({"num_groups": 4, "num_active_groups": 5}, "`num_active_groups` is 5; use 1 to 4"),
        ({"num_groups": 4, "num_active_groups": 0}, "`num_active_groups` is 0"),
    ],
)
def test_a_contradiction_raises_and_names_the_field(fields, said):
    with pytest.raises(ValueError, match=said):
        CoralConfig(**fields)


def test_a_config_comes_back_from_disk_as_it_was(tmp_path):
    config = CoralConfig.from_target(
        tiny_config("gemma2"), num_groups=4, draft_head="routed", tokenizer_hash="ab"
    )
    config.save_pretrained(tmp_path)
    assert CoralConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


def test_auto_config_knows_the_type(tmp_path):
    CoralConfig(vocab_size=VOCAB, eos_token_id=[2, 3]).save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is CoralConfig
    assert (config.vocab_size, config.eos_token_id) == (VOCAB, [2, 3])


def test_two_configs_do_not_share_their_rotary_parameters():
    target = LlamaConfig(**SIZES)
    config = CoralConfig.from_target(target)
    config.rope_parameters["rope_theta"] = 5.0
    assert target.rope_parameters["rope_theta"] == 10000.0
    assert CoralConfig().rope_parameters["rope_theta"] == 10000.0


def test_a_list_of_widths_gives_the_widest():
    config = Gemma3nTextConfig(num_hidden_layers=2, intermediate_size=[48, 96])
    assert CoralConfig.from_target(config).intermediate_size == 96


def test_qwen2_has_biases_though_no_field_says_so():
    assert CoralConfig.from_target(Qwen2Config(**SIZES)).attention_bias is True


def test_a_target_without_attention_is_refused():
    with pytest.raises(ValueError, match="MambaConfig, has no attention heads"):
        CoralConfig.from_target(MambaConfig())
