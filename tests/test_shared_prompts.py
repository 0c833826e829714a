"""Rows that share a prompt train exactly what they train as rows of their own."""

import pytest
import torch
from conftest import OTHERS, VOCAB, make_target, tiny_target
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data import tiny_tokenizer
from test_flex_attention import eager_flex  # noqa: F401  flex attention on a CPU
from test_trainer import make_trainer

from coral_hf import (
    CoralDrafter,
    CoralTrainer,
    CoralTrainingArguments,
    Eagle3Drafter,
    MedusaDrafter,
    RecurrentDrafter,
)
from coral_hf.training.data import CoralCollator, pack_dataset, share_prompts
from coral_hf.training.data.documents import REPEATED, has_branches, parts_of
from coral_hf.training.features import CachedFeatures, write_features
from coral_hf.training.features.reading import TargetFeatures, reads_parts
from coral_hf.training.steps.unroll import unroll

ROOM = 96
NONE = -100


def make_rows() -> list[dict]:
    """Rows of two conversations of a target whose template drops thoughts, an answer each.

    prompt    <q1> <bot>              <q1> <bot> <a1> <q2> <bot>             and so on
    answer    <thought> <a1> <end>    <thought> <a2> <end>
    """
    generator = torch.Generator().manual_seed(0)

    def words(length: int) -> list[int]:
        return torch.randint(2, VOCAB, (length,), generator=generator).tolist()

    rows = []
    for answers in ([5, 7, 4], [6, 3]):
        prompt: list[int] = []
        for length in answers:
            prompt = [*prompt, *words(12)]
            thought, answer = words(3), words(length)
            ids = [*prompt, *thought, *answer]
            labels = [NONE] * len(prompt) + ids[len(prompt) :]
            rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
            prompt = [*prompt, *answer]
    return rows


def documents(rows, name: str = "input_ids") -> list[list[int]]:
    """The documents of rows of a dataset, whole."""
    return [
        part.of(torch.tensor(row[name])).tolist()
        for row in rows
        for part in parts_of(torch.tensor([row["position_ids"]]))[0]
    ]


@pytest.fixture(scope="module")
def shared() -> Dataset:
    return share_prompts(Dataset.from_list(make_rows()), ROOM)


def test_a_prompt_that_begins_a_later_one_is_stored_once(shared):
    assert len(shared) == 2  # a row for each conversation
    assert sorted(documents(shared)) == sorted(row["input_ids"] for row in make_rows())
    before = sum(len(row["input_ids"]) for row in make_rows())
    assert sum(map(len, shared["input_ids"])) < 0.9 * before
    trained = sum(label != NONE for labels in shared["labels"] for label in labels)
    assert trained == sum(label != NONE for row in make_rows() for label in row["labels"])


def test_a_dataset_without_such_rows_stays_as_it_is():
    rows = Dataset.from_list([make_rows()[0], make_rows()[3]])
    assert share_prompts(rows, ROOM) is rows


def test_no_row_becomes_longer_than_its_room():
    longest = max(len(row["input_ids"]) for row in make_rows())
    for room in (longest, longest + 15, ROOM):
        rows = share_prompts(Dataset.from_list(make_rows()), room)
        assert all(len(ids) <= room for ids in rows["input_ids"])


def test_a_branch_that_ends_where_another_begins_is_apart_from_it():
    text = list(range(2, 60))
    rows = []
    for prompt, answer in ((32, 5), (20, 4), (40, 5)):  # branches from 24 on, and from 12 to 23
        ids = [*text[:prompt], *range(90, 90 + answer)]
        labels = [NONE] * prompt + ids[prompt:]
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
    for order in (rows, [rows[1], rows[0], rows[2]]):
        found = share_prompts(Dataset.from_list(order), 200)
        assert len(found) == 1
        assert sorted(documents(found)) == sorted(row["input_ids"] for row in rows)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 20)), min_size=1, max_size=8))
def test_every_document_of_every_dataset_is_kept(sizes):
    text = list(range(2, 60))
    rows = [
        {
            "input_ids": [*text[:prompt], *range(100 + i, 100 + i + answer)],
            "attention_mask": [1] * (prompt + answer),
            "labels": [NONE] * prompt + [*range(100 + i, 100 + i + answer)],
        }
        for i, (prompt, answer) in enumerate(sizes)
    ]
    found = share_prompts(Dataset.from_list(rows), 80)
    found = pack_dataset(found, 80)
    for name in ("input_ids", "attention_mask"):
        assert sorted(documents(found, name)) == sorted(row[name] for row in rows)
    parts = [one for row in found for one in parts_of(torch.tensor([row["position_ids"]]))[0]]
    assert all(part.stop - part.start > REPEATED for part in parts if part.shared)


