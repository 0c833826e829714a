"""Sliding windows: a layer keeps and reads its window, and with a drafter the tree beside it."""

import statistics
import time

import pytest
import torch
from conftest import tiny_target
from transformers import AutoModelForCausalLM, Gemma3TextConfig

from coral_hf import CoralDrafter

WINDOW, NODES, PROMPT = 16, 12, 300
TREE = {"tree_depth": 3, "tree_top_k": 4, "tree_nodes": NODES}
ROOM = WINDOW + 4 * NODES  # generous, and far below the prompt

every_column = pytest.mark.xfail(
    strict=True, raises=AssertionError, reason="every layer keeps and reads the whole text"
)
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


@every_column
@speculations
def test_a_sliding_layer_keeps_no_more_than_its_window_and_the_tree(target, speculation):
    sliding, full = run(target, speculation).cache.layers
    a_column = full.keys[0, :, :1].numel() * full.keys.element_size()
    assert full.keys.untyped_storage().nbytes() / a_column >= PROMPT
    for states in (sliding.keys, sliding.values):
        assert states.untyped_storage().nbytes() / a_column <= ROOM


@every_column
@speculations
def test_a_sliding_layer_reads_no_more_than_its_window_and_the_tree(target, speculation):
    widths = []

    def note(module, args, kwargs):
        widths.append(kwargs["attention_mask"].shape[-1])

    target.model.layers[0].self_attn.register_forward_pre_hook(note, with_kwargs=True)
    run(target, speculation)
    assert len(widths) > 1 and max(widths[1:]) <= ROOM  # the first pass is over the prompt


class Clock:
    """A streamer that notes when tokens come."""

    def __init__(self):
        self.times = []

    def put(self, value):
        self.times.append(time.process_time())

    def end(self):
        pass


@pytest.mark.slow
@every_column
def test_a_plain_round_takes_as_long_as_plain_generate():
    config = Gemma3TextConfig(
        vocab_size=1000,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=12,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=64,
        sliding_window=256,
        layer_types=(["sliding_attention"] * 5 + ["full_attention"]) * 2,
        max_position_embeddings=32768,
        eos_token_id=None,
        pad_token_id=0,
        bos_token_id=1,
    )
    target = AutoModelForCausalLM.from_config(config).eval()
    drafter = {"assistant_model": CoralDrafter.from_target(target), "speculation": "never"}
    ids = torch.randint(3, 1000, (1, 8000))
    given = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 50}
    seconds = []
    for settings in ({}, drafter):
        clock = Clock()
        target.generate(ids, streamer=clock, **given, **settings)
        steps = [b - a for a, b in zip(clock.times[3:], clock.times[4:], strict=False)]
        seconds.append(statistics.median(steps))
    assert seconds[1] < 1.3 * seconds[0]
