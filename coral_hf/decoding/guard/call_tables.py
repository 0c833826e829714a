"""What calls of `generate` may have, by aspect: what is refused, and what to do instead."""

from .entries import REFUSED, Entry
from .target_tables import Table

_REFUSED = "test_what_cannot_work_is_refused"

# the mode and the limits of a call
MODES: Table = {
    "prompt_lookup_num_tokens": Entry(
        REFUSED,
        "`prompt_lookup_num_tokens` and a CORAL drafter both draft",
        "pass one of them",
        test=_REFUSED,
    ),
    "mode": Entry(
        REFUSED,
        "A CORAL drafter works with greedy search and sampling, but the call asks for {name}",
        "set num_beams=1 and leave out penalty_alpha, dola_layers and constraints, or drop"
        " `assistant_model`",
        test=_REFUSED,
    ),
    "use_cache": Entry(
        REFUSED,
        "`use_cache` is False, but a drafter needs the target's cache",
        "pass use_cache=True",
        test=_REFUSED,
    ),
    "cache_implementation": Entry(
        REFUSED,
        "`cache_implementation` is {name!r}",
        "leave it out: a drafter has the default cache",
        test=_REFUSED,
    ),
}

# prompts of a call
INPUTS: Table = {
    "inputs_embeds": Entry(
        REFUSED,
        "`inputs_embeds` was passed, but a drafter reads tokens",
        "pass `input_ids` alone, or drop `assistant_model`",
        test=_REFUSED,
    ),
    "empty prompt": Entry(
        REFUSED,
        "The prompt is empty",
        "pass at least one token, such as the BOS token",
        test=_REFUSED,
    ),
    "padding on the right": Entry(
        REFUSED,
        "`attention_mask` ends with 0 in some row, but tokens are appended on the right",
        "pad on the left: tokenizer.padding_side = 'left'",
        test=_REFUSED,
    ),
    "best keys": Entry(
        REFUSED,
        "The text may have {name}: of a longer text, the target reads the keys with the best scores"
        " alone, and which of equal tokens it reads depends on the size of a pass",
        "lower `max_new_tokens`",
        test="test_a_text_beyond_the_best_keys_is_refused",
    ),
    "prompt beyond the positions": Entry(
        REFUSED,
        "The prompt has {name} positions",
        "shorten it",
        test=_REFUSED,
    ),
}

TABLES: dict[str, Table] = {"Modes of a call": MODES, "Prompts of a call": INPUTS}
