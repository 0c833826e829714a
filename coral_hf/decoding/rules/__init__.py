"""Acceptance rules: which path of a draft tree the target accepts, and the token after it."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor

from ..chance import Chance, Uniforms
from ..drafting import DraftTree
from ..watchers import processed
from .traversal import verify_traversal
from .walk import Verdict, verify_greedy, verify_token


def looks_ahead(rule: str, tree: DraftTree) -> bool:
    """Whether a rule of `settings.RULES` looks at all of a tree before its first token is decided.

    On chains "block" is "traversal". On tokens that were chosen both are the token rule.
    """
    return rule in ("traversal", "block") and tree.draft_probs is not None


def decide(
    rule: str,
    tree: DraftTree,
    logits: Tensor,
    processors: Sequence[LogitsProcessor],
    chance: Chance | Uniforms,
) -> Verdict:
    """What the target accepts by a rule, where scores follow from logits (batch, nodes, vocab)."""
    if rule == "greedy":
        is_coarse = not processors and logits.dtype != torch.float64  # `processed` changes nothing
        scores = logits if is_coarse else processed(processors, logits.flatten(0, 1))
        return verify_greedy(tree, scores.view_as(logits))
    if looks_ahead(rule, tree):
        probs = processed(processors, logits.flatten(0, 1)).softmax(-1)
        return verify_traversal(tree, probs.view_as(logits), chance)
    rows = torch.arange(len(logits), device=logits.device)
    return verify_token(
        tree, lambda node: processed(processors, logits[rows, node]).softmax(-1), chance
    )
