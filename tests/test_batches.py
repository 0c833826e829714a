"""A batch gives what its rows give one by one, and goes at the pace of each row."""

import pytest
import torch
from conftest import VOCAB, noted_passes, scatter_weights, tiny_target
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    SynthIDTextWatermarkingConfig,
)
from transformers.generation.streamers import BaseStreamer

from coral_hf import CoralDrafter
from coral_hf.decoding.caches.continuation import CACHE

TREE = {"tree_depth": 3, "tree_top_k": 3, "tree_nodes": 8}
PAD = 0


@pytest.fixture(scope="module")
def target():
    model = tiny_target("llama", torch.float64)
    model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(scope="module")
def drafter(target):
    torch.manual_seed(0)
    drafter = CoralDrafter.from_target(target).eval()
    scatter_weights(drafter, seed=1)
    return drafter


def make_prompts(lengths=(5, 9, 2, 7), seed=0):
    """Left-padded prompts and their mask, (rows, longest) each."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.full((len(lengths), max(lengths)), PAD)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, -length:] = torch.randint(3, VOCAB, (length,), generator=generator)
        mask[row, -length:] = 1
    return {"input_ids": ids, "attention_mask": mask}


def new_tokens(out, prompts):
    out = out if isinstance(out, torch.Tensor) else out.sequences
    return out[:, prompts["input_ids"].shape[1] :].tolist()


def row_by_row(target, prompts, **settings):
    """The new tokens of plain generation of each row alone, without its padding."""
    found = []
    for ids, mask in zip(*prompts.values(), strict=True):
        ids = ids[mask.bool()][None]
        out = target.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **settings)
        found.append(out[0, ids.shape[1] :].tolist())
    return found


def padded_alike(rows):
    longest = max(map(len, rows))
    return [row + [PAD] * (longest - len(row)) for row in rows]


class PassSizes:
    """How many rows and nodes each pass of a target has read."""

    def __init__(self, target):
        self.rows, self.target = [], target

    def __enter__(self):
        def note(module, args, kwargs):
            self.rows.append(kwargs["input_ids"].shape[0])

        self.watch = noted_passes(self.target, note)
        self.watch.__enter__()
        return self

    def __exit__(self, *exception):
        self.watch.__exit__(*exception)


@pytest.mark.parametrize("tree", [TREE, {"tree_depth": 4, "tree_top_k": 1, "tree_nodes": 5}])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_each_row_has_the_tokens_that_it_has_alone(tree, attention):
    # transformers' eager attention makes NaN of padding in float64: it hides it with its least
    # number, which is -inf in the softmax's fp32
    target = tiny_target("llama", torch.float32 if attention == "eager" else torch.float64)
    target.set_attn_implementation(attention)
    drafter = CoralDrafter.from_target(target).eval()
    prompts = make_prompts()
    out = target.generate(
        **prompts, assistant_model=drafter, do_sample=False, max_new_tokens=24, **tree
    )
    assert new_tokens(out, prompts) == row_by_row(target, prompts, max_new_tokens=24)


def first_tokens_of(target, prompts, rows, position):
    plain = row_by_row(target, prompts, max_new_tokens=24)
    return [plain[row][position] for row in rows]


def test_rows_end_at_their_own_eos_and_cost_nothing_from_then_on(target, drafter):
    prompts = make_prompts()
    eos = first_tokens_of(target, prompts, [0, 1], 5)
    settings = {"eos_token_id": eos, "max_new_tokens": 24}
    with PassSizes(target) as passes:
        out = target.generate(
            **prompts, assistant_model=drafter, do_sample=False, **settings, **TREE
        )
    rows = row_by_row(target, prompts, **settings)
    assert len({len(row) for row in rows}) > 1
    assert new_tokens(out, prompts) == padded_alike(rows)
    assert passes.rows[0] == 4 and passes.rows[-1] < 4
    assert passes.rows == sorted(passes.rows, reverse=True)


def test_rows_accept_different_lengths_in_a_round(target, drafter):
    prompts = make_prompts()
    out = target.generate(
        **prompts,
        assistant_model=drafter,
        do_sample=False,
        max_new_tokens=24,
        return_dict_in_generate=True,
        **TREE,
    )
    lengths = out.stats.round_lengths
    assert sum(lengths) == 4 * 23
    assert len(set(lengths)) > 1
    assert out.stats.num_rounds < len(lengths)


def test_num_return_sequences_gives_samples_that_differ_and_that_a_seed_repeats(target, drafter):
    prompts = make_prompts((5, 9))
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        out = target.generate(
            **prompts,
            assistant_model=drafter,
            do_sample=True,
            top_k=0,
            num_return_sequences=3,
            max_new_tokens=12,
            **TREE,
        )
        runs.append(new_tokens(out, prompts))
    assert len(runs[0]) == 6 and len(set(map(tuple, runs[0]))) > 3
    assert runs[0] == runs[1] != runs[2]


PROCESSORS = {
    "repetition_penalty": 1.7,
    "no_repeat_ngram_size": 2,
    "bad_words_ids": [[5], [7, 9]],
    "min_new_tokens": 9,
    "sequence_bias": [[[11], 4.0], [[12, 13], 8.0]],
    "suppress_tokens": [4, 8, 15],
    "begin_suppress_tokens": [3, 6],
    "forced_eos_token_id": 5,
    "exponential_decay_length_penalty": (6, 1.3),
    "guidance_scale": 1.6,
    "prefix_allowed_tokens_fn": lambda row, ids: [(7 * row + int(ids[-1])) % 36 + 1, 2 + row, 38],
    "watermarking_config": {"bias": 3.0, "seeding_scheme": "selfhash"},
    "encoder_repetition_penalty": 1.9,
    "encoder_no_repeat_ngram_size": 2,
    "forced_bos_token_id": 21,
    "min_length": 12,
    "renormalize_logits": True,
    "remove_invalid_values": True,
}
# processors that remember, made anew for each call
STATEFUL = {
    "synthid": lambda: {
        "watermarking_config": SynthIDTextWatermarkingConfig(keys=[3, 5, 7], ngram_len=3)
    },
    "grammar": lambda: {"logits_processor": LogitsProcessorList([Remembering()])},
}


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("rows", [(6,), (5, 9, 2)])
def test_every_processor_acts_as_in_the_plain_call(target, drafter, name, rows):
    prompts = make_prompts(rows, seed=3)
    settings = {name: PROCESSORS[name], "eos_token_id": 17, "max_new_tokens": 14}
    plain = target.generate(**prompts, do_sample=False, **settings)
    drafted = target.generate(
        **prompts, do_sample=False, assistant_model=drafter, **settings, **TREE
    )
    assert new_tokens(drafted, prompts) == new_tokens(plain, prompts)


@pytest.mark.parametrize("name", STATEFUL)
@pytest.mark.parametrize("rows", [(6,), (5, 9, 2)])
def test_every_processor_that_remembers_acts_as_in_the_plain_call(target, drafter, name, rows):
    prompts, settings = make_prompts(rows, seed=4), {"max_new_tokens": 24, "do_sample": False}
    plain = target.generate(**prompts, **settings, **STATEFUL[name]())
    drafted = target.generate(
        **prompts, assistant_model=drafter, **settings, **STATEFUL[name](), **TREE
    )
    assert new_tokens(drafted, prompts) == new_tokens(plain, prompts)
    assert new_tokens(plain, prompts) != new_tokens(target.generate(**prompts, **settings), prompts)


class Remembering(LogitsProcessor):
    """Forbids each row the tokens that it has ended with before: it looks at all rows."""

    def __init__(self):
        self.seen = []

    def __call__(self, input_ids, scores):
        self.seen.append(input_ids.clone())
        for ids in self.seen:
            scores = scores.scatter(1, ids[:, -1:], float("-inf"))
        return scores


def test_a_processor_that_remembers_sees_each_position_once_with_all_rows(target, drafter):
    prompts = make_prompts()
    found = []
    for assistant in ({}, {"assistant_model": drafter, **TREE}):
        remembering = Remembering()
        processors = LogitsProcessorList([remembering])
        out = target.generate(
            **prompts, do_sample=False, max_new_tokens=12, logits_processor=processors, **assistant
        )
        found.append((new_tokens(out, prompts), [ids.tolist() for ids in remembering.seen]))
    assert found[0] == found[1]


class StopWhenAnyRowHas(StoppingCriteria):
    """Ends every row as soon as one of them has a token."""

    def __init__(self, token):
        self.token = token

    def __call__(self, input_ids, scores, **kwargs):
        has_it = bool((input_ids[:, -1] == self.token).any())
        return torch.full((len(input_ids),), has_it)


def test_a_criterion_over_the_whole_batch_stops_all_rows_at_once(target, drafter):
    prompts = make_prompts()
    (token,) = first_tokens_of(target, prompts, [2], 6)
    settings = {"stopping_criteria": [StopWhenAnyRowHas(token)], "max_new_tokens": 20}
    plain = target.generate(**prompts, do_sample=False, **settings)
    drafted = target.generate(
        **prompts, do_sample=False, assistant_model=drafter, **settings, **TREE
    )
    assert plain.tolist() == drafted.tolist()


class Columns(BaseStreamer):
    def __init__(self):
        self.columns = []

    def put(self, value):
        self.columns.append(value.tolist())

    def end(self):
        self.columns.append("end")


def test_a_streamer_gets_the_batch_token_by_token(target, drafter):
    prompts = make_prompts()
    eos = first_tokens_of(target, prompts, [1], 4)
    streamed = []
    for assistant in ({}, {"assistant_model": drafter, **TREE}):
        streamer = Columns()
        target.generate(
            **prompts,
            do_sample=False,
            max_new_tokens=10,
            eos_token_id=eos,
            streamer=streamer,
            **assistant,
        )
        streamed.append(streamer.columns)
    assert streamed[0] == streamed[1]


@pytest.mark.parametrize("rows", [(6,), (5, 9, 2)])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_scores_and_logits_have_the_plain_calls_shapes_and_values(rows, family):
    target = tiny_target(family, torch.float32)
    drafter = CoralDrafter.from_target(target).eval()
    prompts = make_prompts(rows)
    settings = {
        "do_sample": False,
        "max_new_tokens": 9,
        "repetition_penalty": 1.3,
        "return_dict_in_generate": True,
        "eos_token_id": None,
        "pad_token_id": PAD,
        **dict.fromkeys(("output_scores", "output_logits"), True),
    }
    plain = target.generate(**prompts, **settings)
    drafted = target.generate(**prompts, **settings, assistant_model=drafter, **TREE)
    assert drafted.sequences.equal(plain.sequences)
    for name in ("scores", "logits"):
        torch.testing.assert_close(drafted[name], plain[name], rtol=1e-3, atol=1e-4)


def test_the_returned_cache_of_a_batch_is_a_prefill_of_all_but_the_last_tokens(target, drafter):
    prompts = make_prompts()
    eos = first_tokens_of(target, prompts, [0, 1], 5)
    out = target.generate(
        **prompts,
        assistant_model=drafter,
        do_sample=False,
        max_new_tokens=24,
        eos_token_id=eos,
        return_dict_in_generate=True,
        **TREE,
    )
    start = prompts["input_ids"].shape[1]
    rows = row_by_row(target, prompts, max_new_tokens=24, eos_token_id=eos)
    mask = torch.cat([prompts["attention_mask"], torch.ones(4, 24)], dim=1).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    width = out.sequences.shape[1]
    fresh = target(
        out.sequences, attention_mask=mask[:, :width], position_ids=positions[:, :width]
    )[CACHE]
    assert out[CACHE].get_seq_length() == width - 1
    for ours, theirs in zip(out[CACHE].layers, fresh.layers, strict=True):
        for row, tokens in enumerate(rows):
            first, stop = int((mask[row] == 0).sum()), start + len(tokens) - 1
            for name in ("keys", "values"):
                found, expected = (
                    getattr(layer, name)[row, :, first:stop] for layer in (ours, theirs)
                )
                torch.testing.assert_close(found, expected)


def test_a_mask_that_ends_in_padding_is_refused(target, drafter):
    prompts = make_prompts()
    flipped = {name: tensor.flip(1) for name, tensor in prompts.items()}
    with pytest.raises(ValueError, match="pad on the left"):
        target.generate(**flipped, assistant_model=drafter, max_new_tokens=4)
