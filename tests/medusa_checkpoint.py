"""Checkpoints of Medusa heads as they are published, and what such heads compute, from raw tensors.

Names and shapes as published, formulas from the paper: nothing of the package is in it.
"""

import torch
from eagle_checkpoint import HIDDEN, VOCAB

# the config of medusa-vicuna-7b-v1.3 says fewer heads than its file has
PUBLISHED = {
    "base_model_name_or_path": "lmsys/vicuna-7b-v1.3",
    "medusa_num_heads": 2,
    "medusa_num_layers": 1,
    "transformers_version": "4.31.0",
}
VLLM = {
    "model_type": "medusa",
    "architectures": ["MedusaModel"],
    "hidden_size": HIDDEN,
    "vocab_size": VOCAB,
    "num_heads": 3,
    "num_hidden_layers": 1,
}


def medusa_tensors(heads=3, blocks=1, *, own=True, seed=2) -> dict[str, torch.Tensor]:
    """Random tensors of the names and shapes of `medusa_lm_head.pt`."""
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for head in range(heads):
        for block in range(blocks):
            tensors[f"{head}.{block}.linear.weight"] = (HIDDEN, HIDDEN)
            tensors[f"{head}.{block}.linear.bias"] = (HIDDEN,)
        if own:
            tensors[f"{head}.{blocks}.weight"] = (VOCAB, HIDDEN)
    return {name: 0.4 * torch.randn(shape, generator=generator) for name, shape in tensors.items()}


def medusa_logits(tensors: dict, heads: int, blocks: int, features, lm_head=None):
    """W2 (h + SiLU(W1 h + b)) of each head, block after block: (heads, length, vocab) in float64.

    `lm_head`: (vocab, hidden), read by heads without one of their own.
    """
    w, found = {name: tensor.double() for name, tensor in tensors.items()}, []
    for head in range(heads):
        h = features.double()
        for block in range(blocks):
            x = h @ w[f"{head}.{block}.linear.weight"].T + w[f"{head}.{block}.linear.bias"]
            h = h + x * x.sigmoid()
        found.append(h @ w.get(f"{head}.{blocks}.weight", lm_head).T)
    return torch.stack(found)
