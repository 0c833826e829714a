"""Export of drafters to vLLM and SGLang.

In: a drafter and its target. Out: a folder that the engine loads, whose tensors were compared with
those that the drafter's config gives before anything is written. A CORAL drafter reads the target's
whole LM head there, so routers and other draft heads stay behind.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME

from ..atomic import new_folder, write_json
from ..drafters.coral import CoralDrafter
from ..drafters.eagle3 import Eagle3Drafter, ParallelDrafter
from ..drafters.medusa import MedusaDrafter
from ..drafters.model import Drafter
from ..target import Scales, Target, check_target, read_target, text_config
from .eagle import EMBEDDINGS, check_tensors, scale_embeddings, table_scale
from .eagle3_export import eagle3_content
from .engines import Content, engine_config, obstacles, serving_command
from .files import check_output
from .medusa import WEIGHTS, medusa_content

ENGINES = ("vllm", "sglang")
REMEDY = (
    "Merge an adapter first: model.merge_and_unload(); load a quantised drafter in full precision."
)
USE_TRANSFORMERS = "Serve it with transformers: target.generate(..., assistant_model=drafter)."


class Exported(NamedTuple):
    """What was written."""

    folder: Path
    notes: list[str]  # what the engine does otherwise than `target.generate`
    command: str  # that serves the drafter


def export_drafter(
    drafter: Drafter, engine: str, output: str | Path, target: PreTrainedModel
) -> Exported:
    """Write a drafter as an inference engine reads it, in its own dtype.

    Args:
        drafter: a CORAL, EAGLE-3 or parallel drafter, or Medusa heads.
        engine: `"vllm"` or `"sglang"`.
        output: a new or an empty folder.
        target: the drafter's own, with the scales of its embeddings and logits. Its embeddings are
            copied for vLLM, which needs them for pipeline parallelism.

    Raises:
        ValueError: if the drafter would predict something else in the engine, naming each reason,
            or if `output` holds something. Nothing is written then.
    """
    kind, output = type(drafter), Path(output)
    if engine not in ENGINES or kind not in CONTENTS:
        families = ", ".join(one.__name__ for one in CONTENTS)
        raise ValueError(
            f"`engine` is {engine!r} and the drafter a {kind.__name__}; use one of {ENGINES}, with"
            f" one of {families}. Another library's is imported first: coral-hf import."
        )
    check_output(output)
    check_target(drafter.config, target, takes_other_vocabulary=True)
    with torch.device("meta"):
        state, whole = drafter.state_dict(), kind(drafter.config).state_dict()
    found, wanted = (
        {name: tensor for name, tensor in one.items() if not name.startswith("heads.")}
        for one in (state, whole)
    )
    check_tensors(found, wanted, f"The drafter as {engine} would load it", REMEDY)
    vocab_size = text_config(target).vocab_size
    made: Content = CONTENTS[kind](drafter, engine, read_target(target), vocab_size)
    if made.reasons:
        why = "; ".join(made.reasons)
        raise ValueError(f"The drafter cannot be exported for {engine}: {why}. {USE_TRANSFORMERS}")
    tensors = {}
    for name, one in made.tensors.items():
        dtype = drafter.dtype if one.is_floating_point() else one.dtype
        tensors[name] = one.detach().to("cpu", dtype, copy=True).contiguous()
    names = dict.fromkeys(("dtype", "torch_dtype"), str(drafter.dtype).removeprefix("torch."))
    # TGI reads Medusa heads by that name alone, vLLM by any
    weights = WEIGHTS[0] if kind is MedusaDrafter else SAFE_WEIGHTS_NAME
    with new_folder(output) as folder:
        write_json(folder / CONFIG_NAME, made.fields | names)
        save_file(tensors, folder / weights, metadata={"format": "pt"})
    notes, left = list[str](), ", ".join(sorted(state.keys() - found.keys()))
    if left:
        reads = "It reads the whole LM head."
        notes = [f"Left behind, since {engine} has no place for them: {left}. {reads}"]
    return Exported(output, notes, serving_command(drafter.config, engine, output))


def coral_content(drafter: CoralDrafter, engine: str, target: Target, vocab_size: int) -> Content:
    """Gather what a folder holds of a CORAL drafter, for a target of so many tokens."""
    scales = Scales(table_scale(target), target.head.scale, target.head.softcap)
    state = drafter.state_dict()
    tensors = {name: state[name] for name in state if not name.startswith("heads.")}
    has_fc_bias = "fc.bias" in tensors and bool(tensors["fc.bias"].any())
    reasons = obstacles(drafter.config, scales, engine, has_fc_bias)
    if target.head.bias is not None:
        reasons.append("the target's LM head has a bias, which engines drop")
    if engine == "sglang":  # it would keep random numbers where a checkpoint has none
        tensors.setdefault("fc.bias", torch.zeros_like(tensors["fc.weight"][:, 0]))
    else:
        tensors.pop("fc.bias", None)
        tensors[EMBEDDINGS] = target.embeddings.weight
    fields = engine_config(drafter.config, scales, engine) | {"vocab_size": vocab_size}
    return Content(fields, scale_embeddings(tensors, scales.embedding), reasons)


CONTENTS: dict[type[Drafter], Callable[..., Content]] = {
    CoralDrafter: coral_content,
    Eagle3Drafter: eagle3_content,
    ParallelDrafter: eagle3_content,
    MedusaDrafter: medusa_content,
}
