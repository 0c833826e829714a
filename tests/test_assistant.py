"""A small language model is trained to draft: acceptance rises, and what comes out is ordinary."""

import gzip
import json
import runpy
import shutil
from copy import deepcopy

import launched
import pytest
import torch
from conftest import VOCAB, invoke, printed, tiny_target
from datasets import Dataset
from test_distributed import run_python
from test_examples import EXAMPLES, folder, run  # noqa: F401  a fixture: see `save_target_and_talk`
from test_generate import tokenizer  # noqa: F401  a fixture: of the tiny targets' 40 tokens
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Trainer

import coral_hf
from coral_hf import (
    AssistantTrainer,
    AssistantTrainingArguments,
    CoralTrainingArguments,
    LanguageModelDrafter,
)
from coral_hf.measure.calls import decoded_rounds
from coral_hf.target import read_target
from coral_hf.training.assistant import small_model
from coral_hf.training.data import CoralCollator

PROMPT = 4
# those of the normal run, and two more
ALL = ["kl", "tvd++", *(pytest.param(loss, marks=pytest.mark.slow) for loss in ("ce", "tvd"))]


@pytest.fixture(scope="module")
def target():
    """A target that looks at the last token alone, which a small model learns within a second."""
    target = tiny_target("llama", torch.float32)
    for layer in target.model.layers:
        layer.self_attn.o_proj.weight.data.zero_()
    return target


@pytest.fixture(scope="module")
def rows(target):
    """24 sequences of the target of 20 tokens, of which it wrote the last 16."""
    torch.manual_seed(0)
    prompts = torch.randint(2, VOCAB, (24, PROMPT))
    texts = target.generate(
        prompts, attention_mask=torch.ones_like(prompts), do_sample=False, max_new_tokens=16
    ).tolist()
    labels = [[-100] * PROMPT + text[PROMPT:] for text in texts]
    mask = [[1] * len(text) for text in texts]
    return Dataset.from_dict({"input_ids": texts, "attention_mask": mask, "labels": labels})


def small(config):
    torch.manual_seed(0)
    return small_model(config, num_layers=1, hidden_size=64)


def arguments(folder, kind=AssistantTrainingArguments, **settings):  # noqa: F811
    fields = {
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 20,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return kind(output_dir=str(folder), **{**fields, **settings})


def make_trainer(target, rows, folder, model=None, **settings):  # noqa: F811
    model = small(target.config) if model is None else model
    args = arguments(folder, **settings)
    return AssistantTrainer(model, args, target, train_dataset=rows, eval_dataset=rows)


def weights(model) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.state_dict().items()}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name


@pytest.mark.parametrize("loss", ALL)
def test_training_raises_the_acceptance(target, rows, tmp_path, loss):
    trainer = make_trainer(target, rows, tmp_path, loss=loss, max_steps=30)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    name = "eval_simulated_acceptance_length"
    assert after[name] > before[name] + 0.3
    if loss != "ce":  # of greedy texts alone, cross-entropy learns nothing of other tokens
        assert after["eval_expected_acceptance"] > before["eval_expected_acceptance"] + 0.1
    assert after["eval_loss"] < before["eval_loss"]
    entry = trainer.training_record[-1]
    assert entry["loss"] == loss and entry["trained_tokens"] == 30 * 4 * 16


def test_cross_entropy_trains_as_any_trainer_does(target, rows, tmp_path):
    ours = AssistantTrainer(
        small(target.config), arguments(tmp_path / "a", loss="ce"), train_dataset=rows
    )
    ours.train()
    args = arguments(tmp_path / "b", loss="ce")
    plain = Trainer(small(target.config), args, CoralCollator(0), rows)
    plain.train()
    assert_equal(weights(ours.drafter), weights(plain.model))


