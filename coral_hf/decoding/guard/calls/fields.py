"""Keywords of `generate` and fields of `GenerationConfig`: where each goes, or why it is refused.

A field of a refused entry is refused where its value is neither the default nor the one that the
target's own config has; a keyword where it is passed. Names in no table are refused.
"""

from ..entries import REFUSED, TREE, Entry
from ..target_tables import Table

_WALK = "test_every_keyword_and_field_of_the_installed_version_is_in_a_table"
_REFUSED = "test_a_keyword_or_field_that_goes_nowhere_is_refused"
_PROCESSORS = "test_every_processor_acts_as_in_the_plain_call"
_EXPECTED = "test_every_setting_has_the_effect_that_it_has_in_the_plain_call"


def _all(entry: Entry, *names: str) -> Table:
    return dict.fromkeys(names, entry)


_TARGETS = Entry(TREE, "`generate` prepares it, and the target's passes get it", test=_EXPECTED)
_WATCHES = Entry(TREE, "sees each token in order, with its own prefix", test=_PROCESSORS)
_OTHER_MODES = Entry(
    TREE, "plain `generate` reads it in other modes alone, which are refused", test=_REFUSED
)
_OTHER_DRAFTERS = Entry(
    REFUSED,
    "`{name}` is for transformers' own assistants, and a CORAL drafter does not read it",
    "leave it out; `tree_depth`, `tree_top_k`, `tree_nodes` and `speculation` say how much is"
    " drafted",
    test=_REFUSED,
)

# keywords of `generate`, beside those that are fields of `GenerationConfig` or go to the target
KEYWORDS: Table = {
    **_all(_TARGETS, "inputs", "input_ids", "attention_mask", "position_ids"),
    **_all(_TARGETS, "token_type_ids", "mm_token_type_ids", "mm_encoder_outputs"),
    **_all(
        Entry(TREE, "a drafted call continues it, and a plain one continues ours", test=_EXPECTED),
        *("cache", "past_key_values", "cache_params"),
    ),
    **_all(_WATCHES, "logits_processor", "prefix_allowed_tokens_fn"),
    **_all(_WATCHES, "negative_prompt_ids", "negative_prompt_attention_mask"),
    "stopping_criteria": Entry(TREE, "see each token in order", test=_EXPECTED),
    "streamer": Entry(TREE, "gets each token in order", test=_EXPECTED),
    "tokenizer": Entry(TREE, "for `stop_strings`; compared with the drafter's own", test=_EXPECTED),
    "generation_config": Entry(TREE, "judged field by field", test=_WALK),
    "assistant_model": Entry(TREE, "the drafter", test=_EXPECTED),
    "trust_remote_code": Entry(
        TREE, "for code of `custom_generate` alone, which is refused", test=_REFUSED
    ),
    "logits_to_keep": Entry(TREE, "`generate` sets it itself, for the prompt", test=_WALK),
    "debug_io": Entry(TREE, "does not change the output", test=_WALK),
    **_all(
        Entry(
            REFUSED,
            "`{name}` is for encoder-decoders, and a CORAL drafter needs a decoder",
            "leave it out",
            test=_REFUSED,
        ),
        *("decoder_input_ids", "decoder_attention_mask", "encoder_outputs"),
    ),
    "inputs_embeds": Entry(TREE, "judged with the prompts", test=_WALK),
    "custom_generate": Entry(
        REFUSED, "`custom_generate` and a CORAL drafter both decode", "pass one", test=_REFUSED
    ),
    "synced_gpus": Entry(
        REFUSED,
        "`synced_gpus` is True, but a drafter's rounds differ between ranks",
        "generate on one rank, or without `assistant_model`",
        test=_REFUSED,
    ),
    "assistant_tokenizer": Entry(
        REFUSED,
        "`assistant_tokenizer` was passed, but a CORAL drafter reads the target's own tokens",
        "leave it out",
        test=_REFUSED,
    ),
    "paged": Entry(
        REFUSED,
        "`cache_implementation` is 'paged', and continuous batching takes no drafter",
        "leave it out, or drop `assistant_model`",
        test="test_a_paged_cache_is_refused_with_a_drafter",
    ),
}

