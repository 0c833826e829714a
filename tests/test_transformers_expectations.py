"""What transformers promises of `generate` and of assisted decoding holds with a CORAL drafter."""

import copy
import io
import pickle
import string
import threading

import pytest
import torch
from conftest import VOCAB, scatter_weights, tiny_target
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import BPE
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    PreTrainedTokenizerFast,
    StaticCache,
    StoppingCriteria,
    TextStreamer,
    TopKLogitsWarper,
    WatermarkingConfig,
)
from transformers.generation import GenerateDecoderOnlyOutput

from coral_hf import CoralDrafter
from coral_hf.decoding.caches.continuation import CACHE
from coral_hf.decoding.guard import CHAIN, Judgement

PAD = 0
NEW = 8
TREE = {"tree_depth": 3, "tree_top_k": 4, "tree_nodes": 12}
PROMPTS = torch.tensor([[5, 9, 3, 17, 22, 8], [4, 4, 7, 11, 30, 2]])
GREEDY = {"do_sample": False, "max_new_tokens": NEW}
ALL_OUTPUTS = dict.fromkeys(("output_scores", "output_logits"), True)


def make_target(family="llama", dtype=torch.float64):
    target = tiny_target(family, dtype)
    target.generation_config.pad_token_id = PAD
    return target


def make_drafter(target):
    torch.manual_seed(0)
    drafter = CoralDrafter.from_target(target).eval()
    scatter_weights(drafter, seed=1)
    return drafter


@pytest.fixture(scope="module")
def target():
    return make_target()


@pytest.fixture(scope="module")
def drafter(target):
    return make_drafter(target)


def with_and_without(target, drafter, *inputs, **arguments):
    """What plain `generate` gives, and what it gives with the drafter."""
    arguments = GREEDY | arguments
    plain = target.generate(*inputs, **arguments)
    return plain, target.generate(*inputs, **arguments, assistant_model=drafter, **TREE)


def assert_equal(target, drafter, *inputs, **arguments):
    plain, drafted = with_and_without(target, drafter, *inputs, **arguments)
    assert drafted.equal(plain)


# greedy search and sampling


@pytest.mark.parametrize("rows", [1, 2])
def test_assisted_greedy_search_gives_the_tokens_of_greedy_search(target, drafter, rows):
    assert_equal(target, drafter, PROMPTS[:rows])


@pytest.mark.parametrize("rows", [1, 2])
def test_a_greedy_output_is_a_decoder_only_output_with_all_that_was_asked_for(rows):
    target = make_target(dtype=torch.float32)
    arguments = {"return_dict_in_generate": True, **ALL_OUTPUTS}
    plain, drafted = with_and_without(target, make_drafter(target), PROMPTS[:rows], **arguments)
    assert isinstance(drafted, GenerateDecoderOnlyOutput)
    assert {*drafted.keys()} == {*plain.keys()} | {"stats"}
    assert drafted.sequences.equal(plain.sequences)
    assert [one.shape for one in drafted.scores] == [(rows, VOCAB)] * NEW
    assert [one.shape for one in drafted.logits] == [(rows, VOCAB)] * NEW


def test_an_output_unpacks_like_any_model_output(target, drafter):
    _, out = with_and_without(target, drafter, PROMPTS, return_dict_in_generate=True)
    assert out[0] is out["sequences"] is out.sequences
    assert out.to_tuple() == (out.sequences, out[CACHE], out.stats)
    assert out.scores is out.logits is out.hidden_states is out.attentions is None


def test_what_is_not_asked_for_is_not_kept(target, drafter):
    _, out = with_and_without(
        target, drafter, PROMPTS, return_dict_in_generate=True, output_logits=True
    )
    assert [*out.keys()] == ["sequences", "logits", CACHE, "stats"]


