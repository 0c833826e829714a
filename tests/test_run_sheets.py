"""The run sheets of the docs, command by command, with tiny models of the same architecture."""

import json
import re

import pytest
from conftest import tiny_target
from test_docs import USE, commands
from test_examples import folder  # noqa: F401  a saved target and its conversations
from transformers import AutoTokenizer, LlamaConfig, Qwen3Config

from coral_hf import Eagle3Drafter
from coral_hf.checkpoints import export_drafter
from coral_hf.cli import main

PLACES = {
    "meta-llama/Llama-3.1-8B-Instruct": "target",
    "Qwen/Qwen3-8B": "target",
    "yuhuili/EAGLE3-LLaMA3.1-Instruct-8B": "head",
    "Tengyunw/qwen3_8b_eagle3": "head",
    "allenai/tulu-3-sft-mixture": "chats.jsonl",
}
SMALL = {  # sizes that a test can run; no machine of the tests has a GPU in bf16
    "bfloat16": "float32",
    "256": "8",
    "512": "8",
    "1024": "8",
    "2048": "8",
    "4096": "8",
    "200": "1",
}
ALSO = {
    "generate": ["--max-new-tokens", "8"],
    "plan": ["--use_cpu", "True"],
    "train": ["--use_cpu", "True"],
    "verify": ["--samples", "100", "--max-new-tokens", "8"],
}
SHEETS = {"llama": "llama31_8b_24gb", "qwen3": "qwen3_8b_24gb"}
BOTH = {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8}
BOTH |= {"head_dim": 128, "dtype": "bfloat16"}
CONFIGS = {  # of the published models
    "llama": LlamaConfig(**BOTH, vocab_size=128256, intermediate_size=14336, num_hidden_layers=32),
    "qwen3": Qwen3Config(**BOTH, vocab_size=151936, intermediate_size=12288, num_hidden_layers=36),
}
PLANNED = {  # a row of a sheet → how the line of a plan begins
    "target's weights, bf16": "target's weights",
    "drafter's weights, fp32": "drafter's weights",
    "optimizer": "optimizer",
    "activations, gradients": "activations, gradients",
    "together": "together(?=.*GiB)",
    "disk: three checkpoints, the finished drafter": "together(?=.*features)",
}


def sheet(family):
    """The page of a run sheet."""
    return next(page for page in USE if page.stem == SHEETS[family])


@pytest.mark.slow
@pytest.mark.parametrize("family", SHEETS)
def test_the_figures_of_a_run_sheet_are_those_of_the_plan(family, folder, tmp_path, capsys):  # noqa: F811
    CONFIGS[family].save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(folder / "target").save_pretrained(tmp_path)
    rows = tmp_path / "rows.jsonl"  # of 2048 tokens, all of them trained
    rows.write_text("\n".join([json.dumps({"input_ids": [5] * 2048})] * 9))
    [words] = [words for name, *words in commands(sheet(family)) if name == "plan"]
    words[words.index("--dataset") + 1] = str(rows)
    own = {"--target": tmp_path, "--output": tmp_path / "out", "--hold-out": 1}
    own |= {"--use_cpu": True, "--num_train_epochs": 2000}
    main(["plan", *words, *(str(word) for pair in own.items() for word in pair)])
    shown = capsys.readouterr().out
    said = dict(re.findall(r"^\| (.+?) \| ([\d.]+) \|$", sheet(family).read_text(), re.MULTILINE))
    for name, begin in PLANNED.items():
        [size] = re.findall(rf"^  {begin} +([\d.]+) GB", shown, re.MULTILINE)
        # packed documents, of which the figures are, train a little less of a row
        assert float(size) == pytest.approx(float(said[name]), abs=0.15), name


@pytest.mark.slow
@pytest.mark.parametrize("family", SHEETS)
def test_a_run_sheet_leads_to_a_drafter_that_is_measured(family, folder, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder / "target")
    target = tiny_target(family, vocab_size=len(tokenizer), num_hidden_layers=8).float()
    target.save_pretrained("target")
    tokenizer.save_pretrained("target")
    export_drafter(Eagle3Drafter.from_target(target), "sglang", "head", target)
    talk = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello there."}]
    with open("chats.jsonl", "w") as file:
        file.writelines(json.dumps({"messages": talk}) + "\n" for _ in range(8))
    with open("question.jsonl", "w") as file:
        file.write(json.dumps({"turns": ["Hi.", "And?"]}))

    done = []
    for name, *words in commands(sheet(family)):
        if name != "publish":  # needs an account
            words = [SMALL.get(PLACES.get(word, word), PLACES.get(word, word)) for word in words]
            main([name, *words, *ALSO.get(name, [])])
            done.append(name)
    assert done.index("import") < done.index("regenerate") < done.index("train")
    [results] = tmp_path.glob("*-coral-results")
    report = json.loads((results / "report.json").read_text())
    assert [row["exact_match"] for row in report["rows"] if row["method"] == "coral"] == [1.0, 1.0]
