"""Sliding windows: a layer keeps and reads its window, and with a drafter the tree beside it."""

import pytest
import torch
from conftest import noted_passes, tiny_target

from coral_hf import CoralDrafter

WINDOW, NODES, PROMPT = 16, 12, 300
TREE = {"tree_depth": 3, "tree_top_k": 4, "tree_nodes": NODES}
ROOM = WINDOW + 4 * NODES  # generous, and far below the prompt

speculations = pytest.mark.parametrize("speculation", ["always", "adaptive", "never"])


@pytest.fixture
def target():
    """A target whose first layer slides."""
    model = tiny_target(
        "gemma3", torch.float32, sliding_window=WINDOW, max_position_embeddings=2 * PROMPT
    )
    model.set_attn_implementation("eager")  # always with a mask
    return model


def run(target, speculation: str):
    ids = torch.randint(3, 40, (1, PROMPT))
    given = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 30}
    given |= {"return_dict_in_generate": True, "speculation": speculation, **TREE}
    return target.generate(ids, assistant_model=CoralDrafter.from_target(target).eval(), **given)


@speculations
def test_a_sliding_layer_keeps_no_more_than_its_window_and_the_tree(target, speculation):
    output = run(target, speculation)
    # older versions of transformers name it otherwise
    sliding, full = output.get("cache", output.get("past_key_values")).layers
    a_column = full.keys[0, :, :1].numel() * full.keys.element_size()
    assert full.keys.untyped_storage().nbytes() / a_column >= PROMPT
    for states in (sliding.keys, sliding.values):
        assert states.untyped_storage().nbytes() / a_column <= ROOM


@speculations
def test_a_sliding_layer_reads_no_more_than_its_window_and_the_tree(target, speculation):
    widths = []

    def note(module, args, kwargs):
        widths.append(kwargs["attention_mask"].shape[-1])

    with noted_passes(target.model.layers[0].self_attn, note):
        run(target, speculation)
    assert len(widths) > 1 and max(widths[1:]) <= ROOM  # the first pass is over the prompt
