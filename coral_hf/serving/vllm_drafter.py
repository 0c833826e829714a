"""The CORAL drafter as vLLM runs it, with vLLM's layers and our draft heads.

In: a checkpoint as `CoralDrafter.save_pretrained` writes it, and vLLM's target. Out: the logits of
what the draft head reads, -inf for the rest of the vocabulary; vLLM drafts a chain of their largest
ones (or draws, if it is told to) and verifies with the target's whole head.

    vLLM    token      x1       x2       x3            its EAGLE proposer shifts tokens as we do
            feature    f0       f1       f2
            position   0        1        2
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.models.llama_eagle import EagleLlamaForCausalLM, LlamaModel
from vllm.model_executor.models.utils import maybe_prefix

from ..checkpoints import check_tensors
from ..drafters.coral.configuration import CoralConfig
from ..drafters.coral.modeling import CoralDrafter
from ..heads.collection import DraftHeads
from ..heads.simple import DraftHead
from ..lm_head import LMHead
from ..target import Scales, read_scales

# family whose embeddings transformers scales inside of the embedding module and vLLM outside
SCALED_EMBEDDINGS = "gemma"


class ServedLayers(LlamaModel):
    """`fc` and the decoder layers: vLLM's for EAGLE, with what a CORAL config adds to them."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", start_layer_id: int = 0):
        super().__init__(vllm_config=vllm_config, prefix=prefix, start_layer_id=start_layer_id)
        config = coral_config(vllm_config)
        self.embedding_scale = target_scales(vllm_config).embedding
        if vllm_config.model_config.hf_text_config.model_type.startswith(SCALED_EMBEDDINGS):
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
        """Predict the features that follow.

        Args:
            input_ids: (tokens,), the token after each feature.
            positions: (tokens,), of the features.
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
        target = vllm_config.model_config
        self.model = ServedLayers(
            vllm_config=vllm_config,
            prefix=maybe_prefix(prefix, "model"),
            start_layer_id=target.get_num_layers(vllm_config.parallel_config),
        )
        self.heads = DraftHeads(config)
        self.logits_processor = LogitsProcessor(config.vocab_size)
        self._scales = target_scales(vllm_config)
        self._draft_head: DraftHead | None = None

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """Logits of what the draft head reads, in fp32; -inf for all other tokens.

        Args:
            hidden_states: (rows, hidden), predicted features, each of another request.

        Returns:
            (rows, vocab)
        """
        # a row is a text whose level has one row, so that each has groups of its own
        features = hidden_states[:, None]
        return self._head().logits(features, torch.zeros_like(features[..., 0]))[:, 0]

    def get_top_tokens(self, hidden_states: Tensor) -> Tensor:
        """The best token of each row, (rows,), of predicted features (rows, hidden)."""
        return self.compute_logits(hidden_states).argmax(-1)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Load a checkpoint's tensors.

        Raises:
            ValueError: if one is missing, unknown or of another shape; vLLM would run with random
                numbers.
        """
        tensors = dict(weights)
        with torch.device("meta"):
            wanted = CoralDrafter(self.config).state_dict()
        check_tensors(tensors, wanted, "The drafter's checkpoint")
        of_layers = {n: t for n, t in tensors.items() if n.startswith(("fc.", "layers."))}
        super().load_weights(of_layers.items())
        own = {n.removeprefix("heads."): t for n, t in tensors.items() if n not in of_layers}
        self.heads.load_state_dict(own)
        self.heads.check()

    def _head(self) -> DraftHead:
        """The draft head on the target's, which vLLM hands over after the weights are loaded."""
        if self._draft_head is None:
            # targets with tied embeddings may have no head of their own
            module = self._modules.get("lm_head", self.model.embed_tokens)
            head = VocabHead(module, self.logits_processor, self.config.vocab_size)
            lm_head = LMHead(head, self._scales.logit, self._scales.softcap)
            self._draft_head = self.heads.bind(lm_head)
        return self._draft_head


class VocabHead(nn.Module):
    """vLLM's LM head as our draft heads read one: without the rows that pad its vocabulary."""

    def __init__(self, module: nn.Module, processor: LogitsProcessor, vocab_size: int):
        super().__init__()
        bias: Tensor | None = getattr(module, "bias", None)
        self._call = lambda features: processor(module, features, bias)
        is_padded = len(module.weight) > vocab_size
        # (vocab, hidden), a view
        self.weight = nn.Parameter(module.weight[:vocab_size]) if is_padded else module.weight
        self.bias = bias if bias is None else bias[:vocab_size]

    def forward(self, features: Tensor) -> Tensor:
        """(..., hidden) → (..., vocab)"""
        return self._call(features)


def coral_config(vllm_config: VllmConfig) -> CoralConfig:
    """The checkpoint's own config, which vLLM wraps in one of EAGLE's."""
    return vllm_config.speculative_config.draft_model_config.hf_config.model


def target_scales(vllm_config: VllmConfig) -> Scales:
    """Read the scales of the target that vLLM serves."""
    return read_scales(vllm_config.model_config.hf_text_config)


def _check_parallel(config: CoralConfig) -> None:
    """Each process holds a part of the vocabulary's rows, and a group may lie in several."""
    size = get_tensor_model_parallel_world_size()
    if size > 1 and config.draft_head != "full":
        raise ValueError(
            f"`draft_head` is {config.draft_head!r} and `tensor_parallel_size` is {size}, but only"
            " a whole LM head can be read in parts; set draft_head to 'full' in the drafter's"
            " config.json, or tensor_parallel_size=1."
        )
