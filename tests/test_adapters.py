"""Adapters of PEFT: on a drafter, and on the target that a drafter is trained for."""

# ruff: noqa: F811  fixtures are imported

import copy
import json

import pytest
import torch
from conftest import scatter_weights, tiny_target
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from test_trainer import logged, make_trainer, rows, target  # noqa: F401  fixtures too
from transformers import AutoModel

from coral_hf import CoralDrafter
from coral_hf.training.stages import DRAFTER_LAYERS, lora

# PEFT asks for a property that newer versions of transformers have renamed
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is dep:FutureWarning")
PROMPT = torch.tensor([[1, 5, 9, 7, 3]])
GREEDY = {"do_sample": False, "max_new_tokens": 12, "attention_mask": torch.ones_like(PROMPT)}
LAYERS = ["fc", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def saved(target, tmp_path_factory):
    """A drafter with a router, in a folder."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("drafter")
    drafter = CoralDrafter.from_target(target)
    drafter.heads.add_router(4, 2)
    drafter.save_pretrained(folder)
    return folder


def load(folder) -> CoralDrafter:
    return AutoModel.from_pretrained(folder)


def adapted(folder) -> PeftModel:
    """A drafter with a LoRA that is no longer the zeros it starts with."""
    model = get_peft_model(load(folder), lora(4))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.2, generator=torch.Generator().manual_seed(len(name)))
    return model.eval()


def one_step(drafter) -> torch.Tensor:
    """(1, 6, 32), what a drafter predicts of some features."""
    generator = torch.Generator().manual_seed(3)
    embeddings, features = torch.randn(2, 1, 6, 32, generator=generator)
    with torch.no_grad():
        return drafter(embeddings, features, torch.arange(6)[None])


# ---- training an adapter


def test_only_the_adapter_is_trained(target, rows, saved, tmp_path):
    drafter = load(saved)
    before = {name: tensor.clone() for name, tensor in drafter.state_dict().items()}
    trainer = make_trainer(target, rows, tmp_path, drafter, peft_config=lora(4), max_steps=40)
    trainer.train()
    losses = logged(trainer, "loss")
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])
    after = {name.replace(".base_layer", ""): t for name, t in drafter.state_dict().items()}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    trained = {name for name, parameter in drafter.named_parameters() if parameter.requires_grad}
    assert trained and all("lora_" in name and "router" not in name for name in trained)


@pytest.mark.parametrize("targets", [None, "all-linear", ["fc", "down_proj"], DRAFTER_LAYERS])
def test_without_target_modules_all_layers_but_the_routers_are_adapted(
    target, rows, saved, tmp_path, targets
):
    config = LoraConfig(r=2, target_modules=targets)
    trainer = make_trainer(target, rows, tmp_path, load(saved), peft_config=config)
    names = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
    found = {name.split(".lora_")[0].split(".")[-1] for name in names}
    assert found == set(["fc", "down_proj"] if isinstance(targets, list) else LAYERS)
    assert config.target_modules == targets or isinstance(targets, list)  # the caller's own stays


def test_a_checkpoint_of_an_adapter_names_its_drafter(target, rows, saved, tmp_path):
    trainer = make_trainer(target, rows, tmp_path, load(saved), peft_config=lora(4))
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(saved)
    trained = one_step(trainer.model.eval())
    by_peft = PeftModel.from_pretrained(load(saved), tmp_path / "adapter").eval()
    by_transformers = load(tmp_path / "adapter").eval()
    assert torch.equal(one_step(by_peft), trained)
    assert torch.equal(one_step(by_transformers), trained)
    assert not torch.equal(one_step(load(saved)), trained)


def test_an_interrupted_run_of_an_adapter_resumes(target, rows, saved, tmp_path):
    settings = {"peft_config": lora(4), "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(target, rows, tmp_path, load(saved), **settings)
    whole.train()
    resumed = make_trainer(target, rows, tmp_path, load(saved), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert logged(resumed, "loss") == logged(whole, "loss")
    assert torch.equal(one_step(resumed.model), one_step(whole.model))


def test_a_loaded_adapter_is_trained_further(target, rows, saved, tmp_path):
    adapted(saved).save_pretrained(tmp_path / "adapter")
    model = PeftModel.from_pretrained(load(saved), tmp_path / "adapter", is_trainable=True)
    before = one_step(model)
    make_trainer(target, rows, tmp_path, model).train()
    with model.disable_adapter():
        assert torch.equal(one_step(model), one_step(load(saved)))
    assert not torch.equal(one_step(model), before)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing`:FutureWarning")  # renamed in 5.23
def test_gradient_checkpointing_gives_the_same_losses(target, rows, saved, tmp_path):
    losses = []
    for checkpointing in (False, True):
        settings = {"peft_config": lora(4), "gradient_checkpointing": checkpointing}
        torch.manual_seed(0)
        trainer = make_trainer(target, rows, tmp_path, load(saved), **settings)
        trainer.train()
        losses.append(logged(trainer, "loss"))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


# ---- using an adapter


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_generate_takes_an_adapted_drafter(target, saved, task_type):
    model = adapted(saved)
    model.save_pretrained(saved / "adapter")
    if task_type:  # how others may have made it
        path = saved / "adapter" / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"task_type": task_type}))
    loaded = PeftModel.from_pretrained(load(saved), saved / "adapter").eval()
    merged = adapted(saved).merge_and_unload()
    plain = target.generate(PROMPT, **GREEDY)
    rounds = []
    for drafter in (loaded, merged, load(saved / "adapter"), load(saved)):
        output = target.generate(
            PROMPT, assistant_model=drafter, return_dict_in_generate=True, **GREEDY
        )
        assert torch.equal(output.sequences, plain)
        rounds.append(output.stats.round_lengths)
    assert rounds[0] == rounds[1] == rounds[2]


def test_a_merged_drafter_predicts_and_saves_what_the_adapted_one_does(saved, tmp_path):
    expected = one_step(adapted(saved))
    assert not torch.allclose(expected, one_step(load(saved)), atol=1e-2)
    merged = adapted(saved).merge_and_unload()
    assert type(merged) is CoralDrafter
    torch.testing.assert_close(one_step(merged), expected, rtol=1e-4, atol=1e-5)
    merged.save_pretrained(tmp_path)
    assert torch.equal(one_step(load(tmp_path)), one_step(merged))


# ---- adapters that cannot be trained


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            LoraConfig(target_modules=r"heads\.router\..+"),
            "trains nothing of the drafter.*`target_modules",
        ),
        (
            LoraConfig(task_type="CAUSAL_LM"),
            "LoraConfig whose .*Use a LoraConfig without `task_type`",
        ),
        (
            PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
            "PromptTuningConfig whose .*Use a LoraConfig",
        ),
    ],
)
def test_an_adapter_that_does_not_fit_a_drafter_is_refused(
    target, rows, saved, tmp_path, config, said
):
    with pytest.raises(ValueError, match=said):
        make_trainer(target, rows, tmp_path, load(saved), peft_config=config)


def test_two_adapters_at_once_are_refused(target, rows, saved, tmp_path):
    adapted(saved).save_pretrained(tmp_path / "adapter")
    for model in (adapted(saved), load(tmp_path / "adapter")):
        with pytest.raises(ValueError, match="has an adapter already; pass one of them"):
            make_trainer(target, rows, tmp_path, model, peft_config=lora(4))


def test_an_adapter_that_was_not_loaded_for_training_is_refused(target, rows, saved, tmp_path):
    adapted(saved).save_pretrained(tmp_path / "adapter")
    frozen = PeftModel.from_pretrained(load(saved), tmp_path / "adapter")
    with pytest.raises(ValueError, match="trains nothing of the drafter: .*is_trainable=True"):
        make_trainer(target, rows, tmp_path, frozen)
    with pytest.raises(ValueError, match="loaded from the folder of an adapter.*is_trainable=True"):
        make_trainer(target, rows, tmp_path, load(tmp_path / "adapter"))


def test_the_routers_stage_takes_no_adapter(target, rows, saved, tmp_path):
    with pytest.raises(ValueError, match="`stage` is 'router'.*merge"):
        make_trainer(target, rows, tmp_path, adapted(saved), stage="router")


# ---- a target with an adapter


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q_proj", "down_proj"]},
        {"target_modules": ["embed_tokens", "q_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
)
@pytest.mark.parametrize("stage", ["drafter", "router"])
def test_a_drafter_is_trained_for_an_adapted_target(rows, tmp_path, fields, stage):
    config = LoraConfig(r=4, task_type="CAUSAL_LM", **fields)
    target = get_peft_model(tiny_target("llama", torch.float32), config).eval()
    scatter_weights(target, seed=1)
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    unadapted = copy.deepcopy(target).unload()

    def losses(model):
        trainer = make_trainer(model, rows, tmp_path, stage=stage, grouping="contiguous")
        trainer.train()
        return logged(trainer, "loss")

    found = losses(target)
    assert all(torch.equal(tensor, before[name]) for name, tensor in target.state_dict().items())
    assert found == pytest.approx(losses(target.merge_and_unload()), rel=1e-6)
    assert found != pytest.approx(losses(unadapted), rel=1e-5)


def test_groups_of_like_rows_need_a_head_without_an_adapter(rows, tmp_path):
    config = LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["lm_head"])
    target = get_peft_model(tiny_target("llama", torch.float32), config).eval()
    with pytest.raises(ValueError, match="offloaded or adapted. Use grouping='frequency'"):
        make_trainer(target, rows, tmp_path, stage="router", grouping="kmeans")


def test_a_target_with_virtual_tokens_trains_no_drafter(rows, tmp_path):
    target = tiny_target("llama", torch.float32)
    drafter = CoralDrafter.from_target(target)
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    with pytest.raises(ValueError, match="cannot take a drafter: its adapter.*virtual tokens"):
        make_trainer(get_peft_model(target, config), rows, tmp_path, drafter)
