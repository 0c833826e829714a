"""What the tests share: tiny random targets of every family, and where the shared data lies.

Import the helpers by name: `from conftest import FAMILIES, tiny_target`.
"""

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

VOCAB = 40
WINDOW = 8
SHARED = Path(__file__).parents[2] / "shared" / "data"

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
LLAMA_LIKE = {"intermediate_size": 48, "num_key_value_heads": 2}
GEMMA_LIKE = {
    **LLAMA_LIKE,
    "head_dim": 8,
    "query_pre_attn_scalar": 8,
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"],
    # tied, the scaled embedding of a random model's last token outweighs all else
    "tie_word_embeddings": False,
}

# family → its config class, and what it takes beside `SIZES`
FAMILIES = {
    "llama": (LlamaConfig, LLAMA_LIKE),
    "qwen2": (Qwen2Config, LLAMA_LIKE),
    "qwen3": (Qwen3Config, {**LLAMA_LIKE, "head_dim": 16}),
    "mistral": (MistralConfig, {**LLAMA_LIKE, "sliding_window": None}),
    "mistral_window": (MistralConfig, {**LLAMA_LIKE, "sliding_window": WINDOW}),
    "gemma2": (Gemma2Config, GEMMA_LIKE),
    "gemma3": (Gemma3TextConfig, GEMMA_LIKE),
    "phi3": (Phi3Config, LLAMA_LIKE),
    "olmo2": (Olmo2Config, LLAMA_LIKE),
    "gpt_neox": (GPTNeoXConfig, {"intermediate_size": 48}),
    "gpt2": (GPT2Config, {}),
}


def tiny_config(family: str, **overrides) -> PreTrainedConfig:
    """The config of a tiny target; `overrides` are fields of its class."""
    config_class, fields = FAMILIES[family]
    return config_class(**{**SIZES, **fields, **overrides})


def tiny_target(
    family: str, dtype: torch.dtype = torch.float64, seed: int = 0, **overrides
) -> PreTrainedModel:
    """A random target whose argmax varies: as it is initialised, a tiny one repeats one token."""
    model = AutoModelForCausalLM.from_config(tiny_config(family, **overrides))
    scatter_weights(model, seed)
    return model.to(dtype).eval()


def scatter_weights(model: torch.nn.Module, seed: int = 0) -> None:
    """Draw matrices with a standard deviation of 0.4; move biases and norms off their 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.empty_like(parameter)
            if parameter.dim() > 1:
                parameter.copy_(noise.normal_(0, 0.4, generator=generator))
            else:
                parameter.add_(noise.normal_(0, 0.1, generator=generator))


def shared_file(name: str) -> Path:
    """A path below the shared data; skips the test where it is absent."""
    path = SHARED / name
    if not path.exists():
        pytest.skip("shared data absent")
    return path


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Tiny matrices are slower on many threads than on one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _always_draft(monkeypatch):
    """Tiny targets are faster than any drafter, so calls would soon step back."""
    monkeypatch.setattr("coral_hf.decoding.pace.DEFAULT_SPECULATION", "always")
