"""CORAL drafters leave for vLLM, SGLang and EAGLE's own code.

In: a drafter. Out: a folder that the engine loads, whose tensors were compared with what the engine
builds from its config before anything was written. The engines read the target's whole LM head (or
SGLang the hot tokens of it), so routers and other draft heads stay behind.
"""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from ..drafters.coral.configuration import CoralConfig
from ..drafters.coral.modeling import CoralDrafter
from ..drafters.fit import check_target
from ..target import Target, read_target
from .copies import scale_embeddings, table_scale
from .dtypes import read_dtype
from .eagle import EMBEDDINGS
from .engines import ENGINES, engine_config, engine_shapes, obstacles
from .folder import check_output, whole_folder
from .hot_tokens import HOT_TOKENS, check_hot_tokens
from .source import CONFIG, WEIGHTS, config_folder, read_config

BODY = ("fc.", "layers.")
# families of which transformers scales the rows of the embedding table inside of the module
SCALED_TABLES = ("gemma", "vaultgemma", "minicpm3", "biogpt", "xglm")


class Exported(NamedTuple):
    """What was written."""

    folder: Path
    notes: list[str]  # what the engine does otherwise than `target.generate`
    command: str  # that serves the drafter


def export_drafter(
    drafter: CoralDrafter,
    engine: str,
    output: str | Path,
    target: PreTrainedModel | None = None,
    dtype: str | torch.dtype | None = None,
    hot_tokens: Sequence[int] | None = None,
    overwrite: bool = False,
) -> Exported:
    """Write a drafter as an inference engine reads it.

    Args:
        engine: `"vllm"`, `"sglang"`, or `"eagle"` for EAGLE's own code.
        output: a new or an empty folder.
        target: the drafter's own. Its embeddings are copied for vLLM (which needs them for pipeline
            parallelism) and EAGLE. It is needed where it scales its embeddings.
        dtype: of the tensors, float16, bfloat16, float32 or float64; the drafter's by default.
        hot_tokens: ids of the tokens that SGLang's drafter may propose (FR-Spec, Zhao et al. 2025);
            those of the drafter's own frequency head by default, if that is its draft head.
        overwrite: replace an earlier export for the same engine in `output`.

    Raises:
        ValueError: if the drafter would be another one in the engine, naming each reason, or if
            `output` holds something else. Nothing is written then.
    """
    check_engine(engine)
    config, dtype = drafter.config, read_dtype(dtype or drafter.dtype)
    sources = [drafter.name_or_path, config.target_name_or_path]
    sources += [] if target is None else [target.name_or_path]
    check_output(output, overwrite, export_files(engine), sources)
    if target is not None:
        check_target(config, target)
    bound = None if target is None else read_target(target)
    hot_tokens = _hot_tokens(drafter, engine, hot_tokens)
    body, left = _body(drafter, hot_tokens)
    has_fc_bias = bool(body["fc.bias"].any()) if "fc.bias" in body else False
    _refuse(config, engine, has_fc_bias, bound, hot_tokens is not None)
    scale = config.embedding_scale if bound is None else table_scale(bound)
    fields = engine_config(config, engine, has_fc_bias)
    tensors = _for_engine(scale_embeddings(body, scale), engine, has_fc_bias)
    _check_tensors(tensors, engine_shapes(fields), engine)
    if bound is not None and engine != "sglang":
        tensors[EMBEDDINGS] = bound.embeddings.weight
    tensors = _to_save(tensors, dtype)
    name = str(dtype).removeprefix("torch.")
    fields |= {"dtype": name, "torch_dtype": name}
    with whole_folder(output, overwrite, export_files(engine), sources) as folder:
        _write(folder, engine, fields, tensors, hot_tokens)
    notes = _notes(left, scale, engine, hot_tokens)
    return Exported(Path(output), notes, _command(config, engine, Path(output), hot_tokens))


def check_engine(engine: str) -> None:
    """Raise a ValueError for an engine that is not known."""
    if engine not in ENGINES:
        raise ValueError(f"`engine` is {engine!r}; use one of {ENGINES}.")


def export_files(engine: str) -> tuple[str, ...]:
    """The names of the files that an export for an engine may have."""
    safe, pickle = WEIGHTS
    # all versions of EAGLE's code read the pickle, only the newest the other
    weights = pickle if engine == "eagle" else safe
    return (CONFIG, weights, HOT_TOKENS) if engine == "sglang" else (CONFIG, weights)


def check_drafter(source: str | Path) -> None:
    """Raise a ValueError if a folder or Hub id holds no CORAL drafter, from its config alone."""
    found = read_config(config_folder(source)).get("model_type")
    if found != CoralConfig.model_type:
        raise ValueError(
            f"{source} holds a {found} model, not a CORAL drafter. If it is an EAGLE-1, EAGLE-2 or"
            f" HASS checkpoint, import it first: coral-hf import {source} --target TARGET --output"
            " FOLDER. If it is a target, give its drafter."
        )


def _hot_tokens(
    drafter: CoralDrafter, engine: str, given: Sequence[int] | None
) -> list[int] | None:
    """The map of tokens that goes along: what was given, or what a frequency head reads anyway."""
    if given is not None:
        return check_hot_tokens(given, drafter.config.vocab_size)
    if engine != "sglang" or drafter.config.draft_head != "frequency":
        return None
    assert drafter.heads.hot_tokens is not None, "the config says that there is such a head"
    return drafter.heads.hot_tokens.tolist()


