"""What users of other trainers pass: it is taken, or an error names it."""

import json

import pytest
from datasets import Dataset, DatasetDict
from transformers import ProcessorMixin, TrainingArguments

TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
ROWS = [{"messages": TURNS}] * 4


class Processor(ProcessorMixin):
    """A tokenizer inside of what also reads images, in other targets."""

    def __init__(self, tokenizer):
        super().__init__(tokenizer)


@pytest.fixture
def is_taken_or_named(trainer_of):
    """Whether a trainer trains with what it is given, or refuses it by its name."""

    def check(name: str, *given, **settings) -> bool:
        try:
            return trainer_of(*given, **settings).train().global_step == 1
        except (TypeError, ValueError) as error:
            return name in str(error)

    return check


def test_a_dataset_dict_is_taken_or_named(is_taken_or_named, tokenizer):
    rows = DatasetDict(train=Dataset.from_list(ROWS))
    assert is_taken_or_named("DatasetDict", rows, tokenizer)


def test_a_path_is_taken_or_named(is_taken_or_named, tokenizer, tmp_path):
    file = tmp_path / "talk.jsonl"
    file.write_text("\n".join(map(json.dumps, ROWS)))
    assert is_taken_or_named("str", str(file), tokenizer)


def test_plain_training_arguments_are_taken_or_named(is_taken_or_named, tokenizer, tmp_path):
    args = TrainingArguments(
        str(tmp_path),
        max_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    assert is_taken_or_named("TrainingArguments", ROWS, tokenizer, args=args)


def test_a_processor_is_taken_or_named(is_taken_or_named, tokenizer):
    assert is_taken_or_named("Processor", ROWS, Processor(tokenizer))
