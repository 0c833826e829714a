"""Memory of a training step: the step itself, run on tensors without data.

In: the configs of a target and a drafter, the settings of a stage, a batch. Out: the bytes at the
peak of an optimizer step, by what holds them. No weight is loaded, and no formula repeats the
shapes of the code: target, unroll, losses, backward pass and optimizer are the ones that train.
"""

import copy
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from logging import getLogger
from typing import NamedTuple

import torch
from accelerate.utils import convert_outputs_to_fp32
from peft import PeftModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, Trainer
from transformers.utils import logging

from ...drafters.configuration import FamilyConfig
from ...target import read_features, read_target
from ..adapters import lora, with_adapter
from ..arguments import CoralTrainingArguments
from ..stages import HEAD_OF, default_groups, default_rank, freeze_others
from ..steps import Trained, TrainingStep, Unrolled, step_kind, training_step
from .live_bytes import LiveBytes, bytes_of, size_of
from .target_size import plain_config, target_size

logger = logging.get_logger(__name__)


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
        config = plain_config(run.target)
        target = AutoModelForCausalLM.from_config(config, dtype=run.dtype).eval()
        model = _make_model(run)
    with FakeTensorMode():
        for one in (target, model):
            _drop_data(one)
        target.requires_grad_(False)
        step = training_step(run.drafter, read_target(target), run.args)
        shapes = {name: torch.empty(part.shape, dtype=part.dtype) for name, part in batch.items()}
        found = _Simulation(run, target, model, step).run(shapes, trained)
    size = target_size(target, run.target, run.bits)
    unpacked = found.activations + size.unpacked
    return found._replace(target=size.weights, activations=unpacked)


def _drop_data(model: nn.Module) -> None:
    """Replace the weights of a model by ones of the mode around, of the same shapes and types."""
    known = dict[int, Tensor]()  # tied weights stay one
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, weight in held.items():
                if weight is not None and id(weight) not in known:
                    empty = torch.empty(weight.shape, dtype=weight.dtype)
                    is_trained = isinstance(weight, nn.Parameter)
                    new = nn.Parameter(empty, weight.requires_grad) if is_trained else empty
                    known[id(weight)] = new
                    known[id(new)] = new
                held[name] = None if weight is None else known[id(weight)]


def _make_model(run: RunShape) -> nn.Module:
    """Make the drafter in fp32, with the head or the adapter that the stage trains."""
    config, head = copy.deepcopy(run.drafter), HEAD_OF.get(run.args.stage)
    if head == "router" and config.num_groups is None:
        config.num_groups = run.args.num_groups or default_groups(config.vocab_size)
    if head == "low_rank" and config.head_rank is None:
        config.head_rank = run.args.head_rank or default_rank(config.hidden_size)
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

    def __init__(
        self, run: RunShape, target: PreTrainedModel, model: nn.Module, step: TrainingStep
    ):
        self._run, self._target, self._model, self._step = run, target, model, step
        is_adapted = isinstance(model, PeftModel)
        self._drafter = model.get_base_model() if is_adapted else model
        self._layers = step.layers(run.drafter)
        self._width = len(self._layers) * run.target.get_text_config(decoder=True).hidden_size
        args = run.args
        if args.gradient_checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None)  # its newer name
            enable = enable or model.gradient_checkpointing_enable
            enable(args.gradient_checkpointing_kwargs or {"use_reentrant": False})
        if args.bf16 or args.fp16:
            model.forward = convert_outputs_to_fp32(model.forward)  # as accelerate does
        kind, settings = Trainer.get_optimizer_cls_and_kwargs(args)
        self._weights = [weight for weight in model.parameters() if weight.requires_grad]
        self._optimizer = kind(self._weights, **settings)

    def run(self, batch: dict[str, Tensor], trained: Trained) -> StepMemory:
        """Count a step that is not the first, which has no state of the optimizer yet."""
        # documents of packed rows are found by their positions, which have no data here; a row of
        # them takes what one document of its length takes
        batch.pop("position_ids", None)
        features = batch.pop("features", None)
        accumulated = self._run.args.gradient_accumulation_steps
        with LiveBytes(self._target, self._model) as live:
            held = list[Tensor]()
            if features is None and not self._target_runs(batch):
                features = torch.empty(*batch["input_ids"].shape, self._width)
            if features is not None:
                # `Trainer` fetches the batches of a step together, and on a CPU the next one too
                count = accumulated + self._run.on_cpu
                held = [torch.empty_like(features) for _ in range(count)]
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
        torch.nn.utils.clip_grad_norm_(self._weights, self._run.args.max_grad_norm)
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
            logger.warning(
                "The activations of the target's own pass are not counted, since its code reads"
                f" data ({type(error).__name__})."
            )
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
        args, autocast = self._run.args, nullcontext()
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
