"""Calls that never draft, and the rest of calls that have stepped back, are plain `generate`'s."""

import pytest
import torch
from conftest import VOCAB, as_drafter, tiny_target
from transformers import GenerationMixin, LogitsProcessorList, TopKLogitsWarper
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from coral_hf import CoralDrafter
from coral_hf.decoding import DraftTree
from coral_hf.decoding.caches.continuation import CACHE
from coral_hf.decoding.plain import draft_policy

LENGTH, NEW, STEPS_BACK = 9, 40, 3
SAMPLES = {"do_sample": True, "top_p": 0.9, "repetition_penalty": 1.2}
PROCESSORS = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 5}


class KnowsSomeRows:
    """Drafts chains that some rows accept whole, and others not at all."""

    layers = ()

    def __init__(self, text, known, prompt=LENGTH):
        self.text, self.known, self.prompt = text, torch.tensor(known), prompt

    def begin(self, tokens, features, positions):
        self.rows = torch.arange(len(tokens))
        self.lengths = torch.full((len(tokens),), self.prompt + 1)

    def select(self, rows):
        self.rows, self.lengths = self.rows[rows], self.lengths[rows]

    def commit(self, tokens, features, counts):
        self.lengths += counts

    def memory(self):
        return None

    def propose(self, root, shape, warp=None):
        ids = torch.arange(shape.depth + 1)[None].expand(len(root), -1)
        tokens = self.text[self.rows[:, None], self.lengths[:, None] - 1 + ids]
        tokens = torch.where(self.known[self.rows][:, None], tokens, (tokens + 1) % VOCAB)
        return DraftTree(tokens, (ids - 1).clamp(min=0), ids)


class Newest:
    """A streamer that keeps what it gets."""

    def __init__(self):
        self.got, self.has_ended = [], False

    def put(self, value):
        self.got.append(value.tolist())

    def end(self):
        self.has_ended = True


@pytest.fixture
def steps_back(monkeypatch):
    """Drafting is given up after a few rounds."""

    class StepsBack(draft_policy.DraftPolicy):
        rounds = 0

        def note(self, sample):
            self.rounds += 1
            self.is_plain = self.rounds == STEPS_BACK

    policy = "coral_hf.decoding.generate.choose_policy"
    monkeypatch.setattr(policy, lambda model, shape, *_: StepsBack(shape))


@pytest.fixture
def prompts():
    ids = torch.randint(3, VOCAB, (3, LENGTH), generator=torch.Generator().manual_seed(0))
    ids[1, :3] = ids[2, 0] = 0
    return {"inputs": ids, "attention_mask": (ids != 0).long(), "max_new_tokens": NEW}


@pytest.fixture(params=["llama", "mistral_window", "gpt2"])
def target(request):
    model = tiny_target(request.param)
    model.generation_config.pad_token_id = 0
    return model


def both(target, drafter, given, **settings):
    """The output of plain `generate`, and with a drafter."""
    given = {"do_sample": False, "return_dict_in_generate": True, **given}
    torch.manual_seed(0)
    plain = target.generate(**given)
    torch.manual_seed(0)
    return plain, target.generate(**given, assistant_model=drafter, **settings)


def assert_same(plain, ours):
    """Compare tokens, and whatever else was asked for of each."""
    assert ours.sequences.equal(plain.sequences)
    for name in ("scores", "logits"):
        pairs = zip(getattr(plain, name) or (), getattr(ours, name) or (), strict=True)
        for one, other in pairs:
            torch.testing.assert_close(other, one)


# ---- never


