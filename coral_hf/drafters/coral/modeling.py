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

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from huggingface_hub import CommitInfo
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.utils import cached_file

from ...atomic import write_json
from ...decoding.guard import accept_features, accept_target
from ...decoding.settings import TREE_DEFAULTS
from ...heads.collection import DraftHeads
from ...heads.settings import UNTRAINED_HEADS
from ...lm_head import execution_device
from .configuration import CoralConfig
from .layers import CausalContext, Context, CoralLayer

TRAINING_RECORD = "training_record.json"  # beside the weights
# prefixes of fields and weights that only the first layout of this package saved
FIRST_LAYOUT = ("training_record", "router.", "hot_tokens", "low_rank.")


class CoralDrafter(PreTrainedModel, GenerationMixin):
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
    main_input_name = "input_ids"  # of a batch of training, whose tokens `Trainer` counts
    supports_gradient_checkpointing = True
    # modules that are called on their own need FSDP hooks of their own
    _no_split_modules = ["CoralLayer", "Router", "LowRank"]
    _supports_sdpa = True
    # finds the package that publishes, which imports this one; `import coral_hf` sets it
    publisher: ClassVar[Callable[[], Any]]

    def __init__(self, config: CoralConfig):
        super().__init__(config)
        # (batch, length, 2 * hidden) → (batch, length, hidden)
        self.fc = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=config.fc_bias)
        self.layers = nn.ModuleList(
            CoralLayer(config, idx) for idx in range(config.num_hidden_layers)
        )
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.heads = DraftHeads(config)
        # one dict for each training run of the drafter: recipe, data, cost
        self.training_record: list[dict[str, Any]] = []
        self.post_init()
        # `from_pretrained` replaces it by the checkpoint's own; transformers' defaults for
        # assistants, 20 tokens and a threshold of 0.4, are meant for another method
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
        """Make an untrained drafter for `target`, in its dtype and on the device of its LM head.

        `overrides` are fields of [`CoralConfig`]. A router made by them (`num_groups`) is read only
        after a stage has trained it.

        Raises:
            ValueError: for a target that cannot take a drafter; for a draft head that has to be
                counted or trained first.
        """
        accept_target(target)
        accept_features(target)
        named = {"draft_head", "num_hot_tokens", "head_rank"} & overrides.keys()
        if overrides.get("draft_head") in UNTRAINED_HEADS:
            named.remove("draft_head")
        if heads := sorted(named):
            raise ValueError(
                f"{heads} would name a draft head that has learned nothing; make the drafter, then"
                " call add_frequency_head or add_low_rank_head of drafter.heads, or train one with"
                " CoralTrainer (stage='router' or 'low_rank')."
            )
        config = CoralConfig.from_target(target.config, **overrides)
        device = execution_device(target.get_output_embeddings())
        drafter = cls(config).to(device=device, dtype=target.dtype)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(drafter.generation_config, name, getattr(target.generation_config, name))
        return drafter

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path, *args, output_loading_info: bool = False, **kwargs
    ):
        """See [`~transformers.PreTrainedModel.from_pretrained`].

        Raises:
            ValueError: if the checkpoint cannot be read, lacks a tensor, or has one of another
                shape or name, for which transformers would fill in random numbers and only warn;
                if its groups do not cover the vocabulary, or are not those of its router; if an
                earlier layout of this package wrote it.
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
        names = [*vars(drafter.config), *info["unexpected_keys"]]
        if earlier := sorted(name for name in names if name.startswith(FIRST_LAYOUT)):
            raise ValueError(
                f"{pretrained_model_name_or_path} was saved by an earlier version of coral_hf in a"
                f" layout ({', '.join(earlier)}) that is no longer read; train the drafter again."
            )
        for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
            if info[kind]:
                keys = ", ".join(sorted(map(_with_shapes, info[kind])))
                raise ValueError(
                    f"The checkpoint does not fit its config: {kind} {keys}. Download or save it"
                    " again."
                )
        drafter.heads.check()
        drafter.training_record = _read_record(pretrained_model_name_or_path, kwargs)
        return (drafter, info) if output_loading_info else drafter

    def forward(
        self,
        inputs_embeds: Tensor,
        features: Tensor,
        position_ids: Tensor | None = None,
        context: Context | None = None,
    ) -> Tensor:
        """Predict the feature that follows each pair of (next token, feature).

        Args:
            inputs_embeds: (batch, length, hidden), the target's embedding of the token after each
                feature.
            features: (batch, length, hidden), of the target, or predicted by an earlier step.
            position_ids: (batch or 1, length), the positions of the features; 0, 1, … by default.
            context: what can be attended to beside the inputs; causal attention among the inputs
                by default.

        Returns:
            (batch, length, hidden), the predicted next features.
        """
        if position_ids is None:
            position_ids = torch.arange(features.shape[1], device=features.device)[None]
        dtype = self.fc.weight.dtype
        hidden = self.fc(torch.cat([inputs_embeds.to(dtype), features.to(dtype)], dim=-1))
        cos, sin = (part[:, None] for part in self.rotary_emb(hidden, position_ids))
        for layer in self.layers:
            hidden = layer(hidden, cos=cos, sin=sin, context=context or CausalContext())
        return hidden

    def save_pretrained(self, save_directory, is_main_process: bool = True, **kwargs) -> None:
        """See [`~transformers.PreTrainedModel.save_pretrained`]; the training record goes along."""
        path = Path(save_directory) / TRAINING_RECORD
        if is_main_process and self.training_record and not path.parent.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, self.training_record)
        elif is_main_process and path.exists():
            path.unlink()  # of the drafter that was saved here before
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)

    def get_input_embeddings(self) -> None:
        """Return None: a drafter reads its target's embeddings. FSDP asks for them."""

    def enable_input_require_grads(self) -> None:
        """Does nothing: features need no gradient of their own for activation checkpointing."""

    def push_to_hub(
        self, repo_id: str, *, tokenizer: PreTrainedTokenizerBase | None = None, **kwargs
    ) -> CommitInfo:
        """Upload the drafter and its model card; the card says what is known of it.

        Args:
            repo_id: `"organisation/name"`, made if it does not exist.
            tokenizer: the target's, uploaded too.
            kwargs: those of [`~transformers.PreTrainedModel.push_to_hub`].

        Raises:
            ValueError: if another model is at `repo_id`, or a public repository and `private` is
                asked for; if `tokenizer` is not the one that the drafter was trained with.
        """
        return type(self).publisher().push(self, repo_id, tokenizer, **kwargs)

    def _upload_modified_files(self, working_dir, repo_id, files_timestamps, **kwargs):
        # `save_pretrained(push_to_hub=True)` calls it when all files are saved
        files = working_dir, repo_id, files_timestamps
        return type(self).publisher().upload_saved(self, *files, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Do nothing: transformers would publish a copy of this file, without its package."""

    def generate(self, *args, **kwargs):
        """Raise a TypeError: a drafter has no LM head and only proposes tokens to its target."""
        raise TypeError(
            "A CORAL drafter has no LM head of its own and cannot generate alone. Call"
            " `target.generate(..., assistant_model=drafter)`."
        )


def _read_record(name: str | Path, options: dict[str, Any]) -> list[dict[str, Any]]:
    """Read the training record beside the weights of a folder or Hub id; without one, `[]`."""
    places = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
    found = cached_file(
        str(name),
        TRAINING_RECORD,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **{place: options[place] for place in places if options.get(place) is not None},
    )
    return [] if found is None else json.loads(Path(found).read_text(encoding="utf-8"))


def _with_shapes(key: str | tuple) -> str:
    """Name a tensor, and for one of a wrong shape both shapes."""
    return key if isinstance(key, str) else f"{key[0]} {tuple(key[1])} for {tuple(key[2])}"
