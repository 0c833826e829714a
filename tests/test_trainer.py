"""`CoralTrainer` as a `Trainer`, on a tiny target and sequences that it generates."""

import json
import logging
from dataclasses import replace

import pytest
import torch
from conftest import VOCAB, tiny_target
from datasets import Dataset
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModel, PreTrainedConfig, TrainerCallback
from transformers.utils.logging import warning_once

import coral_hf
from coral_hf import CoralDrafter, CoralTrainer, CoralTrainingArguments
from coral_hf.target import read_target
from coral_hf.training.losses import csra_loss
from coral_hf.training.steps import Trained, register_step, training_step
from coral_hf.training.steps.base import add_noise
from coral_hf.training.steps.coral import CoralStep


@pytest.fixture(scope="module")
def target():
    return tiny_target("llama", torch.float32)


@pytest.fixture(scope="module")
def rows(target):
    """24 sequences of the target of 20 tokens, the first two not trained."""
    torch.manual_seed(0)
    prompts = torch.randint(2, VOCAB, (24, 4))
    texts = target.generate(
        prompts, attention_mask=torch.ones_like(prompts), do_sample=False, max_new_tokens=16
    ).tolist()
    return [
        {"input_ids": text, "attention_mask": [1] * len(text), "labels": [-100, -100, *text[2:]]}
        for text in texts
    ]


