"""Every family of drafters trains alike: the same data, features, cache, packing, resuming."""

import json
from functools import partial
from statistics import mean

import pytest
import torch
from conftest import VOCAB, invoke, printed, slowly, tiny_target
from datasets import Dataset
from test_examples import folder  # noqa: F401  a saved target and its conversations
from test_trainer import logged, make_trainer
from transformers import AutoConfig, AutoModel, AutoTokenizer

from coral_hf.training.features import INDEX, CachedFeatures, write_features
from coral_hf.training.pipeline import train
from coral_hf.training.planning import PlanSettings
from coral_hf.training.planning.plan import plan
from coral_hf.training.stages import lora
from coral_hf.training.steps import step_kind
from coral_hf.training.warm_start import kind_of_source, warm_start

FAMILIES = ["coral", "coral_eagle3", "coral_medusa", "coral_parallel", "coral_recurrent"]
STEPS = 3  # of the unroll: fewer than by default are faster
LAST_SLOW = [pytest.param(one, marks=pytest.mark.slow) for one in FAMILIES[2:]]
# each takes as long as many others of a family, and asks the same of all
LONG = pytest.mark.parametrize("family", [*FAMILIES[:3], *LAST_SLOW[1:]], indirect=True)
UNTIMED = PlanSettings(measure=False)


@pytest.fixture(scope="module")
def target():
    return tiny_target("llama", torch.float32)


@pytest.fixture(scope="module")
def texts(target) -> Dataset:
    """Greedy texts of the target, of lengths that differ; the first four tokens are the prompt."""
    torch.manual_seed(0)
    prompts = torch.randint(2, VOCAB, (24, 4))
    mask = torch.ones_like(prompts)
    whole = target.generate(prompts, attention_mask=mask, do_sample=False, max_new_tokens=14)
    rows = [text[: 10 + index % 8].tolist() for index, text in enumerate(whole)]
    return Dataset.from_list(
        [
            {"input_ids": row, "attention_mask": [1] * len(row), "labels": [-100] * 4 + row[4:]}
            for row in rows
        ]
    )


@pytest.fixture(params=FAMILIES)
def family(request):
    return step_kind(request.param)


def trainer_of(kind, target, rows, path, drafter=None, **settings):
    """A trainer of a fresh drafter of a family, drawn with the same seed each time."""
    torch.manual_seed(0)
    drafter = kind.drafter.from_target(target).float() if drafter is None else drafter
    given = {"recipe": kind.recipes[0], "num_steps": STEPS, **settings}
    return make_trainer(target, rows, path, drafter=drafter, **given)


def test_training_lowers_the_loss_and_raises_the_agreement(family, target, texts, tmp_path):
    trainer = trainer_of(family, target, texts, tmp_path, max_steps=60, classification_weight=1.0)
    trainer.train()
    history = trainer.state.log_history
    first = next(entry for entry in history if f"agreement_{STEPS}" in entry)  # of all steps
    for name in ("loss", "classification_loss"):
        assert logged(trainer, name)[-1] < 0.92 * first[name], name
    for step in range(1, STEPS + 1):
        agreed = logged(trainer, f"agreement_{step}")
        assert mean(agreed[-10:]) > mean(agreed[:5]) + 0.03


def test_a_run_resumes_bit_for_bit(family, target, texts, tmp_path):
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "feature_noise": 0.1}
    whole = trainer_of(family, target, texts, tmp_path / "run", **settings)
    whole.train()
    again = trainer_of(family, target, texts, tmp_path / "run", **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert logged(again, "loss") == logged(whole, "loss")
    for name, tensor in whole.drafter.state_dict().items():
        assert again.drafter.state_dict()[name].equal(tensor), name


def test_packed_rows_have_the_loss_and_the_gradient_of_their_documents(
    family, target, texts, tmp_path
):
    found = []
    for packing in (False, True):
        settings = {"packing": packing, "max_length": 40, "per_device_train_batch_size": 24}
        settings |= {"keep_ratio": 1.0}  # nothing is dropped by chance
        trainer = trainer_of(family, target, texts, tmp_path, **settings)
        batch = next(iter(trainer.get_train_dataloader()))
        assert (len(batch["input_ids"]) < 24) == packing
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        grads = {name: weight.grad for name, weight in trainer.model.named_parameters()}
        found.append((loss.detach(), grads))
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-5)


@LONG
@pytest.mark.parametrize("format", ["bfloat16", "int8"])
def test_training_from_the_cache_is_training_online(family, target, texts, tmp_path, format):
    layers = family.layers(family.drafter.config_class.from_target(target.config))
    cache = tmp_path / "cache"
    write_features(target, texts, cache, format, shard_bytes=20_000, layers=layers)
    losses = []
    for rows in (texts, CachedFeatures(cache)):
        trainer = trainer_of(family, target, rows, tmp_path)
        trainer.train()
        losses.append(logged(trainer, "loss"))
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)


def test_a_cache_of_more_layers_is_read_and_one_of_fewer_is_refused(target, texts, tmp_path):
    coral, eagle3 = map(step_kind, FAMILIES[:2])
    config = eagle3.drafter.config_class.from_target(target.config)
    wide, narrow = tmp_path / "wide", tmp_path / "narrow"
    write_features(target, texts, wide, layers=eagle3.layers(config))
    write_features(target, texts, narrow)
    assert json.loads((narrow / INDEX).read_text())["layers"] == [-1]
    both = CachedFeatures(wide)
    both.select((-1,))
    assert both[3]["features"].equal(CachedFeatures(narrow)[3]["features"])
    trainer_of(coral, target, CachedFeatures(wide), tmp_path / "a").train()
    with pytest.raises(ValueError, match=r"layers \[-1\], but the drafter is trained on layers"):
        trainer_of(eagle3, target, CachedFeatures(narrow), tmp_path / "b")


