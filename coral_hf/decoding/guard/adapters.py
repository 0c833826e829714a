"""Adapters of PEFT in a target, by type: whether each token passes through them alone.

In: a target, or a `PeftModel`. Out: findings for the guard. A type in no table is refused.
"""

from collections.abc import Iterator

from transformers import PreTrainedModel

from .entries import REFUSED, TREE, Entry
from .foreign import forward_hooks, root_of

_EACH = "test_an_adapter_of_each_type_keeps_its_text"
_PLACES = "test_an_adapter_that_looks_at_the_place_of_a_token_is_refused"
_MIXES = "test_an_adapter_that_mixes_the_tokens_of_a_pass_is_refused"
_REMEDY = "merge it into the weights where PEFT can, or drop `assistant_model`"

# types whose layers map one token at a time
BY_TOKEN = """
    ADALORA ADAMSS ADAPTION_PROMPT BEFT BOFT C3A DEFT DELORA FOURIERFT FROD GLORA GRALORA HIRA HRA
    IA3 LN_TUNING LOHA LOKR LORA MISS OFT OSF PEANUT POLY PSOFT PVERA RANDLORA ROAD SHIRA
    SUPERTUNING TINYLORA TRAINABLE_TOKENS UNILORA VBLORA VERA WAVEFT
""".split()

TYPES: dict[str, Entry] = {
    **dict.fromkeys(BY_TOKEN, Entry(TREE, "maps each token alone", test=_EACH)),
    "LILY": Entry(
        REFUSED,
        "its adapter (LILY) routes by the mean over all tokens and rows of a pass",
        "drop `assistant_model`",
        test=_MIXES,
    ),
    "XLORA": Entry(
        REFUSED,
        "its adapter (XLORA) mixes experts by all tokens of a pass, and takes no cache",
        "drop `assistant_model`",
        test=_MIXES,
    ),
    "SHADOW": Entry(
        REFUSED,
        "its adapter (SHADOW) hands states from layer to layer beside the target's own",
        "drop `assistant_model`",
        test=_MIXES,
    ),
}
UNKNOWN_TYPE = Entry(
    REFUSED,
    "its adapter is of type {name}, which is not known to map each token alone",
    _REMEDY,
    test="test_an_adapter_of_an_unknown_type_is_refused",
)

ADAPTERS: dict[str, Entry] = {
    "prompt learning": Entry(
        REFUSED, "its adapter ({name}) puts virtual tokens before the prompt", test=_PLACES
    ),
    "aLoRA": Entry(
        REFUSED, "its adapter (aLoRA) starts to act at a position in the sequence", test=_PLACES
    ),
    **TYPES,
    "any other type": UNKNOWN_TYPE,
}

TABLES = {"Adapters of PEFT": ADAPTERS}


def adapter_findings(model: PreTrainedModel) -> Iterator[tuple[object, Entry]]:
    """What the adapters of a target allow."""
    # where PEFT learns a prompt, it replaces this method of the target for the time of a call
    prepare = getattr(model, "prepare_inputs_for_generation", None)
    around = getattr(getattr(prepare, "__self__", model), "active_peft_config", None)
    if around is not None and around.is_prompt_learning:
        yield around.peft_type.value, ADAPTERS["prompt learning"]
    for adapter in getattr(model, "peft_config", {}).values():
        if getattr(adapter, "alora_invocation_tokens", None):
            yield "aLoRA", ADAPTERS["aLoRA"]
        elif not adapter.is_prompt_learning:
            name = getattr(adapter.peft_type, "value", adapter.peft_type)
            yield name, TYPES.get(name, UNKNOWN_TYPE)


def has_adapters_by_row(model: PreTrainedModel) -> bool:
    """Whether PEFT has given each row of the passes of a call an adapter or a task of its own.

    It does so by hooks that hang on the layers of a target for the time of a call.
    """
    return any(root_of(hook) == "peft" for hook in forward_hooks(model))
