"""Memory of a training step: the step itself, run on tensors without data.

In: the configs of a target and a drafter, the settings of a stage, a batch. Out: the bytes at the
peak of an optimizer step, by what holds them. No weight is loaded, and no formula repeats the
shapes of the code: target, unroll, losses, backward pass and optimizer are the ones that train.
"""

import copy
import weakref
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from logging import getLogger
from typing import Any, NamedTuple

import torch
from accelerate.utils import convert_outputs_to_fp32
from peft import PeftModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, Trainer
from transformers.utils import logging

from ...drafters.configuration import FamilyConfig
from ...target import read_features, read_target, text_config
from ..arguments import CoralTrainingArguments
from ..stages import ROUTER_STAGES, default_groups, freeze_others, lora, with_adapter
from ..steps import Trained, Unrolled, step_kind, training_step

logger = logging.get_logger(__name__)

# bits of a quantized weight, its scales included: NF4 has one of fp32 for 64 weights
# (bitsandbytes), LLM.int8 one of fp32 for a row
BITS = {4: 4.5, 8: 8.01}


class StepMemory(NamedTuple):
    """Bytes at the peak of an optimizer step of one process."""

    target: int  # weights
    drafter: int  # weights
    optimizer: int
    features: int  # the target's, of the batches that are held
    activations: int  # all else: what backward passes need, gradients, logits of a chunk

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self)


@dataclass(frozen=True)
class RunShape:
    """What the memory of a stage depends on, but for its rows."""

    target: PreTrainedConfig
    dtype: torch.dtype  # of the target's weights
    drafter: FamilyConfig
    args: CoralTrainingArguments
    lora_rank: int | None = None
    bits: int | None = None  # 4 or 8, of a target that is quantized when it is loaded
    on_cpu: bool = True


def step_memory(run: RunShape, batch: Mapping[str, Tensor]) -> StepMemory:
    """Count the memory of an optimizer step whose batches are like `batch`.

    Args:
        batch: of the collator, (batch, length) each; of a feature cache also `features` (batch,
            length, layers · hidden), of which only the shapes are read.
    """
    trained = _trained_positions(batch)
    with torch.device("meta"):
        model = _make_model(run)  # PEFT moves no adapter that is there
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        config = plain_config(run.target)
        target = AutoModelForCausalLM.from_config(config, dtype=run.dtype).eval()
        target.requires_grad_(False)
        shapes = {name: torch.empty(part.shape, dtype=part.dtype) for name, part in batch.items()}
        found = _Simulation(run, target, model).step(shapes, trained)
    weights, unpacked = target_size(target, run.target, run.bits)
    return found._replace(target=weights, activations=found.activations + unpacked)


def _make_model(run: RunShape) -> nn.Module:
    """Make the drafter in fp32, with the head or the adapter that the stage trains."""
    config = copy.deepcopy(run.drafter)
    if run.args.stage in ROUTER_STAGES and config.num_groups is None:
        config.num_groups = run.args.num_groups or default_groups(config.vocab_size)
    drafter = step_kind(config.model_type).drafter(config)
    if run.lora_rank and run.args.stage == "drafter":
        return with_adapter(drafter, "drafter", lora(run.lora_rank))
    freeze_others(drafter, run.args.stage)
    return drafter


def _trained_positions(batch: Mapping[str, Tensor]) -> Trained:
    """Select the trained positions of a batch, (batch, length) each, with features of no width."""
    labels, positions = batch["labels"], batch.get("position_ids")
    rows, length = labels.shape
    empty = (torch.empty(1, rows, length - 1, 0), torch.empty(rows, length, 0))
    return Unrolled(*empty, labels, positions).trained()