@pytest.mark.parametrize("rows", [1, 2])
def test_assisted_sampling_runs_and_has_the_type_and_shapes_of_sampling(target, drafter, rows):
    torch.manual_seed(0)
    plain, drafted = with_and_without(
        target,
        drafter,
        PROMPTS[:rows],
        do_sample=True,
        top_k=5,
        temperature=1.2,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
    )
    assert isinstance(drafted, GenerateDecoderOnlyOutput)
    assert drafted.sequences.shape == plain.sequences.shape
    assert drafted.sequences[:, :6].equal(PROMPTS[:rows])
    for name in ("scores", "logits"):
        assert [one.shape for one in drafted[name]] == [one.shape for one in plain[name]]
    for token, scores in zip(drafted.sequences[:, 6:].T, drafted.scores, strict=True):
        assert scores.isfinite().sum(1).tolist() == [5] * rows
        assert scores.gather(1, token[:, None]).isfinite().all()


def test_sampling_from_one_token_is_greedy_search(target, drafter):
    expected = target.generate(PROMPTS, **GREEDY)
    arguments = {"do_sample": True, "top_k": 1, "max_new_tokens": NEW}
    assert target.generate(PROMPTS, assistant_model=drafter, **arguments).equal(expected)


def test_num_return_sequences_repeats_the_prompts_when_sampling_and_raises_when_not(
    target, drafter
):
    torch.manual_seed(0)
    arguments = {"num_return_sequences": 3, "assistant_model": drafter, "max_new_tokens": NEW}
    out = target.generate(PROMPTS, do_sample=True, **arguments)
    assert out.shape == (6, 6 + NEW)
    assert out[:, :6].equal(PROMPTS.repeat_interleave(3, dim=0))
    with pytest.raises(ValueError, match="num_return_sequences"):
        target.generate(PROMPTS, do_sample=False, **arguments)


# inputs, masks, positions


@pytest.mark.parametrize("name", ["inputs", "input_ids"])
def test_the_prompt_may_be_named(target, drafter, name):
    assert_equal(target, drafter, **{name: PROMPTS})


def test_without_a_prompt_the_text_begins_at_bos(target, drafter):
    assert_equal(target, drafter)
    assert_equal(target, drafter, bos_token_id=7)


def test_ids_of_another_integer_type_are_taken(target, drafter):
    assert_equal(target, drafter, PROMPTS.int())


@pytest.mark.parametrize("family", ["llama", "mistral_window", "gemma3", "gpt2"])
def test_left_padding_changes_no_token(family):
    target = make_target(family)
    drafter = make_drafter(target)
    plain = target.generate(PROMPTS, **GREEDY, attention_mask=torch.ones_like(PROMPTS))
    padding = torch.full((2, 5), PAD)
    mask = torch.cat([torch.zeros_like(padding), torch.ones_like(PROMPTS)], dim=1)
    out = target.generate(
        torch.cat([padding, PROMPTS], dim=1),
        attention_mask=mask,
        assistant_model=drafter,
        **GREEDY,
        **TREE,
    )
    assert out[:, 5:].equal(plain)


@pytest.mark.parametrize("dtype", [torch.long, torch.bool, torch.float32])
def test_a_mask_of_any_type_is_taken(target, drafter, dtype):
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1]]).to(dtype)
    assert_equal(target, drafter, PROMPTS, attention_mask=mask)


@pytest.fixture(params=["tree", "chain"])
def _shape(request, monkeypatch):
    """The same target as one that takes trees, and as one that takes chains only."""
    if request.param == "chain":
        chain = Judgement(CHAIN, ("a test",))
        monkeypatch.setattr("coral_hf.decoding.guard.calls.accept_target", lambda *_: chain)
        monkeypatch.setitem(TREE, "tree_top_k", 1)


MASK_WITH_HOLES = torch.tensor([[1] * 3 + [0] * 7 + [1] * 4, [0] * 2 + [1] * 3 + [0] * 3 + [1] * 6])