@pytest.mark.parametrize(
    "settings", [{}, PROCESSORS, SAMPLES], ids=["greedy", "processed", "drawn"]
)
def test_a_call_that_never_drafts_is_plain_generate(target, prompts, settings):
    drafter = CoralDrafter.from_target(target).eval()
    given = {**prompts, **settings, "output_scores": True}
    plain, ours = both(target, drafter, given, speculation="never")
    assert_same(plain, ours)
    assert [type(layer) for layer in ours[CACHE].layers] == [type(x) for x in plain[CACHE].layers]
    assert ours.stats.num_rounds == NEW - 1 and ours.stats.acceptance_length == 1
    assert ours.stats.prefill_seconds > 0 and ours.stats.verify_seconds > 0


def test_a_call_that_never_drafts_returns_tokens_alone_where_they_are_asked_for(target, prompts):
    given = {**prompts, "return_dict_in_generate": False}
    plain, ours = both(target, CoralDrafter.from_target(target), given, speculation="never")
    assert ours.equal(plain)


def test_settings_are_checked_where_nothing_is_drafted(target, prompts):
    drafter = CoralDrafter.from_target(target)
    for wrong in ({"tree_depth": 0}, {"verification": "block"}, {"draft_head": "routed"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            target.generate(**prompts, assistant_model=drafter, speculation="never", **wrong)


def test_rounds_of_rows_that_end_early_are_counted_to_their_end(target, prompts):
    text = target.generate(**prompts, do_sample=False)
    ends = {"eos_token_id": int(text[1, LENGTH + 4])}
    plain, ours = both(
        target, CoralDrafter.from_target(target), prompts | ends, speculation="never"
    )
    assert_same(plain, ours)
    new = plain.sequences[:, LENGTH:].tolist()
    first = [row.index(ends["eos_token_id"]) if ends["eos_token_id"] in row else -1 for row in new]
    passes = [at if at >= 0 else len(row) - 1 for at, row in zip(first, new, strict=True)]
    assert len(ours.stats.round_lengths) == sum(passes)


@pytest.mark.parametrize("order", [("always", "never"), ("never", "always")])
def test_a_cache_continues_in_a_call_of_the_other_kind(target, order):
    drafter = CoralDrafter.from_target(target).eval()
    ids = torch.randint(3, VOCAB, (1, LENGTH))
    mask = torch.ones(1, LENGTH + 10, dtype=torch.long)
    plain = target.generate(ids, do_sample=False, max_new_tokens=24)
    given = {"do_sample": False, "return_dict_in_generate": True, "assistant_model": drafter}
    first = target.generate(ids, max_new_tokens=10, speculation=order[0], **given)
    given |= {CACHE: first[CACHE], "attention_mask": mask, "max_new_tokens": 14}
    second = target.generate(first.sequences, speculation=order[1], **given)
    assert second.sequences.equal(plain)


# ---- stepping back


@pytest.mark.parametrize("known", [[False] * 3, [True, False, True]], ids=["even", "uneven"])
@pytest.mark.parametrize("settings", [{}, PROCESSORS], ids=["greedy", "processed"])
def test_the_rest_of_a_call_that_steps_back_is_plain_generates(
    target, prompts, steps_back, known, settings
):
    target.set_attn_implementation("eager")  # NaN for padding
    prompts["inputs"].clamp_(min=1)
    prompts["attention_mask"].fill_(1)
    given = {**prompts, **settings, "output_scores": True, "output_logits": True}
    text = target.generate(**prompts, **settings, do_sample=False)
    plain, ours = both(target, as_drafter(KnowsSomeRows(text, known)), given)
    assert ours.sequences.equal(plain.sequences)
    assert ours.stats.is_stepped_back and ours.stats.num_levels <= STEPS_BACK * 6
    for name in ("scores", "logits"):
        for one, other in zip(plain[name], ours[name], strict=True):
            torch.testing.assert_close(other, one)


@pytest.mark.parametrize("known", [[False] * 3, [True, False, True]], ids=["even", "uneven"])
def test_rows_that_ended_before_stay_as_they_are(target, prompts, steps_back, known):
    text = target.generate(**prompts, do_sample=False)
    ends = {"eos_token_id": [int(text[0, LENGTH + 1]), int(text[2, -5])], "pad_token_id": 0}
    drafter = as_drafter(KnowsSomeRows(text, known))
    for settings in ({}, PROCESSORS):
        plain, ours = both(target, drafter, prompts | ends | settings)
        assert_same(plain, ours)
        tokens = sum(row.count(0) == 0 for row in plain.sequences[:, LENGTH:].T.tolist())
        assert tokens <= len(ours.stats.round_lengths)


def test_a_batch_that_is_watched_as_a_whole_steps_back(target, prompts, steps_back):
    class Watching(TopKLogitsWarper):
        """Unknown to us, so it may look at the whole batch."""

        def __call__(self, input_ids, scores):
            assert len(scores) == 3
            return super().__call__(input_ids, scores)

    text = target.generate(**prompts, do_sample=False)
    given = {**prompts, "eos_token_id": int(text[0, LENGTH + 1])}
    given["logits_processor"] = LogitsProcessorList([Watching(5)])
    plain, ours = both(target, as_drafter(KnowsSomeRows(text, [True, False, True])), given)
    assert_same(plain, ours)


def test_a_streamer_gets_every_token_once_when_drafting_steps_back(target, steps_back):
    ids = torch.randint(3, VOCAB, (1, LENGTH))
    text = target.generate(ids, do_sample=False, max_new_tokens=NEW)
    given = {"inputs": ids, "do_sample": False, "max_new_tokens": NEW}
    plain, ours = Newest(), Newest()
    target.generate(**given, streamer=plain)
    target.generate(**given, streamer=ours, assistant_model=as_drafter(KnowsSomeRows(text, [True])))
    assert ours.got == plain.got and ours.has_ended


def test_a_text_that_came_as_its_new_tokens_steps_back(target, steps_back):
    ids = torch.randint(3, VOCAB, (1, LENGTH))
    plain = target.generate(ids, do_sample=False, max_new_tokens=NEW)
    cache = target.generate(ids, do_sample=False, max_new_tokens=6, return_dict_in_generate=True)[
        CACHE
    ]
    drafter = as_drafter(KnowsSomeRows(plain, [True], LENGTH + 6))
    length = LENGTH + 6  # of which the cache lacks the last
    ours = target.generate(
        plain[:, length - 1 : length],
        attention_mask=torch.ones(1, length, dtype=torch.long),
        do_sample=False,
        max_new_tokens=NEW - 6,
        assistant_model=drafter,
        **{CACHE: cache},
    )
    assert ours[:, 1:].equal(plain[:, length:])


def test_a_cache_is_as_plain_generates_after_stepping_back(target, prompts, steps_back):
    text = target.generate(**prompts, do_sample=False)
    plain, ours = both(target, as_drafter(KnowsSomeRows(text, [True, False, True])), prompts)
    for one, other in zip(plain[CACHE].layers, ours[CACHE].layers, strict=True):
        assert isinstance(other, DynamicLayer) and other.get_seq_length() == one.get_seq_length()
        assert other.keys.untyped_storage().nbytes() == one.keys.untyped_storage().nbytes()
        if type(one) is not DynamicSlidingWindowLayer:
            assert other.keys.shape == one.keys.shape


def test_images_of_a_prompt_are_read_once(target, prompts, steps_back, monkeypatch):
    seen, prepare = [], GenerationMixin.prepare_inputs_for_generation

    def note(self, *args, is_first_iteration=False, **kwargs):
        seen.append(is_first_iteration)
        return prepare(self, *args, is_first_iteration=is_first_iteration, **kwargs)

    monkeypatch.setattr(GenerationMixin, "prepare_inputs_for_generation", note)
    drafter = as_drafter(KnowsSomeRows(torch.zeros(3, 99, dtype=torch.long), [False] * 3))
    target.generate(**prompts, do_sample=False, assistant_model=drafter)
    assert seen[0] and not any(seen[1:]) and len(seen) > NEW // 2
