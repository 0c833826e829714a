"""Columns that hold a part of the prompt, or say what is trained, are read or named in an error."""

import pytest


@pytest.fixture
def found(read, tokenizer):
    """What is read of a row, and what is trained; nothing where an error names the column."""

    def read_one(row: dict, column: str) -> tuple[str, str] | None:
        try:
            pairs = read([row], tokenizer)
        except ValueError as error:
            assert column in str(error)
            return None
        return "".join(text for text, _ in pairs), "".join(trained for _, trained in pairs)

    return read_one


@pytest.mark.parametrize(
    ("column", "row", "prompt"),
    [
        # as Dolly
        (
            "context",
            {"instruction": "Who?", "context": "Ann wrote.", "response": "Ann."},
            "Ann wrote.",
        ),
        # as LLaMA-Factory
        (
            "history",
            {"instruction": "Sure?", "input": "", "output": "Yes.", "history": [["Who?", "Ann."]]},
            "<|user|>Who?<|end|><|assistant|>Ann.<|end|><|user|>Sure?",
        ),
        (
            "system_prompt",
            {"system_prompt": "One word.", "instruction": "Who?", "output": "Ann."},
            "One word.",
        ),
    ],
    ids=["context", "history", "system_prompt"],
)
def test_a_column_that_is_a_part_of_the_prompt_is_read_or_named(found, column, row, prompt):
    pair = found(row, column)
    assert pair is None or prompt in pair[0]


def test_a_turn_of_no_weight_is_not_trained_or_its_weight_is_named(found):
    turns = [("user", "Who?"), ("assistant", "Ann."), ("user", "Sure?"), ("assistant", "Yes.")]
    messages = [{"role": role, "content": text} for role, text in turns]
    messages[1]["weight"], messages[3]["weight"] = 0, 1  # as OpenAI
    pair = found({"messages": messages}, "weight")
    assert pair is None or (pair[1] == "Yes.<|end|>" and "Ann." in pair[0])


@pytest.mark.parametrize("column", ["loss_mask", "completion_mask"])
def test_a_mask_beside_tokens_says_what_is_trained_or_is_named(found, tokenizer, column):
    ids = tokenizer("<|user|>Who?<|end|><|assistant|>Ann.<|end|>")["input_ids"]
    mask = [0] * (len(ids) - 5) + [1] * 5
    pair = found({"input_ids": ids, column: mask}, column)
    assert pair is None or pair[1] == "Ann.<|end|>"