@LONG
def test_an_evaluation_measures_what_decoding_accepts(family, target, texts, tmp_path):
    trainer = trainer_of(
        family, target, texts, tmp_path, max_steps=40, eval_prompts=4, eval_max_new_tokens=12
    )
    trainer.train()
    found = trainer.evaluate(texts)
    assert found["eval_acceptance_length"] > 1.1
    assert found["eval_simulated_acceptance_length"] > 1.1
    assert 0 < found["eval_acceptance_depth_1"] <= 1


def test_a_recipe_and_a_stage_of_another_family_are_refused(target, texts, tmp_path):
    coral, eagle3 = map(step_kind, FAMILIES[:2])
    with pytest.raises(ValueError, match="`recipe` is 'eagle3', but `model` is a CoralDrafter; u"):
        trainer_of(coral, target, texts, tmp_path, recipe="eagle3")
    medusa = step_kind("coral_medusa")
    with pytest.raises(ValueError, match="`stage` is 'router', but `model` is a MedusaDrafter"):
        trainer_of(medusa, target, texts, tmp_path, stage="router")


def test_the_pipeline_makes_the_drafter_that_the_recipe_is_for(family, target, texts, tmp_path):
    args = trainer_of(family, target, texts, tmp_path / "a", max_steps=1).args
    tokens = texts.remove_columns("labels").add_column("labels", texts["labels"])
    drafter = train(target, None, tokens, [args])
    assert type(drafter) is family.drafter


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is dep:FutureWarning")
def test_an_adapter_is_trained_in_place_of_the_drafter(family, target, texts, tmp_path):
    trainer = trainer_of(family, target, texts, tmp_path, peft_config=lora(2))
    before = {name: weight.clone() for name, weight in trainer.model.named_parameters()}
    trainer.train()
    changed = {n for n, weight in trainer.model.named_parameters() if not weight.equal(before[n])}
    assert changed and all(".lora_" in name for name in changed)


def test_a_drafter_of_another_target_is_a_warm_start(family, target, tmp_path):
    torch.manual_seed(1)
    other = family.drafter.from_target(target).float()
    other.save_pretrained(tmp_path)
    tuned = tiny_target("llama", torch.float32, seed=5)
    for source in (other, tmp_path):
        drafter = warm_start(tuned, source)
        assert type(drafter) is family.drafter and drafter.training_record == []
        for name, tensor in other.state_dict().items():
            assert drafter.state_dict()[name].equal(tensor), name
    assert kind_of_source(tmp_path) is family


@LONG
def test_a_plan_counts_the_layers_and_runs_the_step(family, folder, tmp_path):  # noqa: F811
    rows = Dataset.from_dict({"input_ids": [[*range(1, 40)]] * 4, "labels": [[*range(1, 40)]] * 4})
    args = trainer_of(family, tiny_target("llama", torch.float32), rows, tmp_path, max_steps=1).args
    found = plan(folder / "target", rows, args, UNTIMED)
    layers = family.layers(
        family.drafter.config_class.from_target(AutoConfig.from_pretrained(folder / "target"))
    )
    assert found.caches["bfloat16"] == 4 * 39 * (len(layers) * 32 * 2 + 2 * 4)
    assert found.memory.features > 0 and found.memory.optimizer > 0


@pytest.mark.parametrize("family", [FAMILIES[0], *slowly(FAMILIES[1]), *LAST_SLOW], indirect=True)
def test_the_command_trains_resumes_and_trains_further(family, folder, tmp_path):  # noqa: F811
    names = ["--target", folder / "target", "--dataset", folder / "talk.jsonl"]
    quick = ["--max-steps", 2, "--num-steps", 2, "--use-cpu", "True"]
    quick += ["--stage", "drafter"] if "router" in family.stages else []  # else its only one
    quick += ["--save-strategy", "steps", "--save-steps", 1]
    run = partial(invoke, "train", *names, *quick)
    made = run("--output", tmp_path / "made", "--recipe", family.recipes[0])
    assert made.exit_code == 0, made.output
    drafter = AutoModel.from_pretrained(tmp_path / "made")
    assert type(drafter) is family.drafter
    assert drafter.training_record[0]["recipe"] == family.recipes[0]
    AutoTokenizer.from_pretrained(tmp_path / "made")
    resumed = run("--output", tmp_path / "made", "--recipe", family.recipes[0], "--resume")
    assert resumed.exit_code == 0, resumed.output
    # its recipe and its stage follow from the drafter
    further = run("--output", tmp_path / "further", "--from", tmp_path / "made")
    assert further.exit_code == 0, further.output
    further = AutoModel.from_pretrained(tmp_path / "further")
    assert type(further) is family.drafter and len(further.training_record) == 2


def test_the_features_command_stores_what_the_recipe_reads(family, folder, tmp_path):  # noqa: F811
    names = ["--target", folder / "target", "--dataset", folder / "talk.jsonl"]
    stored = invoke("features", *names, "--output", tmp_path / "f", "--recipe", family.recipes[0])
    assert stored.exit_code == 0, stored.output
    cached = CachedFeatures(tmp_path / "f")
    config = family.drafter.config_class.from_target(AutoConfig.from_pretrained(folder / "target"))
    assert cached.index.layers == family.layers(config)
    wrong = invoke("features", *names, "--output", tmp_path / "g", "--recipe", "eagle4")
    assert "`recipe` is 'eagle4'; use one of" in printed(wrong)
