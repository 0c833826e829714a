"""A text begins with one BOS, whoever writes it."""

import pytest
from tokenizers.processors import TemplateProcessing


@pytest.mark.parametrize("text", ["hi, oh", "<s>hi, oh"])
def test_a_text_begins_with_one_mark(read, tokenizer, text):
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        "<s> $A", special_tokens=[("<s>", 0)]
    )
    ((read_text, _),) = read([{"text": text}], tokenizer)
    assert read_text == "<s>hi, oh<|end|>"
