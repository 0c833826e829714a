"""CORAL drafter inside vLLM, made of vLLM's layers and our draft heads.

In: a checkpoint as `CoralDrafter.save_pretrained` writes it, and vLLM's target. Out: the logits
that the draft head reads, -inf for the rest of the vocabulary; vLLM drafts a chain of the largest
ones (or draws, if its settings say so) and verifies with the target's whole head.

    vLLM    token      x1       x2       x3            its EAGLE proposer shifts tokens as we do
            feature    f0       f1       f2
            position   0        1        2
"""

from collections.abc import Iterable
from functools import cached_property

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.models.llama_eagle import EagleLlamaForCausalLM, LlamaModel
from vllm.model_executor.models.utils import maybe_prefix

from ..checkpoints import check_tensors
from ..drafters.coral import CoralConfig, CoralDrafter
from ..heads.collection import DraftHeads
from ..heads.draft_heads import DraftHead
from ..lm_head import LMHead
from ..target import read_scales

# family whose embeddings transformers scales in their module, and vLLM outside of it
SCALED_EMBEDDINGS = "gemma"


class ServedLayers(LlamaModel):
    """vLLM's `fc` (hidden, 2 hidden) and layers for EAGLE, with what a CORAL drafter adds."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", start_layer_id: int = 0):
        super().__init__(vllm_config=vllm_config, prefix=prefix, start_layer_id=start_layer_id)
        config = coral_config(vllm_config)
        target = vllm_config.model_config.hf_text_config
        self.scales = read_scales(target)
        self.embedding_scale = self.scales.embedding
        if target.model_type.startswith(SCALED_EMBEDDINGS):
            self.embedding_scale *= config.hidden_size**0.5
        if config.fc_bias:
            self.fc = ReplicatedLinear(
                2 * config.hidden_size,
                config.hidden_size,
                params_dtype=vllm_config.model_config.dtype,
                quant_config=self.quant_config,
                prefix=maybe_prefix(prefix, "fc"),
                return_bias=False,
            )

    def forward(
        self, input_ids: Tensor, positions: Tensor, hidden_states: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Predict the next feature of each token of a flattened batch.

        Args:
            input_ids: of shape (tokens,), the token after each feature.
            positions: of shape (tokens,), of the features.
            hidden_states: (tokens, hidden), features.

        Returns:
            (tokens, hidden), twice: what the head reads, and what the next step reads.
        """
        embeddings = self.embed_tokens(input_ids) * self.embedding_scale
        hidden = self.fc(torch.cat((embeddings, hidden_states), dim=-1))
        residual = None
        for layer in self.layers:
            hidden, residual = layer(positions, hidden, residual)
        hidden = hidden + residual
        return hidden, hidden


class ServedDrafter(EagleLlamaForCausalLM):
    """A CORAL drafter, of the architecture `CoralDrafter`, under `"method": "eagle"`."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        nn.Module.__init__(self)  # the parent's would build its own layers
        self.config = config = coral_config(vllm_config)
        _check_parallel(config)
        seen = vllm_config.speculative_config.draft_model_config.hf_config
        # vLLM's Llama reads `attention_bias` for o_proj too, which has none here
        seen.qkv_bias, seen.attention_bias = config.attention_bias, False
        self.model = ServedLayers(
            vllm_config=vllm_config,
            prefix=maybe_prefix(prefix, "model"),
            start_layer_id=vllm_config.model_config.get_num_layers(vllm_config.parallel_config),
        )
        self.heads = DraftHeads(config)
        self.logits_processor = LogitsProcessor(config.vocab_size)

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """Compute the logits that the draft head reads, in fp32; -inf for all other tokens.

        Args:
            hidden_states: (requests, hidden), predicted features.

        Returns:
            (requests, vocab)
        """
        # (requests, 1, hidden): a request is a sequence with one node, and has groups of its own
        features = hidden_states[:, None]
        return self._draft_head.logits(features, torch.zeros_like(features[..., 0]))[:, 0]

    def get_top_tokens(self, hidden_states: Tensor) -> Tensor:
        """Return the best token of each request, given predicted features (requests, hidden)."""
        return self.compute_logits(hidden_states).argmax(-1)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Load a checkpoint's tensors.

        Raises:
            ValueError: if one is missing, unknown or of another shape, where vLLM itself would run
                with random numbers.
        """
        tensors = dict(weights)
        with torch.device("meta"):
            wanted = CoralDrafter(self.config).state_dict()
        check_tensors(tensors, wanted, "The drafter's checkpoint")
        heads = {n: tensors.pop(n) for n in wanted if n.startswith("heads.")}
        super().load_weights(tensors.items())
        self.heads.load_state_dict({n.removeprefix("heads."): t for n, t in heads.items()})
        self.heads.check()

    @cached_property
    def _draft_head(self) -> DraftHead:
        """Bind the draft head to the target's LM head, which vLLM sets after weights are loaded."""
        # targets with tied embeddings may have no LM head of their own
        module = self._modules.get("lm_head", self.model.embed_tokens)
        head = VocabHead(module, self.logits_processor, self.config.vocab_size)
        scales = self.model.scales
        return self.heads.bind(LMHead(head, scales.logit, scales.softcap))


class VocabHead(nn.Module):
    """vLLM's LM head as draft heads read one, (vocab, hidden) without the rows that pad it."""

    def __init__(self, module: nn.Module, processor: LogitsProcessor, vocab_size: int):
        super().__init__()
        bias: Tensor | None = getattr(module, "bias", None)
        self._call = lambda features: processor(module, features, bias)
        is_padded = len(module.weight) > vocab_size
        # (vocab, hidden), a view
        self.weight = nn.Parameter(module.weight[:vocab_size]) if is_padded else module.weight
        self.bias = bias if bias is None else bias[:vocab_size]

    def forward(self, features: Tensor) -> Tensor:
        """(*batch, hidden) → (*batch, vocab)"""
        return self._call(features)


def coral_config(vllm_config: VllmConfig) -> CoralConfig:
    """Return the checkpoint's own config, which vLLM wraps in one of EAGLE's."""
    return vllm_config.speculative_config.draft_model_config.hf_config.model


def _check_parallel(config: CoralConfig) -> None:
    """Refuse to read parts of a head whose rows are split: a group may lie in several processes."""
    size = get_tensor_model_parallel_world_size()
    if size > 1 and config.draft_head != "full":
        raise ValueError(
            f"`draft_head` is {config.draft_head!r} and `tensor_parallel_size` is {size}, but only"
            " a whole LM head can be read in parts; set draft_head to 'full' in the drafter's"
            " config.json, or tensor_parallel_size=1."
        )