@pytest.mark.usefixtures("_shape")
@pytest.mark.parametrize("family", ["llama", "mistral_window", "gemma3", "gpt2"])
@pytest.mark.parametrize(
    "given",
    [
        {"attention_mask": MASK_WITH_HOLES},
        {"position_ids": torch.arange(14)[None].expand(2, -1) * 2 + 3},
        {"attention_mask": MASK_WITH_HOLES.sort(dim=1).values},
    ],
    ids=["holes", "positions", "padding"],
)
def test_masks_and_positions_count_as_in_plain_generate(family, given):
    target = make_target(family)
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(3, VOCAB, (2, 14), generator=generator)
    given = {"attention_mask": torch.ones_like(prompts), **given}
    assert_equal(target, make_drafter(target), prompts, max_new_tokens=16, **given)


def test_inputs_embeds_are_refused_with_or_without_ids(target, drafter):
    embeddings = target.get_input_embeddings()(PROMPTS).detach()
    for ids in ({}, {"input_ids": PROMPTS}):
        with pytest.raises(ValueError, match="`inputs_embeds`.*pass `input_ids` alone"):
            target.generate(**ids, inputs_embeds=embeddings, assistant_model=drafter, **GREEDY)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"attention_mask": torch.ones(2, 1, 6, 6)}, ValueError),
        ({"no_such_argument": 3}, ValueError),
        ({"max_new_tokens": None, "max_length": 6}, ValueError),
        ({"streamer": TextStreamer(None)}, ValueError),
    ],
    ids=["mask", "unknown", "length", "streamer"],
)
def test_what_plain_generate_refuses_is_refused_in_the_same_words(
    target, drafter, arguments, error
):
    with pytest.raises(error) as plain:
        target.generate(PROMPTS, **GREEDY | arguments)
    with pytest.raises(error) as drafted:
        target.generate(PROMPTS, **GREEDY | arguments, assistant_model=drafter)
    assert str(plain.value) == str(drafted.value)


# lengths, stops, settings


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_new_tokens": None, "max_length": 11},
        {"max_new_tokens": 4, "max_length": 11},
        {"min_length": 12, "eos_token_id": [*range(20)]},
        {"min_new_tokens": 5, "eos_token_id": [*range(20)]},
        {"eos_token_id": torch.tensor([29, 37])},
        {"max_time": 100.0},
    ],
    ids=lambda arguments: "-".join(arguments),
)
def test_lengths_and_stops_are_those_of_plain_generate(target, drafter, arguments):
    assert_equal(target, drafter, PROMPTS, **arguments)


def test_rows_that_end_early_are_padded(target, drafter):
    plain = target.generate(PROMPTS, **GREEDY)
    eos = int(plain[0, 6 + 2])
    plain, drafted = with_and_without(target, drafter, PROMPTS, eos_token_id=eos)
    assert drafted.equal(plain)
    assert drafted[0, 6 + 3 :].eq(PAD).all()


def test_eos_pads_where_there_is_no_pad_token(drafter):
    target = tiny_target("llama", pad_token_id=None)
    mask = torch.ones_like(PROMPTS)
    eos = int(target.generate(PROMPTS, attention_mask=mask, **GREEDY)[0, 6 + 2])
    plain, drafted = with_and_without(
        target, drafter, PROMPTS, eos_token_id=eos, attention_mask=mask
    )
    assert drafted.equal(plain)
    assert drafted[0, 6 + 3 :].eq(eos).all()


def test_a_generation_config_is_followed_and_left_as_it_was(target, drafter):
    config = GenerationConfig(
        max_new_tokens=5, repetition_penalty=1.4, eos_token_id=[1, 37], pad_token_id=PAD
    )
    before, own = config.to_dict(), target.generation_config.to_dict()
    plain = target.generate(PROMPTS, config)
    assert target.generate(PROMPTS, config, assistant_model=drafter).equal(plain)
    assert target.generate(PROMPTS, generation_config=config, assistant_model=drafter).equal(plain)
    assert config.to_dict() == before
    assert target.generation_config.to_dict() == own


