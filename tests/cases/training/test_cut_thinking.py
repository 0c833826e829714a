"""An answer that is cut off while the target still thinks: what it wrote is trained, no more."""

import json

import datasets
import pytest
import torch
from conftest import tiny_target

# the prompt opens the thought with "Well,"; a template splits a turn where the thought ends
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content }}<|end|>"
    "{% else %}<|assistant|>Well,"
    "{% if ' So:' in m.content %}{{ m.content }}{% else %} So:{{ m.content }}{% endif %}<|end|>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>Well,{% endif %}"
)
QUESTION = [{"role": "user", "content": "Tell me a short story about a dog."}]


@pytest.fixture
def tokenizer(tokenizer):
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture
def target(tokenizer):
    """A target that says letters and never ends."""
    size = len(tokenizer)
    model = tiny_target("llama", torch.float32, vocab_size=size, bos_token_id=0)
    letters = tokenizer.convert_tokens_to_ids([*"abcdefghijklmnopqrstuvwxyz"])
    with torch.no_grad():
        silent = torch.ones(size, dtype=torch.bool)
        silent[letters] = False
        model.lm_head.weight[silent] = 0
    return model


@pytest.fixture
def spoken(target, tokenizer):
    """A prompt, and the eight tokens that the target writes after it."""
    text = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    mask = torch.ones_like(ids)
    new = target.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=8)
    return ids[0].tolist(), new[0, ids.shape[1] :].tolist()


@pytest.fixture
def folder(target, tokenizer, command, tmp_path):
    """A target, and `own.jsonl` of its answers."""
    target.save_pretrained(tmp_path / "target")
    tokenizer.save_pretrained(tmp_path / "target")
    (tmp_path / "asked.jsonl").write_text(json.dumps({"messages": QUESTION}))
    names = {"target": "target", "dataset": "asked.jsonl", "output": "own.jsonl"}
    paths = [word for name in names for word in (f"--{name}", tmp_path / names[name])]
    command("regenerate", *paths, "--max-new-tokens", 8)
    return tmp_path


def test_a_regenerated_row_is_the_prompt_and_what_the_target_wrote(
    folder, spoken, tokenizer, trainer_of
):
    rows = datasets.load_dataset("json", data_files=str(folder / "own.jsonl"), split="train")
    (batch,) = trainer_of(rows, tokenizer).get_train_dataloader()
    prompt, answer = spoken
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    assert tokenizer.decode(ids) == tokenizer.decode(prompt + answer)
    assert ids.tolist() == prompt + answer and ids[labels != -100].tolist() == answer


def test_data_show_counts_the_tokens_that_the_target_wrote(folder, spoken, command):
    names = ("--dataset", folder / "own.jsonl", "--target", folder / "target")
    shown = command("data", "show", *names)
    assert f"Row 0: {len(spoken[0]) + 8} tokens, 8 trained" in shown
