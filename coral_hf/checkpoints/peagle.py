"""What a checkpoint of P-EAGLE has beside EAGLE-3's: a shared hidden state, and a mask token.

In: tensors under EAGLE-3's names. Out: those of a `ParallelDrafter`, and back.

                   shared hidden state              mask token, in config.json
    AWS            mask_hidden (1, 1, 3 · hidden)   ptd_token_id
    speculators    mask_hidden (1, 1, 3 · hidden)   mask_token_id, speculators_model_type "peagle"
    vLLM reads     mask_hidden, of any shape        pard_token, ptd_token_id, mask_token_id

The mask embedding is the mask token's row of `embed_tokens.weight` there, and a tensor of its own
here. This was read from the code of trainers and engines, not from a checkpoint.
"""

from pathlib import Path
from typing import Any

from torch import Tensor

from ..drafters.eagle3 import ParallelDrafter
from ..target import Target
from .eagle import EMBEDDINGS, is_plain

HIDDEN, EMBEDDING = "mask_hidden", "mask_embedding"
TOKEN = "ptd_token_id"  # as it is written
TOKENS = ("pard_token", TOKEN, "mask_token_id")


def read_mask_token(config: dict[str, Any]) -> int | None:
    """Read the mask token that a config.json names; None without one."""
    found = [int(config[name]) for name in TOKENS if config.get(name) is not None]
    return found[0] if found else None


def names_peagle(config: dict[str, Any]) -> bool:
    """Whether a config.json says that it is of a P-EAGLE drafter."""
    kinds = config.get("speculators_model_type"), config.get("architectures")
    return read_mask_token(config) is not None or "peagle" in str(kinds).lower()


def split_table(
    tensors: dict[str, Tensor], target: Target, token: int | None, folder: Path
) -> None:
    """Make the mask embedding a tensor of its own, in the place of a row of a table.

    The table, (vocab, hidden), gets the target's own row there, so that one which is the target's
    is known as such.

    Raises:
        ValueError: if no token is named, or one that is none.
    """
    own, found = target.embeddings.weight, tensors.get(EMBEDDINGS)
    table = own.detach() if found is None else found
    if token is None or not 0 <= token < len(table):
        raise ValueError(
            f"{folder} is a P-EAGLE drafter, whose config.json names its mask token as one of"
            f" {', '.join(TOKENS)}: expected a token from 0 to {len(table) - 1}, and found {token}."
            " Add the one that it was trained with."
        )
    tensors[EMBEDDING] = table[token].cpu().reshape(1, 1, -1).clone()
    if HIDDEN in tensors:
        tensors[HIDDEN] = tensors[HIDDEN].reshape(1, 1, -1)
    if found is not None and is_plain(own) and token < len(own) and found.shape[1] == own.shape[1]:
        tensors[EMBEDDINGS] = found.clone()
        tensors[EMBEDDINGS][token] = own[token].detach().to(found)


def join_table(
    tensors: dict[str, Tensor], drafter: ParallelDrafter, engine: str, vocab_size: int
) -> list[str]:
    """Put the mask embedding into the table of an engine, or list why that cannot be.

    `vocab_size`: of the target.
    """
    config, table = drafter.config, tensors.get(EMBEDDINGS)
    token, mask = config.mask_token_id, tensors.pop(EMBEDDING)
    if engine != "vllm":
        return [f"{engine} drafts no tokens in parallel"]
    found = []
    if token is None:
        found.append(
            "`mask_token_id` is not set; set it in the drafter's config to a token that no"
            " text has, such as a reserved one"
        )
    elif token >= vocab_size:
        found.append(f"`mask_token_id` is {token}, beyond the target's {vocab_size} tokens")
    if table is None:
        found.append(
            "its mask embedding goes into the target's embeddings, so pass `target` (--target)"
        )
    if len(config.target_layers) != 3 or config.target_hidden_size != config.hidden_size:
        found.append("vLLM takes a shared hidden state of three layers of the drafter's own width")
    if table is not None and not found:
        tensors[EMBEDDINGS] = table.detach().clone()
        tensors[EMBEDDINGS][token] = mask.reshape(-1).to(table)
    return found