@pytest.mark.parametrize(
    ("loss", "families"), [("kl", ["granite", "gemma2"]), ("tvd++", ["llama", "gpt2"])]
)
def test_the_loss_of_a_batch_is_that_of_whole_logits(rows, tmp_path, loss, families):
    """Of models that scale or cap their logits, too."""
    target, model = (tiny_target(name, torch.float32, seed) for seed, name in enumerate(families))
    model.eval()
    trainer = make_trainer(target, rows, tmp_path, model, loss=loss)
    batch = CoralCollator(0)([rows[0], rows[1]])
    batch["labels"][1, 9:] = -100
    batch["attention_mask"][1, 9:] = 0
    found = trainer.compute_loss(trainer.model, dict(batch))
    read = {name: batch[name] for name in ("input_ids", "attention_mask")}
    own, theirs = (model(**read).logits[:, :-1] for model in (trainer.model, target))
    is_trained = batch["labels"][:, 1:] != -100
    log_q, p = own[is_trained].log_softmax(-1), theirs[is_trained].softmax(-1)
    if loss == "kl":
        expected = (p * (p.log() - log_q)).sum(-1).mean()
    else:
        reward = (p > log_q.exp()).float()
        mean = (log_q.exp() * reward).sum(-1).mean()
        expected = (p - log_q.exp()).abs().sum(-1).mean() / 2 / (mean * (1 - mean)).sqrt()
    assert len(p) == 16 + 9 - PROMPT
    torch.testing.assert_close(found, expected)


def test_accumulated_batches_equal_one_large_batch(target, rows, tmp_path):
    rows = rows.map(
        lambda row, at: {"labels": [-100] * (at % 9) + row["labels"][at % 9 :]}, with_indices=True
    )
    found = []
    for size in (4, 2):
        settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size}
        trainer = make_trainer(
            target, rows, tmp_path / str(size), max_steps=1, optim="sgd", **settings
        )
        trainer.train()
        found.append(weights(trainer.drafter))
    for name, weight in found[0].items():
        torch.testing.assert_close(found[1][name], weight)


