"""A tokenizer with a token that its target has no embedding for, as small Gemma 3 targets have."""

import pytest

QUESTION = {"role": "user", "content": "hi"}
IMAGE = "<|image|>"


def chat(answer: str) -> list[dict]:
    return [{"messages": [QUESTION, {"role": "assistant", "content": answer}]}]


@pytest.fixture
def longer(tokenizer, target):
    """The target's tokenizer with one token more."""
    assert len(tokenizer) == target.config.vocab_size
    tokenizer.add_special_tokens(
        {"extra_special_tokens": [IMAGE]}, replace_extra_special_tokens=False
    )
    return tokenizer


def test_a_token_that_no_row_has_keeps_nothing_from_training(longer, target, trainer_of):
    trainer = trainer_of(chat("hello"), longer)
    trainer.train()
    given = {"max_new_tokens": 4, "do_sample": False, "tokenizer": longer}
    ids = longer("hello", return_tensors="pt")
    ours = target.generate(**ids, assistant_model=trainer.model.eval(), **given)
    assert ours.equal(target.generate(**ids, **given))


def test_a_row_that_has_a_token_without_embedding_is_refused(longer, trainer_of):
    with pytest.raises(ValueError, match=str(len(longer) - 1)):
        trainer_of(chat(f"hello{IMAGE}"), longer)