def make_trainer(target, rows, folder, drafter=None, peft_config=None, **settings):
    if drafter is None:
        torch.manual_seed(0)
        drafter = CoralDrafter.from_target(target)
    fields = {
        "output_dir": str(folder),
        "recipe": "coral",
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    args = CoralTrainingArguments(**{**fields, **settings})
    dataset = Dataset.from_list(rows) if isinstance(rows, list) else rows
    return CoralTrainer(
        model=drafter,
        target_model=target,
        args=args,
        train_dataset=dataset,
        peft_config=peft_config,
    )


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def test_training_lowers_every_loss_and_raises_the_agreement(target, rows, tmp_path):
    trainer = make_trainer(target, rows, tmp_path, max_steps=60, classification_weight=1.0)
    trainer.train()
    for name in ("loss", "regression_loss", "classification_loss", "csra_loss"):
        assert logged(trainer, name)[-1] < 0.95 * logged(trainer, name)[0], name
    for step in (1, 2, 3):
        agreement = logged(trainer, f"agreement_{step}")
        assert sum(agreement[-5:]) > sum(agreement[:5]) + 0.5 and agreement[-1] <= 1


def test_every_loss_the_agreement_and_the_gradient_norm_are_logged(target, rows, tmp_path):
    trainer = make_trainer(target, rows, tmp_path, max_steps=1)
    trainer.train()
    expected = {"loss", "grad_norm", "learning_rate", "regression_loss", "classification_loss"}
    expected |= {"csra_loss", "agreement_1", "agreement_2", "agreement_3"}
    assert expected <= set(trainer.state.log_history[0])


@pytest.mark.parametrize(
    ("negatives", "csra"),
    [
        ("batch", lambda predicted: csra_loss(predicted, 0.07)),
        ("sequence", lambda predicted: csra_loss(predicted, 0.07, [18, 7])),
    ],
)
def test_the_loss_is_the_weighted_sum_over_trained_tokens(target, rows, tmp_path, negatives, csra):
    weights = {"regression_weight": 0.7, "classification_weight": 0.3, "csra_weight": 0.2}
    weights["csra_negatives"] = negatives
    trainer = make_trainer(target, rows, tmp_path, num_steps=2, **weights)
    batch = {name: torch.tensor([row[name] for row in rows[:2]]) for name in rows[0]}
    batch["labels"][1, 9:] = -100
    loss = trainer.compute_loss(trainer.model, dict(batch))
    # by hand, one step after the other
    ids, drafter = batch["input_ids"], trainer.model
    features = target.model(ids).last_hidden_state
    embeddings = target.model.embed_tokens(ids[:, 1:])
    unrolled = trainer.step.unroll(drafter, batch, 2).trained()
    kept = batch["labels"][:, 2:] != -100
    first = drafter(embeddings, features[:, :-1])[:, :-1][kept]
    torch.testing.assert_close(unrolled.predicted[0], first)
    goal = features[:, 1:-1][kept]
    probs = target.lm_head(goal).softmax(-1)
    total = 0.2 * csra(unrolled.predicted)
    for predicted in unrolled.predicted:
        total += 0.7 * F.smooth_l1_loss(predicted, goal, reduction="none").mean(-1).sum()
        total -= 0.3 * (probs * target.lm_head(predicted).log_softmax(-1)).sum()
    torch.testing.assert_close(loss, total / kept.sum())


def test_a_family_of_drafters_trains_by_the_step_that_it_registers(target, tmp_path):
    args = CoralTrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    read, config = read_target(target), PreTrainedConfig()
    config.model_type = "toy"
    with pytest.raises(ValueError, match="a 'toy' drafter, for which no training step is regis"):
        training_step(config, read, args)

    class ToyStep(CoralStep):
        stages = ("drafter",)

    register_step("toy", ToyStep)
    assert type(training_step(config, read, args)) is ToyStep
    with pytest.raises(ValueError, match="`stage` is 'joint', .* use one of .'drafter',."):
        training_step(config, read, replace(args, stage="joint"))


def test_training_leaves_the_target_unchanged(target, rows, tmp_path):
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    make_trainer(target, rows, tmp_path).train()
    assert all(torch.equal(tensor, before[name]) for name, tensor in target.state_dict().items())
    assert not any(parameter.requires_grad for parameter in target.parameters())


@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_any_number_of_steps_trains(target, rows, tmp_path, num_steps):
    csra = {"csra_weight": 0.0} if num_steps == 1 else {}
    trainer = make_trainer(target, rows, tmp_path, num_steps=num_steps, max_steps=1, **csra)
    trainer.train()
    assert f"agreement_{num_steps}" in trainer.state.log_history[0]


def test_accumulated_batches_equal_one_large_batch(target, rows, tmp_path):
    # rows of different numbers of trained tokens, so a mean of means would differ
    uneven = [
        dict(row, labels=[-100] * (2 + index) + row["labels"][2 + index :])
        for index, row in enumerate(rows[:8])
    ]
    found = []
    for size, accumulated in ((8, 1), (2, 4)):
        trainer = make_trainer(
            target,
            uneven,
            tmp_path,
            max_steps=1,
            csra_negatives="sequence",
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulated,
            optim="sgd",
        )
        trainer.train()
        found.append((logged(trainer, "loss")[0], trainer.model.fc.weight.detach().clone()))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing`:FutureWarning")  # renamed in 5.23
def test_gradient_checkpointing_gives_the_same_losses_without_warnings(
    target, rows, tmp_path, caplog, monkeypatch
):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    warning_once.cache_clear()
    losses = []
    for checkpointing in (False, True):
        trainer = make_trainer(
            target,
            rows,
            tmp_path,
            gradient_checkpointing=checkpointing,
            include_num_input_tokens_seen="all",
        )
        trainer.train()
        trainer.train()
        losses.append(logged(trainer, "loss"))
        assert trainer.state.num_input_tokens_seen == 4 * 4 * 20
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert "input embeddings" not in caplog.text


def test_bf16_trains(target, rows, tmp_path):
    trainer = make_trainer(target, rows, tmp_path, bf16=True, max_steps=20)
    trainer.train()
    assert logged(trainer, "loss")[-1] < logged(trainer, "loss")[0]
    assert trainer.model.dtype == torch.float32


def test_a_seed_gives_the_same_losses_twice(target, rows, tmp_path):
    runs = [make_trainer(target, rows, tmp_path, seed=7) for _ in range(2)]
    for trainer in runs:
        trainer.train()
    assert logged(runs[0], "loss") == logged(runs[1], "loss")


class Interrupt(TrainerCallback):
    """Stops a run as Ctrl-C would, in the middle of a step after a checkpoint."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    "extra",
    [{"single_step_share": 0.6}, {"feature_noise": 0.1, "packing": True, "max_length": 45}],
)
def test_an_interrupted_run_resumes_with_the_same_losses(target, rows, tmp_path, extra):
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, **extra}
    whole = make_trainer(target, rows, tmp_path / "whole", **settings)
    whole.train()
    broken = make_trainer(target, rows, tmp_path / "broken", **settings)
    broken.add_callback(Interrupt())
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    resumed = make_trainer(target, rows, tmp_path / "broken", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert logged(resumed, "loss") == logged(whole, "loss")
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_stream_trains_and_its_length_is_not_recorded(target, rows, tmp_path):
    stream = Dataset.from_list(rows).to_iterable_dataset()
    trainer = make_trainer(target, stream, tmp_path, save_strategy="steps", save_steps=2)
    trainer.train()
    saved = CoralDrafter.from_pretrained(tmp_path / "checkpoint-4")
    (stage,) = saved.training_record
    assert stage["rows"] is None and stage["steps"] == 4


def test_a_checkpoint_holds_the_drafter_and_nothing_of_the_target(target, rows, tmp_path):
    trainer = make_trainer(target, rows, tmp_path, save_strategy="steps", save_steps=4)
    trainer.train()
    folder = tmp_path / "checkpoint-4"
    saved = load_file(folder / "model.safetensors")
    assert set(saved) == set(trainer.model.state_dict())
    assert not any("embed" in name or "lm_head" in name for name in saved)
    assert (folder / "generation_config.json").exists()
    assert isinstance(AutoModel.from_pretrained(folder), CoralDrafter)


def test_a_trained_router_becomes_the_drafters_head(target, rows, tmp_path):
    first = make_trainer(target, rows, tmp_path / "drafter")
    first.train()
    before = {name: tensor.clone() for name, tensor in first.model.state_dict().items()}
    groups = {"num_groups": 6, "num_active_groups": 2}
    second = make_trainer(
        target, rows, tmp_path / "router", first.model, stage="router", max_steps=60, **groups
    )
    second.train()
    losses = logged(second, "router_loss")
    assert sum(losses[-6:]) < sum(losses[:6])
    for name, tensor in second.model.state_dict().items():
        assert name.startswith("heads.router.") or torch.equal(tensor, before[name])
    second.model.save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["draft_head"] == "routed" and config["is_router_trained"]
    loaded = AutoModel.from_pretrained(tmp_path / "saved").eval()
    prompt = torch.tensor([rows[0]["input_ids"][:4]])
    settings = {"do_sample": False, "max_new_tokens": 20, "attention_mask": torch.ones_like(prompt)}
    plain = target.generate(prompt, **settings)
    for head in ("routed", "full"):
        drafted = target.generate(prompt, assistant_model=loaded, draft_head=head, **settings)
        assert torch.equal(plain, drafted)


def test_conversations_are_rendered_by_the_trainer(target, tmp_path):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"[PAD]": 0, "[UNK]": 1, "user": 2, "assistant": 3, "end": 4, "hello": 5, "you": 6}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + ' ' + m.content + ' end ' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant {% endif %}"
    )
    talk = [
        {"role": "user", "content": "hello hello"},
        {"role": "assistant", "content": "you hello you"},
    ]
    args = CoralTrainingArguments(
        output_dir=str(tmp_path), max_steps=1, report_to="none", use_cpu=True, disable_tqdm=True
    )
    drafter = CoralDrafter.from_target(target)
    trainer = CoralTrainer(
        model=drafter,
        target_model=target,
        args=args,
        train_dataset=Dataset.from_list([{"messages": talk}] * 4),
        processing_class=tokenizer,
    )
    # user hello hello end assistant | you hello you end
    assert trainer.train_dataset[0]["labels"] == [-100] * 5 + [6, 5, 6, 4]
    assert drafter.config.tokenizer_hash == coral_hf.identity.tokenizer_hash(tokenizer)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "tokenizer.json").exists()


def test_evaluation_reports_the_loss_of_held_out_rows(target, rows, tmp_path):
    trainer = make_trainer(target, rows[:16], tmp_path)
    metrics = trainer.evaluate(Dataset.from_list(rows[16:]))
    assert 0 < metrics["eval_loss"] < 100


def test_a_target_of_other_sizes_is_refused_before_training(target, rows, tmp_path):
    other = tiny_target("llama", torch.float32, hidden_size=16)
    drafter = CoralDrafter.from_target(target)
    with pytest.raises(ValueError, match="`hidden_size` of the target is 16"):
        make_trainer(other, rows, tmp_path, drafter)


def test_feature_noise_is_read_in_training_and_never_the_goal(target, rows, tmp_path):
    trainer = make_trainer(target, rows, tmp_path, feature_noise=0.1)
    batch = {name: torch.tensor([row[name] for row in rows[:2]]) for name in rows[0]}
    trainer.model.train()
    noisy = trainer.step.unroll(trainer.model, batch, 3).trained()
    trainer.model.eval()
    clear = trainer.step.unroll(trainer.model, batch, 3).trained()
    assert not torch.equal(noisy.predicted, clear.predicted)
    assert torch.equal(noisy.target, clear.target)
    features = torch.zeros(4, 50, 32)
    noise = add_noise(features, 0.1, process=0)
    assert noise.abs().max() <= 0.1 and noise.std() == pytest.approx(0.1 / 3**0.5, rel=0.1)


@pytest.mark.parametrize("recipe", ["eagle", "hass", "coral"])
def test_every_recipe_trains(target, rows, tmp_path, recipe):
    trainer = make_trainer(target, rows, tmp_path, recipe=recipe, max_steps=20)
    trainer.train()
    assert logged(trainer, "loss")[-1] < 0.95 * logged(trainer, "loss")[0]
    entry = trainer.state.log_history[0]
    assert ("csra_loss" in entry, "top_k_loss" in entry) == (recipe == "coral", recipe == "hass")
    assert ("agreement_2" in entry) == (recipe != "eagle")


def test_a_share_of_a_run_trains_its_first_step_alone(target, rows, tmp_path):
    def trained(**settings):
        trainer = make_trainer(target, rows, tmp_path, lr_scheduler_type="constant", **settings)
        trainer.train()
        return trainer

    eagle, both = trained(recipe="eagle"), trained(single_step_share=0.5)
    assert logged(both, "loss")[:2] == logged(eagle, "loss")[:2]
    for name in ("agreement_1", "classification_loss_1"):
        assert len(logged(both, name)) == 4
    for name in ("agreement_3", "csra_loss", "feature_similarity_2"):
        assert [name in entry for entry in both.state.log_history[:4]] == [False] * 2 + [True] * 2
    (entry,) = both.training_record
    assert entry["weights"]["single_step_share"] == 0.5
    # an entry over both parts averages over the positions that each step had
    together = trained(single_step_share=0.5, logging_steps=4)
    for name in ("agreement_1", "agreement_3", "csra_loss"):
        values = logged(both, name)
        expected = pytest.approx(sum(values) / len(values), rel=1e-6)
        assert logged(together, name) == [expected]


def test_a_share_of_single_steps_is_for_a_drafters_stages(target, tmp_path):
    def steps(**settings):
        args = CoralTrainingArguments(output_dir=str(tmp_path), **settings)
        return [args.steps_at(number, 10) for number in range(10)]

    assert steps() == steps(stage="joint") == [1] * 3 + [3] * 7
    assert steps(stage="router") == steps(recipe="hass") == [3] * 10
    assert steps(recipe="hass", single_step_share=0.5) == [1] * 5 + [3] * 5
    assert steps(recipe="eagle", single_step_share=0.5) == [1] * 10


def test_csra_that_no_step_of_a_run_computes_is_refused(target, rows, tmp_path):
    trainer = make_trainer(target, rows, tmp_path, single_step_share=0.9)  # of 4: 3.6
    with pytest.raises(ValueError, match="`csra_weight` is 0.1, but all 4 steps of the run train"):
        trainer.train()


def test_csra_of_later_steps_does_not_train_the_first(target, rows, tmp_path):
    predicted = torch.randn(3, 5, 32, requires_grad=True)
    trained = Trained(predicted, torch.randn(5, 32), [5], torch.arange(5))
    weights = {"regression_weight": 0.0, "classification_weight": 0.0, "top_k_weight": 1e-9}
    trainer = make_trainer(target, rows, tmp_path, csra_gradient="later_steps", **weights)
    loss = trainer.step.losses(trainer.drafter, trained).terms["csra"]
    (gradient,) = torch.autograd.grad(loss, trained.predicted)
    assert gradient[0].eq(0).all() and gradient[1:].abs().sum(-1).gt(0).all()


def test_csra_can_pull_predictions_to_the_targets_features(target, rows, tmp_path):
    trained = Trained(torch.randn(3, 5, 32), torch.randn(5, 32), [5], torch.arange(5))
    trainer = make_trainer(target, rows, tmp_path, csra_positives="steps_and_target")
    expected = csra_loss(trained.predicted, 0.07, target=trained.target)
    losses = trainer.step.losses(trainer.drafter, trained)
    torch.testing.assert_close(losses.notes["csra_loss"], expected)


@pytest.mark.slow
# what torch's compiler says of itself as it traces
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("packing", [False, True])
def test_a_compiled_drafter_has_the_same_losses(target, rows, tmp_path, packing):
    uneven = [
        {name: values[: len(values) - index % 5] for name, values in row.items()}
        for index, row in enumerate(rows)
    ]
    losses = []
    for compiled in (False, True):
        settings = {"torch_compile": compiled, "packing": packing, "max_length": 40}
        trainer = make_trainer(target, uneven, tmp_path, **settings)
        trainer.train()
        losses.append(logged(trainer, "loss"))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
