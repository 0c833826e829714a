"""Features on disk: training reads what the target would compute, or an error says why not."""

import copy
import json
import os
import shutil
import subprocess
from contextlib import contextmanager

import pytest
import torch
from conftest import VOCAB, invoke, make_target, printed, tiny_config, tiny_target
from datasets import Dataset
from test_trainer import logged, make_trainer
from torch.utils.data import DataLoader

from coral_hf.atomic import sole_writer
from coral_hf.identity import file_digest
from coral_hf.training.data import CoralCollator, pack_dataset
from coral_hf.training.features import (
    INDEX,
    CachedFeatures,
    plan_features,
    write_features,
)
from coral_hf.training.features.cache import SHARDS
from coral_hf.training.features.reading import TargetFeatures


@pytest.fixture(scope="module")
def target():
    return tiny_target("llama", torch.float32).bfloat16()


@pytest.fixture(scope="module")
def rows() -> Dataset:
    torch.manual_seed(0)
    texts = [torch.randint(2, VOCAB, (5 + index % 7,)).tolist() for index in range(24)]
    return Dataset.from_list(
        [
            {
                "input_ids": text,
                "attention_mask": [1] * len(text),
                "labels": [-100, -100, *text[2:]],
            }
            for text in texts
        ]
    )


def fresh(target, rows, row: int) -> torch.Tensor:
    """The target's features of one row, alone."""
    return TargetFeatures(target).read(CoralCollator()([rows[row]]))[0]


def fine_tuned(target):
    """A target whose weights, and so its features, are off by some percent."""
    other = copy.deepcopy(target)
    with torch.no_grad():
        for weight in other.parameters():
            weight *= 1.02
    return other


def interrupted(target, rows, folder, monkeypatch, after: int):
    """A cache of which so many shards were written."""
    from coral_hf.training.features import writer

    save, saved = writer.save_file, []

    def stopping(tensors, path):
        if len(saved) == after:
            raise KeyboardInterrupt
        saved.append(path)
        save(tensors, path)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(writer, "save_file", stopping)
        write_features(target, rows, folder, shard_bytes=2000)


