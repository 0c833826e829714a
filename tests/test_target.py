"""What is read from a target is what the target computes; what it cannot do is said."""

import logging

import pytest
import torch
from conftest import FAMILIES, VOCAB, WINDOW, any_target, shared_file, tiny_target
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    LlamaModel,
    MptConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from coral_hf import CoralConfig
from coral_hf.decoding.drafting import DraftTree
from coral_hf.decoding.guard import CHAIN, REFUSED, TREE, accept_features, judge_target
from coral_hf.decoding.target_runner import TargetRunner
from coral_hf.identity import check_tokenizer, tokenizer_hash
from coral_hf.target import (
    FEATURE,
    Target,
    check_target,
    read_features,
    read_scales,
    read_target,
    sliding_windows,
)

# the parent of each node; down to depth 6, and with more rows than a window
PARENTS = [0, 0, 0, 0, 1, 1, 2, 3, 4, 4, 8, 10, 9, 11, 12]


def bind(model: PreTrainedModel) -> Target:
    return read_target(model)


def make_text(length: int, seed: int = 0) -> Tensor:
    """(1, length)"""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCAB, (1, length), generator=generator)


def make_tree() -> DraftTree:
    depths = [0]
    for parent in PARENTS[1:]:
        depths.append(depths[parent] + 1)
    return DraftTree(make_text(len(PARENTS), 1), torch.tensor([PARENTS]), torch.tensor([depths]))


# ---- features, embeddings, LM head


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_a_feature_is_the_last_hidden_state_and_the_head_makes_the_logits_of_it(name):
    model = any_target(name)
    target, text = bind(model), make_text(12)
    whole = model(text, output_hidden_states=True)
    features = read_features(model, text, torch.ones_like(text))
    torch.testing.assert_close(features, whole.hidden_states[-1])
    torch.testing.assert_close(features, whole.hidden_states[FEATURE])
    torch.testing.assert_close(target.head.logits(features), whole.logits)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "gpt2"])
@torch.no_grad()
def test_embeddings_are_what_the_targets_first_layer_sees(name):
    # GPT-2 adds its positions to them first
    model, text = any_target(name), make_text(5)
    seen = model(text, output_hidden_states=True).hidden_states[0]
    torch.testing.assert_close(bind(model).embed(text), seen)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_padding_on_the_right_leaves_the_features_of_a_row_as_they_are(family):
    model, text = tiny_target(family), make_text(9)
    padded = torch.cat([text, torch.zeros(1, 4, dtype=torch.long)], dim=1)
    batch = torch.cat([padded, make_text(13, seed=1)])
    mask = torch.ones_like(batch)
    mask[0, 9:] = 0
    alone = read_features(model, text, torch.ones_like(text))
    torch.testing.assert_close(read_features(model, batch, mask)[:1, :9], alone)


@pytest.mark.parametrize(
    ("config", "scales"),
    [
        (GraniteConfig(embedding_multiplier=12.0, logits_scaling=16.0), (12.0, 1 / 16, None)),
        (CohereConfig(logit_scale=0.25), (1.0, 0.25, None)),
        (Gemma2Config(final_logit_softcapping=30.0), (1.0, 1.0, 30.0)),
        # transformers does not apply the rule that MPT names
        (MptConfig(logit_scale="inv_sqrt_d_model"), (1.0, 1.0, None)),
        (LlamaConfig(), (1.0, 1.0, None)),
    ],
)
def test_scales_are_those_of_the_targets_config(config, scales):
    assert read_scales(config) == scales


def test_nothing_of_a_target_is_registered_in_the_value_that_names_it():
    target = bind(tiny_target("llama"))
    assert not isinstance(target, torch.nn.Module)
    with pytest.raises(AttributeError):
        target.embedding_scale = 2.0


# ---- targets that do not fit


@pytest.mark.parametrize(("field", "value"), [("hidden_size", 64), ("vocab_size", 41)])
def test_a_target_of_another_size_raises_and_names_the_field(field, value):
    config = CoralConfig.from_target(tiny_target("llama").config, target_name_or_path="org/model")
    other = tiny_target("llama", **{field: value})
    with pytest.raises(ValueError, match=f"`{field}` of the target is {value}.*org/model"):
        check_target(config, other)


def test_a_target_without_an_lm_head_raises():
    model = LlamaModel(tiny_target("llama").config)
    with pytest.raises(ValueError, match="LlamaModel has no LM head"):
        bind(model)


def test_a_target_of_several_hidden_states_a_token_raises():
    model = tiny_target("llama")
    model.config.altup_num_inputs = 4  # as Gemma 3n's
    with pytest.raises(ValueError, match="has 4 hidden states per token"):
        accept_features(model)