def read(target, rows) -> list[torch.Tensor]:
    """The features of each document, sorted as its tokens are."""
    batch = CoralCollator()(list(rows))
    features = TargetFeatures(target).read(batch)
    if "position_ids" not in batch:
        pairs = zip(features, batch["attention_mask"].bool(), batch["input_ids"], strict=True)
        found = [(ids[mask].tolist(), part[mask]) for part, mask, ids in pairs]
    else:
        rows = zip(batch["input_ids"], features, parts_of(batch["position_ids"]), strict=True)
        found = [
            (part.of(ids).tolist(), part.of(values)) for ids, values, all_ in rows for part in all_
        ]
    texts = [(ids, part) for ids, part in found if any(ids)]  # not of padding
    return [part for _, part in sorted(texts, key=lambda pair: pair[0])]


@pytest.mark.parametrize(
    "family", ["llama", "gemma2", "gemma3", "mistral_window", "qwen3_moe", "bloom", "lfm2"]
)
def test_features_of_a_shared_prompt_are_those_of_each_row(family, shared):
    is_other = family in OTHERS
    target = make_target(OTHERS[family], torch.float32) if is_other else tiny_target(family)
    target = target.float()
    assert (
        reads_parts(target, torch.device("cpu"), is_branch=True) != is_other
    )  # else document by document
    alone, joined = read(target, make_rows()), read(target, shared)
    assert len(alone) == len(joined) == 5
    for one, other in zip(alone, joined, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("negatives", ["sequence", "batch"])
@pytest.mark.parametrize(
    ("recipe", "packing"), [("eagle", False), ("coral", False), ("coral", True)]
)
def test_rows_that_share_have_the_loss_and_the_gradient_of_their_documents(
    tmp_path, recipe, packing, negatives
):
    found, rows = [], Dataset.from_list(make_rows())
    joined = share_prompts(rows, 2 * ROOM)
    joined = pack_dataset(joined, 2 * ROOM) if packing else joined
    for dataset, count in ((rows, 5), (joined, 2 - packing)):
        trainer = make_trainer(
            tiny_target("llama", torch.float32),
            dataset,
            tmp_path,
            recipe=recipe,
            max_length=2 * ROOM,
            csra_negatives=negatives,
            per_device_train_batch_size=8,
        )
        batch = next(iter(trainer.get_train_dataloader()))
        assert len(batch["input_ids"]) == count
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        found.append((loss.detach(), trainer.model.fc.weight.grad))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("num_steps", [1, 3, REPEATED - 1])
def test_the_unroll_of_a_branch_is_that_of_its_document(
    num_steps,
    eager_flex,  # noqa: F811
    monkeypatch,
):
    torch.manual_seed(0)
    drafter = CoralDrafter.from_target(tiny_target("llama", torch.float64), num_hidden_layers=2)
    first, second, other = 30, 14, 11
    lengths = (first, second, other)
    positions = torch.cat([torch.arange(n) for n in lengths])
    positions[first : first + second] += 15
    embeddings, features = torch.randn(2, 1, sum(lengths), 32, dtype=torch.float64)
    trunk = slice(first, first + REPEATED)  # a branch repeats the trunk's tokens
    for values in (embeddings, features):
        values[:, trunk] = values[:, 15 : 15 + REPEATED]
    plain = unroll(drafter, embeddings, features, num_steps, positions[None])
    monkeypatch.setattr("coral_hf.training.steps.unroll.fits_flex", lambda query: True)
    flex = unroll(drafter, embeddings, features, num_steps, positions[None])
    for part in parts_of(positions[None])[0]:
        document = (part.of(values, dim=1) for values in (embeddings, features))
        alone = unroll(drafter, *document, num_steps)[:, :, part.shared :]
        kept = slice(num_steps - 1 if part.shared else 0, None)
        for found in (plain, flex):
            torch.testing.assert_close(
                found[:, :, part.start : part.stop][:, :, kept], alone[:, :, kept]
            )


def test_a_cache_stores_the_features_of_a_shared_prompt_once(tmp_path, shared):
    target = tiny_target("llama", torch.float32)
    write_features(target, shared, tmp_path / "shared")
    write_features(target, Dataset.from_list(make_rows()), tmp_path / "alone")
    caches = [CachedFeatures(tmp_path / name) for name in ("alone", "shared")]
    sizes = [sum(cache.lengths) for cache in caches]
    assert sizes[1] < 0.9 * sizes[0]
    losses = []
    for cache in caches:
        trainer = make_trainer(target, cache, tmp_path, per_device_train_batch_size=8)
        batch = next(iter(trainer.get_train_dataloader()))
        losses.append(trainer.compute_loss(trainer.model, batch).detach())
    torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-4)


