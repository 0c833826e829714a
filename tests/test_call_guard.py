"""Every keyword of `generate` and field of `GenerationConfig` goes somewhere, or is refused."""

import ast
import inspect

import pytest
import torch
from conftest import tiny_target
from transformers import (
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    LlamaConfig,
    LogitsProcessorList,
    MaxTimeCriteria,
    StaticCache,
    StoppingCriteriaList,
    WatermarkingConfig,
)
from transformers.cache_utils import DynamicLayer, QuantizedLayer
from transformers.generation import CompileConfig, TemperatureLogitsWarper
from transformers.generation import utils as generation
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.streamers import BaseStreamer

import coral_hf
from coral_hf import CoralDrafter
from coral_hf.decoding.caches.continuation import CACHE
from coral_hf.decoding.guard.calls import FIELDS, KEYWORDS

TREE = {"speculation": "always", "tree_depth": 3, "tree_top_k": 2, "tree_nodes": 8}
GREEDY = {"do_sample": False, "max_new_tokens": 10}
IDS = torch.tensor([[5, 9, 14, 3, 22], [7, 7, 31, 12, 4]])
# of what `generate` reads keywords from: its own, those of its modes, and those for the model
SOURCES = ("kwargs", "model_kwargs", "generation_mode_kwargs", "candidate_kwargs")


@pytest.fixture(scope="module")
def target():
    return tiny_target("llama")


@pytest.fixture(scope="module")
def drafter(target):
    torch.manual_seed(1)
    return CoralDrafter.from_target(target).eval()


def keywords_read() -> set[str]:
    """The names that the code of `generate` takes from its keywords, found in its source."""
    found = set()
    for node in ast.walk(ast.parse(inspect.getsource(generation))):
        source = name = None
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if node.func.attr in ("pop", "get", "setdefault") and node.args:
                source, name = node.func.value, node.args[0]
        elif isinstance(node, ast.Subscript):
            source, name = node.value, node.slice
        elif isinstance(node, ast.Compare):
            source, name = node.comparators[0], node.left
        if isinstance(name, ast.Constant) and getattr(source, "id", None) in SOURCES:
            found.add(name.value)
    return found


def test_every_keyword_and_field_of_the_installed_version_is_in_a_table():
    fields = set(vars(GenerationConfig()))
    assert not fields - FIELDS.keys()
    signature, read = inspect.signature(GenerationMixin.generate), keywords_read()
    assert {"tokenizer", "assistant_tokenizer", "attention_mask", "use_cache"} <= read
    # one is set by `generate` itself, for decoding methods of its own
    read |= signature.parameters.keys() - {"self", "kwargs"}
    assert not read - {"inputs_tensor"} - KEYWORDS.keys() - FIELDS.keys()


class Kept(BaseStreamer):
    """Keeps what it gets."""

    def __init__(self):
        self.found = []

    def put(self, value):
        self.found += value.flatten().tolist()

    def end(self):
        self.found.append("end")


HONOURED = [
    {"attention_mask": torch.ones_like(IDS)},
    {"position_ids": torch.arange(5).expand(2, -1) + 3},
    {"logits_processor": LogitsProcessorList([TemperatureLogitsWarper(0.5)])},
    {"stopping_criteria": StoppingCriteriaList([MaxTimeCriteria(1000.0)])},
    {"generation_config": GenerationConfig(max_new_tokens=4, repetition_penalty=1.3)},
    {"max_new_tokens": None, "max_length": 11},
    {"max_time": 1000.0},
    {"eos_token_id": [3, 8, 13, 30], "pad_token_id": 2},
    {"num_return_sequences": 2, "do_sample": True, "top_k": 1},
    {"prefill_chunk_size": 2},
    {"do_sample": True, "top_k": 1, "temperature": 0.5, "top_p": 0.9},
    {"min_new_tokens": 8, "eos_token_id": [*range(3, 30)]},
    {"bad_words_ids": [[7]], "sequence_bias": [[[11], 4.0]]},
    {"watermarking_config": WatermarkingConfig(bias=2.5)},
    {"prefix_allowed_tokens_fn": lambda row, ids: [*range(10 * row + 5, 10 * row + 15)]},
    {"guidance_scale": 1.5},
    {"disable_compile": True, "trust_remote_code": True, "max_cache_len": 64, "top_h": None},
    {"cache_implementation": "static"},
    {"compile_config": CompileConfig(backend="eager")},
    {"cache_implementation": "dynamic"},
    {"length_penalty": 0.5, "early_stopping": True, "num_beam_groups": 1, "penalty_alpha": 0.0},
    {"cache_config": {}, "constraints": None},
]