@contextmanager
def small_disk(folder):
    """A disk of 64 KB."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small disk can be mounted by root alone")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def flip(file, position: int) -> None:
    """Change a byte."""
    data = bytearray(file.read_bytes())
    data[position] ^= 255
    file.write_bytes(data)


def test_a_row_holds_the_features_of_the_target(target, rows, tmp_path):
    write_features(target, rows, tmp_path, shard_bytes=2000)
    cached = CachedFeatures(tmp_path, checksums=True)
    assert len(cached) == len(rows) and len(cached.index.shards) > 3
    assert cached.index.lost == 0
    for row in (0, 7, 23):
        assert cached[row]["input_ids"] == rows[row]["input_ids"]
        assert cached[row]["labels"] == rows[row]["labels"]
        torch.testing.assert_close(
            cached[row]["features"], fresh(target, rows, row), atol=0.05, rtol=0.05
        )


def test_the_plan_is_what_is_written(target, rows, tmp_path):
    for format in ("bfloat16", "int8"):
        folder = tmp_path / format
        plan = plan_features(target.config, rows, folder, format, 2000)
        assert not folder.exists()
        write_features(target, rows, folder, format, shard_bytes=2000)
        found = sum(shard.num_bytes for shard in CachedFeatures(folder).index.shards)
        headers = 600 * len(plan.shards)
        assert plan.memory_bytes > 2 * 2000
        assert plan.disk_bytes <= found <= plan.disk_bytes + headers
        assert f"{len(rows)} rows" in str(plan) and f"{len(plan.shards)} shards" in str(plan)


def test_the_loss_of_int8_is_measured(target, rows, tmp_path):
    index = write_features(target, rows, tmp_path, format="int8", shard_bytes=2000)
    lost = [
        CachedFeatures(tmp_path)[row]["features"] - fresh(target, rows, row) for row in range(24)
    ]
    whole = torch.cat([fresh(target, rows, row) for row in range(24)]).float()
    found = torch.cat(lost).norm() / whole.norm()
    assert 0 < index.lost < 0.02
    assert float(found) == pytest.approx(index.lost, abs=0.01)
    assert CachedFeatures(tmp_path).index == index


@pytest.mark.parametrize("packing", [False, True])
def test_training_from_the_cache_is_training_online(rows, tmp_path, packing):
    online = tiny_target("llama", torch.float32)
    given = pack_dataset(rows, 16) if packing else rows
    write_features(online, given, tmp_path / "cache", shard_bytes=2000)
    losses = []
    for dataset in (rows, CachedFeatures(tmp_path / "cache")):
        trainer = make_trainer(online, dataset, tmp_path, packing=packing, max_length=16)
        trainer.train()
        losses.append(logged(trainer, "loss"))
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)


def test_worker_processes_read_the_same_rows(target, rows, tmp_path):
    write_features(target, rows, tmp_path, shard_bytes=2000)
    cached = CachedFeatures(tmp_path)
    cached[3]  # a file is open before the workers start
    loader = DataLoader(cached, batch_size=4, collate_fn=CoralCollator(), num_workers=2)
    batches = list(loader)
    assert sum(len(batch["input_ids"]) for batch in batches) == len(rows)
    assert torch.equal(
        batches[0]["features"], CoralCollator()([cached[i] for i in range(4)])["features"]
    )


def test_an_interrupted_run_resumes_with_the_next_shard(target, rows, tmp_path, monkeypatch):
    from coral_hf.training.features import writer

    whole = write_features(target, rows, tmp_path / "whole", shard_bytes=2000)
    interrupted(target, rows, tmp_path / "broken", monkeypatch, after=2)
    with pytest.raises(ValueError, match="run the command that writes them again, and it resumes"):
        CachedFeatures(tmp_path / "broken")
    save, saved = writer.save_file, []
    monkeypatch.setattr(writer, "save_file", lambda *args: (saved.append(args[1]), save(*args)))
    index = write_features(target, rows, tmp_path / "broken", shard_bytes=2000)
    assert len(saved) + 2 == len(index.shards)
    assert index == whole


def test_the_same_command_writes_the_same_bytes(target, rows, tmp_path):
    for name in ("one", "two"):
        write_features(target, rows, tmp_path / name, shard_bytes=2000)
    one, two = ({p.name: file_digest(p) for p in (tmp_path / n).iterdir()} for n in ("one", "two"))
    assert one == two and len(one) > 5


def test_a_shard_missing_from_the_index_is_written_again(target, rows, tmp_path):
    whole = write_features(target, rows, tmp_path, shard_bytes=2000)
    lines = (tmp_path / SHARDS).read_bytes()
    (tmp_path / SHARDS).write_bytes(lines[: lines.rstrip().rfind(b"\n") + 9])  # a kill within one
    assert write_features(target, rows, tmp_path, shard_bytes=2000) == whole
    assert len(CachedFeatures(tmp_path, checksums=True)) == len(rows)


def test_a_full_disk_keeps_the_shards_that_are_whole(target, rows, tmp_path, monkeypatch):
    with small_disk(tmp_path / "disk") as folder:
        cache = folder / "cache"
        many = Dataset.from_list(list(rows) * 10)
        with pytest.raises(ValueError, match="The features need .* more, but only .* are free"):
            write_features(target, many, cache, shard_bytes=9000)
        shutil.rmtree(cache)
        # what fits by the plan, but not with what somebody else writes meanwhile
        (folder / "other").write_bytes(b"0" * 40_000)
        few = Dataset.from_list(list(rows))
        plan = plan_features(target.config, few, cache, "bfloat16", 4000)
        with monkeypatch.context() as patch:
            patch.setattr("shutil.disk_usage", lambda folder: shutil._ntuple_diskusage(0, 0, 10**9))
            with pytest.raises(Exception, match="No space left"):
                write_features(target, few, cache, shard_bytes=4000)
        kept = (cache / SHARDS).read_text().splitlines()
        assert len(kept) < len(plan.shards)
        assert not list(cache.glob(".*"))
        (folder / "other").unlink()
        write_features(target, few, cache, shard_bytes=4000)
        assert len(CachedFeatures(cache, checksums=True)) == len(rows)


def test_a_disk_full_from_the_start_leaves_no_index(target, rows, tmp_path, monkeypatch):
    with small_disk(tmp_path / "disk") as folder:
        (folder / "cache").mkdir()
        with pytest.raises(OSError, match="No space left"):
            (folder / "other").write_bytes(b"0" * 100_000)
        with pytest.raises(OSError, match="No space left .*features.json"):
            write_features(target, rows, folder / "cache")
        assert [path.name for path in (folder / "cache").iterdir()] == ["_writer.lock"]
        (folder / "other").unlink()
        write_features(target, rows, folder / "cache")
        assert len(CachedFeatures(folder / "cache")) == len(rows)


def test_an_index_that_cannot_be_read_is_named(target, rows, tmp_path):
    write_features(target, rows, tmp_path / "cache")
    fields = json.loads((tmp_path / "cache" / INDEX).read_text())
    for text in ('{"target": ', json.dumps({**fields, "other": 1})):
        (tmp_path / "cache" / INDEX).write_text(text)
        with pytest.raises(ValueError, match=f"{INDEX} cannot be read .*delete"):
            CachedFeatures(tmp_path / "cache")


def test_a_folder_with_other_content_is_refused(target, rows, tmp_path):
    write_features(target, rows, tmp_path / "cache", shard_bytes=2000)
    with pytest.raises(ValueError, match="written with format = 'bfloat16', now it is 'int8'"):
        write_features(target, rows, tmp_path / "cache", format="int8")
    with pytest.raises(ValueError, match="written with fingerprint = "):
        write_features(target, Dataset.from_list(list(rows)[::-1]), tmp_path / "cache")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(ValueError, match="holds other files; give a new folder"):
        write_features(target, rows, tmp_path / "other")
    with pytest.raises(ValueError, match="is no feature cache"):
        CachedFeatures(tmp_path / "other")
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["thesis.tex"]
    with pytest.raises(ValueError, match="`format` is 'int4'; use one of"):
        write_features(target, rows, tmp_path / "new", format="int4")


def test_a_changed_byte_is_found(target, rows, tmp_path):
    index = write_features(target, rows, tmp_path, shard_bytes=2000)
    shard = index.shards[1]
    file = tmp_path / shard.file
    flip(file, -1)
    cached = CachedFeatures(tmp_path)
    assert len(cached[0]["input_ids"]) == 5  # a file is compared with its first row
    with pytest.raises(
        ValueError, match=f"{shard.file} does not have the checksum.*delete the folder"
    ):
        cached[len(index.shards[0].lengths)]
    with pytest.raises(ValueError, match="does not have the checksum"):
        CachedFeatures(tmp_path, checksums=True)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match="should have .* bytes and has"):
        CachedFeatures(tmp_path)


def test_the_features_of_another_target_are_refused(target, rows, tmp_path):
    write_features(target, rows, tmp_path / "cache")
    other = make_target(tiny_config("llama"), torch.float32, seed=1)
    with pytest.raises(ValueError, match="not of the target"):
        make_trainer(other, CachedFeatures(tmp_path / "cache"), tmp_path)


def test_a_file_is_compared_with_its_checksum_once(target, rows, tmp_path, monkeypatch):
    index = write_features(target, rows, tmp_path, shard_bytes=2000)
    compared = []
    monkeypatch.setattr(
        "coral_hf.training.features.cache.file_digest",
        lambda path: compared.append(path.name) or hashes[path.name],
    )
    hashes = {shard.file: shard.sha256 for shard in index.shards}
    cached = CachedFeatures(tmp_path)
    assert not compared
    for row in (*range(len(rows)), *range(len(rows))):
        cached[row]
    assert compared == [shard.file for shard in index.shards]


def test_another_target_of_the_same_name_cannot_finish_a_cache(target, rows, tmp_path, monkeypatch):
    interrupted(target, rows, tmp_path / "cache", monkeypatch, after=2)
    with pytest.raises(ValueError, match="written with digest = .* choose another"):
        write_features(fine_tuned(target), rows, tmp_path / "cache", shard_bytes=2000)
    with pytest.raises(ValueError, match="with dtype = 'bfloat16', now it is 'float32'"):
        other = copy.deepcopy(target).float()
        write_features(other, rows, tmp_path / "cache", shard_bytes=2000)
    write_features(target, rows, tmp_path / "cache", shard_bytes=2000)


def test_features_from_before_a_fine_tuning_are_refused(target, rows, tmp_path):
    write_features(target, rows, tmp_path / "cache")
    cached = CachedFeatures(tmp_path / "cache")
    assert cached._is_first_row_of(fine_tuned(target))  # too near for features alone to tell
    with pytest.raises(ValueError, match="not of the target .*weights are others.*write a cache"):
        cached.check_target(fine_tuned(target))
    cached.check_target(copy.deepcopy(target))
    cached.check_target(copy.deepcopy(target).float())


def test_the_same_weights_under_another_config_are_another_target(target, rows, tmp_path):
    write_features(target, rows, tmp_path / "cache")
    other = tiny_target("llama", torch.float32, rms_norm_eps=1.0).bfloat16()
    other.load_state_dict(target.state_dict())
    with pytest.raises(ValueError, match="features of the first row are others"):
        CachedFeatures(tmp_path / "cache").check_target(other)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_quantised_target_reads_the_features_of_its_unquantised_self(target, rows, tmp_path):
    quantization = pytest.importorskip("torchao.quantization")
    write_features(target, rows, tmp_path / "cache")
    packed, tuned = copy.deepcopy(target), fine_tuned(target)
    for model in (packed, tuned):
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    CachedFeatures(tmp_path / "cache").check_target(packed)
    write_features(packed, rows, tmp_path / "packed")
    CachedFeatures(tmp_path / "packed").check_target(packed)
    with pytest.raises(ValueError, match="weights are others"):
        CachedFeatures(tmp_path / "packed").check_target(tuned)


@pytest.mark.parametrize("option", ["--batch-size", "--shard-megabytes", "--max-length"])
def test_sizes_of_zero_are_refused(tmp_path, option):
    command = ["features", "--target", "x", "--dataset", "y", "--output", str(tmp_path / "z")]
    result = invoke(*command, option, "0")
    name = option.strip("-").replace("-", "_")
    assert result.exit_code == 1 and f"`{name}` is 0; use 1 or more" in printed(result)


def test_a_batch_size_of_zero_is_refused_in_python_too(target, rows, tmp_path):
    with pytest.raises(ValueError, match="`batch_size` is 0; use at least 1"):
        write_features(target, rows, tmp_path / "cache", batch_size=0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("strategy", ["group_by_length", "batch_rebalance"])
def test_rows_are_grouped_by_length_without_opening_a_shard(
    target, rows, tmp_path, monkeypatch, strategy
):
    write_features(target, rows, tmp_path / "cache", shard_bytes=2000)
    orders = []
    for dataset in (rows, CachedFeatures(tmp_path / "cache")):
        trainer = make_trainer(target, list(rows), tmp_path, train_sampling_strategy=strategy)
        monkeypatch.setattr(CachedFeatures, "file", None)  # which opens them
        samplers = trainer._get_train_sampler(dataset), trainer._get_eval_sampler(dataset)
        monkeypatch.undo()
        torch.manual_seed(0)
        orders.append([[*sampler] for sampler in samplers])
    assert orders[0] == orders[1]
    assert orders[0][0] != sorted(orders[0][0]) and sorted(orders[0][1]) == list(range(len(rows)))


def test_training_reads_rows_grouped_by_length(target, rows, tmp_path):
    write_features(target, rows, tmp_path / "cache", shard_bytes=2000)
    cached = CachedFeatures(tmp_path / "cache")
    assert [row["input_ids"] for row in cached] == rows["input_ids"]
    assert cached[-1]["labels"] == rows[-1]["labels"]
    sampling = {"train_sampling_strategy": "group_by_length", "max_steps": 2}
    make_trainer(
        tiny_target("llama", torch.float32).bfloat16(), cached, tmp_path, **sampling
    ).train()


def test_cached_rows_longer_than_max_length_are_refused(target, rows, tmp_path):
    write_features(target, rows, tmp_path / "cache")
    with pytest.raises(
        ValueError, match="a row of the cache in .* has 11 tokens; pass max_length=11"
    ):
        make_trainer(target, CachedFeatures(tmp_path / "cache"), tmp_path, max_length=10)


def test_the_features_of_another_target_are_refused_in_evaluations_too(target, rows, tmp_path):
    write_features(target, rows, tmp_path / "cache")
    other = make_target(tiny_config("llama"), torch.float32, seed=1)
    trainer = make_trainer(other, list(rows), tmp_path)
    for held_out in (CachedFeatures(tmp_path / "cache"), {"x": CachedFeatures(tmp_path / "cache")}):
        with pytest.raises(ValueError, match="not of the target"):
            trainer.evaluate(held_out)


def test_another_size_of_shards_cannot_be_resumed(target, rows, tmp_path):
    write_features(target, rows, tmp_path, shard_bytes=2000)
    with pytest.raises(ValueError, match="written with shard_bytes = 2000, now it is 3000"):
        write_features(target, rows, tmp_path, shard_bytes=3000)


def test_a_second_writer_is_refused(target, rows, tmp_path):
    with sole_writer(tmp_path / "cache"):
        with pytest.raises(ValueError, match=f"cache is in use: .*cache{os.sep}_writer.lock`"):
            write_features(target, rows, tmp_path / "cache")
