"""A plan before a run: what it takes of memory, disk and time, and what makes it fit."""

import gc
import json
from dataclasses import replace

import pytest
import torch
from conftest import invoke
from datasets import Dataset
from test_examples import folder  # noqa: F401  a saved target and its conversations
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import coral_hf
from coral_hf import CoralConfig, CoralDrafter, CoralTrainer, CoralTrainingArguments
from coral_hf.training.features import CachedFeatures, write_features
from coral_hf.training.planning import PlanSettings, run
from coral_hf.training.planning.memory import RunShape, bytes_of, step_memory
from coral_hf.training.planning.run import num_checkpoints
from coral_hf.training.steps import kind_of_recipe

UNTIMED = PlanSettings(measure=False)
EVERY_STEP = {"save_strategy": "steps", "save_steps": 1}


@pytest.fixture(scope="module")
def named(folder):  # noqa: F811
    """A folder with the config and the tokenizer of a target, and no weights."""
    path = folder / "named"
    AutoTokenizer.from_pretrained(folder / "target").save_pretrained(path)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    LlamaConfig(vocab_size=300, num_attention_heads=4, **sizes).save_pretrained(path)
    return path


def rows(*lengths: int) -> Dataset:
    """Rows of token ids, all of them trained."""
    ids = [[1 + index % 99 for index in range(length)] for length in lengths]
    ones = [[1] * length for length in lengths]
    return Dataset.from_dict({"input_ids": ids, "attention_mask": ones, "labels": ids})


def arguments(path, **given) -> CoralTrainingArguments:
    defaults = {"per_device_train_batch_size": 4, "save_strategy": "no", "num_train_epochs": 1}
    quiet = {"report_to": "none", "disable_tqdm": True, "use_cpu": True}
    return CoralTrainingArguments(str(path / "run"), **{**defaults, **quiet, **given})


def allocated(target, args, data) -> tuple[int, CoralTrainer]:
    """The peak of what torch allocates in a run, with the target's weights, and the trainer."""
    gc.collect()  # what is released during the run was not allocated in it
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        drafter = kind_of_recipe(args.recipe).drafter.from_target(target).float()
        trainer = CoralTrainer(drafter, target, args, train_dataset=data)
        trainer.train()
    live = peak = 0
    events = profiler.profiler.kineto_results.events()
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak + bytes_of(target), trainer


@pytest.mark.parametrize(
    "recipe, accumulated, is_cached",
    [
        ("eagle", 1, False),
        pytest.param("coral", 1, True, marks=pytest.mark.slow),
        pytest.param("eagle", 3, True, marks=pytest.mark.slow),
        pytest.param("eagle3", 1, False, marks=pytest.mark.slow),
        pytest.param("eagle3", 1, True, marks=pytest.mark.slow),
        pytest.param("medusa", 1, False, marks=pytest.mark.slow),
    ],
)
def test_planned_memory_is_what_torch_allocates(named, tmp_path, recipe, accumulated, is_cached):
    target = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(named))
    data = rows(96, 40, 64, 96, 80, 33, 96, 50, 41, 90)
    if is_cached:
        kind = kind_of_recipe(recipe)
        layers = kind.layers(kind.drafter.config_class.from_target(target.config))
        write_features(target, data, tmp_path / "features", layers=layers)
        data = CachedFeatures(tmp_path / "features")
    given = {"gradient_accumulation_steps": accumulated, "num_train_epochs": 2}
    args = arguments(tmp_path, recipe=recipe, **given)
    planned = coral_hf.plan(named, data, args, UNTIMED)
    found, trainer = allocated(target, args, data)
    assert planned.memory.total == pytest.approx(found, rel=0.15)
    assert planned.memory.target == bytes_of(target)
    assert planned.stages[0].num_steps == trainer.state.max_steps
    assert planned.features == ("cached" if is_cached else "online")


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is dep:FutureWarning")
@pytest.mark.slow
def test_what_a_run_holds_less_is_planned_less(named, tmp_path):
    shape = RunShape(
        AutoConfig.from_pretrained(named),
        torch.float32,
        CoralConfig.from_target(AutoConfig.from_pretrained(named)),
        arguments(tmp_path),
    )
    batch = {name: torch.ones(2, 40, dtype=torch.long) for name in ("input_ids", "labels")}
    batch["attention_mask"] = batch["input_ids"]
    whole = step_memory(shape, batch)
    lora = step_memory(replace(shape, lora_rank=2), batch)
    router = step_memory(replace(shape, args=arguments(tmp_path, stage="router")), batch)
    assert lora.optimizer < whole.optimizer / 4 and lora.drafter > whole.drafter
    assert router.optimizer < whole.optimizer / 4 and router.drafter > whole.drafter
    halves = step_memory(replace(shape, dtype=torch.bfloat16), batch)
    quarters = step_memory(replace(shape, bits=4), batch)
    assert quarters.target < halves.target == pytest.approx(whole.target / 2, rel=0.01)
    short = step_memory(shape, {name: part[:, :20] for name, part in batch.items()})
    assert short.activations < whole.activations


