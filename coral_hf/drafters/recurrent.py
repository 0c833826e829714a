"""The Recurrent Drafter: one step of its state, and its head.

    position          0       1       2       3
    token             x0      x1      x2      x3        x3 was just emitted
    target feature    f0      f1      f2                f2 is the feature of every step of a round
    state                             0       s1        s1 has read x3
    the head reads                            [f2;s1]   → logits for x4
    the next step                             [f2;s2]   s2 has read x̂4 too → logits for x5

A state of a step is [feature; state] side by side: the feature is carried along as it is.
"""

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn import functional as F

from ..heads.draft_heads import OtherVocabulary
from ..heads.settings import check_sizes
from ..target import Target
from .configuration import FamilyConfig
from .layers import Context, ResidualBlock
from .model import Drafter, register_family
from .tree_builders import Beam
from .tree_drafting import Grown, LastFeatureDrafting, TreeDrafting


@strict
class RecurrentConfig(FamilyConfig):
    """Configuration of a [`RecurrentDrafter`]; its own fields have the published names.

    `RecurrentConfig.from_target` fills in everything that follows from a target. What it shares
    with other families is in `FamilyConfig`.

    Args:
        exit_dim: width of the head; twice `hidden_size` by default, which needs no projection.
        num_draft_layers: residual blocks of the head.
        rnn: whether a state goes through an RNN; else it is a sum of embeddings.

    Example:

    ```python
    >>> from transformers import LlamaConfig
    >>> from coral_hf import RecurrentConfig
    >>> RecurrentConfig.from_target(LlamaConfig(hidden_size=256)).exit_dim
    512
    ```
    """

    model_type = "coral_recurrent"
    # the name by which commands and model cards ask for the layers of any drafter
    attribute_map = {"num_hidden_layers": "num_draft_layers"}

    exit_dim: int | None = None
    num_draft_layers: int = 2
    rnn: bool = True

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.exit_dim is None:
            self.exit_dim = 2 * self.hidden_size
        check_sizes(self, 1, None, "exit_dim")
        check_sizes(self, 0, None, "num_draft_layers")


class RecurrentDrafter(Drafter):
    """A light model that predicts a target's next tokens from one feature and the tokens since.

    Example:

    ```python
    >>> drafter = RecurrentDrafter.from_target(target)  # fresh; train it with CoralTrainer
    >>> target.generate(**inputs, assistant_model=drafter)
    ```
    """

    config_class = RecurrentConfig
    config: RecurrentConfig
    title = "Recurrent Drafter"
    paper = "[Recurrent Drafter (2024)](https://arxiv.org/abs/2403.09919)"
    supports_gradient_checkpointing = False  # a step keeps little more than its output

    def __init__(self, config: RecurrentConfig):
        super().__init__(config)
        width, exit_dim = config.hidden_size, config.exit_dim
        assert exit_dim, "the config fills it in"
        if config.rnn:
            self.rnn_w = nn.Linear(width, width, bias=False)  # of the embedding
            self.rnn_u = nn.Linear(width, width)  # of the state
        self.input_proj = nn.Linear(2 * width, exit_dim) if exit_dim != 2 * width else None
        self.lm_head = nn.Sequential(
            *(ResidualBlock(exit_dim) for _ in range(config.num_draft_layers)),
            nn.Linear(exit_dim, config.vocab_size, bias=False),
        )
        self.post_init()

    def get_output_embeddings(self) -> None:
        """Return None: the head is more than one matrix."""

    @property
    def draft_tokens(self) -> Tensor:
        """The token id of each row of the head, of shape (vocab,)."""
        return torch.arange(self.config.vocab_size, device=self.device)

    def forward(
        self,
        inputs_embeds: Tensor,
        states: Tensor,
        position_ids: Tensor | None = None,
        context: Context | None = None,
    ) -> Tensor:
        """Let states read one token more.

        Args:
            inputs_embeds: (batch, length, hidden), the embedding of that token.
            states: (batch, length, 2 · hidden): the feature that a draft starts from, and what has
                been read since, 0 at first.
            position_ids, context: as other families have them; not read.

        Returns:
            (batch, length, 2 · hidden): the same features, and the new states.
        """
        dtype = self.lm_head[-1].weight.dtype
        feature, state = states.to(dtype).chunk(2, dim=-1)
        embeddings = inputs_embeds.to(dtype)
        if self.config.rnn:
            state = F.silu(self.rnn_w(embeddings) + self.rnn_u(state))
        else:
            state = embeddings + state
        return torch.cat([feature, state.to(feature.dtype)], dim=-1)

    def draft_logits(self, states: Tensor) -> Tensor:
        """Logits of the token after each state: (*batch, 2 · hidden) → (*batch, vocab)."""
        return self.lm_head(states if self.input_proj is None else self.input_proj(states))


class RecurrentDrafting(LastFeatureDrafting, TreeDrafting):
    """Drafts trees below one feature, for one call of `generate`; see [`LastFeatureDrafting`]."""

    drafter: RecurrentDrafter

    def __init__(self, drafter: RecurrentDrafter, target: Target, memory: None = None):
        super().__init__(drafter, target)
        self.head = OtherVocabulary(drafter.draft_logits, self._num_tokens)

    def _start(self, root: Tensor) -> Grown:
        feature = self._feature[:, None]
        states = torch.cat([feature, torch.zeros_like(feature)], dim=-1)
        return self._read(root[:, None], states)

    def _grow(self, grown: Grown, beam: Beam, depth: int) -> Grown:
        return self._read(beam.tokens, beam.of_parents(grown.features))

    def _read(self, tokens: Tensor, states: Tensor) -> Grown:
        """Let states (batch, beam, 2 · hidden) read tokens (batch, beam)."""
        embeddings = self.target.embed(tokens).to(self.device)
        return Grown(self.drafter(embeddings, states))


register_family(RecurrentDrafter, RecurrentDrafting)