@pytest.mark.parametrize("settings", HONOURED, ids=lambda settings: "-".join(settings))
def test_every_setting_has_the_effect_that_it_has_in_the_plain_call(target, drafter, settings):
    plain = target.generate(IDS, **GREEDY | settings)
    assert target.generate(IDS, **GREEDY | settings, assistant_model=drafter, **TREE).equal(plain)


def test_prompt_streamer_cache_and_outputs_are_those_of_the_plain_call(target, drafter):
    names = ("output_scores", "output_logits")
    found = []
    for assistant in ({}, {"assistant_model": drafter, **TREE}):
        streamer, cache = Kept(), DynamicCache(config=target.config)
        settings = {**GREEDY, **dict.fromkeys(names, True), CACHE: cache, **assistant}
        output = target.generate(
            inputs=IDS[:1], streamer=streamer, return_dict_in_generate=True, **settings
        )
        found.append((output, streamer.found, cache))
    (plain, streamed, cache), (drafted, streamed_too, cache_too) = found
    assert drafted.sequences.equal(plain.sequences) and streamed_too == streamed
    assert cache_too.get_seq_length() == cache.get_seq_length() == 14
    for name in names:
        part = name.removeprefix("output_")
        assert len(getattr(drafted, part)) == len(getattr(plain, part)) == 10


NOWHERE = [
    ({"synced_gpus": True}, "`synced_gpus` is True"),
    ({"assistant_tokenizer": object()}, "`assistant_tokenizer` was passed"),
    ({"custom_generate": lambda *args, **kwargs: None}, "`custom_generate` and a drafter"),
    ({"decoder_input_ids": IDS}, "`decoder_input_ids` is for encoder-decoders"),
    ({"encoder_outputs": (IDS,)}, "`encoder_outputs` is for encoder-decoders"),
    ({"cache_implementation": "quantized"}, "`cache_implementation` is 'quantized'"),
    ({"cache_implementation": "offloaded"}, "`cache_implementation` is 'offloaded'"),
    ({"cache_implementation": "offloaded_static"}, "`cache_implementation` is 'offloaded_static'"),
    ({"use_cache": False}, "`use_cache` is False"),
    ({"continuous_batching_config": ContinuousBatchingConfig()}, "continuous batching takes no"),
    ({"token_healing": True}, "`token_healing` is True"),
    ({"is_assistant": True}, "`is_assistant` is True"),
    ({"low_memory": True}, "`low_memory` is True"),
    ({"output_attentions": True}, "`output_attentions` asks for states of each token"),
    ({"output_hidden_states": True}, "`output_hidden_states` asks for states of each token"),
    ({"use_mtp": True}, "assisted_generation"),
    ({"dola_layers": "low"}, "dola_generation"),
    ({"constraints": [object()]}, "constrained_beam_search"),
    ({"force_words_ids": [[3]]}, "constrained_beam_search"),
    ({"num_beams": 2, "num_beam_groups": 2, "diversity_penalty": 0.5}, "num_beams=1"),
    ({"prompt_lookup_num_tokens": 3}, "`prompt_lookup_num_tokens` and a drafter both"),
    ({"assistant_early_exit": 1}, "assisted_generation"),
    ({"num_assistant_tokens": 7}, "`num_assistant_tokens` is for transformers' own assistants"),
    ({"num_assistant_tokens_schedule": "heuristic"}, "`num_assistant_tokens_schedule` is for"),
    ({"assistant_confidence_threshold": 0.7}, "`assistant_confidence_threshold` is for"),
    ({"assistant_lookbehind": 4}, "`assistant_lookbehind` is for"),
    ({"target_lookbehind": 4}, "`target_lookbehind` is for"),
    ({"assistant_ensemble_weight": 0.5}, "`assistant_ensemble_weight` is for"),
    ({"speculation_type": "dflash"}, "`speculation_type` is for"),
    ({"max_matching_ngram_size": 2}, "`max_matching_ngram_size` is for"),
]