def test_a_quantized_checkpoint_is_counted_by_its_bits(named, tmp_path):
    config = json.loads((named / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tokenizer = AutoTokenizer.from_pretrained(named)
    estimated = coral_hf.plan(tmp_path, rows(20), arguments(tmp_path), UNTIMED, tokenizer)
    plain = coral_hf.plan(named, rows(20), arguments(tmp_path), UNTIMED)
    assert plain.memory.target / 8 < estimated.memory.target < plain.memory.target
    assert "quantized" in str(estimated)


@pytest.mark.slow
def test_a_run_that_does_not_fit_is_made_smaller_step_by_step(named, tmp_path):
    args = arguments(tmp_path, per_device_train_batch_size=2)
    planned = coral_hf.plan(named, rows(600, 9), args, PlanSettings(gpu_memory=1, measure=False))
    assert not planned.fits  # all of one GiB is left to CUDA
    options = [*planned.changes]
    assert options[0] == "--per_device_train_batch_size 1 --gradient_accumulation_steps 2"
    assert options[1].endswith("_checkpointing True") and options[2] == "--dtype bfloat16"
    assert ["bits" in one for one in options[3:5]] == [True, True]
    assert options[5:] == ["--max_length 512"]
    sizes = [memory.total for memory in planned.changes.values()]
    assert sizes[0] < planned.memory.total and sizes[-1] < sizes[2]
    assert "does not fit in a GPU of 1 GiB" in str(planned)
    roomy = coral_hf.plan(named, rows(600, 9), args, PlanSettings(gpu_memory=2, measure=False))
    assert roomy.fits and not roomy.changes


@pytest.mark.parametrize("limit", [None, 2])
def test_checkpoints_that_lie_on_the_disk_together_are_counted(named, tmp_path, limit):
    target = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(named))
    args = arguments(tmp_path, max_steps=3, save_total_limit=limit, **EVERY_STEP)
    planned = coral_hf.plan(named, rows(20, 30, 20), args, UNTIMED)
    CoralTrainer(CoralDrafter.from_target(target), target, args, train_dataset=rows(20)).train()
    kept = [*(tmp_path / "run").glob("checkpoint-*")]
    # with a limit, the oldest is deleted when the next one is whole
    assert planned.stages[0].num_checkpoints == len(kept) + (limit is not None)
    weights = (kept[-1] / "model.safetensors").stat().st_size
    states = (kept[-1] / "optimizer.pt").stat().st_size
    assert planned.stages[0].checkpoint >= 0.95 * (weights + states)


def test_checkpoints_by_epoch_and_by_share_of_a_run_are_counted(tmp_path):
    assert num_checkpoints(100, arguments(tmp_path)) == 0
    assert num_checkpoints(100, arguments(tmp_path, save_strategy="epoch")) == 1
    share = arguments(tmp_path, save_strategy="steps", save_steps=0.3)
    assert num_checkpoints(100, share) == 4  # after 30, 60 and 90 steps, and at the end


def test_train_prints_its_plan_and_refuses_a_full_disk_before_anything_is_loaded(named, folder):  # noqa: F811
    names = ["--target", named, "--dataset", folder / "talk.jsonl", "--output", folder / "full"]
    endless = ["--max_steps", 10**12, "--save_steps", 1, "--use_cpu", True]
    result = invoke("train", *names, *endless)
    assert result.exit_code == 1
    assert "Memory of a process" in result.output
    assert "The run needs" in result.output and "--save_total_limit 1" in result.output
    assert not (folder / "full").exists()
    limited = invoke("train", *names, *endless, "--save_total_limit", 1)
    assert "The run needs" not in limited.output  # it goes on, and finds no weights
    assert limited.exit_code == 1 and "model.safetensors" in limited.output


def test_features_that_do_not_fit_are_refused_before_the_target_is_loaded(named, folder, tmp_path):  # noqa: F811
    config = json.loads((named / "config.json").read_text())
    AutoTokenizer.from_pretrained(named).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_size": 4 * 10**12}))
    names = ["--target", tmp_path, "--dataset", folder / "talk.jsonl"]
    result = invoke("features", *names, "--output", tmp_path / "features")
    assert result.exit_code == 1
    assert "The features need" in result.output and "int8" in result.output


def test_plan_takes_the_options_of_train_and_says_what_a_cache_takes(named, folder):  # noqa: F811
    names = ["--target", named, "--dataset", folder / "talk.jsonl", "--router-epochs", 1]
    result = invoke("plan", *names, "--recipe", "hass", "--use_cpu", True, "--no-measure")
    assert result.exit_code == 0, result.output
    assert "stage 'drafter'" in result.output and "stage 'router'" in result.output
    assert "bfloat16" in result.output and "int8" in result.output
    assert "no step was timed" in result.output
    cached = invoke("plan", *names, "--features", "int8", "--use_cpu", True, "--no-measure")
    assert "with features int8, fits" in cached.output


@pytest.mark.slow
@pytest.mark.parametrize("features", ["online", "int8", "cached"])
def test_hours_come_from_a_few_steps_and_nothing_is_kept(folder, tmp_path, features):  # noqa: F811
    name, data = folder / "target", folder / "talk.jsonl"
    settings = PlanSettings()  # a small folder is timed without being asked
    if features == "cached":
        target, data = AutoModelForCausalLM.from_pretrained(name), tmp_path / "features"
        write_features(target, rows(20, 30, 25, 20), data)
    else:
        settings = PlanSettings(features=features)
    args = arguments(tmp_path, max_steps=1000)
    planned = coral_hf.plan(name, data, args, settings)
    assert planned.hours == pytest.approx(
        (planned.stages[0].seconds * 1000 + planned.cache_seconds) / 3600
    )
    assert (planned.cache_seconds > 0) == (features == "int8")
    assert not (tmp_path / "run").exists()
    assert "Hours:" in str(planned)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["hass", "coral"])