# fields of `GenerationConfig`, which are keywords too
FIELDS: Table = {
    **_all(
        Entry(TREE, "ends rows as in plain `generate`", test=_EXPECTED),
        *("max_length", "max_new_tokens", "max_time", "stop_strings", "eos_token_id"),
    ),
    **_all(Entry(TREE, "plain `generate` reads it before us", test=_EXPECTED), "bos_token_id"),
    "pad_token_id": Entry(TREE, "fills rows that have ended", test=_EXPECTED),
    "num_return_sequences": Entry(TREE, "plain `generate` repeats the prompts", test=_EXPECTED),
    "do_sample": Entry(TREE, "chooses the rule of verification", test=_EXPECTED),
    "return_dict_in_generate": Entry(TREE, "returns a CoralGenerateOutput", test=_EXPECTED),
    **_all(
        Entry(TREE, "collected token by token", test=_EXPECTED),
        *("output_scores", "output_logits", "output_attentions", "output_hidden_states"),
    ),
    "prefill_chunk_size": Entry(TREE, "the prompt is read in such chunks", test=_EXPECTED),
    **_all(_WATCHES, "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p"),
    **_all(_WATCHES, "epsilon_cutoff", "eta_cutoff", "min_length", "min_new_tokens"),
    **_all(_WATCHES, "repetition_penalty", "encoder_repetition_penalty", "no_repeat_ngram_size"),
    **_all(_WATCHES, "encoder_no_repeat_ngram_size", "bad_words_ids", "sequence_bias"),
    **_all(_WATCHES, "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values"),
    **_all(_WATCHES, "exponential_decay_length_penalty", "suppress_tokens"),
    **_all(_WATCHES, "begin_suppress_tokens", "guidance_scale", "renormalize_logits"),
    **_all(_WATCHES, "watermarking_config"),
    "use_cache": Entry(TREE, "judged with the modes: a drafter needs it", test=_REFUSED),
    "cache_implementation": Entry(
        TREE,
        "judged with the modes: what changes speed alone is taken, what saves memory or bits is"
        " refused",
        test=_REFUSED,
    ),
    **_all(
        Entry(TREE, "plain `generate` reads it for caches of fixed size alone", test=_REFUSED),
        "max_cache_len",
    ),
    **_all(
        Entry(TREE, "plain `generate` reads it for quantized caches alone", test=_WALK),
        "cache_config",
    ),
    "disable_compile": Entry(TREE, "nothing is compiled", test=_WALK),
    "compile_config": Entry(
        TREE,
        "compiles rounds of constant shapes; where a call cannot have them, nothing is compiled",
        test="test_a_compiled_call_gives_the_tokens_of_a_plain_one",
    ),
    "continuous_batching_config": Entry(
        REFUSED,
        "`continuous_batching_config` was passed, and continuous batching takes no drafter",
        "leave it out, or drop `assistant_model`",
        test=_REFUSED,
    ),
    "token_healing": Entry(
        REFUSED,
        "`token_healing` is True, which rewrites the prompt",
        "heal it before the call: ids = target.heal_tokens(ids, tokenizer)",
        test=_REFUSED,
    ),
    "is_assistant": Entry(
        REFUSED,
        "`is_assistant` is True, which ends texts where transformers' own assistants would",
        "leave it out",
        test=_REFUSED,
    ),
    **_all(_OTHER_MODES, "num_beams", "early_stopping", "length_penalty", "num_beam_groups"),
    **_all(_OTHER_MODES, "diversity_penalty", "constraints", "force_words_ids", "penalty_alpha"),
    **_all(_OTHER_MODES, "decoder_start_token_id", "dola_layers"),
    "low_memory": Entry(
        REFUSED,
        "`low_memory` is True, which asks for contrastive search to be split",
        "leave it out, or drop `assistant_model`",
        test=_REFUSED,
    ),
    **_all(_OTHER_DRAFTERS, "num_assistant_tokens", "num_assistant_tokens_schedule"),
    **_all(_OTHER_DRAFTERS, "assistant_confidence_threshold", "assistant_early_exit"),
    **_all(_OTHER_DRAFTERS, "assistant_lookbehind", "target_lookbehind", "use_mtp"),
    **_all(_OTHER_DRAFTERS, "assistant_ensemble_weight", "speculation_type"),
    **_all(_OTHER_DRAFTERS, "max_matching_ngram_size", "prompt_lookup_num_tokens"),
    **_all(
        Entry(TREE, "where the config comes from", test=_WALK),
        *("transformers_version", "_from_model_config", "_commit_hash"),
    ),
}
UNKNOWN_FIELD = Entry(
    REFUSED,
    "the generation setting `{name}` is not known to coral_hf, which may miss what it asks for",
    "leave it out, or drop `assistant_model`",
    test="test_an_unknown_field_is_refused_unless_it_is_left_alone",
)
UNKNOWN_KEYWORD = Entry(
    REFUSED,
    "`{name}` is a keyword of this version of `generate` that coral_hf does not know",
    "leave it out, or drop `assistant_model`",
    test="test_an_unknown_keyword_is_refused",
)

TABLES: dict[str, Table] = {
    "Keywords of a call": KEYWORDS,
    "Generation settings": FIELDS,
    "Other settings": {"any other field": UNKNOWN_FIELD, "any other keyword": UNKNOWN_KEYWORD},
}
