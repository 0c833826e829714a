"""What targets may have, by aspect: whether a tree is exact with it, a chain, or nothing.

Each table maps a name, as transformers or PEFT spells it, to an `Entry`.
"""

from .classes import REFUSED_CLASSES
from .entries import CHAIN, REFUSED, TREE, Entry, Table
from .quantization import QUANTIZATION

_FAMILIES = "test_greedy_tokens_equal_the_target_alone"
_CHAINS = "test_a_target_without_trees_keeps_its_own_text_in_chains"
_SIBLINGS = "test_a_target_that_cannot_tell_siblings_apart_names_its_obstacle"
_RECURRENT = "test_a_recurrent_target_is_refused"
_MASKS = "test_an_attention_that_takes_no_float_mask_is_an_obstacle"

_ODD = "test_an_odd_target_works_or_is_refused_with_its_name"

_NO_MASK = Entry(CHAIN, "its attention {name!r} takes no 4-D mask", test=_MASKS)
_PAGED = Entry(
    REFUSED, "its attention {name!r} reads pages of a cache", "set another one", test=_MASKS
)
_DROPS_NOTHING = Entry(
    REFUSED,
    "its cache has layers of kind {name}, which cannot drop rejected tokens",
    test=_RECURRENT,
)
_OTHER_SLOTS = Entry(
    CHAIN, "its layers of type {name} attend to other slots than a mask allows", test=_SIBLINGS
)

_ORDER = Entry(
    CHAIN, "its layers of type {name} look back along the order of a pass", test=_RECURRENT
)

# functions of the target's attention
ATTENTION: Table = {
    "eager": Entry(TREE, "adds the float mask of a tree to its scores", test=_FAMILIES),
    "sdpa": Entry(TREE, "adds the float mask of a tree to its scores", test=_FAMILIES),
    "flash_attention_2": _NO_MASK,
    "flash_attention_3": _NO_MASK,
    "flash_attention_4": _NO_MASK,
    "flex_attention": _NO_MASK,
    "paged|eager": _PAGED,
    "paged|sdpa": _PAGED,
    "paged|flash_attention_2": _PAGED,
    "paged|flash_attention_3": _PAGED,
    "paged|flash_attention_4": _PAGED,
}

# code of others, with the highest way that a trial can give it
TRIED: Table = {
    "attention function": Entry(
        TREE,
        "its attention {name!r} is registered by others and was tried on a small copy",
        "register its mask function too, with AttentionMaskInterface.register, or use 'sdpa'",
        test="test_a_registered_attention_function_is_exact_or_refused",
    ),
    "class": Entry(
        TREE,
        "its class {name} is none of transformers and was tried on a small copy",
        "use the class of transformers for this model",
        test="test_a_class_of_others_is_tried",
    ),
    "new class": Entry(
        TREE,
        "its class {name} is not among those that were tried with this package, and was tried on"
        " a small copy",
        "use a target of another class",
        test="test_a_class_that_is_not_known_is_tried",
    ),
    "modules": Entry(
        TREE,
        "its module {name} is none of transformers and was tried",
        "leave it out while drafting",
        test="test_a_module_of_others_is_tried",
    ),
    "hooks": Entry(
        TREE,
        "its forward hook {name} changes what passes through it and was tried",
        "let it treat all tokens of a pass alike, or remove it while drafting",
        test="test_a_hook_is_tried",
    ),
}

# packages whose modules, hooks and attention functions are known
LIBRARIES = (
    "transformers",
    "torch",
    "accelerate",
    "peft",
    "deepspeed",
    "liger_kernel",
    "coral_hf",
    # of quantized layers, which have a table of their own
    "aqlm",
    "auto_round",
    "awq",
    "bitsandbytes",
    "compressed_tensors",
    "eetq",
    "fbgemm_gpu",
    "fouroversix",
    "fp_quant",
    "gptqmodel",
    "hqq",
    "optimum",
    "quark",
    "sinq",
    "spqr_quant",
    "torchao",
    "vptq",
)

