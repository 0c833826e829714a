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
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
TWO_KINDS = {
    "head_dim": 8,
    "query_pre_attn_scalar": 8,
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"],
}

# family → its config class, and what differs from `SIZES`
FAMILIES = {
    "llama": (LlamaConfig, {}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {"head_dim": 16}),
    "mistral": (MistralConfig, {"sliding_window": None}),
    "mistral_window": (MistralConfig, {"sliding_window": WINDOW}),
    "gemma2": (Gemma2Config, TWO_KINDS),
    "gemma3": (Gemma3TextConfig, TWO_KINDS),
    "phi3": (Phi3Config, {}),
    "olmo2": (Olmo2Config, {}),
    "gpt_neox": (GPTNeoXConfig, {"num_key_value_heads": None}),
    "gpt2": (GPT2Config, {"intermediate_size": None, "num_key_value_heads": None}),
}


def tiny_config(family: str, **overrides) -> PreTrainedConfig:
    """The config of a tiny target; `overrides` are fields of its class, or of the layers' number and widths."""
    config_class, differences = FAMILIES[family]
    fields = {**SIZES, **differences, **overrides}
    return config_class(**{name: value for name, value in fields.items() if name in overrides or
                           value is not None or name == "eos_token_id" or name == "sliding_window"})


def tiny_target(
    family: str, dtype: torch.dtype = torch.float64, seed: int = 0, **overrides
) -> PreTrainedModel:
    """A random target whose argmax varies: at the usual initialisation a tiny model repeats one token."""
    model = AutoModelForCausalLM.from_config(tiny_config(family, **overrides))
    scatter_weights(model, seed)
    return model.to(dtype).eval()


def scatter_weights(model: torch.nn.Module, seed: int = 0) -> None:
    """Draw matrices with a standard deviation of 0.4, and move biases and norms off their 0 and 1."""
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