def test_hours_count_single_steps_by_their_share(recipe, folder, tmp_path, monkeypatch):  # noqa: F811
    seconds = iter([2.0, 8.0])  # of one step of the unroll, of all
    monkeypatch.setattr(run, "fmean", lambda _: next(seconds))
    args = arguments(tmp_path, recipe=recipe, max_steps=1000, single_step_share=0.25)
    planned = coral_hf.plan(folder / "target", folder / "talk.jsonl", args, PlanSettings())
    assert planned.stages[0].seconds == 0.75 * 8.0 + 0.25 * 2.0


@pytest.mark.parametrize(
    ("settings", "length", "alone"),
    [
        ({"recipe": "hass"}, 25, 0),  # 25 steps of 4 s
        ({"recipe": "eagle"}, 25, 0),
        ({"single_step_share": 0.5}, 40, 20),
        ({"single_step_share": 1.0}, 100, 100),
        ({"single_step_share": 0.5, "stage": "router"}, 25, 0),
    ],
    ids=str,
)
def test_steps_that_fit_into_a_time_are_of_two_kinds(settings, length, alone, tmp_path):
    args = arguments(tmp_path, **{"recipe": "hass", **settings})
    assert run.steps_in(100.0, args, 1.0, 4.0) == length
    assert args.steps_alone(length) == alone
    assert 96.0 < run.seconds_of(length, args, 1.0, 4.0) <= 100.0
    assert run.steps_in(0.1, args, 1.0, 4.0) == 1  # none is shorter


def test_a_stream_cannot_be_planned(named, tmp_path):
    with pytest.raises(ValueError, match="a stream"):
        coral_hf.plan(named, rows(20).to_iterable_dataset(), arguments(tmp_path), UNTIMED)
