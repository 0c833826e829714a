"""Images in a prompt: what the target makes of them reaches every round."""

import pytest
import torch
from conftest import LLAMA_LIKE, ROPE, SIZES, scatter_weights, slowly
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

TREE, CHAIN = {"speculation": "always"}, {"speculation": "always", "tree_top_k": 1}
PLAIN = {"speculation": "never"}
IMAGE, START, END, VIDEO = 36, 37, 38, 39  # tokens that stand for parts of an image
SIGLIP = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
GEMMA = {**SIZES, **LLAMA_LIKE, "head_dim": 8, "tie_word_embeddings": False}
SECTIONS = {**ROPE, "mrope_section": [1, 1, 2]}
QWEN_VISION = {"depth": 1, "num_heads": 2, "patch_size": 2, "temporal_patch_size": 1}


def gemma3():
    text = {**GEMMA, "query_pre_attn_scalar": 8, "sliding_window": 8}
    text["layer_types"] = ["sliding_attention", "full_attention"]
    config = Gemma3Config(
        text_config=text,
        vision_config=SIGLIP,
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        tie_word_embeddings=False,
    )
    given = {"pixel_values": torch.randn(1, 3, 8, 8).double()}
    return Gemma3ForConditionalGeneration(config), 4, given, "token_type_ids"


def paligemma():
    text = {**GEMMA, "model_type": "gemma"}
    vision = {**SIGLIP, "projection_dim": 32}
    config = PaliGemmaConfig(
        text_config=text, vision_config=vision, image_token_index=IMAGE, projection_dim=32
    )
    given = {"pixel_values": torch.randn(1, 3, 8, 8).double()}
    return PaliGemmaForConditionalGeneration(config), 4, given, None


def qwen(config_class, model_class, vision):
    text = {**SIZES, **LLAMA_LIKE, "head_dim": 8, "rope_parameters": SECTIONS}
    config = config_class(
        text_config=text,
        vision_config={**QWEN_VISION, **vision},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )
    given = {
        "pixel_values": torch.randn(16, 12).double(),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
    }
    return model_class(config), 16, given, "mm_token_type_ids"


def qwen2_5_vl():
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "out_hidden_size": 32,
        "spatial_merge_size": 1,
        "window_size": 4,
        "fullatt_block_indexes": [0],
    }
    return qwen(Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, vision)


def qwen3_vl():
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "out_hidden_size": 32,
        "spatial_merge_size": 1,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    }
    return qwen(Qwen3VLConfig, Qwen3VLForConditionalGeneration, vision)


@pytest.mark.parametrize("settings", [TREE, CHAIN, PLAIN], ids=["tree", "chain", "never"])
@pytest.mark.parametrize("rows", [2, *slowly(1)])
@pytest.mark.parametrize("make", [gemma3, paligemma, qwen2_5_vl, qwen3_vl])
def test_text_after_an_image_equals_plain_generate(compare, make, rows, settings):
    target, size, given, types = make()
    scatter_weights(target)
    words = torch.randint(3, IMAGE, (rows, 9))
    prompt = torch.tensor([[1, START, *[IMAGE] * size, END]]).expand(rows, -1)
    ids = torch.cat([prompt, words], 1)
    mask = torch.ones_like(ids)
    if rows == 2:  # the second prompt is shorter
        ids = torch.cat([torch.zeros(rows, 3, dtype=torch.long), ids], 1)
        ids[0, :3], mask = words[0, :3], torch.cat([torch.tensor([[1] * 3, [0] * 3]), mask], 1)
    given = {name: value.repeat(rows, *[1] * (value.dim() - 1)) for name, value in given.items()}
    if types is not None:
        given[types] = (ids == IMAGE).long()
    given |= {"input_ids": ids, "attention_mask": mask}
    target.double().eval()
    assert compare(target, given, **settings) == "equal"
    others = {**given, "pixel_values": -given["pixel_values"]}
    texts = [target.generate(**one, max_new_tokens=16, do_sample=False) for one in (given, others)]
    assert not texts[0].equal(texts[1])  # or the image would not be seen
