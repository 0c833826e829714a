"""The CORAL drafter: one step, (next token, feature) → predicted next feature.

EAGLE-1's shape (Li et al. 2024): `fc` on [embedding; feature], one Llama-style decoder layer
without an input norm, no final norm; the embeddings and the LM head are the target's and are not
held here.

    position          0        1        2        3
    token             x0       x1       x2       x3
    target feature    f0       f1       f2       f3          f_i has read x_0 … x_i
    drafter reads              (x1,f0)  (x2,f1)  (x3,f2)     at positions 0, 1, 2
    and predicts               f̂1       f̂2       f̂3          whose logits are for x2, x3, x4
"""

from collections.abc import Sequence

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from .autotune import Tuning, autotune, read_prompts
from .configuration_coral import CoralConfig
from .drafter_layers import CausalContext, Context, CoralLayer
from .head_choice import DraftHeads
from .lm_head import execution_device

TREE_DEFAULTS = {"tree_depth": 6, "tree_top_k": 10, "tree_nodes": 60}


class CoralDrafter(DraftHeads, GenerationMixin):
    """A light model that predicts a target's next features, for the target's own LM head to read.

    Example:

    ```python
    >>> drafter = CoralDrafter.from_target(target)  # fresh; train it with CoralTrainer
    >>> drafter = AutoModel.from_pretrained("org/coral-llama3")  # or load a trained one
    >>> target.generate(**inputs, assistant_model=drafter)
    ```
    """

    config_class = CoralConfig
    config: CoralConfig
    base_model_prefix = "model"
    main_input_name = "features"
    supports_gradient_checkpointing = True
    _no_split_modules = ["CoralLayer"]
    _supports_sdpa = True

    def __init__(self, config: CoralConfig):
        super().__init__(config)
        self.fc = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=config.fc_bias)
        self.layers = nn.ModuleList(
            CoralLayer(config, idx) for idx in range(config.num_hidden_layers)
        )
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self._make_heads(config)
        self.post_init()
        # replaced by the checkpoint's own when `from_pretrained` finds one; transformers' defaults
        # for assistants, 20 tokens and a threshold of 0.4, are meant for another method
        self.generation_config = GenerationConfig(
            bos_token_id=config.bos_token_id,
            eos_token_id=config.eos_token_id,
            pad_token_id=config.pad_token_id,
            num_assistant_tokens=TREE_DEFAULTS["tree_depth"],
            assistant_confidence_threshold=0.0,
            **TREE_DEFAULTS,
        )

    @classmethod
    def from_target(cls, target: PreTrainedModel, **overrides) -> "CoralDrafter":
        """A fresh drafter for `target`, in its dtype and on the device of its LM head.

        `overrides` are fields of [`CoralConfig`]. A router made by its fields (`num_groups`) is
        untrained, and not read before a stage has trained it.

        Raises:
            ValueError: for a draft head that has to be counted or trained first.
        """
        heads = [
            name for name in ("draft_head", "num_hot_tokens", "head_rank") if name in overrides
        ]
        if heads:
            raise ValueError(
                f"{heads} would name a draft head that has learned nothing; make the drafter, then"
                " call add_frequency_head or add_low_rank_head, or train one with CoralTrainer"
                " (stage='router' or 'low_rank')."
            )
        config = CoralConfig.from_target(target.config, **overrides)
        device = execution_device(target.get_output_embeddings())
        drafter = cls(config).to(device=device, dtype=target.dtype)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(drafter.generation_config, name, getattr(target.generation_config, name))
        return drafter

    @classmethod
    def from_eagle(cls, target: PreTrainedModel, source: str, **kwargs) -> "CoralDrafter":
        """A drafter from an EAGLE-1, EAGLE-2 or HASS checkpoint, a folder or a Hub id.

        See `coral_hf.checkpoints.from_eagle`, which takes `kwargs`.
        """
        try:  # this file is published with checkpoints, where the library need not be installed
            from coral_hf.checkpoints import from_eagle
        except ImportError as error:
            raise ImportError(
                "Reading an EAGLE checkpoint needs the library: pip install coral_hf."
            ) from error
        return from_eagle(target, source, drafter_class=cls, **kwargs)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path, *args, output_loading_info: bool = False, **kwargs
    ):
        """See [`~transformers.PreTrainedModel.from_pretrained`].

        Raises:
            ValueError: if the checkpoint cannot be read, lacks a tensor, or has one of another
                shape or name, for which transformers would fill in random numbers and only warn;
                if its groups do not cover the vocabulary, or are not those of its router.
        """
        kwargs["ignore_mismatched_sizes"] = True  # they are named below
        try:
            drafter, info = super().from_pretrained(
                pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
            )
        except SafetensorError as error:
            raise ValueError(
                f"The weights of {pretrained_model_name_or_path} cannot be read ({error}). Download"
                " or save them again."
            ) from error
        for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
            if info[kind]:
                keys = ", ".join(sorted(map(_with_shapes, info[kind])))
                raise ValueError(
                    f"The checkpoint does not fit its config: {kind} {keys}. Download or save it"
                    " again."
                )
        drafter.check_heads()
        return (drafter, info) if output_loading_info else drafter

    def forward(
        self,
        inputs_embeds: Tensor | None,
        features: Tensor,
        position_ids: Tensor | None = None,
        context: Context | None = None,
        head: str = "routed",
    ) -> Tensor:
        """Predict the feature that follows each pair of (next token, feature).

        Args:
            inputs_embeds: (batch, length, hidden), the target's embedding of the token after each
                feature. None asks the draft head `head` about the features instead: what is trained
                has to run in `forward`, which is all that wrappers for several devices see.
            features: (batch, length, hidden), of the target, or predicted by an earlier step.
            position_ids: (batch or 1, length), the positions of the features; 0, 1, … by default.
            context: what can be attended to beside the inputs; causal attention among the inputs
                by default.
            head: `"routed"` or `"low_rank"`, without `inputs_embeds`.

        Returns:
            (batch, length, hidden), the predicted next features; without `inputs_embeds` what the
            draft head makes of features of any shape: the router's log-probabilities (..., groups),
            or features squeezed through low rank (..., hidden).
        """
        if inputs_embeds is None:
            return self._ask(head, features)
        if position_ids is None:
            position_ids = torch.arange(features.shape[1], device=features.device)[None]
        dtype = self.fc.weight.dtype
        hidden = self.fc(torch.cat([inputs_embeds.to(dtype), features.to(dtype)], dim=-1))
        cos, sin = (part[:, None] for part in self.rotary_emb(hidden, position_ids))
        for layer in self.layers:
            hidden = layer(hidden, cos=cos, sin=sin, context=context or CausalContext())
        return hidden

    def _ask(self, head: str, features: Tensor) -> Tensor:
        """What the trained part of a draft head makes of features (..., hidden)."""
        part = {"routed": self.router, "low_rank": self.low_rank}[head]
        if part is None:
            raise ValueError(
                f"`inputs_embeds` is None, which asks the {head} head, but this drafter has none;"
                " pass embeddings, or add the head first (`add_router`, `add_low_rank_head`)."
            )
        return part(features)

    def get_input_embeddings(self) -> None:
        """None: a drafter reads its target's. FSDP asks for them."""

    def autotune(
        self,
        target: PreTrainedModel,
        prompts: Sequence[Tensor | str],
        tokenizer: PreTrainedTokenizerBase | None = None,
        max_seconds: float = 45.0,
    ) -> Tuning:
        """Find the tree that pays best for `target` on this machine, and keep it.

        The tree and the costs go into `generation_config`, which `save_pretrained` saves.

        Args:
            prompts: token ids (1, length) each, or texts; as different as those to come.
            tokenizer: the target's, for prompts that are texts.
            max_seconds: no new run begins after them.
        """
        try:  # as in `from_eagle`
            from coral_hf.target import tree_obstacle
        except ImportError as error:
            raise ImportError("Tuning needs the library: pip install coral_hf.") from error
        ids = read_prompts(prompts, tokenizer, target.device)
        base = target.get_base_model() if hasattr(target, "get_base_model") else target
        own = self.generation_config
        tree = {name: getattr(own, name, value) for name, value in TREE_DEFAULTS.items()}
        if tree_obstacle(base) is not None:  # a chain has a depth and nothing else
            tree = {"tree_depth": tree["tree_depth"]}
        tuning = autotune(self, target, ids, tree, max_seconds)
        for name, value in tuning.tree.items():
            setattr(own, name, value)
        own.draft_costs = tuning.costs
        return tuning

    def push_to_hub(
        self, repo_id: str, *args, tokenizer: PreTrainedTokenizerBase | None = None, **kwargs
    ) -> str:
        """See [`~transformers.PreTrainedModel.push_to_hub`]; the card says what is known.

        Args:
            tokenizer: the target's, pushed too.

        Raises:
            ValueError: if another model is at `repo_id`, or a public repository and `private` is
                asked for.
            HfHubHTTPError, ConnectionError: where the Hub refuses or the connection breaks, with a
                sentence on what to do.
        """
        publishing = _publishing()
        if publishing is None:
            return super().push_to_hub(repo_id, *args, **kwargs)
        with publishing.pushing(self, repo_id, tokenizer, kwargs):
            return super().push_to_hub(repo_id, *args, **kwargs)

    def _upload_modified_files(self, working_dir, repo_id: str, *args, **kwargs):
        # where transformers has saved all files, its own card among them, and uploads next
        publishing = _publishing()
        if publishing is not None:
            publishing.finish_folder(self, working_dir, repo_id)
        done = super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)
        if publishing is not None:
            publishing.drop_stale(working_dir, done, kwargs)
        return done

    def generate(self, *args, **kwargs):
        """A drafter drafts for its target and has no text of its own."""
        raise TypeError(
            "A CORAL drafter has no LM head of its own and cannot generate alone. Call"
            " `target.generate(..., assistant_model=drafter)` after `pip install coral_hf` and"
            " `import coral_hf`."
        )


def _with_shapes(key: str | tuple) -> str:
    """The name of a tensor; of one with a wrong shape also that and the right one."""
    return key if isinstance(key, str) else f"{key[0]} {tuple(key[1])} for {tuple(key[2])}"


def _publishing():
    """The library's part, or None where this file is published code and the library is missing."""
    try:
        import coral_hf.publishing as publishing
    except ImportError:
        return None
    return publishing


__all__ = ["CoralDrafter"]