def test_a_generation_config_may_ask_for_the_outputs(target, drafter):
    config = GenerationConfig(
        max_new_tokens=5, output_scores=True, return_dict_in_generate=True, pad_token_id=PAD
    )
    out = target.generate(PROMPTS, config, assistant_model=drafter)
    assert len(out.scores) == 5 and out.stats.num_rounds > 0


def test_the_settings_of_chain_assistants_change_nothing(target):
    drafter = make_drafter(target)
    plain, drafted = with_and_without(target, drafter, PROMPTS, return_dict_in_generate=True)
    drafter.generation_config.num_assistant_tokens = 2
    drafter.generation_config.num_assistant_tokens_schedule = "heuristic"
    drafter.generation_config.assistant_confidence_threshold = 0.9
    arguments = {"assistant_model": drafter, "return_dict_in_generate": True, **TREE}
    again = target.generate(PROMPTS, **GREEDY, **arguments)
    assert again.sequences.equal(plain.sequences)
    assert again.stats.round_lengths == drafted.stats.round_lengths
    assert drafter.generation_config.num_assistant_tokens == 2
    with pytest.raises(ValueError, match="`num_assistant_tokens` is for transformers' own"):
        target.generate(PROMPTS, **GREEDY, **arguments, num_assistant_tokens=3)


