"""Metrics of an evaluation, and training runs that evaluations leave unchanged."""

import os
import re
import subprocess
import sys
from copy import deepcopy
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import VOCAB, tiny_target
from datasets import Dataset
from test_data import CHAT, tiny_tokenizer
from transformers import EarlyStoppingCallback, PrinterCallback

from coral_hf import CoralDrafter, CoralTrainer, CoralTrainingArguments
from coral_hf.target import read_target
from coral_hf.training.evaluation import EvaluationTable
from coral_hf.training.evaluation.acceptance import (
    acceptance_by_depth,
    acceptance_length,
    count_rounds,
    held_out_prompts,
    prompt_of,
)
from coral_hf.training.steps.objectives import step_similarity

TREE = {"tree_depth": 3, "tree_top_k": 4, "tree_nodes": 12}


@pytest.fixture(scope="module")
def target():
    return tiny_target("llama", torch.float32)


@pytest.fixture(scope="module")
def rows(target):
    """The target's own words: 24 rows of 20 tokens, of which 4 to 7 are the prompt."""
    torch.manual_seed(0)
    prompts = torch.randint(2, VOCAB, (24, 4))
    mask = torch.ones_like(prompts)
    texts = target.generate(prompts, attention_mask=mask, do_sample=False, max_new_tokens=16)
    starts = [4 + index % 4 for index in range(24)]
    return [
        {"input_ids": text, "attention_mask": [1] * 20, "labels": [-100] * start + text[start:]}
        for text, start in zip(texts.tolist(), starts, strict=True)
    ]


def make_trainer(target, rows, folder, drafter=None, eval_dataset=None, **settings):
    torch.manual_seed(0)
    drafter = CoralDrafter.from_target(target) if drafter is None else drafter
    drafter.generation_config.update(**TREE)
    fields = {
        "output_dir": str(folder),
        "max_steps": 6,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 4,
        "learning_rate": 1e-2,
        "classification_weight": 1.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "eval_prompts": 4,
        "eval_max_new_tokens": 12,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return CoralTrainer(
        model=drafter,
        target_model=target,
        args=CoralTrainingArguments(**{**fields, **settings}),
        # with the evaluated rows: there is nothing that a random target's texts have in common
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows[16:]) if eval_dataset is None else eval_dataset,
    )


@pytest.fixture(scope="module")
def trained(target, rows, tmp_path_factory):
    """A drafter that has learned some of the rows."""
    trainer = make_trainer(target, rows, tmp_path_factory.mktemp("trained"), max_steps=40)
    trainer.train()
    return trainer.model


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def decoded(target, drafter, rows, **settings):
    """Tokens of each round of tree decoding, the prompts one by one."""
    rounds = []
    for row in rows:
        prompt = torch.tensor([prompt_of(row, 16)])
        settings = {"do_sample": False, "max_new_tokens": 12, **TREE, **settings}
        output = target.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            assistant_model=drafter,
            speculation="always",
            return_dict_in_generate=True,
            **settings,
        )
        rounds += output.stats.round_lengths
    return rounds


def test_conversations_given_to_evaluate_are_prepared_like_eval_dataset(tmp_path):
    target = tiny_target("llama", torch.float32, vocab_size=300)
    chats = {
        "short": Dataset.from_list([{"messages": CHAT}] * 3),
        "long": Dataset.from_list([{"messages": CHAT * 2}, {"messages": CHAT * 3}]),
    }
    trainer = CoralTrainer(
        model=CoralDrafter.from_target(target),
        target_model=target,
        args=CoralTrainingArguments(
            output_dir=str(tmp_path),
            eval_prompts=2,
            eval_max_new_tokens=12,
            report_to="none",
            use_cpu=True,
        ),
        eval_dataset=chats,
        processing_class=tiny_tokenizer(),
    )
    expected = trainer.evaluate()
    found = trainer.evaluate(chats)
    long = trainer.evaluate(chats["long"], metric_key_prefix="eval_long")
    names = [name for name in expected if name.endswith(("loss", "acceptance_length"))]
    assert len(names) == 6
    for name in names:
        assert found[name] == expected[name]
        assert name not in long or long[name] == expected[name]
    with pytest.raises(ValueError, match="`dataset` is a list; give a `datasets.Dataset`"):
        trainer.evaluate([{"messages": CHAT}])