def _body(
    drafter: CoralDrafter, hot_tokens: list[int] | None
) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of the drafter itself, and the names of its draft heads' that stay behind."""
    state = drafter.state_dict()
    if hot_tokens is not None:
        state.pop("heads.hot_tokens", None)
    body = {name: tensor for name, tensor in state.items() if name.startswith(BODY)}
    return body, sorted(state.keys() - body.keys())


def _refuse(
    config: CoralConfig,
    engine: str,
    has_fc_bias: bool,
    bound: Target | None,
    has_hot_tokens: bool,
) -> None:
    """Raise a ValueError that names all that the engine cannot express."""
    found = obstacles(config, engine, has_fc_bias)
    family = config.target_model_type or ""
    if bound is None and family.startswith(SCALED_TABLES):
        found.append(
            f"a {family} target scales its embeddings, which the engine does not do for its"
            " drafter: pass `target` (--target), and the scale goes into `fc`"
        )
    if bound is not None and bound.head.bias is not None:
        found.append(
            "the target's LM head has a bias, which the engine leaves out of its drafter's logits:"
            " serve it with transformers"
        )
    if has_hot_tokens and engine != "sglang":
        found.append("`hot_tokens` are a map that SGLang alone reads: leave them out")
    if found:
        raise ValueError(f"The drafter cannot be exported for {engine}. " + ". ".join(found) + ".")


def _for_engine(body: dict[str, Tensor], engine: str, has_fc_bias: bool) -> dict[str, Tensor]:
    """The tensors of a drafter with the bias of `fc` that an engine reads."""
    tensors = dict(body)
    if engine == "sglang" and "fc.bias" not in tensors:
        # SGLang would keep random numbers where a checkpoint has none
        tensors["fc.bias"] = torch.zeros_like(body["fc.weight"][:, 0])
    elif engine != "sglang" and not has_fc_bias:
        tensors.pop("fc.bias", None)
    return tensors


def _check_tensors(
    tensors: dict[str, Tensor], expected: dict[str, tuple[int, ...]], engine: str
) -> None:
    """Compare names and shapes with what an engine builds; SGLang skips wrong names silently."""
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    wrong = sorted(n for n in found.keys() | expected.keys() if found.get(n) != expected.get(n))
    if wrong:
        listed = (f"{n}: expected {expected.get(n)}, found {found.get(n)}" for n in wrong)
        raise ValueError(
            f"The drafter has not the tensors that {engine} builds ({'; '.join(listed)}). Merge an"
            " adapter first: model.merge_and_unload(); load a quantised drafter in full precision."
        )


def _to_save(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors of their own memory, in one dtype.

    Raises:
        ValueError: if a number is not finite in that dtype.
    """
    saved = {}
    for name, tensor in tensors.items():
        saved[name] = tensor.detach().to("cpu", dtype, copy=True).contiguous()
        if not saved[name].isfinite().all():
            raise ValueError(
                f"`{name}` has numbers that are not finite in {dtype}; export it with dtype"
                " bfloat16 or float32, or train the drafter again."
            )
    return saved


def _write(
    folder: Path,
    engine: str,
    fields: dict[str, Any],
    tensors: dict[str, Tensor],
    hot_tokens: list[int] | None,
) -> None:
    _, weights, *_ = export_files(engine)
    (folder / CONFIG).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    if engine == "eagle":
        torch.save(tensors, folder / weights)
    else:
        save_file(tensors, folder / weights, metadata={"format": "pt"})
    if hot_tokens is not None:
        torch.save(hot_tokens, folder / HOT_TOKENS)


def _notes(left: list[str], scale: float, engine: str, hot_tokens: list[int] | None) -> list[str]:
    notes = []
    if left:
        instead = "the target's whole LM head" if hot_tokens is None else HOT_TOKENS
        notes.append(
            f"Left behind, since {engine} has no place for them: {', '.join(left)}. Its drafter"
            f" reads {instead}."
        )
    if scale != 1.0:
        notes.append(f"The target's embedding scale, {scale:.6g}, is in `fc.weight` now.")
    return notes


def _command(config: CoralConfig, engine: str, output: Path, hot_tokens: list[int] | None) -> str:
    """How to serve the drafter, with placeholders for the lengths, which depend on the machine."""
    target, folder = config.target_name_or_path or "TARGET", str(output)
    if engine == "vllm":
        settings = {"method": "eagle", "model": folder, "num_speculative_tokens": 3}
        parts = ["vllm", "serve", target, "--speculative-config", json.dumps(settings)]
    elif engine == "sglang":
        parts = ["python", "-m", "sglang.launch_server", "--model-path", target]
        parts += ["--speculative-algorithm", "EAGLE", "--speculative-draft-model-path", folder]
        parts += _sglang_tree(config.vocab_size if hot_tokens is None else len(hot_tokens))
        if hot_tokens is not None:
            parts += ["--speculative-token-map", str(output / HOT_TOKENS)]
    else:
        path = f"base_model_path={target!r}, ea_model_path={folder!r}"
        return f"EaModel.from_pretrained({path}, use_eagle3=False)"
    return shlex.join(parts)


def _sglang_tree(num_tokens: int, steps: int = 5) -> list[str]:
    """SGLang's usual tree, no larger than the tokens that its drafter may propose allow."""
    top_k = min(8, num_tokens)
    # each of the first step's tokens, and of those that are kept after it, has `top_k` children
    num_nodes = 1 + top_k + (steps - 1) * top_k**2
    sizes = {"num-steps": steps, "eagle-topk": top_k, "num-draft-tokens": min(32, num_nodes)}
    return [word for name, size in sizes.items() for word in (f"--speculative-{name}", str(size))]
