"""A plan of a training run: what it takes of memory, disk and time, and what makes it fit.

In: a target's name, a dataset, the settings of a run. Out: a `Plan`. Configs and rows alone are
read; weights only where steps are timed.
"""

import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import IterableDataset
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig
from transformers import PreTrainedTokenizerBase as Tokenizer

from ...atomic import free_bytes, shown_bytes
from ...drafters.configuration import FamilyConfig
from ..arguments import CoralTrainingArguments
from ..data import load_conversations
from ..features import INDEX, CachedFeatures, plan_features
from ..features.cache import FORMAT_BYTES
from ..inputs import token_rows
from ..steps import kind_of_recipe, step_kind
from . import PlanSettings
from .memory import RunShape, StepMemory, step_memory
from .report import Plan, StagePlan
from .run import largest_batch, lengths_of, num_checkpoints, num_steps, timed_run

SMALL = 1e9  # bytes of a target whose steps are timed without being asked
CONTEXT = 2**30  # bytes of a GPU that are left to CUDA itself and to fragments
PROCESS = 10**9  # bytes of memory of Python and its libraries, beside all tensors
LEAST_LENGTH = 512  # to which rows are cut at most, to fit


def plan(
    target: str | Path,
    dataset: Any,
    stages: CoralTrainingArguments | Sequence[CoralTrainingArguments] = (),
    settings: PlanSettings | None = None,
    tokenizer: Tokenizer | None = None,
    dtype: str = "auto",
    drafter: FamilyConfig | None = None,
) -> Plan:
    """Plan a training run before anything is loaded: its memory, disk and hours.

    Args:
        target: a folder or a Hub id, of which config and tokenizer are read.
        dataset: conversations in any form that `CoralTrainer` takes, a file, a folder or a Hub id
            of them, or a feature cache.
        stages: arguments of one stage or of several; by default those of the drafter's.
        settings: what the run is planned for.
        tokenizer: the target's; by default the one beside it.
        dtype: of the target's weights; its config's by default.
        drafter: its config; by default the one that follows from the target and the recipe.

    Example:

    ```python
    >>> print(coral_hf.plan("org/my-llama", "conversations.jsonl"))
    ```
    """
    settings, target = settings or PlanSettings(), str(target)
    stages = [stages] if isinstance(stages, CoralTrainingArguments) else [*stages]
    stages = stages or [CoralTrainingArguments("coral-drafter", report_to="none")]
    config = AutoConfig.from_pretrained(target)
    tokenizer = AutoTokenizer.from_pretrained(target) if tokenizer is None else tokenizer
    rows = _read_rows(dataset, tokenizer, stages[0], config.get_text_config(decoder=True))
    lengths = lengths_of(rows)
    shape = _shape_of(config, drafter, stages[0], settings, dtype)
    room, room_name = _room(settings, shape)
    shapes = [replace(shape, args=args) for args in stages]
    found = [_plan_stage(one, rows, lengths, tokenizer) for one in shapes]
    largest = max(range(len(found)), key=lambda index: found[index].memory.total)
    formats = () if isinstance(rows, CachedFeatures) else FORMAT_BYTES
    features, token_seconds = settings.features if formats else "cached", 0.0
    is_small = Path(target).is_dir() and found[0].memory.target <= SMALL
    if is_small if settings.measure is None else settings.measure:
        model = AutoModelForCausalLM.from_pretrained(target, dtype=shape.dtype)
        steps, token_seconds = timed_run(model, tokenizer, rows, stages, shape.drafter, features)
        found = [one._replace(seconds=s) for one, s in zip(found, steps, strict=True)]
    output = Path(stages[0].output_dir)
    layers = step_kind(shape.drafter.model_type).layers(shape.drafter)
    return Plan(
        target=f"{target}, {_described(config, shape)}",
        rows=f"{len(rows)}, of {lengths.sum()} tokens, at most {lengths.max()}",
        stages=found,
        room=room,
        room_name=room_name,
        changes=_changes(shapes[largest], found[largest].memory, rows, lengths, room),
        caches={
            name: plan_features(config, rows, output, name, layers=layers).disk_bytes
            for name in formats
        },
        features=features,
        finished=max(one.memory.drafter for one in found) + _saved_bytes(tokenizer),
        output=output,
        free=free_bytes(output),
        existing=sum(_written_bytes(Path(args.output_dir)) for args in stages),
        cache_seconds=token_seconds * lengths.sum(),
    )


def _shape_of(
    config: PreTrainedConfig,
    drafter: FamilyConfig | None,
    args: CoralTrainingArguments,
    settings: PlanSettings,
    dtype: str,
) -> RunShape:
    kind = kind_of_recipe(args.recipe)
    known = config.dtype or config.get_text_config(decoder=True).dtype or torch.float32
    return RunShape(
        config,
        known if dtype == "auto" else getattr(torch, dtype),
        drafter or kind.drafter.config_class.from_target(config, **kind.fresh_fields(args)),
        args,
        settings.lora_rank,
        None if settings.target_bits is None else int(settings.target_bits),
        on_cpu=settings.gpu_memory is None and args.device.type == "cpu",
    )