def test_rows_beyond_the_limit_are_refused_by_evaluate_too(target, rows, tmp_path):
    trainer = make_trainer(target, rows, tmp_path, max_length=20)
    row = {name: [*values, values[-1]] for name, values in rows[0].items()}
    with pytest.raises(ValueError, match="`max_length` is 20, but a row of `dataset` has 21"):
        trainer.evaluate(Dataset.from_list([row]))


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_acceptance_length_is_that_of_generate(target, rows, trained, tmp_path, batch_size):
    trainer = make_trainer(
        target, rows, tmp_path, deepcopy(trained), per_device_eval_batch_size=batch_size
    )
    metrics = trainer.evaluate()
    rounds = decoded(target, trainer.model, [rows[16 + index] for index in (0, 2, 4, 6)])
    assert metrics["eval_acceptance_length"] == pytest.approx(sum(rounds) / len(rounds))
    assert metrics["eval_acceptance_length"] > 1.3
    assert 1 <= metrics["eval_simulated_acceptance_length"] <= 4
    for depth in (1, 2, 3):
        came, accepted = (sum(n > d for n in rounds) for d in (depth - 1, depth))
        assert metrics[f"eval_acceptance_depth_{depth}"] == pytest.approx(accepted / came)
    assert trainer.state.log_history[-1]["eval_acceptance_length"] > 1.3


def test_evaluations_do_not_change_a_training_run(target, rows, tmp_path):
    curves = []
    for strategy in ("no", "steps"):
        trainer = make_trainer(
            target, rows, tmp_path, eval_strategy=strategy, eval_steps=1, eval_temperature=1.0
        )
        trainer.train()  # of three epochs, each with its own order
        curves.append(logged(trainer, "loss"))
    assert len(logged(trainer, "eval_acceptance_length")) == 6
    assert curves[0] == curves[1]


def test_an_evaluation_restores_the_random_state(target, rows, tmp_path):
    trainer = make_trainer(target, rows, tmp_path, eval_temperature=1.0)
    before = torch.get_rng_state()
    trainer.evaluate()
    assert torch.equal(torch.get_rng_state(), before)


def test_evaluations_do_not_change_a_bf16_run_or_its_dtype(target, rows, tmp_path):
    curves = []
    for strategy in ("no", "steps"):
        trainer = make_trainer(
            target, rows, tmp_path, eval_strategy=strategy, eval_steps=2, bf16=True
        )
        trainer.train()
        curves.append(logged(trainer, "loss"))
    assert logged(trainer, "eval_acceptance_length")[-1] >= 1
    assert curves[0] == curves[1]
    assert trainer.model.dtype == torch.float32


def test_the_best_checkpoint_is_that_of_the_highest_acceptance_length(target, rows, tmp_path):
    trainer = make_trainer(
        target,
        rows,
        tmp_path,
        max_steps=24,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=4,
        save_steps=4,
        metric_for_best_model="acceptance_length",
        greater_is_better=True,
        load_best_model_at_end=True,
    )
    trainer.train()
    lengths = logged(trainer, "eval_acceptance_length")
    assert len(set(lengths)) > 1
    assert trainer.state.best_metric == max(lengths)
    best = 4 * (lengths.index(max(lengths)) + 1)
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    # the weights are the best ones again
    assert trainer.evaluate()["eval_acceptance_length"] == max(lengths)