@pytest.mark.parametrize(("settings", "said"), NOWHERE, ids=lambda value: str(value)[:30])
def test_a_keyword_or_field_that_goes_nowhere_is_refused(target, drafter, settings, said):
    with pytest.raises(ValueError, match=said) as error:
        target.generate(IDS, **GREEDY | settings, assistant_model=drafter)
    assert "; " in str(error.value), "without a remedy"


def test_each_refused_field_is_refused_in_a_config_too(target, drafter):
    for settings, said in NOWHERE:
        if settings.keys() <= FIELDS.keys():
            config = GenerationConfig(**GREEDY)
            for name, value in settings.items():
                setattr(config, name, value)
            with pytest.raises(ValueError, match=said):
                target.generate(IDS, config, assistant_model=drafter)


def test_settings_of_the_target_for_other_assistants_are_no_obstacle(drafter):
    target = tiny_target("llama")
    target.generation_config.num_assistant_tokens = 7
    target.generation_config.assistant_confidence_threshold = 0.1
    target.generation_config.chat_format = "of its authors"
    plain = target.generate(IDS, **GREEDY)
    assert target.generate(IDS, **GREEDY, assistant_model=drafter).equal(plain)


def test_an_unknown_field_is_refused_unless_it_is_left_alone(target, drafter, monkeypatch):
    init = GenerationConfig.__init__

    def newer(self, **kwargs):
        self.think_harder = kwargs.pop("think_harder", None)
        init(self, **kwargs)

    monkeypatch.setattr(GenerationConfig, "__init__", newer)
    plain = target.generate(IDS, **GREEDY)
    assert target.generate(IDS, **GREEDY, assistant_model=drafter).equal(plain)
    with pytest.raises(ValueError, match="`think_harder` is not known"):
        target.generate(IDS, **GREEDY, think_harder=2, assistant_model=drafter)


def test_an_unknown_keyword_is_refused(target, drafter, monkeypatch):
    extract = GenerationMixin._extract_generation_mode_kwargs

    def newer(self, custom_generate, kwargs, *rest):
        kwargs.pop("think_harder", None)
        return extract(self, custom_generate, kwargs, *rest)

    monkeypatch.setattr(GenerationMixin, "_extract_generation_mode_kwargs", newer)
    target.generate(IDS, **GREEDY, think_harder=2)
    with pytest.raises(ValueError, match="`think_harder` is a keyword of this version"):
        target.generate(IDS, **GREEDY, think_harder=2, assistant_model=drafter)
    with pytest.raises(ValueError, match="think_twice"):  # by transformers itself
        target.generate(IDS, **GREEDY, think_twice=2, assistant_model=drafter)


class Halved(QuantizedLayer):
    """A layer that keeps few bits, without a library."""

    def _quantize(self, tensor, axis):
        return tensor.half()

    def _dequantize(self, tensor):
        return tensor.double()


class Forgetful(DynamicLayer):
    """A layer of the caller's own, which forgets."""

    def update(self, key_states, value_states, *args, **kwargs):
        return super().update(key_states * 0, value_states, *args, **kwargs)


def of_layers(layer, count: int = 2) -> DynamicCache:
    """A cache with layers of one kind."""
    cache = DynamicCache()
    cache.layers = [layer() for _ in range(count)]
    cache.layer_class_to_replicate = None
    return cache


def test_a_cache_that_changes_or_moves_what_it_holds_is_refused(target, drafter):
    assert isinstance(target.config, LlamaConfig)
    caches = {
        "fewer bits": of_layers(Halved),
        "moves its layers": DynamicCache(config=target.config, offloading=True),
        "none of transformers": of_layers(Forgetful),
    }
    for said, cache in caches.items():
        with pytest.raises(ValueError, match=said):
            target.generate(IDS, **GREEDY, assistant_model=drafter, **{CACHE: cache})
    for cache in (DynamicCache(), StaticCache(config=target.config, max_cache_len=40)):
        plain = target.generate(IDS, **GREEDY)
        drafted = target.generate(IDS, **GREEDY, assistant_model=drafter, **{CACHE: cache})
        assert drafted.equal(plain)


def test_calls_without_a_drafter_are_left_alone(target):
    assert target.generate(IDS, **GREEDY, num_assistant_tokens=3).shape == (2, 15)
    coral_hf.uninstall()
    try:
        plain = target.generate(IDS, **GREEDY)
    finally:
        coral_hf.install()
    assert target.generate(IDS, **GREEDY).equal(plain)
