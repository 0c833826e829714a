"""What calls of `generate` may have, by aspect: what is refused, and what to do instead."""

from ...watchers import PREFIX_FREE, ROW_WISE, ROW_WISE_CRITERIA, STATEFUL, STATELESS
from ..entries import REFUSED, TREE, Entry
from ..target_tables import Table
from .fields import TABLES as FIELD_TABLES

_REFUSED = "test_what_cannot_work_is_refused"
_CACHES = "test_a_cache_that_changes_or_moves_what_it_holds_is_refused"
_PROCESSORS = "test_every_processor_acts_as_in_the_plain_call"
_REMEMBER = "test_every_processor_that_remembers_acts_as_in_the_plain_call"
_CRITERIA = "test_a_criterion_with_state_by_row_ends_rows_as_in_the_plain_call"

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
    "generate_batch": Entry(
        REFUSED,
        "`generate_batch` is continuous batching, which takes no drafter",
        "call `generate` with padded prompts, or drop `assistant_model`",
        test="test_continuous_batching_is_refused_with_a_drafter",
    ),
    "rule that reads all nodes": Entry(
        REFUSED,
        "{name} may remember what it has seen, and this call reads nodes that are never emitted",
        "pass verification='token' and drawn_tree=False",
        test="test_what_does_not_fit_together_is_refused",
    ),
    "rule that reads rows alone": Entry(
        REFUSED,
        "`verification` is {name!r}, but a logits processor looks at the whole batch",
        "pass verification='token', or one row at a time",
        test="test_what_does_not_fit_together_is_refused",
    ),
}

# caches that the caller passes
CACHES: Table = {
    "quantized": Entry(
        REFUSED,
        "the cache that was passed is a {name}, which holds keys and values in fewer bits",
        "leave it out, or drop `assistant_model`",
        test=_CACHES,
    ),
    "offloaded": Entry(
        REFUSED,
        "the cache that was passed is a {name} that moves its layers off the device",
        "leave it out, or drop `assistant_model`",
        test=_CACHES,
    ),
    "foreign": Entry(
        REFUSED,
        "the cache that was passed is a {name}, which is none of transformers and may hold other"
        " slots than those of all tokens",
        "pass a DynamicCache, or drop `assistant_model`",
        test=_CACHES,
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

# logits processors by class; which are which is told in sequences.py
PROCESSORS: Table = {
    **{one.__name__: Entry(TREE, "remembers", test=_REMEMBER) for one in STATEFUL},
    **{
        one.__name__: Entry(TREE, "looks at the batch: rows grow alike", test=_PROCESSORS)
        for one in STATELESS
    },
    **{one.__name__: Entry(TREE, "looks at one row", test=_PROCESSORS) for one in ROW_WISE},
    **{one.__name__: Entry(TREE, "looks at logits alone", test=_PROCESSORS) for one in PREFIX_FREE},
    "any other": Entry(
        TREE,
        "sees each token once, in order, with all rows of the batch: none leaves the pass, and all"
        " grow alike",
        test="test_a_processor_that_remembers_sees_each_position_once_with_all_rows",
    ),
}
# stopping criteria by class
CRITERIA: Table = {
    **{one.__name__: Entry(TREE, "looks at one row", test=_CRITERIA) for one in ROW_WISE_CRITERIA},
    "any other": Entry(
        TREE,
        "sees all rows after each token, as in plain `generate`: none leaves the pass, and all"
        " grow alike",
        test=_CRITERIA,
    ),
}
# what else counts the rows of a pass
ROWS: Table = {
    "adapter_names": Entry(
        TREE,
        "adapters of PEFT by row: no row leaves the pass",
        test="test_rows_with_adapters_of_their_own_have_their_own_text",
    ),
    "forward hooks": Entry(
        TREE,
        "hooks that no library has put there: no row leaves the pass",
        test="test_a_hook_with_state_by_row_sees_all_rows_in_each_pass",
    ),
}

TABLES: dict[str, Table] = {
    "Modes of a call": MODES,
    "Prompts of a call": INPUTS,
    "Caches of a call": CACHES,
    "Logits processors": PROCESSORS,
    "Stopping criteria": CRITERIA,
    "Rows of a call": ROWS,
    **FIELD_TABLES,
}