def test_the_example_of_the_documentation_selects_the_best_checkpoint(
    target, rows, tmp_path, monkeypatch
):
    page = (Path(__file__).parents[1] / "docs" / "use" / "evaluation.md").read_text()
    example = re.search(r"```python\n(from .*?)```", page, re.DOTALL)[1]
    monkeypatch.chdir(tmp_path)  # where the example's folder goes
    small = {"eval_prompts": 2, "eval_max_new_tokens": 8, "use_cpu": True, "report_to": "none"}
    names = {
        "CoralTrainer": CoralTrainer,
        "CoralTrainingArguments": partial(CoralTrainingArguments, **small),
        "drafter": CoralDrafter.from_target(target),
        "target": target,
        "tokenizer": None,
        "conversations": Dataset.from_list(rows),
        "chat": Dataset.from_list(rows[:4]),
        "code": Dataset.from_list(rows[4:8]),
    }
    exec(example, names)
    trainer = names["trainer"]
    trainer.args.max_steps, trainer.args.eval_steps, trainer.args.save_steps = 2, 1, 1
    trainer.train()
    lengths = logged(trainer, f"eval_{trainer.args.metric_for_best_model}")
    assert len(lengths) == 2 and trainer.state.best_metric == max(lengths)


def test_early_stopping_works_with_the_acceptance_length(target, rows, tmp_path):
    trainer = make_trainer(
        target,
        rows,
        tmp_path,
        max_steps=40,
        learning_rate=0.0,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=2,
        save_steps=2,
        metric_for_best_model="acceptance_length",
        greater_is_better=True,
        load_best_model_at_end=True,
    )
    trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=2))
    trainer.train()
    # the first evaluation is the best so far, two more gain nothing
    assert trainer.state.global_step == 6


def test_each_of_several_datasets_has_its_own_metrics(target, rows, trained, tmp_path):
    parts = {"chat": Dataset.from_list(rows[16:20]), "code": Dataset.from_list(rows[20:])}
    trainer = make_trainer(target, rows, tmp_path, deepcopy(trained), eval_dataset=parts)
    metrics = trainer.evaluate()
    for name, part in (("chat", rows[16:20]), ("code", rows[20:])):
        rounds = decoded(target, trainer.model, part)
        expected = pytest.approx(sum(rounds) / len(rounds))
        assert metrics[f"eval_{name}_acceptance_length"] == expected
        alone = trainer.evaluate(parts[name])
        found = metrics[f"eval_{name}_simulated_acceptance_length"]
        assert found == alone["eval_simulated_acceptance_length"]


def test_the_routers_stage_decodes_with_the_routed_head(target, rows, trained, tmp_path):
    groups = {"num_groups": 20, "num_active_groups": 1}
    second = make_trainer(target, rows, tmp_path, deepcopy(trained), stage="router", **groups)
    full = second.evaluate()
    second.train()
    routed = second.evaluate()
    held_out = [rows[16 + index] for index in (0, 2, 4, 6)]
    for head, metrics in (("full", full), ("routed", routed)):
        rounds = decoded(target, second.model, held_out, draft_head=head)
        assert metrics["eval_acceptance_length"] == pytest.approx(sum(rounds) / len(rounds))
    assert full["eval_acceptance_length"] > routed["eval_acceptance_length"]
    simulated = "eval_simulated_acceptance_length"
    assert full[simulated] != routed[simulated]


def test_sampled_answers_are_the_same_at_every_evaluation(target, rows, trained, tmp_path):
    trainer = make_trainer(target, rows, tmp_path, deepcopy(trained), eval_temperature=1.0)
    metrics = [trainer.evaluate()["eval_acceptance_length"] for _ in range(2)]
    assert metrics[0] == metrics[1]
    trainer.args.eval_temperature = 0.0
    assert trainer.evaluate()["eval_acceptance_length"] != metrics[0]


def test_without_prompts_nothing_is_decoded(target, rows, tmp_path, monkeypatch):
    trainer = make_trainer(target, rows, tmp_path, eval_prompts=0)
    monkeypatch.setattr(target, "generate", None)
    metrics = trainer.evaluate()
    assert "eval_acceptance_length" not in metrics
    assert metrics["eval_simulated_acceptance_length"] >= 1


