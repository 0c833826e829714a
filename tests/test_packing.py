"""Packed rows train exactly what their documents train one by one."""

import pytest
import torch
from conftest import OTHERS, VOCAB, make_target, tiny_target
from datasets import Dataset, IterableDataset
from hypothesis import given, settings
from hypothesis import strategies as st
from test_trainer import make_trainer

from coral_hf import CoralDrafter
from coral_hf.training.data import CoralCollator, pack_dataset
from coral_hf.training.data.documents import best_fit, parts_of
from coral_hf.training.evaluation.acceptance import first_document
from coral_hf.training.features.reading import TargetFeatures, reads_parts
from coral_hf.training.steps.unroll import unroll


def document_lengths(positions: torch.Tensor) -> list[list[int]]:
    """The lengths of the documents of each row, of positions (batch, length)."""
    return [[part.stop - part.start for part in parts] for parts in parts_of(positions)]


LENGTHS = [7, 3, 12, 5, 4, 9]
ROOM = 16


def make_rows() -> list[dict]:
    torch.manual_seed(0)
    texts = [torch.randint(2, VOCAB, (length,)).tolist() for length in LENGTHS]
    return [
        {"input_ids": text, "attention_mask": [1] * len(text), "labels": [-100, -100, *text[2:]]}
        for text in texts
    ]


@pytest.fixture(scope="module")
def packed() -> Dataset:
    return pack_dataset(Dataset.from_list(make_rows()), ROOM)


def test_no_document_is_cut_or_lost(packed):
    texts = []
    for row in packed:
        lengths = document_lengths(torch.tensor([row["position_ids"]]))[0]
        texts += [part.tolist() for part in torch.tensor(row["input_ids"]).split(lengths)]
    assert sorted(texts) == sorted(row["input_ids"] for row in make_rows())
    assert all(len(row["input_ids"]) <= ROOM for row in packed)


def test_a_document_goes_where_it_leaves_the_least_space():
    assert best_fit([7, 3, 12, 5, 4, 9], 16) == [[2, 4], [5, 0], [3, 1]]


@settings(deadline=None)
@given(st.lists(st.integers(1, 50), max_size=40))
def test_every_document_is_in_one_row_and_no_row_is_too_long(lengths):
    rows = best_fit(lengths, 50)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in row) <= 50 for row in rows)


def test_padding_is_a_document_of_its_own(packed):
    batch = CoralCollator()(list(packed))
    assert batch["position_ids"].shape == batch["input_ids"].shape
    assert [sum(row) for row in document_lengths(batch["position_ids"])] == [16, 16, 16]
    assert document_lengths(batch["position_ids"])[2] == [5, 3, 8]


def test_a_stream_is_packed_too():
    stream = pack_dataset(Dataset.from_list(make_rows()).to_iterable_dataset(), ROOM)
    assert [len(row["input_ids"]) for row in stream] == [16, 16, 8]


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral_window", "qwen3_moe"])
def test_targets_of_transformers_keep_packed_documents_apart(family):
    assert reads_parts(tiny_target(family, torch.float32), torch.device("cpu"))


@pytest.mark.parametrize("family", ["bloom", "falcon_alibi", "gpt_neo", "lfm2", "recurrent_gemma"])
def test_a_target_that_attends_across_documents_reads_them_one_by_one(family):
    target = make_target(OTHERS[family], torch.float32)
    features = TargetFeatures(target)
    batch = CoralCollator()(list(pack_dataset(Dataset.from_list(make_rows()), ROOM)))
    found = features.read(batch).flatten(0, 1)
    lengths = [length for row in document_lengths(batch["position_ids"]) for length in row]
    texts = batch["input_ids"].flatten().split(lengths)
    for ids, document in zip(texts, found.split(lengths), strict=True):
        alone = target.get_decoder()(ids[None], use_cache=False).last_hidden_state[0]
        torch.testing.assert_close(document, alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("num_steps", [1, 3])
def test_the_unroll_of_a_packed_row_is_that_of_its_documents(num_steps):
    target = tiny_target("llama", torch.float64)
    torch.manual_seed(0)
    drafter = CoralDrafter.from_target(target, num_hidden_layers=2)
    embeddings, features = torch.randn(2, 2, 11, 32, dtype=torch.float64)
    positions = torch.tensor([[*range(4), *range(1), *range(6)], [*range(11)]])
    packed = unroll(drafter, embeddings, features, num_steps, positions)
    for row, part in ((0, slice(0, 4)), (0, slice(4, 5)), (0, slice(5, 11)), (1, slice(0, 11))):
        alone = unroll(drafter, embeddings[[row], part], features[[row], part], num_steps)
        torch.testing.assert_close(packed[:, [row], part], alone)


@pytest.mark.parametrize("negatives", ["sequence", "batch"])
def test_packed_rows_have_the_loss_and_the_gradient_of_their_documents(tmp_path, negatives):
    found = []
    for packing in (False, True):
        trainer = make_trainer(
            tiny_target("llama", torch.float32),
            make_rows(),
            tmp_path,
            packing=packing,
            max_length=ROOM,
            csra_negatives=negatives,
            per_device_train_batch_size=8,
        )
        batch = next(iter(trainer.get_train_dataloader()))
        assert len(batch["input_ids"]) == (3 if packing else 6)
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        found.append((loss.detach(), trainer.model.fc.weight.grad))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def test_labels_of_a_documents_first_two_tokens_are_never_trained():
    rows = [dict(row, labels=row["input_ids"]) for row in make_rows()]
    for dataset in (Dataset.from_list(rows), pack_dataset(Dataset.from_list(rows), ROOM)):
        batch = CoralCollator()(list(dataset))
        assert (batch["labels"] != -100).sum() == sum(length - 2 for length in LENGTHS)


def test_a_stream_without_column_names_is_packed_once(tmp_path):
    def rows():
        yield from make_rows()

    stream = IterableDataset.from_generator(rows)
    target = tiny_target("llama", torch.float32)
    trainer = make_trainer(target, stream, tmp_path, packing=True, max_length=ROOM, max_steps=1)
    found = list(trainer.train_dataset)
    assert [len(row["input_ids"]) for row in found] == [16, 16, 8]
    again = make_trainer(target, trainer.train_dataset, tmp_path, packing=True, max_length=ROOM)
    assert [row["position_ids"] for row in again.train_dataset] == [
        row["position_ids"] for row in found
    ]


def test_held_out_rows_are_not_packed(tmp_path):
    settings = {
        "packing": True,
        "max_length": ROOM,
        "eval_prompt_length": 4,
        "eval_max_new_tokens": 4,
    }
    trainer = make_trainer(tiny_target("llama", torch.float32), make_rows(), tmp_path, **settings)
    held_out = Dataset.from_list(make_rows())
    assert 0 < trainer.evaluate(held_out)["eval_loss"] < 100
    packed = [first_document(row) for row in pack_dataset(held_out, ROOM)]
    assert [len(row["input_ids"]) for row in packed] == [12, 9, 5]


@pytest.mark.parametrize("packing", [False, True])
def test_token_rows_longer_than_max_length_are_refused(tmp_path, packing):
    target = tiny_target("llama", torch.float32)
    with pytest.raises(ValueError, match="`max_length` is 8, but a row of `dataset` has 12 tokens"):
        make_trainer(target, make_rows(), tmp_path, packing=packing, max_length=8)
