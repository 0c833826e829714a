"""What models of all families share that are trained: saving, loading, publishing, and refusals.

A family's model is one step and its heads; what it has learned from lies in `training_record`.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers.generation import GenerationConfig, GenerationMixin
from transformers.models.auto import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.utils import cached_file

from ..atomic import write_json
from ..decoding.drafting import Drafting, register_drafting
from ..decoding.guard import accept_features, accept_target
from ..decoding.settings import TREE_DEFAULTS
from ..heads.settings import UNTRAINED_HEADS
from ..lm_head import execution_device
from .configuration import FamilyConfig

TRAINING_RECORD = "training_record.json"  # beside the weights
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")

Made = TypeVar("Made", bound="Drafter")


class Drafter(PreTrainedModel, GenerationMixin):
    """A light model that proposes a target's next tokens, and cannot generate alone."""

    config: FamilyConfig
    title: ClassVar[str]  # of the family, as users meet it
    paper: ClassVar[str]  # the method and where it is described, in Markdown
    base_model_prefix = "model"
    main_input_name = "input_ids"  # of a batch of training, whose tokens `Trainer` counts
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    # finds the package that publishes, which imports this one; `import coral_hf` sets it
    publisher: ClassVar[Callable[[], Any]]

    def __init__(self, config: FamilyConfig):
        super().__init__(config)
        # one dict for each training run of the drafter: recipe, data, cost
        self.training_record: list[dict[str, Any]] = []

    def post_init(self) -> None:
        """See [`~transformers.PreTrainedModel`]; settings of trees are set."""
        super().post_init()
        # `from_pretrained` replaces it by the checkpoint's own
        tokens = {name: getattr(self.config, name) for name in SPECIAL_TOKENS}
        self.generation_config = GenerationConfig(**tokens, **TREE_DEFAULTS)

    @classmethod
    def from_target(cls: type[Made], target: PreTrainedModel, **overrides) -> Made:
        """Make an untrained drafter for `target`, in its dtype and on the device of its LM head.

        `overrides` are fields of the family's config. A router made by them (`num_groups`) is read
        only after a stage has trained it.

        Raises:
            ValueError: for a target that cannot take a drafter; for a draft head that has to be
                counted or trained first.
        """
        head = overrides.get("draft_head", "full")
        if head not in UNTRAINED_HEADS or "num_hot_tokens" in overrides:
            raise ValueError(
                f"`draft_head` {head!r} or `num_hot_tokens` names a head that has learned nothing;"
                " make the drafter, then call drafter.heads.add_frequency_head or train a router."
            )
        accept_target(target)
        accept_features(target)
        config = cls.config_class.from_target(target.config, **overrides)
        device = execution_device(target.get_output_embeddings())
        drafter = cls(config).to(device=device, dtype=target.dtype)
        for name in SPECIAL_TOKENS:
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
                if its tensors contradict each other.
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
        kinds = ("missing_keys", "mismatched_keys", "unexpected_keys")
        if wrong := {kind: sorted(info[kind]) for kind in kinds if info[kind]}:
            raise ValueError(f"The checkpoint does not fit its config: {wrong}; download it again.")
        drafter.check()
        drafter.training_record = _read_record(pretrained_model_name_or_path, kwargs)
        return (drafter, info) if output_loading_info else drafter

    def check(self) -> None:
        """Raise a ValueError if what was loaded contradicts itself."""

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

    def _upload_modified_files(self, working_dir, repo_id, files_timestamps, **kwargs):
        # `push_to_hub` calls it when all files are saved
        return type(self).publisher().publish(working_dir, repo_id, drafter=self, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Do nothing: transformers would publish a copy of this file, without its package."""

    def generate(self, *args, **kwargs):
        """Raise a TypeError: a drafter only proposes tokens to its target."""
        raise TypeError(
            f"A {type(self).__name__} reads hidden states of its target and cannot generate alone."
            " Call `target.generate(..., assistant_model=drafter)`."
        )


# the families that are trained and published, by `model_type` of their configs
FAMILIES: dict[str, type[Drafter]] = {}


def register_family(model: type[Drafter], drafting: Callable[..., Drafting]) -> None:
    """Let transformers load a family's drafters, and `generate` take them.

    `drafting.options` are keywords of `generate`; see [`register_drafting`].
    """
    config = model.config_class
    AutoConfig.register(config.model_type, config, exist_ok=True)
    # by the second of them transformers' users load assistants
    for auto in (AutoModel, AutoModelForCausalLM):
        auto.register(config, model, exist_ok=True)
    register_drafting(config.model_type, drafting, getattr(drafting, "options", ()))
    FAMILIES[config.model_type] = model


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