class _Simulation:
    """A few optimizer steps within `FakeTensorMode`."""

    def __init__(self, run: RunShape, target: PreTrainedModel, model: nn.Module):
        self._args, self._target, self._model = run.args, target, model
        self._step = training_step(run.drafter, read_target(target), run.args)
        self._drafter = model.get_base_model() if isinstance(model, PeftModel) else model
        self._layers = self._step.layers(run.drafter)
        self._on_cpu, args = run.on_cpu, run.args
        if args.gradient_checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None)  # its newer name
            enable = enable or model.gradient_checkpointing_enable
            enable(args.gradient_checkpointing_kwargs or {"use_reentrant": False})
        if args.bf16 or args.fp16:
            model.forward = convert_outputs_to_fp32(model.forward)  # as accelerate does
        kind, settings = Trainer.get_optimizer_cls_and_kwargs(args)
        self._weights = [weight for weight in model.parameters() if weight.requires_grad]
        self._optimizer = kind(self._weights, **settings)

    def step(self, batch: dict[str, Tensor], trained: Trained) -> StepMemory:
        """Count a step that is not the first, which has no state of the optimizer yet."""
        # documents of packed rows are found by their positions, which have no data here; a row of
        # them takes what one document of its length takes
        batch.pop("position_ids", None)
        features = batch.pop("features", None)
        accumulated = self._args.gradient_accumulation_steps
        with LiveBytes(self._target, self._model) as live:
            held = list[Tensor]()
            if features is None and not self._target_runs(batch):
                width = len(self._layers) * text_config(self._target).hidden_size
                features = torch.empty(*batch["input_ids"].shape, width)
            if features is not None:
                # `Trainer` fetches the batches of a step together, and on a CPU the next one too
                held = [torch.empty_like(features) for _ in range(accumulated + self._on_cpu)]
                batch["features"] = held[0]
            for _ in range(min(accumulated, 2)):
                computed = self._accumulate(batch, trained)
            size = sum(map(size_of, held))
            peak = live.peak, size or computed
            given = self._update()
            states = [part for one in self._optimizer.state.values() for part in one.values()]
            optimizer = sum(map(size_of, filter(torch.is_tensor, states)))
            # all later passes hold the optimizer's state too; its own update may hold even more
            live.peak = live.live
            for weight in given:
                weight.grad = torch.empty_like(weight)
            self._update()
        total, size = max((peak[0] + optimizer, peak[1]), (live.peak, size))
        own = bytes_of(self._target), bytes_of(self._model)
        return StepMemory(*own, optimizer, size, total - optimizer - size)

    def _update(self) -> list[Tensor]:
        """Update the weights once and drop their gradients; return those that had any."""
        given = [one for one in self._weights if one.grad is not None]
        torch.nn.utils.clip_grad_norm_(self._weights, self._args.max_grad_norm)
        self._optimizer.step()
        self._model.zero_grad()
        return given

    def _target_runs(self, batch: dict[str, Tensor]) -> bool:
        """Whether the target's code runs without data on a batch, (batch, length) each."""
        torchs = getLogger("torch._subclasses.fake_tensor")  # prints what it raises
        was_off, torchs.disabled = torchs.disabled, True
        try:
            ids, mask = batch["input_ids"], batch["attention_mask"]
            read_features(self._target, ids, mask, layers=self._layers)
        except Exception as error:  # whatever that code raises
            why = f"since its code reads data ({type(error).__name__})"
            logger.warning(f"The activations of the target's own pass are not counted, {why}.")
            return False
        finally:
            torchs.disabled = was_off
        return True

    def _accumulate(self, batch: dict[str, Tensor], trained: Trained) -> int:
        """Run the forward and the backward pass of a batch; return the bytes of its features.

        Args:
            batch: (batch, length) each.
            trained: (steps, positions, 0).
        """
        args, autocast = self._args, nullcontext()
        if args.bf16 or args.fp16:
            autocast = torch.autocast("cpu", torch.bfloat16 if args.bf16 else torch.float16)
        self._model.train()
        with autocast:
            unrolled = self._step.unroll(self._model, batch, args.resolved.num_steps)
            # where a mask would select them, which has no data here
            rows, places = torch.empty(2, len(trained.target), dtype=torch.long).unbind()
            selected = Trained(
                unrolled.predicted[:, rows, places],
                unrolled.features[:, 1:][rows, places],
                trained.lengths,
                rows,  # any tokens
            )
            loss = self._step.losses(self._drafter, selected).total / 2
        loss.backward()
        return size_of(unrolled.features)


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operations make, until they are released.

    Args:
        models: whose weights, of any shape, are not counted.
    """

    def __init__(self, *models: nn.Module):
        super().__init__()
        self.live = self.peak = 0
        # addresses of storages that are alive, and of those that are not counted
        self._known = {*storages(*models)}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None) -> Any:
        """Run an operation and count what it returns."""
        output = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and _address(tensor) not in self._known:
                storage, address = tensor.untyped_storage(), _address(tensor)
                self._known.add(address)
                weakref.finalize(storage, self._release, address, storage.nbytes())
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
        return output

    def _release(self, address: int, size: int) -> None:
        self.live -= size
        self._known.remove(address)


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def storages(*models: nn.Module) -> dict[int, int]:
    """Return the bytes of all parameters and buffers by address, tied ones once."""
    held = [weight for model in models for weight in [*model.parameters(), *model.buffers()]]
    return {_address(weight): size_of(weight) for weight in held}


def bytes_of(model: nn.Module) -> int:
    """Count the bytes of a model's weights."""
    return sum(storages(model).values())


def size_of(tensor: Tensor) -> int:
    """Count the bytes of the storage of a tensor of any shape."""
    return tensor.untyped_storage().nbytes()


def plain_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return a config without its quantization, with the shapes of the weights before it."""
    plain = copy.deepcopy(config)
    for part in (plain, plain.get_text_config(decoder=True)):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    return plain


def target_size(
    model: PreTrainedModel, config: PreTrainedConfig, bits: int | None = None
) -> tuple[int, int]:
    """Count the bytes of a target, and of the largest weight that it unpacks while it runs.

    Args:
        model: without data and without quantization, in the dtype of the run.
        config: with its `quantization_config`, if its checkpoint has one.
        bits: 4 or 8, to quantize the layers when it is loaded.
    """
    whole, given = bytes_of(model), getattr(config, "quantization_config", None)
    if bits is None and given is None:
        return whole, 0
    target = read_target(model)
    outer = [*target.head.module.parameters(), *target.embeddings.parameters()]
    kept = {*map(id, outer)}  # in floating point
    counts = [w.numel() for w in model.parameters() if w.ndim > 1 and id(w) not in kept]
    itemsize = model.dtype.itemsize
    packed = int(sum(counts) * BITS[bits or bits_of(given)] / 8)
    return whole - sum(counts) * itemsize + packed, max(counts, default=0) * itemsize


def bits_of(quantization: Any) -> int:
    """Read how many bits a `quantization_config` keeps of a weight, 4 or 8."""
    given = quantization if isinstance(quantization, dict) else quantization.to_dict()
    method = str(getattr(given.get("quant_method"), "value", given.get("quant_method")))
    is_4_bit = given.get("load_in_4bit") or given.get("bits") == 4 or "fp4" in method
    return 4 if is_4_bit else 8
