"""The run sheets of the docs, command by command, with tiny models of the same architecture."""

import json

import pytest
from conftest import tiny_target
from test_docs import USE, commands
from test_examples import folder  # noqa: F401  a saved target and its conversations
from transformers import AutoTokenizer

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
    "plan": ["--use_cpu", "True"],
    "train": ["--use_cpu", "True"],
    "verify": ["--samples", "100", "--max-new-tokens", "8"],
}
SHEETS = {"llama": "llama31_8b_24gb", "qwen3": "qwen3_8b_24gb"}


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

    [sheet] = [page for page in USE if page.stem == SHEETS[family]]
    done = []
    for name, *words in commands(sheet):
        if name != "publish":  # needs an account
            words = [SMALL.get(PLACES.get(word, word), PLACES.get(word, word)) for word in words]
            main([name, *words, *ALSO.get(name, [])])
            done.append(name)
    assert done.index("import") < done.index("regenerate") < done.index("train")
    [results] = tmp_path.glob("*-coral-results")
    report = json.loads((results / "report.json").read_text())
    assert [row["exact_match"] for row in report["rows"] if row["method"] == "coral"] == [1.0, 1.0]
