"""Llama 3.2 Vision: the cache of its cross-attention holds an image, or nothing, and no text."""

import pytest
import torch
import transformers
from conftest import ROPE, SIZES, scatter_weights
from packaging.version import Version
from transformers import MllamaConfig, MllamaForConditionalGeneration

pytestmark = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.24"),
    reason="older versions of transformers fail otherwise: its vision tower warns of itself",
)

TREE, CHAIN = {"speculation": "always"}, {"speculation": "always", "tree_top_k": 1}
PLAIN = {"speculation": "never"}
IMAGE = 39  # the token that stands for one


shapes = pytest.mark.parametrize("settings", [TREE, CHAIN, PLAIN], ids=["tree", "chain", "never"])


@pytest.fixture
def mllama():
    text = {
        **SIZES,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "cross_attention_layers": [1],
        "rope_parameters": ROPE,
    }
    vision = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_global_layers": 1,
        "attention_heads": 2,
        "intermediate_size": 16,
        "vision_output_dim": 32,
        "image_size": 8,
        "patch_size": 4,
        "intermediate_layers_indices": [0],
    }
    config = MllamaConfig(text_config=text, vision_config=vision, image_token_index=IMAGE)
    target = MllamaForConditionalGeneration(config)
    scatter_weights(target)
    with torch.no_grad():
        for name, weight in target.named_parameters():
            if "gate" in name and weight.dim() <= 1:
                weight.fill_(1.0)  # else an image is not seen
    return target.double().eval()


@pytest.fixture
def words():
    return torch.randint(3, IMAGE, (1, 30))


@shapes
def test_text_about_an_image_equals_plain_generate(compare, mllama, words, settings):
    seen = torch.zeros(1, 32, 1, 4, dtype=torch.long)  # of each token: (batch, length, image, tile)
    seen[:, 1:, :, :2] = 1
    given = {
        "input_ids": torch.cat([torch.tensor([[1, IMAGE]]), words], 1),
        "attention_mask": torch.ones(1, 32, dtype=torch.long),
        "pixel_values": torch.randn(1, 1, 4, 3, 8, 8).double(),
        "aspect_ratio_ids": torch.tensor([[1]]),
        "aspect_ratio_mask": torch.tensor([[[1, 1, 0, 0]]]),
        "cross_attention_mask": seen,
    }
    assert compare(mllama, given, **settings) == "equal"


@shapes
def test_text_without_an_image_equals_plain_generate(compare, mllama, words, settings):
    given = {"input_ids": words, "attention_mask": torch.ones_like(words)}
    assert compare(mllama, given, **settings) == "equal"