def _read_rows(dataset: Any, tokenizer: Any, args: CoralTrainingArguments, text: Any) -> Any:
    """Return the rows that the trainer would make of a dataset."""
    if isinstance(dataset, str | Path):
        is_cache = (Path(dataset) / INDEX).is_file()
        dataset = CachedFeatures(dataset) if is_cache else load_conversations(str(dataset))
    if isinstance(dataset, IterableDataset):
        remedy = "such as `Dataset.from_list([*dataset.take(1000)])`, and `max_steps`"
        raise ValueError(f"`dataset` is a stream; plan with a part of it, {remedy}.")
    if isinstance(dataset, CachedFeatures):
        return dataset
    return token_rows(dataset, tokenizer, args, text, may_join=True).with_format(None)


def _plan_stage(shape: RunShape, rows: Any, lengths: np.ndarray, tokenizer: Tokenizer) -> StagePlan:
    args, steps = shape.args, num_steps(len(rows), shape.args)
    memory = step_memory(shape, largest_batch(rows, lengths, args))
    # an adapter's weights are half of the two states that the optimizer keeps of each
    weights = memory.drafter if shape.lora_rank is None else memory.optimizer // 2
    states = 0 if args.save_only_model else memory.optimizer
    checkpoint = weights + states + _saved_bytes(tokenizer)
    return StagePlan(args.stage, steps, memory, checkpoint, num_checkpoints(steps, args))


def _changes(
    shape: RunShape, memory: StepMemory, rows: Any, lengths: np.ndarray, room: int
) -> dict[str, StepMemory]:
    """Return changes of a run, each on top of those before it, until it fits."""
    smaller, found = _smaller(shape, int(lengths.max())), dict[str, StepMemory]()
    while memory.total > room and (change := next(smaller, None)) is not None:
        options, shape = change
        found[options] = memory = step_memory(shape, largest_batch(rows, lengths, shape.args))
    return found


def _smaller(shape: RunShape, longest: int) -> Iterator[tuple[str, RunShape]]:
    """Yield runs that take less and less: first those that learn the same."""

    def changed(**fields: Any) -> RunShape:
        return replace(shape, args=replace(shape.args, **fields))

    while (size := shape.args.per_device_train_batch_size) > 1:
        accumulated = -(-size * shape.args.gradient_accumulation_steps // (size // 2))
        fields = {"per_device_train_batch_size": size // 2}
        fields["gradient_accumulation_steps"] = accumulated
        shape = changed(**fields)
        yield " ".join(f"--{name} {value}" for name, value in fields.items()), shape
    if not shape.args.gradient_checkpointing:
        name = "activation_checkpointing"  # of newer versions of transformers
        name = name if hasattr(shape.args, name) else "gradient_checkpointing"
        shape = changed(**{name: True})
        yield f"--{name} True", shape
    if shape.dtype == torch.float32:
        shape = replace(shape, dtype=torch.bfloat16)
        yield "--dtype bfloat16", shape
    is_quantized = getattr(shape.target, "quantization_config", None) is not None
    for bits in () if is_quantized or shape.bits else (8, 4):
        shape = replace(shape, bits=bits)
        yield f"a target in {bits} bits (`quantization_config`, docs/use/scale.md)", shape
    length = min(shape.args.max_length, longest)
    while length > LEAST_LENGTH:
        length = max(length // 2, LEAST_LENGTH)
        shape = changed(max_length=length)
        yield f"--max_length {length}", shape


def _room(settings: PlanSettings, shape: RunShape) -> tuple[int, str]:
    """Return the bytes of memory that a process can have, and what they are of."""
    if shape.on_cpu:
        size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return size - PROCESS, f"this machine's {shown_bytes(size)}, one of them left to libraries"
    known = settings.gpu_memory or torch.cuda.get_device_properties(0).total_memory / 2**30
    return int(known * 2**30) - CONTEXT, f"a GPU of {known:.3g} GiB, one of them left to CUDA"


def _described(config: PreTrainedConfig, shape: RunShape) -> str:
    kind = ", ".join(config.architectures or [config.model_type])
    is_quantized = getattr(config, "quantization_config", None) is not None
    dtype = f"{'quantized, else ' if is_quantized else ''}{str(shape.dtype).removeprefix('torch.')}"
    return f"{kind}, in {shape.bits} bits" if shape.bits else f"{kind}, {dtype}"


def _saved_bytes(tokenizer: Tokenizer) -> int:
    """Count the bytes of a tokenizer's files, which lie in every checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return _written_bytes(Path(folder))


def _written_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
