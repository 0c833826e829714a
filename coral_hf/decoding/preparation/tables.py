"""Inputs of rounds, and methods that prepare them: why several tokens get what each would alone."""

from transformers.generation.utils import MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL

from ..caches.continuation import CACHE
from ..guard.entries import CHAIN, REFUSED, TREE, Entry

Table = dict[str, Entry]

_SWITCH = "test_text_across_a_longrope_switch_equals_plain_generate"
_IMAGES = "test_text_about_an_image_equals_plain_generate"
_DROPS_CACHE = Entry(
    TREE, "it drops its cache at the switch of LongRoPE, where a round has one token", test=_SWITCH
)
_AFTER = "test_text_after_an_image_equals_plain_generate"
_LEAVES_OUT = Entry(TREE, "after the prompt it only leaves out inputs", test=_AFTER)
_EVERY = "test_a_class_keeps_its_own_text_or_is_refused_in_a_sentence"
_LEAVES_OUT_TEXT = Entry(TREE, "after the prompt it only leaves out inputs", test=_EVERY)
_COUNTS = Entry(
    TREE, "it counts positions anew in each pass, and changes nothing else", test=_EVERY
)

# classes of transformers that override a method which prepares the inputs of each step
CLASSES: Table = {
    "CTRLLMHeadModel": _LEAVES_OUT_TEXT,
    "Ernie4_5_VLMoeForConditionalGeneration": _LEAVES_OUT_TEXT,
    "Exaone4_5_ForConditionalGeneration": _COUNTS,
    "Gemma3ForConditionalGeneration": _LEAVES_OUT,
    "Gemma4ForConditionalGeneration": _LEAVES_OUT_TEXT,
    "Gemma4UnifiedForConditionalGeneration": _LEAVES_OUT_TEXT,
    "HyperCLOVAXVisionV2ForConditionalGeneration": _COUNTS,
    "Kosmos2_5ForConditionalGeneration": Entry(
        REFUSED,
        "it counts positions by the tokens of a pass that are no padding, so that a pad token"
        " shifts those behind it",
        "drop `assistant_model`",
        test=_EVERY,
    ),
    "Molmo2ForConditionalGeneration": _LEAVES_OUT_TEXT,
    "RoCBertForCausalLM": _LEAVES_OUT_TEXT,
    "MllamaForConditionalGeneration": Entry(
        TREE, "new tokens see the images that the last one before them sees", test=_IMAGES
    ),
    "PaliGemmaForConditionalGeneration": Entry(TREE, "it counts positions from 1", test=_AFTER),
    "Phi3ForCausalLM": _DROPS_CACHE,
    "Phi4MultimodalForCausalLM": _DROPS_CACHE,
    "PhimoeForCausalLM": _DROPS_CACHE,
}

# of these, those whose method does nothing more
AT_A_SWITCH = {name for name, entry in CLASSES.items() if entry is _DROPS_CACHE}
UNKNOWN_PREPARE = Entry(
    CHAIN,
    "it has a `prepare_inputs_for_generation` of its own, so that each round is compared with"
    " single steps",
    test="test_rounds_that_differ_from_single_steps_have_one_token",
)
UNKNOWN_UPDATE = Entry(
    REFUSED,
    "it has an `_update_model_kwargs_for_generation` of its own, which is not known to carry inputs"
    " on over several tokens as over one after the other",
    "drop `assistant_model`",
    test="test_a_method_that_updates_inputs_is_refused_unless_it_is_known",
)

# what a round needs, or none does: with nothing else, rounds are made without the target's methods
DIRECT_INPUTS = {
    "attention_mask",
    "position_ids",
    "use_cache",
    "logits_to_keep",
    CACHE,
    *MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL,
}

_CROSS = Entry(
    TREE,
    "cross-attention reads the same at each token",
    test="test_states_of_an_encoder_reach_every_round",
)
_IMAGE = Entry(TREE, "it tells of images or videos in the prompt", test=_AFTER)
_TEXT = Entry(TREE, "new tokens are text", test=_AFTER)

# further inputs, of which a new token gets what the one before it had
INPUTS: Table = {
    "token_type_ids": Entry(
        TREE, "new tokens are of the last one's type", test="test_token_types_reach_every_round"
    ),
    "mm_token_type_ids": _TEXT,
    "moe_mm_token_type_ids": _TEXT,
    "encoder_hidden_states": _CROSS,
    "encoder_attention_mask": _CROSS,
    "cross_attention_mask": Entry(
        TREE, "new tokens see the images that the last one before them sees", test=_IMAGES
    ),
    "aspect_ratio_ids": _IMAGE,
    "aspect_ratio_mask": _IMAGE,
    "image_grid_thw": _IMAGE,
    "video_grid_thw": _IMAGE,
    "second_per_grid_ts": _IMAGE,
}
_OWN_TEST = "test_an_input_of_the_models_own_is_refused_until_it_is_registered"
_PLAIN_TEST = "test_an_input_of_the_models_own_reaches_every_round"
PLAIN_INPUT = Entry(TREE, "plain values are the same at each token", test=_PLAIN_TEST)
REGISTERED_INPUT = Entry(TREE, "registered by the user", test=_OWN_TEST)
UNKNOWN_INPUT = Entry(
    REFUSED,
    "`{name}` reaches the target in each pass, and is not known to give several tokens what each"
    " would get alone",
    "leave it out, pass speculation='never', or, if it gives each token the same whatever else the"
    " pass reads, call coral_hf.register_input('{name}')",
    test=_OWN_TEST,
)


def register_input(name: str) -> None:
    """Let drafters follow calls with a keyword of the target's own that holds tensors.

    Args:
        name: of the keyword. Of what it holds, the target must give each token the same, however
            many a pass reads; or its own methods make what each pass gets, by the tokens in it.
    """
    INPUTS[name] = REGISTERED_INPUT


# kinds of rotary embeddings
ROTARY: Table = {
    **dict.fromkeys(
        ("default", "linear", "yarn", "llama3", "proportional"),
        Entry(
            TREE,
            "it follows from positions alone",
            test="test_greedy_tokens_equal_the_target_alone",
        ),
    ),
    "longrope": Entry(TREE, "no round goes across its switch", test=_SWITCH),
    "dynamic": Entry(
        TREE,
        "beyond its positions a round has one token",
        test="test_text_beyond_the_positions_of_dynamic_ntk_equals_plain_generate",
    ),
}
UNKNOWN_ROTARY = Entry(
    REFUSED,
    "its rotary embedding {name!r} is not known to give several tokens what each would get alone",
    test="test_a_rotary_embedding_that_is_not_known_is_refused",
)

TABLES: dict[str, Table] = {
    "Targets that prepare the inputs of each step": {
        **CLASSES,
        "any other that prepares them": UNKNOWN_PREPARE,
        "any other that updates them": UNKNOWN_UPDATE,
    },
    "Inputs that reach the target at each step": {
        **INPUTS,
        "numbers and words": PLAIN_INPUT,
        "any other": UNKNOWN_INPUT,
    },
    "Rotary embeddings": {**ROTARY, "any other": UNKNOWN_ROTARY},
}