def test_predict_reports_a_loss_and_no_acceptance(target, rows, tmp_path, monkeypatch):
    trainer = make_trainer(target, rows, tmp_path)
    monkeypatch.setattr(target, "generate", None)
    metrics = trainer.predict(Dataset.from_list(rows[16:])).metrics
    assert "test_loss" in metrics and not any("acceptance" in name for name in metrics)


def test_more_levels_than_steps_leave_the_loss_as_it_is(target, rows, tmp_path):
    losses = []
    for depth in (1, 5):
        trainer = make_trainer(target, rows, tmp_path, num_steps=2, eval_prompts=0)
        trainer.model.generation_config.tree_depth = depth
        losses.append(trainer.evaluate()["eval_loss"])
    assert losses[0] == losses[1]


def test_a_stream_is_evaluated_by_its_first_rows(target, rows, tmp_path):
    stream = Dataset.from_list(rows[16:]).to_iterable_dataset()
    trainer = make_trainer(target, rows, tmp_path, eval_dataset=stream)
    rounds = decoded(target, trainer.model, rows[16:20])
    found = trainer.evaluate()["eval_acceptance_length"]
    assert found == pytest.approx(sum(rounds) / len(rounds))


def test_a_prompt_is_what_precedes_the_first_trained_token():
    ids = list(range(10))
    assert prompt_of({"input_ids": ids, "labels": [-100] * 5 + ids[5:]}, 3) == [0, 1, 2, 3, 4]
    # of a plain text all is trained but the two tokens that nothing predicts
    assert prompt_of({"input_ids": ids, "labels": [-100] * 2 + ids[2:]}, 3) == [0, 1, 2]


def prompts_of(target, rows, folder, **settings):
    read = read_target(target)
    fields = {"output_dir": str(folder), "report_to": "none", "use_cpu": True}
    args = CoralTrainingArguments(**fields, **settings)
    sizes = args.eval_prompts, args.eval_max_new_tokens, args.eval_prompt_length
    return held_out_prompts(rows, read, *sizes)


def test_prompts_are_spread_over_the_dataset_and_leave_room_to_answer(target, rows, tmp_path):
    spread = prompts_of(target, rows, tmp_path, eval_prompts=4)
    assert spread == [prompt_of(rows[index], 16) for index in (0, 6, 12, 18)]
    # the target has 128 positions: prompts of up to 5 tokens leave room for 123 more
    short = prompts_of(target, rows, tmp_path, eval_prompts=24, eval_max_new_tokens=123)
    assert [len(prompt) for prompt in short] == [4, 5] * 6


def test_rows_without_a_usable_prompt_are_refused(target, rows, tmp_path):
    said = r"None of 24 rows has a prompt of at most 0 tokens .*lower `eval_max_new_tokens`"
    with pytest.raises(ValueError, match=said):
        prompts_of(target, rows, tmp_path, eval_prompts=24, eval_max_new_tokens=128)
    texts = [dict(row, labels=[-100, -100, *row["input_ids"][2:]]) for row in rows]
    with pytest.raises(ValueError, match="or `eval_prompt_length`"):
        prompts_of(target, texts, tmp_path, eval_prompts=24, eval_prompt_length=20)


def test_lengths_of_rounds_become_metrics():
    counts = count_rounds([1, 1, 2, 4, 2, 1, 1, 3, 3, 1], depth=5)
    assert counts.tolist() == [0, 5, 2, 2, 1, 0, 0]
    assert acceptance_length(counts) == pytest.approx(1.9)
    # depth 5 is left out: no round came to depth 4
    shares = {1: 5 / 10, 2: 3 / 5, 3: 1 / 3, 4: 0}
    expected = {f"acceptance_depth_{depth}": share for depth, share in shares.items()}
    assert acceptance_by_depth(counts) == pytest.approx(expected)
    assert acceptance_length(count_rounds([], 5)) == 0.0


