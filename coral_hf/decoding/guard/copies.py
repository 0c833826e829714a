"""A small copy of a target, for a trial: its class and kinds of layers, random weights.

In: a target of any size. Out: a model with one layer of each kind, a small vocabulary, and short
windows, in float32.
"""

import copy

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ...target import read_target

WINDOW, SWITCH, POSITIONS, VOCAB, WIDTH = 8, 16, 128, 64, 64
# config fields that name a length → that of the copy
LENGTHS = {
    "sliding_window": WINDOW,
    "window_size": WINDOW,
    "attention_window_size": WINDOW,
    "attention_chunk_size": WINDOW,
    "original_max_position_embeddings": SWITCH,
    "max_position_embeddings": POSITIONS,
    "n_positions": POSITIONS,
    "n_ctx": POSITIONS,
    "max_seq_len": POSITIONS,
}
# widths that no attention depends on
WIDTHS = (
    "intermediate_size",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "ffn_dim",
)
SPREAD = 1.5  # of a matrix's outputs: such that tokens tell each other apart


def small_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a target's class with random weights; the global generator is left as it was."""
    config = small_config(model.config)
    device = read_target(model).device
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.device(device):
        torch.manual_seed(0)
        made = type(model)._from_config(
            config, dtype=torch.float32, attn_implementation=model.config._attn_implementation
        )
        for weight in made.parameters():
            if weight.dim() > 1:
                torch.nn.init.normal_(weight, 0, SPREAD * weight.shape[-1] ** -0.5)
    return made.eval().requires_grad_(False)


def small_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """A config with one layer of each kind, a small vocabulary and short lengths."""
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    text = config.get_text_config(decoder=True)
    _keep_layers(text)
    for part in {id(config): config, id(text): text}.values():
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(part, name, None)
        if getattr(part, "vocab_size", None):
            part.vocab_size = min(part.vocab_size, VOCAB)
    fields = vars(text)
    for name, length in LENGTHS.items():
        if isinstance(fields.get(name), int):
            setattr(text, name, min(length, fields[name]))
    for name in WIDTHS:
        if isinstance(fields.get(name), int):
            setattr(text, name, min(WIDTH, fields[name]))
    _shorten(fields.get("rope_parameters"))
    return config


def _shorten(rope: object) -> None:
    """Shorten the length at which rotary parameters switch, of all layers or by layer type."""
    if not isinstance(rope, dict):
        return
    if "original_max_position_embeddings" in rope:
        rope["original_max_position_embeddings"] = SWITCH
    for part in rope.values():
        _shorten(part)


def _keep_layers(text: PreTrainedConfig) -> None:
    """Keep the first layer of each kind, by all lists that have an entry a layer."""
    layers = text.num_hidden_layers
    lists = {
        name: value
        for name, value in vars(text).items()
        if isinstance(value, (list, tuple)) and len(value) == layers and name != "architectures"
    }
    kinds: dict[tuple, int] = {}
    for layer in range(layers):
        kinds.setdefault(tuple(str(value[layer]) for value in lists.values()), layer)
    kept = sorted(kinds.values()) if lists else list(range(min(layers, 2)))
    for name, value in lists.items():
        setattr(text, name, type(value)(value[at] for at in kept))
    text.num_hidden_layers = len(kept)