def test_a_target_of_another_family_warns_and_one_of_another_name_does_not(caplog):
    config = CoralConfig.from_target(tiny_target("llama").config, target_name_or_path="org/model")
    with caplog.at_level(logging.WARNING):
        check_target(config, tiny_target("llama"))
        assert not caplog.records
        check_target(config, tiny_target("mistral"))
    assert "made for a llama target and is used with a mistral target" in caplog.text


# ---- tokenizers


def make_tokenizer(*words: str) -> PreTrainedTokenizerFast:
    vocab = {word: index for index, word in enumerate(words)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocab, unk_token=words[0])), unk_token=words[0]
    )


def test_the_hash_of_a_tokenizer_is_that_of_its_token_ids():
    one, same, other = (make_tokenizer(*words) for words in ("abc", "abc", "acb"))
    same.model_max_length = 7  # what a text may be long is no part of it
    assert tokenizer_hash(one) == tokenizer_hash(same) != tokenizer_hash(other)
    assert len(tokenizer_hash(one)) == 64


def test_an_added_token_changes_the_hash():
    one, other = make_tokenizer(*"abc"), make_tokenizer(*"abc")
    other.add_tokens(["d"])
    assert tokenizer_hash(one) != tokenizer_hash(other)


def test_the_hash_of_a_real_tokenizer_survives_a_reload(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(shared_file("targets/stories260k-hf"))
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer_hash(tokenizer) == tokenizer_hash(AutoTokenizer.from_pretrained(tmp_path))


def test_another_tokenizer_than_the_drafters_raises():
    config = CoralConfig(tokenizer_hash=tokenizer_hash(make_tokenizer(*"abc")))
    check_tokenizer(make_tokenizer(*"abc"), config)
    with pytest.raises(ValueError, match="maps tokens to other ids"):
        check_tokenizer(make_tokenizer(*"acb"), config)


def test_a_drafter_that_remembers_no_tokenizer_takes_any():
    check_tokenizer(make_tokenizer(*"abc"), CoralConfig())


# ---- what a target's attention and cache support


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_takes_trees_and_drops_rejected_tokens(family):
    model = tiny_target(family)
    assert judge_target(model).way == TREE


@pytest.mark.parametrize("name", [*FAMILIES, "llama4", "gpt_neo"])
@torch.no_grad()
def test_a_target_scores_each_node_as_the_text_that_ends_there_or_names_an_obstacle(name):
    model, text, tree = any_target(name), make_text(2 * WINDOW + 3), make_tree()
    if judge_target(model).way != TREE:
        return
    runner = TargetRunner(bind(model), takes_tree=True, layers=(-1,))
    runner.prefill(text, {"use_cache": True})
    scores = runner.score(tree)
    for node, seen in enumerate(tree.ancestry()[0]):
        alone = model(torch.cat([text, tree.tokens[:, seen]], dim=1)).logits[:, -1]
        # the eager softmax of some families is in fp32
        torch.testing.assert_close(scores.logits[:, node], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("bloom", "takes no `position_ids`"),
        ("mpt", "takes no `position_ids`"),
        ("falcon_alibi", "ALiBi"),
        ("mamba", "takes no `position_ids`"),
        ("llama4", "chunk"),  # a chunk's bounds are not a window
        ("gpt_neo", "local"),  # its window counts rows, not positions
    ],
)
def test_a_target_that_cannot_tell_siblings_apart_names_its_obstacle(name, said):
    judgement = judge_target(any_target(name))
    assert judgement.way < TREE and any(said in reason for reason in judgement.reasons)


@pytest.mark.parametrize("attention", ["flash_attention_2", "flex_attention"])
def test_an_attention_that_takes_no_float_mask_is_an_obstacle(attention):
    model = tiny_target("llama")
    model.config._attn_implementation = attention
    judgement = judge_target(model)
    assert judgement.way == CHAIN and repr(attention) in judgement.obstacle


def test_eager_attention_takes_trees():
    model = AutoModelForCausalLM.from_config(
        tiny_target("llama").config, attn_implementation="eager"
    )
    assert judge_target(model).way == TREE


@pytest.mark.parametrize("name", ["mamba", "recurrent_gemma"])
def test_a_recurrent_state_cannot_drop_rejected_tokens(name):
    judgement = judge_target(any_target(name))
    assert judgement.way == REFUSED and "cannot drop rejected tokens" in judgement.obstacle


@pytest.mark.parametrize("name", ["bloom", "mpt", "falcon_alibi", "gpt_neo", "llama4"])
def test_a_target_without_trees_may_still_take_chains(name):
    assert judge_target(any_target(name)).way == CHAIN


@pytest.mark.parametrize(
    ("family", "windows"),
    [
        ("llama", [None, None]),
        ("mistral", [None, None]),
        ("mistral_window", [WINDOW, WINDOW]),
        ("gemma2", [WINDOW, None]),
        ("gemma3", [WINDOW, None]),
        ("gpt2", [None, None]),
    ],
)
def test_each_layers_window_is_read(family, windows):
    assert sliding_windows(tiny_target(family)) == windows
