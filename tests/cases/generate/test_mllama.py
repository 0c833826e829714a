"""Llama 3.2 Vision: the cache of its cross-attention holds an image, or nothing, and no text."""

import pytest
import torch
import transformers
from conftest import ROPE, SIZES, scatter_weights
from packaging.version import Version
from transformers import MllamaConfig, MllamaForConditionalGeneration

from coral_hf import CoralDrafter
from coral_hf.decoding.caches.continuation import CACHE

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


@pytest.fixture
def asked(words):
    """A question about an image, of one row; of several where it is repeated."""
    seen = torch.zeros(1, 32, 1, 4, dtype=torch.long)  # of each token: (batch, length, image, tile)
    seen[:, 1:, :, :2] = 1
    return {
        "input_ids": torch.cat([torch.tensor([[1, IMAGE]]), words], 1),
        "attention_mask": torch.ones(1, 32, dtype=torch.long),
        "pixel_values": torch.randn(1, 1, 4, 3, 8, 8).double(),
        "aspect_ratio_ids": torch.tensor([[1]]),
        "aspect_ratio_mask": torch.tensor([[[1, 1, 0, 0]]]),
        "cross_attention_mask": seen,
    }


@shapes
@pytest.mark.parametrize("rows", [1, 3])
def test_text_about_an_image_equals_plain_generate(compare, mllama, asked, settings, rows):
    given = {name: value.repeat(rows, *[1] * (value.dim() - 1)) for name, value in asked.items()}
    given["pixel_values"] = torch.randn(rows, 1, 4, 3, 8, 8).double()
    assert compare(mllama, given, **settings) == "equal"


@shapes
def test_text_without_an_image_equals_plain_generate(compare, mllama, words, settings):
    given = {"input_ids": words, "attention_mask": torch.ones_like(words)}
    assert compare(mllama, given, **settings) == "equal"


@pytest.mark.usefixtures("stepping_back")
def test_a_call_about_an_image_may_step_back(compare, mllama, asked):
    assert compare(mllama, asked, **TREE) == "equal"


@pytest.mark.parametrize("first", [TREE, None], ids=["drafted", "plain"])
def test_a_text_about_an_image_goes_on_from_a_cache(mllama, asked, first):
    drafter = CoralDrafter.from_target(mllama).eval()
    texts = []
    for before, after in ((None, None), (first, TREE)):
        call = {**asked, "do_sample": False, "return_dict_in_generate": True}
        drafts = [one and {"assistant_model": drafter, **one} for one in (before, after)]
        begun = mllama.generate(**call, max_new_tokens=6, **(drafts[0] or {}))
        ids = torch.cat([begun.sequences, torch.tensor([[5, 6]])], 1)
        seen = asked["cross_attention_mask"][:, :1].expand(-1, ids.shape[1], -1, -1).clone()
        seen[:, 1:, :, :2] = 1
        call = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "do_sample": False}
        call |= {"cross_attention_mask": seen, CACHE: begun[CACHE], "max_new_tokens": 10}
        texts.append(mllama.generate(**call, **(drafts[1] or {})))
    assert texts[0].equal(texts[1])
