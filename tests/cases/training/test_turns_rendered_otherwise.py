"""Templates that render earlier turns otherwise than the last: a row an answer.

Each row is the prompt that the target reads, and then its turn.
"""

import pytest

QUESTION = {"role": "user", "content": "2+2?"}
ASKED = "<|user|>2+2?<|end|>"
START = "{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content }}<|end|>"
END = "<|end|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|><think>{% endif %}"
WITHOUT_THOUGHT = "<|assistant|>{{ m.content.split('</think>')[-1] }}"
# as Qwen3.5, GLM-4.5: the thought of the last turn alone is rendered
LAST_THOUGHT = (
    START + "{% elif loop.last %}<|assistant|><think>{{ m.content }}"
    "{% else %}" + WITHOUT_THOUGHT + "<|end|>{% endif %}"
    "{% if m.role != 'user' and loop.last %}" + END
)
# as R1: no thought is rendered
NO_THOUGHT = START + "{% else %}" + WITHOUT_THOUGHT + END
TURN = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
PROMPT = "{% if add_generation_prompt %}<|assistant|>"
# as Phi-3: a text that is not to go on ends with another mark
LAST_MARK = TURN + "<|end|>{% endfor %}" + PROMPT + "{% else %}<s>{% endif %}"
# as gpt-oss: the last answer ends with a mark of its own
OTHER_MARK = (
    TURN
    + "{{ '<s>' if loop.last and m.role == 'assistant' else '<|end|>' }}{% endfor %}"
    + PROMPT
    + "{% endif %}"
)


def chat(answer: str, turns: int) -> list[dict]:
    return [{"messages": [QUESTION, {"role": "assistant", "content": answer}] * turns}]


@pytest.mark.parametrize("turns", [1, 2])
def test_the_last_thought_is_trained_in_a_row_an_answer(read, tokenizer, turns):
    tokenizer.chat_template = LAST_THOUGHT
    wrote = "Easy.</think>4.<|end|>"
    first = f"{ASKED}<|assistant|><think>"
    second = f"{ASKED}<|assistant|>4.<|end|>{first}"
    expected = [(prompt + wrote, wrote) for prompt in (first, second)[:turns]]
    assert read(chat("Easy.</think>4.", turns), tokenizer) == sorted(expected)


@pytest.mark.parametrize("turns", [1, 2])
def test_a_thought_that_is_never_rendered_is_trained_in_a_row_an_answer(read, tokenizer, turns):
    tokenizer.chat_template = NO_THOUGHT
    wrote = "Easy.</think>4.<|end|>"
    first = f"{ASKED}<|assistant|><think>"
    second = f"{ASKED}<|assistant|>4.<|end|>{first}"
    expected = [(prompt + wrote, wrote) for prompt in (first, second)[:turns]]
    assert read(chat("Easy.</think>4.", turns), tokenizer) == sorted(expected)


@pytest.mark.parametrize("turns", [1, 2])
def test_a_mark_after_the_last_turn_does_not_keep_others_from_training(read, tokenizer, turns):
    tokenizer.chat_template = LAST_MARK
    first = f"{ASKED}<|assistant|>"
    second = f"{first}4.<|end|>{first}"
    rows = read(chat("4.", turns), tokenizer)
    trained = [wrote for _, wrote in rows]
    assert [wrote.removesuffix("<s>") for wrote in trained] == ["4.<|end|>"] * turns
    prompts = [text.removesuffix(wrote) for text, wrote in rows]
    assert sorted(prompts) == sorted((first, second)[:turns])


@pytest.mark.parametrize("turns", [1, 2])
def test_every_answer_is_trained_with_the_mark_that_ends_it_as_the_last(read, tokenizer, turns):
    tokenizer.chat_template = OTHER_MARK
    first = f"{ASKED}<|assistant|>"
    second = f"{first}4.<|end|>{first}"
    expected = [(prompt + "4.<s>", "4.<s>") for prompt in (first, second)[:turns]]
    assert read(chat("4.", turns), tokenizer) == sorted(expected)