def test_a_run_resumes_bit_for_bit_and_refuses_another_loss(target, rows, tmp_path):
    settings = {"loss": "tvd++", "max_steps": 5, "save_strategy": "steps", "save_steps": 3}
    trainer = make_trainer(target, rows, tmp_path / "whole", **settings)
    trainer.train()
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "again" / "checkpoint-3")
    # another start: the weights come from the checkpoint
    other = small(target.config)
    torch.nn.init.normal_(other.lm_head.weight)
    resumed = make_trainer(target, rows, tmp_path / "again", other, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert_equal(weights(resumed.drafter), weights(trainer.drafter))
    assert resumed.training_record[-1]["trained_tokens"] == 5 * 4 * 16
    with pytest.raises(ValueError, match="`loss` was tvd\\+\\+, now it is kl"):
        changed = make_trainer(target, rows, tmp_path / "again", **{**settings, "loss": "kl"})
        changed.train(resume_from_checkpoint=True)


@pytest.fixture(scope="module")
def trained(target, rows, tmp_path_factory):
    """A trainer that has trained, and its model before."""
    trainer = make_trainer(target, rows, tmp_path_factory.mktemp("trained"), max_steps=30)
    untrained = deepcopy(trainer.drafter)
    trainer.train()
    trainer.save_model()
    return trainer, untrained


def test_the_simulated_length_is_that_of_a_decoded_chain(target, rows, trained):
    trainer, _ = trained
    model = trainer.drafter.eval()
    shape = {"tree_depth": 3, "tree_top_k": 1, "tree_nodes": 4}
    vars(model.generation_config).update(shape)
    simulated = trainer.evaluate()["eval_simulated_acceptance_length"]
    prompts = [ids[:PROMPT] for ids in rows["input_ids"]]
    rounds = decoded_rounds(LanguageModelDrafter(model), read_target(target), prompts, 16)
    assert sum(rounds) / len(rounds) == pytest.approx(simulated)
    assert {1, 4} <= {*rounds}


def test_the_result_drafts_in_stock_transformers_and_in_trees(target, rows, trained):
    trainer, untrained = trained
    model = AutoModelForCausalLM.from_pretrained(trainer.args.output_dir)
    prompt = torch.tensor([rows[0]["input_ids"][:PROMPT]])
    plain = target.generate(prompt, do_sample=False, max_new_tokens=16)
    coral_hf.uninstall()  # `generate` as transformers has it
    try:
        stock = target.generate(prompt, assistant_model=model, do_sample=False, max_new_tokens=16)
    finally:
        coral_hf.install()
    assert stock.equal(plain)
    prompts = [ids[:PROMPT] for ids in rows["input_ids"][:8]]
    taus = []
    for one in (untrained, model):
        rounds = decoded_rounds(LanguageModelDrafter(one), read_target(target), prompts, 16)
        taus.append(sum(rounds) / len(rounds))
    assert taus[1] > taus[0] + 0.5


@pytest.mark.parametrize("num_tokens", [pytest.param(38, marks=pytest.mark.slow), 48])
def test_a_vocabulary_that_is_padded_otherwise_needs_both_tokenizers(
    target,
    rows,
    tmp_path,
    tokenizer,  # noqa: F811
    num_tokens,
):
    config = deepcopy(target.config)
    config.vocab_size = num_tokens
    model = small(config)
    rows = rows.filter(lambda row: max(row["input_ids"]) < num_tokens)
    args = arguments(tmp_path, max_steps=20, loss="tvd")
    with pytest.raises(ValueError, match=f"{num_tokens} tokens and the target 40.*assistant_tok"):
        AssistantTrainer(model, args, target, train_dataset=rows)
    known = {"assistant_tokenizer": tokenizer, "train_dataset": rows, "eval_dataset": rows}
    trainer = AssistantTrainer(model, args, target, **known)
    before = trainer.evaluate()["eval_expected_acceptance"]
    trainer.train()
    assert trainer.evaluate()["eval_expected_acceptance"] > before + 0.1


def test_what_cannot_be_trained_is_refused_by_name(target, rows, tmp_path, tokenizer):  # noqa: F811
    model, args = small(target.config), arguments(tmp_path, loss="tvd")
    with pytest.raises(ValueError, match="`loss` is 'tvd'.*pass `target_model`"):
        AssistantTrainer(model, args, train_dataset=rows)
    with pytest.raises(ValueError, match="`loss` is 'jsd'; use one of"):
        arguments(tmp_path, loss="jsd")
    with pytest.raises(ValueError, match="`args` is a CoralTrainingArguments; pass `AssistantTr"):
        AssistantTrainer(model, arguments(tmp_path, CoralTrainingArguments), target)
    with pytest.raises(ValueError, match="`model` is a str .'small'.*AutoModelForCausalLM"):
        AssistantTrainer("small", args, target)
    other = deepcopy(tokenizer)
    other.add_tokens(["word0!"])
    with pytest.raises(ValueError, match="has another tokenizer than the target.*universal"):
        AssistantTrainer(model, args, target, tokenizer, assistant_tokenizer=other)
    with pytest.raises(ValueError, match="packed"):
        packed = rows.add_column("position_ids", [[*range(20)]] * len(rows))
        AssistantTrainer(model, args, target, train_dataset=packed)
    with pytest.raises(ValueError, match="`label_smoothing_factor` is 0.1.*own probabilities"):
        smooth = arguments(tmp_path, loss="kl", label_smoothing_factor=0.1)
        AssistantTrainer(model, smooth, target, train_dataset=rows)


def test_a_loss_that_is_not_finite_stops_before_the_step(target, rows, tmp_path):
    broken = deepcopy(target)
    broken.model.norm.weight.data[0] = float("nan")
    trainer = make_trainer(broken, rows, tmp_path)
    before = weights(trainer.drafter)
    with pytest.raises(FloatingPointError, match="target's features are not finite"):
        trainer.train()
    assert_equal(weights(trainer.drafter), before)


@pytest.mark.parametrize("hidden_size", [16, 96, 960, 4096])
def test_a_fresh_model_has_the_targets_tokens_and_heads_that_divide_its_width(hidden_size):
    fields = {"hidden_size": hidden_size, "num_attention_heads": 1, "eos_token_id": [3, 4]}
    config = LlamaConfig(vocab_size=50, **fields)
    with torch.device("meta"):
        model = small_model(config, num_layers=2)
    found = model.config
    assert found.hidden_size == min(1024, hidden_size // 2)
    assert found.hidden_size % found.num_attention_heads == 0
    assert (found.vocab_size, found.eos_token_id) == (50, [3, 4])
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_the_command_pretrains_fine_tunes_resumes_and_writes_an_ordinary_checkpoint(
    folder,  # noqa: F811
    tmp_path,
):
    names = ["distill", "--target", folder / "target", "--dataset", folder / "talk.jsonl"]
    short = ["--max_steps", 2, "--save_steps", 1, "--use_cpu", True, "--learning_rate", 1e-2]
    first, second = tmp_path / "pretrained", tmp_path / "tuned"
    made = invoke(*names, *short, "--output", first, "--layers", 1, "--loss", "ce")
    assert made.exit_code == 0, made.output
    given = [*names, "--from", first, "--output", second, "--loss", "tvd++"]
    assert invoke(*given, *short, "--hold-out", 1, "--eval-strategy", "epoch").exit_code == 0
    state = json.loads((second / "run" / "checkpoint-2" / "trainer_state.json").read_text())
    assert any("eval_expected_acceptance" in entry for entry in state["log_history"])
    refused = invoke(*given, *short)
    assert refused.exit_code == 1 and "holds checkpoint-2 of an earlier run" in printed(refused)
    assert invoke(*given, *short, "--hold-out", 1, "--resume").exit_code == 0
    model = AutoModelForCausalLM.from_pretrained(second)
    assert model.config.num_hidden_layers == 1 and model.dtype == torch.float32
    assert len(AutoTokenizer.from_pretrained(second)) == model.config.vocab_size
    before = AutoModelForCausalLM.from_pretrained(first).state_dict()
    assert any(not weight.equal(before[name]) for name, weight in model.state_dict().items())


@pytest.mark.slow
def test_two_processes_train_as_one_with_twice_the_batch(tmp_path):
    found = []
    for name, size, words in (("one", 4, []), ("two", 2, ["--two"])):
        settings = json.dumps({"per_device_train_batch_size": size, "max_steps": 3, "optim": "sgd"})
        (tmp_path / name).mkdir()
        script = launched.__file__
        run_python(script, tmp_path / name, "assistant", settings, *words)
        found.append(torch.load(tmp_path / name / "assistant_0.pt", weights_only=False))
    for step, expected in enumerate(found[0]["gradients"]):
        for name, gradient in expected.items():
            torch.testing.assert_close(
                found[1]["gradients"][step][name], gradient, rtol=1e-4, atol=1e-6
            )
    assert found[1]["metrics"] == pytest.approx(found[0]["metrics"], rel=1e-4)


PAGE = r""".\" A comment
.TH {name} 1
.SH NAME
{name} \- {words}
.PP
The command \fB{name}\fP\&, {words}, is "here" \(aqquoted\(aq.
.nf
{many}
"""
WORDS = {"en": "what it does", "de": "was es tut, für alle", "fr": "ce qu'il fait, déjà"}


def write_pages(folder):  # noqa: F811
    for language, words in WORDS.items():
        place = folder / ("" if language == "en" else language) / "man1"
        place.mkdir(parents=True)
        for number in range(30):
            name = f"page{number}"
            many = "\n\n".join(f"{words} {name} {part}" * 9 for part in range(8))
            page = PAGE.format(name=name, words=words, many=many)
            (place / f"{name}.1.gz").write_bytes(gzip.compress(page.encode()))


@pytest.mark.slow
def test_drafters_of_three_languages_are_trained_measured_and_kept(tmp_path, monkeypatch, capsys):
    write_pages(tmp_path / "man")
    names = ["--pages", tmp_path / "man", "--output", tmp_path / "out"]
    names += ["--rows", tmp_path / "rows.jsonl", "--characters", 100000]
    sizes = ["--vocab-size", 300, "--width", 32, "--layers", 1, "--held-out", 2, "--prompts", 2]
    steps = ["--target-steps", 2, "--pretrain-steps", 1, "--finetune-steps", 1]
    tables, lines = [], []
    for _ in range(2):  # the second run finds all of it done
        run(monkeypatch, "language_drafters.py", *names, *sizes, *steps)
        printed = capsys.readouterr().out.splitlines()
        tables.append([line for line in printed if line.startswith("|")])
        lines.append((tmp_path / "rows.jsonl").read_text().splitlines())
    assert tables[0] == tables[1] and lines[0] == lines[1]
    drafters = [line.split(" | ")[0].strip("| ") for line in tables[0][2:]]
    assert drafters == ["all", "en", "de", "fr", "coral"]
    rows = [json.loads(line) for line in lines[0]]
    assert len(rows) == 5 * 3 * 2 and all(row["tau"] >= 1 for row in rows)
    assert all(row["training_seconds"] > 0 and row["prompts"] == 2 for row in rows)


def test_a_manual_page_is_read_without_its_commands(tmp_path):
    write_pages(tmp_path)
    script = runpy.run_path(str(EXAMPLES / "language_drafters.py"))
    text = script["page_text"](tmp_path / "de" / "man1" / "page3.1.gz")
    assert text.startswith("NAME\npage3 - was es tut, für alle\n\nThe command page3, was es tut")
    assert "is \"here\" 'quoted'.\n" in text and "comment" not in text
    pages = script["read_pages"]([tmp_path], characters=10**6)
    assert pages.keys() == {"en", "de", "fr"} and pages["de"].keys() == pages["fr"].keys()
    held_out = [*script["passages"](pages["fr"], held_out=True)]
    trained = [*script["passages"](pages["fr"], held_out=False)]
    assert all(len(one) == 400 for one in trained) and not {*held_out} & {*trained}
