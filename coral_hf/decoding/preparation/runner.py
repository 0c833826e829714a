"""Passes whose inputs the target prepares itself, as in plain `generate`.

In: prompts, then trees, all rows equally long. Out: `TargetOutput`. What plain `generate` does with
a call's inputs between two steps is done between two rounds, by the target's own methods:

    prefill   prepare(prompt, first iteration)       → pass
    round     grow the inputs by the drafted nodes
              prepare(text + nodes, nodes)           → pass; a tree has its own mask and positions
    commit    grow the inputs by the accepted nodes
"""

from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from ...target import Target
from ..caches.continuation import CACHE
from ..drafting import DraftTree, root_only
from ..outputs import TargetOutput
from ..target_runner import TargetRunner, masks_by_layer
from .needs import UPDATE, Preparation, agree, overridden

STATES = ("logits", "hidden_states", "attentions")  # that no target asks for between two rounds
TYPES = "token_type_ids"


class PreparedRunner(TargetRunner):
    """Runs a target over a batch whose rows stay and are equally long.

    Where rounds are `CHECKED`, one that differs from single steps is the last of several tokens.
    """

    _ids: Tensor  # (batch, length), without the root of the next tree
    _kwargs: dict[str, Any]  # the inputs for a pass over the root alone
    _tree: DraftTree  # the newest
    _outputs: ModelOutput  # of the newest pass, without `STATES`

    def __init__(self, *args, need: Preparation, **kwargs):
        super().__init__(*args, **kwargs)
        self._is_compared = need == Preparation.CHECKED
        self._has_differed = False
        self._updates_itself = UPDATE in overridden(self._target.model)

    def prefill(self, input_ids: Tensor, model_kwargs: dict, *passes) -> TargetOutput:
        """See [`TargetRunner`]."""
        output = super().prefill(input_ids, model_kwargs, *passes)
        self._ids = input_ids.to(self._target.device)
        self._kwargs = self._grown({**model_kwargs, CACHE: self.cache}, 1)
        return output

    @property
    def is_at_switch(self) -> bool:
        """Whether the target would drop its cache for the next token, as Phi-3 does at a switch."""
        may_drop = self._is_compared or self._switches
        return bool(may_drop) and self._prepare(self._ids[:, -1:], 1).get(CACHE) is None

    def room(self) -> int:
        """See [`TargetRunner`]."""
        if self._has_differed:
            return 0
        length = self._ids.shape[1] + 1
        until = [one.length - length for one in self._switches if length <= one.length]
        return min([super().room(), *until])

    def checked(self, tree: DraftTree) -> DraftTree:
        """A tree, or its root alone where the target would prepare its nodes otherwise in turn."""
        if tree.tokens.shape[1] - 1 > self.room():  # whatever shape a drafter was asked for
            return root_only(tree.tokens[:, 0])
        if not self._is_compared or tree.tokens.shape[1] == 1:
            return tree
        tokens = tree.tokens.to(self._target.device)
        steps = [self._prepare(tokens[:, : end + 1], 1) for end in range(tokens.shape[1])]
        whole = self._prepare(tokens, tokens.shape[1])
        if whole.get(CACHE) is not None and agree(whole, steps):
            return tree
        self._has_differed = True
        return root_only(tree.tokens[:, 0])

    def score(self, tree: DraftTree) -> TargetOutput:
        """See [`TargetRunner`]."""
        self._tree = tree = tree.to(self._target.device)
        inputs = self._prepare(tree.tokens, tree.tokens.shape[1])
        if self._takes_tree and tree.branching != 1 and tree.tokens.shape[1] > 1:
            positions = inputs.get("position_ids")
            root = self.cache.width if positions is None else positions[..., :1]
            own = self.cache.position_ids(tree.depths)
            masks = masks_by_layer(self.model, self.cache, own, tree.ancestry())
            inputs |= {"position_ids": root + tree.depths, "attention_mask": masks}
        return self._forward(**inputs)

    def commit(self, counts: list[int], path: Tensor | None) -> None:
        """See [`TargetRunner`]."""
        super().commit(counts, path)
        nodes = self._tree.tokens[:, :1]
        if path is not None:
            nodes = self._tree.tokens.gather(1, path[:, : counts[0]].to(nodes.device))
        self._ids = torch.cat([self._ids, nodes], dim=1)
        self._kwargs = self._grown(self._kwargs, counts[0])

    def _prepare(self, tokens: Tensor, count: int) -> dict[str, Any]:
        """The target's own inputs for the last `count` of the text and `tokens` (batch, nodes)."""
        inputs = self._target.model.prepare_inputs_for_generation(
            torch.cat([self._ids, tokens], dim=1),
            next_sequence_length=count,
            **self._grown(self._kwargs, tokens.shape[1] - 1),
        )
        if "logits_to_keep" in inputs:
            inputs["logits_to_keep"] = count
        return inputs

    def _grown(self, kwargs: dict[str, Any], count: int) -> dict[str, Any]:
        """Inputs as the target carries them on over `count` tokens."""
        kwargs = dict(kwargs)
        # transformers repeats the last types of a text as often as it has several new tokens
        at_once = count if TYPES not in kwargs and not self._updates_itself else 1
        for _ in range(count // max(at_once, 1)):
            kwargs = self._target.model._update_model_kwargs_for_generation(
                self._outputs, kwargs, is_encoder_decoder=False, num_new_tokens=at_once
            )
            kwargs[CACHE] = self.cache
        return kwargs

    def _run(self, inputs: dict[str, Any]) -> ModelOutput:
        """See [`TargetRunner`]."""
        outputs = super()._run(inputs)
        kept = {name: value for name, value in outputs.items() if name not in STATES}
        self._outputs = type(outputs)(**kept)
        return outputs


def make_runner(target: Target, need: Preparation, takes_tree: bool, *passes) -> TargetRunner:
    """The runner of a call, which prepares rounds as it needs; see [`TargetRunner`]."""
    if need > Preparation.DIRECT:
        return PreparedRunner(target, takes_tree, *passes, need=need)
    return TargetRunner(target, takes_tree, *passes)