def test_similarity_of_steps_is_the_cosine_with_step_one():
    predicted = torch.tensor([[[1.0, 0], [0, 2]], [[3, 0], [0, 1]], [[0, 1], [0, -1]]])
    assert step_similarity(predicted) == [2.0, -1.0]
    assert step_similarity(predicted[:1]) == []


def test_losses_and_similarity_are_logged_by_step(target, rows, tmp_path):
    trainer = make_trainer(target, rows, tmp_path)
    trainer.train()
    entry = trainer.state.log_history[5]
    for name in ("regression_loss", "classification_loss"):
        by_step = [entry[f"{name}_{step}"] for step in (1, 2, 3)]
        assert sum(by_step) / 3 == pytest.approx(entry[name])
    assert -1 < entry["feature_similarity_3"] < entry["feature_similarity_2"] < 1


def test_a_checkpoint_without_tree_settings_is_evaluated_with_the_defaults(target, rows, tmp_path):
    trainer = make_trainer(target, rows, tmp_path)
    for name in TREE:
        delattr(trainer.model.generation_config, name)
    assert trainer.evaluate()["eval_acceptance_length"] >= 1


@pytest.mark.slow
def test_two_processes_report_what_one_does(tmp_path):
    """Ranks share the prompts and the rows, and both log the same numbers."""
    script = Path(__file__).parent / "evaluate_in_processes.py"
    loopback = "lo" if sys.platform == "linux" else "lo0"
    own = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": loopback}
    own["PYTHONPATH"] = os.pathsep.join(sys.path)
    found = []
    for number in (1, 2):
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={number}"]
        folder = tmp_path / str(number)
        subprocess.run(
            [*command, "--master-addr=127.0.0.1", "--master-port=29617", str(script), str(folder)],
            check=True,
            timeout=120,
            env={**os.environ, **own},
        )
        found += [torch.load(folder / f"{rank}.pt") for rank in range(number)]
    alone, first, second = found
    assert first == second
    assert first == pytest.approx(alone)
    assert alone["eval_acceptance_length"] > 1.2


def test_an_evaluation_is_one_table_of_acceptance_beside_the_losses(target, rows, tmp_path, capsys):
    settings = {"eval_strategy": "steps", "eval_steps": 2, "logging_steps": 1, "max_steps": 2}
    parts = {"chat": rows, "code": rows}
    trainer = make_trainer(target, rows, tmp_path, eval_dataset=parts, **settings)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(EvaluationTable)
    trainer.train()
    shown = capsys.readouterr().out
    for name in ("chat", "code"):
        assert shown.count(f"eval_{name}, step 2; loss") == 1 and f"'eval_{name}_loss'" not in shown
    assert shown.count("(decoded)") == shown.count("(simulated chain)") == 2
    newest = next(one for one in trainer.state.log_history[::-1] if "regression_loss_1" in one)
    evaluated = next(one for one in trainer.state.log_history if "eval_code_loss" in one)
    share = f"{evaluated['eval_code_acceptance_depth_1']:.1%}"
    assert re.search(rf"│ 1 +│ +{share} +│ +{newest['regression_loss_1']:.4g} ", shown)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of tensorboard itself
def test_tensorboard_gets_every_scalar(target, rows, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    settings = {"eval_strategy": "steps", "eval_steps": 3, "report_to": "tensorboard"}
    parts = {"chat": rows, "code": rows}
    trainer = make_trainer(target, rows, tmp_path, eval_dataset=parts, **settings)
    trainer.train()
    events = EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    scalars = set(events.Tags()["scalars"])
    for entry in trainer.state.log_history:
        for name in set(entry) - {"step"}:
            written = f"eval/{name[5:]}" if name.startswith("eval_") else f"train/{name}"
            assert written in scalars
    assert {"train/feature_similarity_2", "eval/chat_acceptance_depth_1"} <= scalars
    found = [event.value for event in events.Scalars("eval/code_acceptance_length")]
    assert found == pytest.approx(logged(trainer, "eval_code_acceptance_length"))
