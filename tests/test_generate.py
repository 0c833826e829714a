"""The door to `generate`: what works without a drafter works with one, and gives the same."""

import string
import threading

import pytest
import torch
from conftest import OTHERS, as_drafter, make_target, noted_passes
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import BPE
from torch.distributed.fsdp import FSDPModule
from transformers import (
    GenerationMixin,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
    pipeline,
)
from transformers.generation.streamers import BaseStreamer

import coral_hf
from coral_hf import CoralDrafter
from coral_hf.decoding.caches.continuation import CACHE
from coral_hf.decoding.settings import Rule, choose_shape

VOCAB = 40
PROMPT = torch.tensor([[5, 9, 3, 17, 22, 8]])


def scatter_weights(model, seed=0):
    """Weights large enough that the argmax is never the same token twice in a row for long."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.4, generator=generator)
    return model.double().eval()


@pytest.fixture(scope="module")
def target():
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=0,
    )
    return scatter_weights(LlamaForCausalLM(config))


@pytest.fixture(scope="module")
def drafter(target):
    torch.manual_seed(0)
    return CoralDrafter.from_target(target).eval()


@pytest.fixture(scope="module")
def tokenizer():
    """One token a character."""
    characters = string.ascii_lowercase + string.digits + "+-*/"
    vocabulary = {character: index for index, character in enumerate(characters)}
    backend = Tokenizer(BPE(vocabulary, merges=[]))
    backend.decoder = Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="a")


def plain_and_drafted(target, drafter, tree=None, **settings):
    settings = {
        "do_sample": False,
        "max_new_tokens": 30,
        "return_dict_in_generate": True,
    } | settings
    plain = target.generate(PROMPT, **settings)
    return plain, target.generate(PROMPT, assistant_model=drafter, **settings, **(tree or {}))


class EveryToken(BaseStreamer):
    def __init__(self):
        self.tokens, self.is_ended = [], False

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.is_ended = True


class StopAt(StoppingCriteria):
    """Stops once the text has `length` tokens; remembers every length it was asked about."""

    def __init__(self, length):
        self.length, self.asked = length, []

    def __call__(self, input_ids, scores, **kwargs):
        self.asked.append(input_ids.shape[1])
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= self.length)


class TheTargetItself:
    """A drafter that knows what comes next: every round accepts its whole chain."""

    layers = ()

    def __init__(self, text):
        self.text = text

    def begin(self, tokens, features, positions):
        self.known = tokens.shape[1]

    def commit(self, tokens, features, counts):
        self.known += int(counts)

    def memory(self):
        return None

    def propose(self, root, shape, warp=None):
        from coral_hf.decoding.drafting import DraftTree

        length = min(shape.depth, self.text.shape[1] - self.known) + 1
        ids = torch.arange(length)[None]
        start = self.known - 1
        return DraftTree(self.text[:, start : start + length], (ids - 1).clamp(min=0), ids)


def test_tree_gives_the_targets_own_tokens(target, drafter):
    plain, drafted = plain_and_drafted(
        target, drafter, {"tree_depth": 4, "tree_top_k": 5, "tree_nodes": 20}
    )
    assert torch.equal(plain.sequences, drafted.sequences)


def test_chain_gives_the_targets_own_tokens(target, drafter):
    plain, drafted = plain_and_drafted(target, drafter, {"tree_top_k": 1})
    assert torch.equal(plain.sequences, drafted.sequences)


def test_every_drafted_token_is_accepted_when_the_drafter_knows_the_text(target, drafter):
    text = target.generate(PROMPT, do_sample=False, max_new_tokens=31)
    knowing = as_drafter(TheTargetItself(text))
    drafted = target.generate(
        PROMPT,
        do_sample=False,
        max_new_tokens=31,
        assistant_model=knowing,
        return_dict_in_generate=True,
    )
    assert torch.equal(text, drafted.sequences)
    # the first token comes from the prompt's pass; of the other 30 a round takes 6 + 1
    assert drafted.stats.round_lengths == [7, 7, 7, 7, 2]


def test_round_lengths_count_every_token_but_the_first(target, drafter):
    _, drafted = plain_and_drafted(target, drafter)
    assert sum(drafted.stats.round_lengths) == 30 - 1


@pytest.mark.parametrize("max_new_tokens", range(1, 10))
def test_max_new_tokens_is_exact(target, drafter, max_new_tokens):
    text = target.generate(PROMPT, do_sample=False, max_new_tokens=30)
    knowing = as_drafter(TheTargetItself(text))
    settings = {"do_sample": False, "max_new_tokens": max_new_tokens}
    drafted = target.generate(PROMPT, assistant_model=knowing, **settings)
    assert torch.equal(drafted, text[:, : PROMPT.shape[1] + max_new_tokens])


def test_max_new_tokens_zero_raises_as_the_plain_call_does(target, drafter):
    with pytest.raises(ValueError) as plain:
        target.generate(PROMPT, max_new_tokens=0)
    with pytest.raises(ValueError) as drafted:
        target.generate(PROMPT, max_new_tokens=0, assistant_model=drafter)
    assert str(plain.value) == str(drafted.value)


@pytest.mark.parametrize("position", [0, 1, 3, 8])
def test_nothing_comes_after_eos(target, drafter, position):
    text = target.generate(PROMPT, do_sample=False, max_new_tokens=30)
    new = text[0, PROMPT.shape[1] :].tolist()
    settings = {"do_sample": False, "max_new_tokens": 30, "eos_token_id": [new[position], 39]}
    plain = target.generate(PROMPT, **settings)
    knowing = as_drafter(TheTargetItself(text))
    assert torch.equal(plain, target.generate(PROMPT, assistant_model=knowing, **settings))
    assert torch.equal(plain, target.generate(PROMPT, assistant_model=drafter, **settings))


def test_a_custom_criterion_sees_every_token_in_order_and_stops_exactly(target, drafter):
    text = target.generate(PROMPT, do_sample=False, max_new_tokens=30)
    knowing, stop = as_drafter(TheTargetItself(text)), StopAt(PROMPT.shape[1] + 9)
    criteria = StoppingCriteriaList([stop])
    drafted = target.generate(
        PROMPT,
        do_sample=False,
        max_new_tokens=30,
        assistant_model=knowing,
        stopping_criteria=criteria,
    )
    assert torch.equal(drafted, text[:, : PROMPT.shape[1] + 9])
    assert stop.asked == list(range(PROMPT.shape[1] + 1, PROMPT.shape[1] + 10))


def test_the_returned_cache_is_that_of_all_but_the_last_token(target, drafter):
    text = target.generate(PROMPT, do_sample=False, max_new_tokens=30)
    for length in (1, 4, 9, 12):
        drafted = target.generate(
            PROMPT,
            do_sample=False,
            max_new_tokens=length,
            assistant_model=as_drafter(TheTargetItself(text)),
            return_dict_in_generate=True,
        )
        expected = target(drafted.sequences[:, :-1])[CACHE]
        for ours, theirs in zip(drafted[CACHE].layers, expected.layers, strict=True):
            torch.testing.assert_close(ours.keys, theirs.keys)
            torch.testing.assert_close(ours.values, theirs.values)


def test_plain_generation_continues_from_the_returned_cache(target, drafter):
    plain, drafted = plain_and_drafted(target, drafter, max_new_tokens=12)
    more = target.generate(
        drafted.sequences,
        **{CACHE: drafted[CACHE]},
        do_sample=False,
        max_new_tokens=10,
    )
    assert torch.equal(more, target.generate(PROMPT, do_sample=False, max_new_tokens=22))


def test_streamer_gets_the_prompt_and_every_token_once_in_order(target, drafter):
    streamer = EveryToken()
    text = target.generate(
        PROMPT, do_sample=False, max_new_tokens=20, assistant_model=drafter, streamer=streamer
    )
    assert streamer.tokens == text[0].tolist() and streamer.is_ended


def test_scores_and_logits_are_those_of_the_plain_call(target, drafter):
    settings = {"output_scores": True, "output_logits": True, "repetition_penalty": 1.3}
    plain, drafted = plain_and_drafted(target, drafter, **settings)
    assert torch.equal(plain.sequences, drafted.sequences)
    for name in ("scores", "logits"):
        assert len(plain[name]) == len(drafted[name])
        for ours, theirs in zip(drafted[name], plain[name], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "processors",
    [
        {"repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 2},
        {"bad_words_ids": [[7], [3, 5]]},
        {"suppress_tokens": [1, 2, 3], "min_new_tokens": 10},
        {"sequence_bias": {(4,): 3.0, (5, 6): -2.0}},
        {"forced_eos_token_id": 39},
    ],
    ids=lambda processors: next(iter(processors)),
)
def test_processors_see_each_tokens_own_prefix(target, drafter, processors):
    plain, drafted = plain_and_drafted(target, drafter, **processors)
    assert torch.equal(plain.sequences, drafted.sequences)


def test_a_seed_gives_the_same_sample_twice(target, drafter):
    texts = []
    for _ in range(2):
        torch.manual_seed(3)
        texts.append(
            target.generate(PROMPT, do_sample=True, assistant_model=drafter, max_new_tokens=30)
        )
    assert torch.equal(*texts)


def test_stop_strings_end_the_text_inside_a_round(target, drafter, tokenizer):
    text = target.generate(PROMPT, do_sample=False, max_new_tokens=30)
    stop = tokenizer.decode(text[0, PROMPT.shape[1] + 3 : PROMPT.shape[1] + 5])
    settings = {"max_new_tokens": 30, "stop_strings": [stop], "tokenizer": tokenizer}
    plain, drafted = plain_and_drafted(target, drafter, **settings)
    assert torch.equal(plain.sequences, drafted.sequences)
    assert plain.sequences.shape[1] < text.shape[1]
    with pytest.raises(ValueError, match="without `tokenizer`"):
        target.generate(PROMPT, stop_strings=[stop], assistant_model=drafter)


def test_stop_strings_of_the_targets_own_config_end_a_text_too(
    target, drafter, tokenizer, monkeypatch
):
    text = target.generate(PROMPT, do_sample=False, max_new_tokens=30)
    stops = [
        tokenizer.decode(text[0, PROMPT.shape[1] + n : PROMPT.shape[1] + n + 2]) for n in (2, 6)
    ]
    monkeypatch.setattr(target.generation_config, "stop_strings", [stops[1]])
    settings = {"max_new_tokens": 30, "tokenizer": tokenizer}
    lengths = []
    for own in ({}, {"stop_strings": [stops[0]]}):  # those of a call come first
        plain, drafted = plain_and_drafted(target, drafter, **settings, **own)
        assert torch.equal(plain.sequences, drafted.sequences)
        lengths.append(plain.sequences.shape[1])
    assert text.shape[1] > lengths[0] > lengths[1]
    assert target.generation_config.stop_strings == [stops[1]]


@pytest.mark.parametrize("kind", ["fsdp", "fsdp2 of a layer", "zero3"])
def test_processes_that_share_out_a_targets_weights_do_not_draft(
    target, drafter, monkeypatch, kind
):
    layer = target.model.layers[0]
    if kind == "fsdp":
        monkeypatch.setattr(target, "_is_fsdp_managed_module", True, raising=False)
    elif kind == "zero3":
        monkeypatch.setattr(layer.mlp.up_proj.weight, "ds_id", 0, raising=False)
    else:
        sharded = type("FSDPLayer", (FSDPModule, type(layer)), {})  # as `fully_shard` does
        monkeypatch.setattr(layer, "__class__", sharded)
    target.generate(PROMPT, assistant_model=drafter, max_new_tokens=2)  # of one process
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(ValueError, match="weights are sharded over 2 processes"):
        target.generate(PROMPT, assistant_model=drafter, max_new_tokens=2, synced_gpus=False)


def test_a_tokenizer_the_drafter_was_not_trained_with_is_refused(target, tokenizer):
    drafter = CoralDrafter.from_target(target, tokenizer_hash="of another tokenizer")
    with pytest.raises(ValueError, match="Pass the target's own tokenizer"):
        target.generate(PROMPT, assistant_model=drafter, tokenizer=tokenizer, max_new_tokens=2)


def test_settings_come_from_the_drafter_and_can_be_overridden_in_the_call(target):
    drafter = CoralDrafter.from_target(target).eval()
    drafter.generation_config.tree_nodes = 7
    rows = []

    def note(module, args, kwargs):
        rows.append(kwargs["input_ids"].shape[1])

    for settings, nodes in (({}, 7), ({"tree_nodes": 13}, 13)):
        rows.clear()
        with noted_passes(target.model, note):
            target.generate(PROMPT, assistant_model=drafter, max_new_tokens=12, **settings)
        assert max(rows[1:]) == nodes


def test_left_padding_of_a_row_changes_nothing(target, drafter):
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), PROMPT], dim=1)
    mask = torch.cat([torch.zeros(1, 3, dtype=torch.long), torch.ones_like(PROMPT)], dim=1)
    plain = target.generate(PROMPT, do_sample=False, max_new_tokens=20)
    for settings in ({}, {"tree_top_k": 1}):
        drafted = target.generate(
            padded,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=20,
            assistant_model=drafter,
            **settings,
        )
        assert torch.equal(drafted[:, 3:], plain)


def test_install_is_idempotent_and_uninstall_gives_back_what_was_there():
    wrapped = GenerationMixin.generate
    coral_hf.install()
    assert GenerationMixin.generate is wrapped
    coral_hf.uninstall()
    original = GenerationMixin.generate
    coral_hf.uninstall()
    assert GenerationMixin.generate is original and original is wrapped.__wrapped__
    coral_hf.install()


def test_calls_without_a_coral_drafter_pass_untouched(target):
    other = scatter_weights(LlamaForCausalLM(target.config), seed=1)
    plain = target.generate(PROMPT, do_sample=False, max_new_tokens=10)
    assisted = target.generate(PROMPT, do_sample=False, max_new_tokens=10, assistant_model=other)
    assert torch.equal(plain, assisted)


def test_a_positional_assistant_is_found(target, drafter):
    plain = target.generate(PROMPT, do_sample=False, max_new_tokens=10)
    config = target.generation_config
    drafted = target.generate(
        PROMPT, config, None, None, None, None, drafter, do_sample=False, max_new_tokens=10
    )
    assert torch.equal(plain, drafted)


def test_pipeline_takes_the_drafter_as_assistant(target, drafter, tokenizer):
    settings = {"do_sample": False, "max_new_tokens": 12, "return_tensors": True}
    plain = pipeline("text-generation", target, tokenizer=tokenizer)("face", **settings)
    drafted = pipeline("text-generation", target, tokenizer=tokenizer, assistant_model=drafter)(
        "face", **settings
    )
    assert plain == drafted


def test_a_drafter_has_no_part_of_its_target(target, drafter):
    before = set(drafter.state_dict())
    target.generate(PROMPT, assistant_model=drafter, max_new_tokens=5)
    assert set(drafter.state_dict()) == before


def test_two_threads_share_one_drafter(target, drafter):
    prompts = [PROMPT, PROMPT.flip(1)]
    expected = [target.generate(p, do_sample=False, max_new_tokens=25) for p in prompts]
    found = [None, None]

    def work(index):
        found[index] = target.generate(
            prompts[index], do_sample=False, max_new_tokens=25, assistant_model=drafter
        )

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(*pair) for pair in zip(expected, found, strict=True))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 2}, "num_beams=1"),
        ({"use_cache": False}, "use_cache=True"),
        ({"penalty_alpha": 0.6, "top_k": 4, "do_sample": False}, "penalty_alpha"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens"),
        ({"cache_implementation": "offloaded"}, "cache_implementation"),
        ({"draft_head": "routed"}, "no trained router"),
        ({"draft_head": "half"}, "use one of .'full', 'quantized'"),
        ({"tree_depth": 0}, "`tree_depth` is 0"),
        ({"synced_gpus": True}, "synced_gpus"),
        ({"custom_generate": lambda *args, **kwargs: None}, "custom_generate"),
    ],
)
def test_what_cannot_work_is_refused(target, drafter, settings, message):
    with pytest.raises(ValueError, match=message):
        target.generate(PROMPT, assistant_model=drafter, max_new_tokens=5, **settings)


def test_an_empty_prompt_is_refused(target, drafter):
    with pytest.raises(ValueError, match="[Ee]mpty|input_ids"):
        target.generate(
            torch.zeros(1, 0, dtype=torch.long), assistant_model=drafter, max_new_tokens=5
        )


def test_a_drafter_of_another_target_is_refused_by_field(target):
    config = LlamaConfig(**{**target.config.to_dict(), "hidden_size": 48, "head_dim": 12})
    with pytest.raises(ValueError, match="`hidden_size` of the target is 32.*48"):
        wider = CoralDrafter.from_target(LlamaForCausalLM(config))
        target.generate(PROMPT, assistant_model=wider, max_new_tokens=2)


@pytest.fixture(scope="module")
def gpt2():
    config = GPT2Config(
        vocab_size=VOCAB,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=24,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=0,
    )
    return scatter_weights(GPT2LMHeadModel(config))


def test_the_text_may_fill_a_table_of_positions_to_the_last_token(gpt2):
    drafter = CoralDrafter.from_target(gpt2).eval()
    for max_new_tokens in (18, 19):  # 24 positions are read, the 25th token is only emitted
        settings = {"do_sample": False, "max_new_tokens": max_new_tokens}
        plain = gpt2.generate(PROMPT, attention_mask=torch.ones_like(PROMPT), **settings)
        drafted = gpt2.generate(
            PROMPT, attention_mask=torch.ones_like(PROMPT), assistant_model=drafter, **settings
        )
        assert torch.equal(plain, drafted)


def test_a_target_that_takes_chains_ends_within_its_table_of_positions():
    fields = {**OTHERS["gpt_neo"].to_dict(), "max_position_embeddings": 16, "eos_token_id": None}
    target = make_target(GPTNeoConfig(**fields))
    drafter = CoralDrafter.from_target(target).eval()
    scatter_weights(drafter, seed=1)
    settings = {"max_new_tokens": 11, "do_sample": False}  # 16 positions are read
    expected = target.generate(PROMPT, **settings)
    assert target.generate(PROMPT, assistant_model=drafter, **settings).equal(expected)
    # a text that ends in time may ask for more than there is room for
    settings = {"max_new_tokens": 50, "do_sample": False, "eos_token_id": int(expected[0, -1])}
    expected = target.generate(PROMPT, **settings)
    assert expected.shape[1] <= 17
    assert target.generate(PROMPT, assistant_model=drafter, **settings).equal(expected)


def test_a_prompt_beyond_the_positions_is_refused(gpt2):
    prompt = torch.ones(1, 25, dtype=torch.long)
    with pytest.raises(ValueError, match="25 tokens, but the target has 24 positions"):
        gpt2.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            assistant_model=CoralDrafter.from_target(gpt2),
            max_new_tokens=2,
        )


def test_a_recurrent_target_is_refused():
    config = MambaConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, bos_token_id=0, eos_token_id=None
    )
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=4,
        )
    )
    with pytest.raises(ValueError, match="MambaForCausalLM cannot take a drafter"):
        MambaForCausalLM(config).generate(
            PROMPT,
            attention_mask=torch.ones_like(PROMPT),
            assistant_model=CoralDrafter.from_target(llama),
            max_new_tokens=3,
        )


def test_asking_for_a_tree_where_only_a_chain_is_safe_is_refused(target, drafter):
    rule = Rule("greedy", is_drawn=False)
    shape = {"tree_depth": 4, "tree_top_k": 5, "tree_nodes": 20}
    declared = target.config._attn_implementation
    target.config._attn_implementation_internal = "flash_attention_2"
    try:
        chain, takes_tree = choose_shape(target, shape, {}, rule)
        assert (chain.top_k, chain.nodes, takes_tree) == (1, 5, False)
        with pytest.raises(ValueError, match="cannot verify a tree"):
            choose_shape(target, shape, {"tree_top_k": 5}, rule)
    finally:
        target.config._attn_implementation_internal = declared


def test_an_exception_in_a_streamer_leaves_target_and_drafter_usable(target, drafter):
    class Broken(EveryToken):
        def put(self, value):
            super().put(value)
            if len(self.tokens) > 12:
                raise RuntimeError("broken pipe")

    plain = target.generate(PROMPT, do_sample=False, max_new_tokens=15)
    with pytest.raises(RuntimeError, match="broken pipe"):
        target.generate(PROMPT, assistant_model=drafter, max_new_tokens=15, streamer=Broken())
    drafted = target.generate(PROMPT, do_sample=False, max_new_tokens=15, assistant_model=drafter)
    assert torch.equal(plain, drafted)
