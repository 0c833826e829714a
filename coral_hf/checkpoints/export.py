"""Export of drafters to vLLM, SGLang, and the code of EAGLE, Medusa, the Recurrent Drafter.

In: a drafter. Out: a folder that the engine loads, whose tensors were compared with those that the
drafter's config gives before anything is written. A CORAL drafter reads the target's whole LM head
there (or in SGLang the hot tokens of it), so routers and other draft heads stay behind.
"""

from collections.abc import Sequence
from copy import copy
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME

from ..atomic import new_folder, write_json
from ..drafters.coral import CoralConfig, CoralDrafter
from ..drafters.eagle3 import Eagle3Drafter
from ..drafters.medusa import MedusaDrafter
from ..drafters.model import FAMILIES, Drafter
from ..drafters.recurrent import RecurrentDrafter
from ..heads.router import check_token_ids
from ..target import Scales, Target, check_target, read_target, text_config
from .eagle import EMBEDDINGS, check_tensors, scale_embeddings, table_scale
from .eagle3_export import eagle3_content
from .engines import HOT_TOKENS, Content, engine_config, obstacles, serving_command
from .files import WEIGHTS, check_output, config_folder, read_config, read_dtype
from .other_families import MEDUSA_WEIGHTS, medusa_content, recurrent_content

