"""What a drafter keeps of a text, which it reads in pieces: all, or the window that it has."""

import pytest
import torch
from conftest import VOCAB, tiny_target
from transformers import LogitsProcessorList, NoRepeatNGramLogitsProcessor, StoppingCriteriaList
from transformers import RepetitionPenaltyLogitsProcessor as RepetitionPenalty

from coral_hf import CoralDrafter
from coral_hf.decoding.caches.continuation import CACHE
from coral_hf.decoding.drafting import TreeShape
from coral_hf.decoding.sequences import Sequences
from coral_hf.drafters import cached_drafting as drafting
from coral_hf.drafters.coral import CoralDrafting
from coral_hf.target import read_target

LENGTH = 90
SHAPE = TreeShape(depth=4, top_k=3, nodes=12)


@pytest.fixture
def target():
    return tiny_target("llama")


@pytest.fixture
def drafter(target):
    return CoralDrafter.from_target(target).eval()


def begun(drafter, target, padding=0, **options):
    """The drafting of a call that has read two prompts, of which one is padded."""
    own = CoralDrafting(drafter, read_target(target), **options)
    chance = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, VOCAB, (2, LENGTH + 1), generator=chance)
    features = torch.randn(2, LENGTH, 32, generator=chance, dtype=torch.float64)
    positions = torch.arange(LENGTH).repeat(2, 1)
    positions[1] = (positions[1] - padding).clamp(min=-1)
    own.begin(tokens, features, positions)
    return own, tokens[:, -1]


@pytest.mark.parametrize("padding", [0, 30])
@pytest.mark.parametrize("window", [None, 40])
def test_a_prompt_read_in_pieces_is_drafted_from_as_one_read_at_once(
    target, drafter, monkeypatch, padding, window
):
    trees = []
    with torch.no_grad():
        for least, largest in ((128, 1024), (1, 7)):
            monkeypatch.setattr(drafting, "LEAST_PIECE", least)
            monkeypatch.setattr(drafting, "LARGEST_PIECE", largest)
            own, root = begun(drafter, target, padding, draft_window=window)
            trees.append(own.propose(root, SHAPE))
    assert trees[0].tokens.equal(trees[1].tokens) and trees[0].parents.equal(trees[1].parents)


def test_a_window_beyond_the_text_changes_nothing(target, drafter):
    with torch.no_grad():
        trees = []
        for window in (None, 2 * LENGTH):
            own, root = begun(drafter, target, draft_window=window)
            trees.append(own.propose(root, SHAPE))
    assert trees[0].tokens.equal(trees[1].tokens)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("is_default", [False, True])
def test_a_drafter_with_a_window_keeps_no_more_and_the_output_is_unchanged(
    target, drafter, rows, is_default
):
    ids = torch.randint(3, VOCAB, (rows, LENGTH))
    given = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 40}
    plain = target.generate(ids, **given)
    option = {} if is_default else {"draft_window": 32}
    if is_default:
        drafter.generation_config.draft_window = 32
    given |= {"assistant_model": drafter, "speculation": "always", "return_dict_in_generate": True}
    ours = target.generate(ids, **given, **option)
    assert ours.sequences.equal(plain)
    if rows == 1:  # else it is forgotten where rows have ended earlier than others
        (layer,) = ours[CACHE].drafter_memory.cache.layers
        assert layer.held <= 32 + layer.slack
        assert layer.keys.untyped_storage().nbytes() <= 3 * layer.held * 32 * 8


def test_a_text_continues_with_a_drafters_window(target, drafter):
    ids = torch.randint(3, VOCAB, (1, LENGTH))
    plain = target.generate(ids, do_sample=False, max_new_tokens=40)
    given = {"do_sample": False, "max_new_tokens": 20, "assistant_model": drafter}
    given |= {"return_dict_in_generate": True, "draft_window": 32}
    first = target.generate(ids, attention_mask=torch.ones_like(ids), **given)
    mask = torch.ones_like(first.sequences)
    cache = {CACHE: first[CACHE]}
    second = target.generate(first.sequences, attention_mask=mask, **given, **cache)
    assert second.sequences.equal(plain)


def test_a_window_that_holds_no_tree_is_refused(target, drafter):
    with pytest.raises(ValueError, match="`draft_window` is 8"):
        CoralDrafting(drafter, read_target(target), draft_window=8)


def test_rows_of_one_length_are_processed_as_a_batch_and_as_alone():
    ids = torch.randint(0, VOCAB, (4, 12))
    processors = LogitsProcessorList([RepetitionPenalty(1.5), NoRepeatNGramLogitsProcessor(2)])
    sequences = Sequences(ids, processors, StoppingCriteriaList())
    sequences.lengths = [12, 9, 12, 9]
    logits = torch.randn(3, VOCAB)
    found = sequences.scores([0, 1, 3], logits)
    for row, one, scores in zip([0, 1, 3], logits, found, strict=True):
        alone = processors(ids[row : row + 1, : sequences.lengths[row]], one[None].clone())
        assert scores.equal(alone[0])