def test_more_steps_than_branches_repeat_tokens_are_refused(shared):
    batch = CoralCollator()(list(shared))
    assert has_branches(batch["position_ids"])
    drafter = CoralDrafter.from_target(tiny_target("llama"))
    with pytest.raises(ValueError, match="`num_steps` is 8, but rows that share prompts allow 7"):
        unroll(drafter, torch.zeros(2, 1), torch.zeros(2, 1), 8, batch["position_ids"])


def test_more_steps_are_refused_before_the_part_of_one_step(tmp_path, shared):
    settings = {"recipe": "one_step_first", "num_steps": 8}
    trainer = make_trainer(tiny_target("llama"), shared, tmp_path, **settings)
    with pytest.raises(ValueError, match="`num_steps` is 8, but rows that share prompts allow 7"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_the_trainer_joins_the_answers_of_a_conversation(tmp_path):
    template = (
        "{% for m in messages %}<{{ m.role }}>"
        "{{ m.content if loop.last else m.content.split('</think>')[-1] }}<end>"
        "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    tokenizer = tiny_tokenizer(template)

    def chat(what: str) -> dict:
        turns = []
        for index in range(3):
            answer = f"<think>hm {index}</think>it is {index}."
            turns.append({"role": "user", "content": f"{what} is {index}?"})
            turns.append({"role": "assistant", "content": answer})
        return {"messages": turns}

    rows = Dataset.from_list([chat("what"), chat("who")])
    target = tiny_target("llama", torch.float32, vocab_size=len(tokenizer))
    common = {"max_length": 512, "eval_prompts": 1, "eval_max_new_tokens": 4, "report_to": "none"}
    common |= {"use_cpu": True, "max_steps": 1, "disable_tqdm": True}
    lengths = {}
    for share in (True, False):
        args = CoralTrainingArguments(str(tmp_path / str(share)), share_prompts=share, **common)
        drafter = CoralDrafter.from_target(target)
        data = {"train_dataset": rows, "eval_dataset": rows}
        trainer = CoralTrainer(drafter, target, args, tokenizer, **data)
        lengths[share] = [len(ids) for ids in trainer.train_dataset["input_ids"]]
        assert (
            "position_ids" not in trainer.eval_dataset.column_names
        )  # held-out rows are documents
    trainer.train()
    assert (len(lengths[True]), len(lengths[False])) == (2, 6)
    assert sum(lengths[True]) < sum(lengths[False])


def test_rows_of_token_ids_may_be_padded_and_share_nothing(tmp_path):
    trainer = make_trainer(tiny_target("llama", torch.float32), make_rows(), tmp_path)
    assert len(trainer.train_dataset) == len(make_rows())


@pytest.mark.parametrize(
    ("recipe", "family", "name"),
    [
        ("eagle3", Eagle3Drafter, "fc.weight"),  # in seven steps
        ("medusa", MedusaDrafter, "blocks.4.0.linear.weight"),
        ("recurrent", RecurrentDrafter, "rnn_u.weight"),
    ],
)
def test_drafters_of_other_families_learn_the_same_from_shared_prompts(
    tmp_path, recipe, family, name
):
    found, rows = [], Dataset.from_list(make_rows())
    target = tiny_target("llama", torch.float32)
    for dataset in (rows, share_prompts(rows, 2 * ROOM)):
        torch.manual_seed(0)
        drafter = family.from_target(target)
        given = {"max_length": 2 * ROOM, "per_device_train_batch_size": 8, "recipe": recipe}
        trainer = make_trainer(target, dataset, tmp_path, drafter, **given)
        loss = trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader())))
        loss.backward()
        found.append((loss.detach(), trainer.model.get_parameter(name).grad))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)