ENGINES = ("vllm", "sglang", "eagle")
# of the families that not all engines read
ENGINES_OF: dict[type, tuple[str, ...]] = {
    MedusaDrafter: ("vllm", "medusa"),
    RecurrentDrafter: ("redrafter",),
}
# the files of an export beside its config: weights, and what there may be in their place or beside
FILES = {
    "vllm": (WEIGHTS[0], MEDUSA_WEIGHTS[0]),  # TGI reads the second name alone, vLLM any
    "sglang": (WEIGHTS[0], HOT_TOKENS),
    # all versions of EAGLE's code read the pickle, only the newest the other; so does Medusa's
    "eagle": (WEIGHTS[1],),
    "medusa": (MEDUSA_WEIGHTS[1],),
    "redrafter": (WEIGHTS[0],),
}
BODY = ("fc.", "layers.")
REMEDY = (
    "Merge an adapter first: model.merge_and_unload(); load a quantised drafter in full precision."
)
USE_TRANSFORMERS = "Serve it with transformers: target.generate(..., assistant_model=drafter)."
# families of targets that never scale embeddings or logits
UNSCALED = ("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "phi3", "gpt_oss")


class Exported(NamedTuple):
    """What was written."""

    folder: Path
    notes: list[str]  # what the engine does otherwise than `target.generate`
    command: str  # that serves the drafter


def export_drafter(
    drafter: Drafter,
    engine: str,
    output: str | Path,
    target: PreTrainedModel | None = None,
    dtype: str | torch.dtype | None = None,
    hot_tokens: Sequence[int] | None = None,
    overwrite: bool = False,
) -> Exported:
    """Write a drafter as an inference engine reads it.

    Args:
        drafter: a CORAL, EAGLE-3 or Recurrent Drafter, or Medusa heads.
        engine: `"vllm"`, `"sglang"`, or `"eagle"` for EAGLE's own code; of Medusa heads `"vllm"`,
            or `"medusa"` for Medusa's own; `"redrafter"` for the Recurrent Drafter's own.
        output: a new or an empty folder.
        target: the drafter's own. Its embeddings are copied for vLLM (which needs them for pipeline
            parallelism) and EAGLE. It is needed where targets of its family may scale embeddings
            or logits, or where its vocabulary has grown, shrunk or been padded since the drafter
            was made.
        dtype: of the tensors, float16, bfloat16, float32 or float64; the drafter's by default.
        hot_tokens: ids of the tokens that SGLang's drafter may propose (FR-Spec, Zhao et al. 2025);
            those of the drafter's own frequency head by default, if that is its draft head.
        overwrite: replace an earlier export for the same engine in `output`.

    Raises:
        ValueError: if the drafter would predict something else in the engine, naming each reason,
            or if `output` holds something else. Nothing is written then.
    """
    is_medusa = isinstance(drafter, MedusaDrafter)  # which reads no embedding
    engines = ENGINES_OF.get(type(drafter), ENGINES)
    if engine not in engines:
        raise ValueError(f"`engine` is {engine!r}; use one of {engines}.")
    config, dtype = drafter.config, read_dtype(dtype or drafter.dtype)
    read = (drafter.name_or_path, config.target_name_or_path, getattr(target, "name_or_path", None))
    check_output(output, overwrite, export_files(engine), read)
    scales, bound = Scales(), None
    if target is None:
        family = config.target_model_type
        if not (is_medusa or getattr(config, "has_embeddings", False) or family in UNSCALED):
            raise ValueError(
                f"A {family or 'nameless'} target may scale its embeddings or logits, which no"
                " engine does for its drafter: pass `target` (--target), and the scales go along."
            )
    else:
        check_target(config, target, takes_other_vocabulary=True)
        bound, config = read_target(target), copy(config)
        config.vocab_size = text_config(target).vocab_size
        if not is_medusa:
            scales = Scales(table_scale(bound), bound.head.scale, bound.head.softcap)
    if hot_tokens is not None and not (isinstance(drafter, CoralDrafter) and engine == "sglang"):
        raise ValueError("`hot_tokens` are for CORAL drafters in SGLang; leave them out.")
    if isinstance(drafter, Eagle3Drafter):
        made = eagle3_content(drafter, engine, bound, scales.embedding, config.vocab_size)
    elif isinstance(drafter, MedusaDrafter):
        made = medusa_content(drafter, engine, bound, config.vocab_size)
    elif isinstance(drafter, RecurrentDrafter):
        made = recurrent_content(drafter, scales.embedding, config.vocab_size)
    else:
        assert isinstance(drafter, CoralDrafter), "the families that are exported"
        hot_tokens = _hot_tokens(drafter, engine, hot_tokens, config.vocab_size)
        made = _coral_content(drafter, config, engine, bound, scales)
    if made.reasons:
        why = "; ".join(made.reasons)
        raise ValueError(f"The drafter cannot be exported for {engine}: {why}. {USE_TRANSFORMERS}")
    tensors = _to_save(made.tensors, dtype)
    names = dict.fromkeys(("dtype", "torch_dtype"), str(dtype).removeprefix("torch."))
    with new_folder(output, last=CONFIG_NAME) as folder:
        write_json(folder / CONFIG_NAME, made.fields | names)
        path = folder / FILES[engine][-1 if is_medusa else 0]
        if path.suffix in (".bin", ".pt"):
            torch.save(tensors, path)
        else:
            save_file(tensors, path, metadata={"format": "pt"})
        if hot_tokens is not None:
            torch.save(hot_tokens, folder / HOT_TOKENS)
    notes = [*made.notes, *_notes(drafter, scales.embedding, engine, hot_tokens)]
    num_hot = None if hot_tokens is None else len(hot_tokens)
    return Exported(Path(output), notes, serving_command(config, engine, Path(output), num_hot))


def _coral_content(
    drafter: CoralDrafter, config: CoralConfig, engine: str, target: Target | None, scales: Scales
) -> Content:
    """Gather what a folder holds of a CORAL drafter; `config` is as wide as the target.

    Tensors are compared with those that the drafter's own config gives: an engine may skip some of
    wrong names silently.
    """
    with torch.device("meta"):
        whole = CoralDrafter(drafter.config).state_dict()
    tensors, wanted = (
        {name: tensor for name, tensor in state.items() if name.startswith(BODY)}
        for state in (drafter.state_dict(), whole)
    )
    check_tensors(tensors, wanted, f"The drafter as {engine} would load it", REMEDY)
    has_fc_bias = "fc.bias" in tensors and bool(tensors["fc.bias"].any())
    reasons = obstacles(config, scales, engine, has_fc_bias)
    if target is not None and target.head.bias is not None:
        reasons.append("the target's LM head has a bias, which engines drop")
    if engine == "sglang":  # it would keep random numbers where a checkpoint has none
        tensors.setdefault("fc.bias", torch.zeros_like(tensors["fc.weight"][:, 0]))
    elif not has_fc_bias:
        tensors.pop("fc.bias", None)
    if target is not None and engine != "sglang":
        tensors[EMBEDDINGS] = target.embeddings.weight
    fields = engine_config(config, scales, engine, has_fc_bias)
    return Content(fields, scale_embeddings(tensors, scales.embedding), reasons, [])


def export_files(engine: str) -> tuple[str, ...]:
    """Return the names of the files that an export for an engine may have."""
    return (CONFIG_NAME, *FILES[engine])


def check_drafter(source: str | Path) -> None:
    """Raise a ValueError if a folder or Hub id holds no drafter, from its config alone."""
    found = read_config(config_folder(source)).get("model_type")
    if found not in FAMILIES:
        raise ValueError(
            f"{source} holds a {found} model, not a drafter of this library. Import another one's"
            f" checkpoint first: coral-hf import {source} --target TARGET --output FOLDER."
        )


def _hot_tokens(
    drafter: CoralDrafter, engine: str, given: Sequence[int] | None, vocab_size: int
) -> list[int] | None:
    """Return the token ids that go along: what was given, or what a frequency head reads anyway.

    `vocab_size`: of the target, which may have lost tokens since the head was made.
    """
    if given is not None:
        ids = torch.as_tensor(given)  # of shape (read,)
        check_token_ids("hot_tokens", ids, vocab_size)
        return ids.tolist()
    if engine != "sglang" or drafter.config.draft_head != "frequency":
        return None
    assert drafter.heads.hot_tokens is not None, "the config says that there is such a head"
    return [token for token in drafter.heads.hot_tokens.tolist() if token < vocab_size] or None


def _to_save(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Copy tensors of any shapes in one dtype; a ValueError for a number it cannot hold."""
    saved = {}
    for name, tensor in tensors.items():
        kept = dtype if tensor.is_floating_point() else tensor.dtype
        saved[name] = tensor.detach().to("cpu", kept, copy=True).contiguous()
        if not saved[name].isfinite().all():
            raise ValueError(
                f"`{name}` has numbers that are not finite in {dtype}; use bfloat16 or float32."
            )
    return saved


def _notes(
    drafter: Drafter, scale: float, engine: str, hot_tokens: Sequence[int] | None
) -> list[str]:
    """Say what stays behind, and what moved."""
    notes = list[str]()
    left = {name for name in drafter.state_dict() if name.startswith("heads.")}
    if hot_tokens is not None:
        left = left - {"heads.hot_tokens"}  # they are in a file of their own
    if left:
        lost, read = ", ".join(sorted(left)), HOT_TOKENS if hot_tokens else "the whole LM head"
        notes.append(f"Left behind, since {engine} has no place for them: {lost}. It reads {read}.")
    if scale != 1.0:
        place = {CoralDrafter: "fc.weight", RecurrentDrafter: "rnn_w.weight"}.get(
            type(drafter), EMBEDDINGS
        )
        notes.append(f"The target's embedding scale, {scale:.6g}, is in `{place}` now.")
    return notes