# entries of `layer_types`
LAYER_TYPES: Table = {
    "full_attention": Entry(TREE, "its mask follows from positions alone", test=_FAMILIES),
    "sliding_attention": Entry(TREE, "its mask follows from positions alone", test=_FAMILIES),
    "chunked_attention": _OTHER_SLOTS,
    "conv": _ORDER,
    "hybrid": _ORDER,
    "hybrid_sliding": _ORDER,
    "linear_attention": _ORDER,
    "moe": Entry(TREE, "it attends to nothing", test=_FAMILIES),
}

# layers of the cache that transformers makes for the target
CACHE_LAYERS: Table = {
    "DynamicLayer": Entry(TREE, "drops rejected tokens at its end", test=_FAMILIES),
    "DynamicSlidingWindowLayer": Entry(TREE, "holds the window and the tree", test=_FAMILIES),
    "DummyLayer": Entry(
        TREE,
        "holds nothing: it shares another layer's keys, or has none",
        test="test_layers_that_share_keys_keep_their_own_text",
    ),
    "LinearAttentionLayer of convolutions alone": Entry(
        CHAIN,
        "its convolutions look back along the order of a pass",
        test="test_a_target_with_convolutions_keeps_its_own_text_in_chains",
    ),
    "LinearAttentionLayer": _DROPS_NOTHING,
    "LinearAttentionAndFullAttentionLayer": _DROPS_NOTHING,
    "LinearAttentionAndSlidingWindowAttentionLayer": _DROPS_NOTHING,
}

# what a target is, beyond names in its config
STRUCTURE: Table = {
    "no position_ids": Entry(CHAIN, "its forward takes no `position_ids`", test=_SIBLINGS),
    "alibi": Entry(
        CHAIN,
        "its positions are ALiBi biases, which follow the order of the KV slots",
        test=_SIBLINGS,
    ),
    "local attention": Entry(
        CHAIN, "the window of its local attention counts KV slots, not positions", test=_SIBLINGS
    ),
    "recurrent state": Entry(
        REFUSED, "its recurrent state cannot drop rejected tokens", test=_RECURRENT
    ),
    "encoder-decoder": Entry(
        REFUSED,
        "it is an encoder-decoder",
        "use a target that is a decoder alone",
        test=_ODD,
    ),
    "no layers": Entry(
        REFUSED,
        "its config has no `num_hidden_layers`, by which a cache is made",
        test="test_a_class_that_no_drafter_can_follow_is_refused",
    ),
    "no text token by token": Entry(
        REFUSED,
        "it writes no text token by token",
        "use a target that has `generate` of transformers",
        test="test_a_class_that_no_drafter_can_follow_is_refused",
    ),
    "no LM head": Entry(
        REFUSED,
        "it has no LM head",
        "load it with AutoModelForCausalLM",
        test="test_a_target_without_an_lm_head_raises",
    ),
    "expert capacity": Entry(
        REFUSED,
        "its experts drop tokens beyond a capacity, so that a token's output depends on the others"
        " of its pass",
        test="test_experts_of_bounded_capacity_are_refused",
    ),
}

# what drafters that read features need of a target
FEATURES: Table = {
    "streams": Entry(
        REFUSED,
        "it has {name} hidden states per token (`altup_num_inputs`), and a drafter reads one",
        test="test_a_target_of_several_hidden_states_a_token_raises",
    ),
    "embedding width": Entry(
        REFUSED,
        "its embeddings are {name} wide, and a drafter reads both side by side",
        test=_ODD,
    ),
}

# how the target's weights lie; generation asks, training does not
PLACEMENT: Table = {
    "sharded": Entry(
        REFUSED,
        "its weights are sharded over {name} processes",
        test="test_processes_that_share_out_a_targets_weights_do_not_draft",
    ),
}

UNKNOWN_CACHE_LAYER = _DROPS_NOTHING
UNKNOWN_LAYER_TYPE = _OTHER_SLOTS

TABLES: dict[str, Table] = {
    "Attention functions": ATTENTION,
    "Code of others, which is tried": TRIED,
    "Layer types": LAYER_TYPES,
    "Cache layers": CACHE_LAYERS,
    "Structure": STRUCTURE,
    "Classes of transformers": REFUSED_CLASSES,
    "Features, for drafters that read them": FEATURES,
    "Quantization": QUANTIZATION,
    "Placement": PLACEMENT,
}