@pytest.mark.parametrize(
    "arguments",
    [
        {"disable_compile": True},
        {"trust_remote_code": True},
        {"use_cache": True},
        {"cache_implementation": "dynamic"},
        {"remove_invalid_values": True},
        {"prefill_chunk_size": 4},
        {"logits_to_keep": 0},
    ],
    ids=lambda arguments: next(iter(arguments)),
)
def test_settings_about_anything_but_tokens_change_no_token(target, drafter, arguments):
    assert_equal(target, drafter, PROMPTS, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_beams": 2}, "beam_search; set num_beams=1"),
        ({"num_beams": 2, "do_sample": True}, "beam_sample; set num_beams=1"),
        ({"penalty_alpha": 0.6}, "contrastive_search"),
        ({"dola_layers": "low"}, "dola_generation"),
        ({"prompt_lookup_num_tokens": 3}, "pass one of them"),
        ({"assistant_early_exit": 1}, "assisted_generation"),
        ({"use_cache": False}, "pass use_cache=True"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_way_of_decoding_is_refused_with_a_remedy(target, drafter, arguments, message):
    if "penalty_alpha" in arguments:
        target.generation_config.top_k, arguments = 4, {**arguments, "top_k": 4}
    try:
        with pytest.raises(ValueError, match=message):
            target.generate(PROMPTS, **GREEDY | arguments, assistant_model=drafter)
    finally:
        target.generation_config.top_k = None


# processors


@pytest.mark.parametrize(
    "arguments",
    [
        {"logits_processor": [TopKLogitsWarper(1)]},
        {"prefix_allowed_tokens_fn": lambda row, ids: [*range(10 * row + 5, 10 * row + 15)]},
        {"guidance_scale": 1.5},
        {"watermarking_config": WatermarkingConfig(bias=2.5)},
        {"begin_suppress_tokens": [3, 7, 29, 33]},
        {"exponential_decay_length_penalty": (2, 1.5), "eos_token_id": 3},
        {"renormalize_logits": True, "encoder_no_repeat_ngram_size": 2},
    ],
    ids=lambda arguments: next(iter(arguments)),
)
def test_processors_act_as_in_plain_generate(target, drafter, arguments):
    assert_equal(target, drafter, PROMPTS, **arguments)


def test_a_negative_prompt_acts_as_in_plain_generate(target, drafter):
    assert_equal(target, drafter, PROMPTS[:1], guidance_scale=1.5, negative_prompt_ids=PROMPTS[1:])


# the cache


@pytest.mark.parametrize("new", [1, 2, 7])
def test_the_cache_has_a_column_for_every_token_but_the_last(target, drafter, new):
    _, out = with_and_without(
        target, drafter, PROMPTS, max_new_tokens=new, return_dict_in_generate=True
    )
    assert isinstance(out[CACHE], DynamicCache)
    assert out[CACHE].get_seq_length() == 6 + new - 1
    for layer in out[CACHE].layers:
        assert layer.keys.shape == layer.values.shape == (2, 2, 6 + new - 1, 8)


@pytest.mark.parametrize("first", [False, True], ids=["plain-first", "drafted-first"])
@pytest.mark.parametrize("then", [False, True], ids=["plain-then", "drafted-then"])
@pytest.mark.parametrize("is_whole", [True, False], ids=["whole-text", "new-tokens"])
def test_generation_continues_from_a_returned_cache(target, drafter, first, then, is_whole):
    expected = target.generate(PROMPTS, **GREEDY)
    assistant = {"assistant_model": drafter, **TREE}
    half = target.generate(
        PROMPTS,
        do_sample=False,
        max_new_tokens=3,
        return_dict_in_generate=True,
        **(assistant if first else {}),
    )
    text = half.sequences
    given = text if is_whole else text[:, half[CACHE].get_seq_length() :]
    out = target.generate(
        given,
        attention_mask=torch.ones_like(text),
        **{CACHE: half[CACHE]},
        do_sample=False,
        max_new_tokens=NEW - 3,
        **(assistant if then else {}),
    )
    assert out.equal(expected if is_whole else expected[:, -out.shape[1] :])


@pytest.mark.parametrize(
    "make_cache",
    [
        lambda config: DynamicCache(),
        lambda config: DynamicCache(config=config),
        lambda config: StaticCache(config=config, max_cache_len=40),
    ],
    ids=["dynamic", "dynamic-of-config", "static"],
)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_cache_of_any_class_may_be_passed(family, make_cache):
    target = make_target(family)
    plain = target.generate(PROMPTS, **GREEDY)
    out = target.generate(
        PROMPTS,
        **GREEDY,
        **{CACHE: make_cache(target.config)},
        assistant_model=make_drafter(target),
        **TREE,
    )
    assert out.equal(plain)


def test_a_returned_cache_can_be_cropped_and_reordered(target, drafter):
    _, out = with_and_without(target, drafter, PROMPTS, return_dict_in_generate=True)
    cache, text = out[CACHE], out.sequences
    cache.crop(-4)
    cache.reorder_cache(torch.tensor([1, 0]))
    text = text.flip(0)[:, : cache.get_seq_length() + 1]
    for assistant in ({}, {"assistant_model": drafter, **TREE}):
        more = target.generate(text, **{CACHE: copy.deepcopy(cache)}, **GREEDY, **assistant)
        assert more.equal(target.generate(text, **GREEDY))


@pytest.mark.parametrize("rows", [1, 2])
def test_a_returned_cache_can_be_saved_and_loaded(target, drafter, rows):
    _, out = with_and_without(target, drafter, PROMPTS[:rows], return_dict_in_generate=True)
    file = io.BytesIO()
    torch.save(out[CACHE], file)
    file.seek(0)
    expected = target.generate(out.sequences, **GREEDY)
    loaded = (
        torch.load(file, weights_only=False),
        pickle.loads(pickle.dumps(out[CACHE])),
    )
    for cache in loaded:
        more = target.generate(
            out.sequences, **{CACHE: cache}, assistant_model=drafter, **GREEDY, **TREE
        )
        assert more.equal(expected)


def test_the_copy_of_a_cache_keeps_what_the_drafter_has_read(target, drafter):
    _, out = with_and_without(target, drafter, PROMPTS[:1], return_dict_in_generate=True)
    memory = copy.deepcopy(out[CACHE]).drafter_memory
    assert memory.drafter() is drafter
    assert memory.cache.next_positions.tolist() == [out.sequences.shape[1] - 1]
    assert memory.cache is not out[CACHE].drafter_memory.cache


# threads and exceptions


class FailingCriterion(StoppingCriteria):
    """Breaks off a call once its text has some length."""

    def __init__(self, length):
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        if input_ids.shape[1] >= self.length:
            raise RuntimeError("broken off")
        return torch.zeros(len(input_ids), dtype=torch.bool)


class FailingProcessor(LogitsProcessor):
    """Breaks off a call at the text's token of some number."""

    def __init__(self, length):
        self.length = length

    def __call__(self, input_ids, scores):
        if input_ids.shape[1] >= self.length:
            raise RuntimeError("broken off")
        return scores


@pytest.mark.parametrize(
    ("name", "failing"),
    [("stopping_criteria", FailingCriterion), ("logits_processor", FailingProcessor)],
)
@pytest.mark.parametrize("length", [6, 7, 10])
def test_an_exception_inside_a_call_leaves_target_drafter_and_cache_usable(
    target, drafter, name, failing, length
):
    expected = target.generate(PROMPTS, **GREEDY)
    assistant = {"assistant_model": drafter, **TREE}
    cache = DynamicCache(config=target.config)
    with pytest.raises(RuntimeError, match="broken off"):
        target.generate(
            PROMPTS, **GREEDY, **assistant, **{CACHE: cache}, **{name: [failing(length)]}
        )
    assert target.generate(PROMPTS, **GREEDY).equal(expected)
    assert target.generate(PROMPTS, **GREEDY, **assistant).equal(expected)
    assert target.generate(PROMPTS, **GREEDY, **assistant, **{CACHE: cache}).equal(expected)


def test_an_exception_in_a_continued_call_leaves_the_cache_usable(target, drafter):
    assistant = {"assistant_model": drafter, **TREE}
    first = target.generate(PROMPTS[:1], **GREEDY, **assistant, return_dict_in_generate=True)
    cache, text = first[CACHE], first.sequences
    with pytest.raises(RuntimeError, match="broken off"):
        target.generate(
            text,
            **GREEDY,
            **assistant,
            **{CACHE: cache},
            stopping_criteria=[FailingCriterion(18)],
        )
    out = target.generate(text, **GREEDY, **assistant, **{CACHE: cache})
    assert out.equal(target.generate(text, **GREEDY))


def test_threads_share_one_target_and_one_drafter(target, drafter):
    prompts = [PROMPTS, PROMPTS[:1], PROMPTS.flip(0)[:, :4]]
    expected = [target.generate(prompt, **GREEDY) for prompt in prompts]
    found: list = [None] * len(prompts)

    def work(index):
        calls = (
            target.generate(prompts[index], **GREEDY, assistant_model=drafter, **TREE)
            for _ in range(3)
        )
        found[index] = [*calls]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for plain, drafted in zip(expected, found, strict=True):
        assert all(one.equal(plain) for one in drafted)


# tokenizers


def test_a_tokenizer_may_be_passed_for_stop_strings_to_a_batch(target, drafter):
    characters = string.ascii_lowercase + string.digits + "+-*/"
    vocabulary = {character: index for index, character in enumerate(characters)}
    backend = Tokenizer(BPE(vocabulary, merges=[]))
    backend.decoder = Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    text = target.generate(PROMPTS, **GREEDY)
    stop = tokenizer.convert_ids_to_tokens(int(text[1, 6 + 3]))
    # without an EOS token plain `generate` pads no row: one that has ended goes on with the others
    settings = {"stop_strings": [stop], "tokenizer": tokenizer, "eos_token_id": 1}
    plain, drafted = with_and_without(target, drafter, PROMPTS, **settings)
    assert drafted.equal(plain)
    assert drafted[1, 6 + 4 :].eq(PAD).all()
