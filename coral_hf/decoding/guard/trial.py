"""A trial of a target: read as trees and as chains, against plain decoding, on small texts.

In: a target, or a small copy of it, which has a layer of each kind and random weights. Out: the
highest way in which it gives the logits of plain `generate`. The text of plain `generate` is read
again, several tokens in a pass, with wrong ones beside them:

    node     0      1      2    3      4    5      6      7        the true tokens are t1, t2, t3
    token    root   wrong  t1   wrong  t2   wrong  wrong  t3
    parent   -      0      0    2      2    1      4      4
"""

import copy
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from ...target import FEATURE, read_target, text_config
from ..caches.shared_keys import sharing_keys
from ..drafting import DraftTree, host_tensor
from ..preparation.needs import Preparation, choose_preparation
from ..preparation.runner import make_runner
from .entries import CHAIN, REFUSED, TREE, Way

PARENTS = (0, 0, 0, 2, 2, 1, 4, 4)
DEPTHS = (0, 1, 1, 2, 2, 2, 3, 3)
TRUE_NODES = (0, 2, 4, 7)
# how far logits may be off, in their standard deviation; another mask moves them much further
ROUNDING = {torch.float64: 1e-4, torch.float32: 1e-3}  # some compute attention in float32
LOOSE = 0.2  # in lower precision
# of a copy: the largest numbers of config fields that name a length, or a width that no attention
# depends on; the number of tokens at which rotary parameters switch; and the spread of a matrix's
# outputs, such that tokens tell each other apart
VOCAB, SWITCH, SPREAD = 64, 16, 1.5
WIDTHS = "intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size", "ffn_dim"
LARGEST = {
    SWITCH: ("original_max_position_embeddings",),
    8: ("sliding_window", "window_size", "attention_window_size", "attention_chunk_size"),
    VOCAB: WIDTHS,
    128: ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"),
}


class Verdict(NamedTuple):
    """What a trial has found."""

    way: Way
    said: str = ""  # what was wrong with the next higher way


@torch.no_grad()
def try_target(model: PreTrainedModel, prompts: list[tuple[int, ...]], new: int) -> Verdict:
    """Find the highest way in which a target gives the logits of plain `generate`.

    Args:
        prompts: lengths of the prompts of each call.
        new: tokens of each text.
    """
    said = ""
    for way in (TREE, CHAIN):
        try:
            for lengths in prompts:
                _try_call(model, lengths, new, way == TREE)
        except Exception as error:  # whatever other people's code raises is its answer
            said = f"{type(error).__name__}: {error}".splitlines()[0]
        else:
            return Verdict(way, said)
    return Verdict(REFUSED, said)


def _try_call(model: PreTrainedModel, lengths: tuple[int, ...], new: int, takes_tree: bool) -> None:
    """Raise an error if a target does not give the logits of a plain call in larger passes."""
    device, vocab = read_target(model).device, text_config(model).vocab_size
    longest, padding = max(lengths), host_tensor([max(lengths) - one for one in lengths])
    ids = torch.arange(len(lengths) * longest, device=device).view(len(lengths), -1) * 7 % vocab
    seen = torch.arange(longest, device=device) >= padding.to(device)[:, None]
    # a text of all tokens, which tells their places apart
    how = {"do_sample": False, "num_beams": 1, "no_repeat_ngram_size": 1, "pad_token_id": 0}
    how |= {"return_dict_in_generate": True, "output_logits": True}
    settings = GenerationConfig(max_new_tokens=new, min_new_tokens=new, **how)
    call = {"attention_mask": seen.long(), "generation_config": settings}
    plain = model.generate(ids, **call)

    def reread(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        need = choose_preparation(model, kwargs, len(input_ids), longest + new)
        assert need < Preparation.CHECKED or not takes_tree, "each round is compared with steps"
        runner = make_runner(read_target(model), need, takes_tree, (FEATURE,))
        found = [runner.prefill(input_ids, kwargs).logits[:, 0]]  # (batch, vocab) for each token
        while len(found) < new and not runner.is_at_switch:
            depth = min(3, new - len(found) - 1, runner.room())
            rest = plain.sequences[:, longest + len(found) - 1 :]
            tree, path = _tree_of(rest, depth, vocab, None if takes_tree else len(found))
            tree = runner.checked(tree)
            path = path[: tree.tokens.shape[1]]
            with sharing_keys():
                logits = runner.score(tree).logits
            found += [logits[:, node] for node in path]
            nodes = host_tensor([path] * len(input_ids)) if len(path) > 1 else None
            runner.commit([len(path)] * len(input_ids), nodes)
        return torch.stack(found)

    found = model.generate(ids, **call, custom_generate=reread)
    expected = torch.stack(plain.logits[: len(found)])
    off = (found.to(expected) - expected).abs().amax(-1) / expected.std(dim=-1)  # (tokens, batch)
    off = off[off > ROUNDING.get(model.dtype, LOOSE)]
    if len(off):
        raise AssertionError(f"logits are off by {float(off.max()):.1g} standard deviations")


def _tree_of(text: Tensor, depth: int, vocab: int, turn: int | None) -> tuple[DraftTree, list[int]]:
    """The tree of a root and the next tokens of a text (batch, some), and its true nodes.

    `turn`: None; of a chain a number that says how many of its last tokens are wrong.
    """
    if turn is None:
        nodes = sum(level <= depth for level in DEPTHS)
        parents, depths, path = PARENTS[:nodes], DEPTHS[:nodes], TRUE_NODES[: depth + 1]
    else:
        depths = tuple(range(depth + 1))
        parents, path = (0, *depths[:-1]), depths[: depth + 1 - turn % (depth + 1)]
    known = text[:, list(depths)]
    is_true = [node in path for node in range(len(depths))]
    tokens = torch.where(host_tensor(is_true).bool().to(text.device), known, (known + 1) % vocab)
    below, at = (host_tensor(part).to(tokens).expand_as(tokens) for part in (parents, depths))
    return DraftTree(tokens, below, at, levels=depth), list(path)


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
    for largest, names in LARGEST.items():
        for name in names:
            if isinstance(fields.get(name), int):
                setattr(text, name, min(largest, fields[name]))
    rope = fields.get("rope_parameters") or {}
    for part in (rope, *rope.values()):  # of all layers, or by layer type
        if isinstance(part, dict) and "original_max_position_embeddings" in part:
            part["original_max_position_embeddings"] = SWITCH
    return config


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
