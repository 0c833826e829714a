"""Placement of target and drafter on the devices of a training run.

In: a target and a drafter, and accelerate's settings. Out: both on the devices of the run; after a
sharded run, the user's drafter with the trained weights.
"""

import contextlib
import copy

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled

from .data.encoding import IGNORED


def shards_weights(trainer: Trainer) -> bool:
    """Whether each process of the run holds only a part of the drafter's weights (FSDP, ZeRO-3)."""
    is_zero3 = trainer.is_deepspeed_enabled and is_deepspeed_zero3_enabled()
    return trainer.is_fsdp_enabled or is_zero3


def sharded_copy(drafter: PreTrainedModel) -> PreTrainedModel:
    """Copy a drafter before it is sharded, so that the user's own stays whole for the next stage.

    Both share their config and training record. All processes start with the weights of the first
    one, of any shape, as under DDP.
    """
    shared = (drafter.config, drafter.generation_config, drafter.training_record)
    copied = copy.deepcopy(drafter, {id(part): part for part in shared})
    # accelerate refuses the name of a layer that a model does not have, such as a router
    kinds = {type(module).__name__ for module in copied.modules()}
    copied._no_split_modules = [*kinds.intersection(drafter._no_split_modules or ())]
    for weight in copied.parameters():
        torch.distributed.broadcast(weight.data, src=0)
    return copied


class GiveBack(TrainerCallback):
    """Copies sharded weights into the user's whole drafter, in every process, after training."""

    def __init__(self, drafter: PreTrainedModel):
        self._drafter = drafter

    @torch.no_grad()
    def on_train_end(self, args, state, control, model, **kwargs) -> None:
        """See [`~transformers.TrainerCallback.on_train_end`]; weights may be of any shape."""
        weights = dict(extract_model_from_parallel(model).named_parameters())
        whole: contextlib.AbstractContextManager = contextlib.nullcontext()
        if is_deepspeed_zero3_enabled():
            import deepspeed

            whole = deepspeed.zero.GatheredParameters([*weights.values()])
        with whole:
            for name, own in self._drafter.named_parameters():
                found = weights[name]
                own.copy_(found.full_tensor() if isinstance(found, DTensor) else found)


def place_target(target: PreTrainedModel, trainer: Trainer) -> None:
    """Put a target on the devices of a run; under FSDP2 its layers are sharded.

    Its embeddings and LM head stay whole on every device: losses read the head many times a batch,
    and each time it would have to be gathered.
    """
    if any(hasattr(weight, "ds_id") for weight in target.parameters()):
        raise ValueError(
            "The target was loaded after `TrainingArguments` of a ZeRO-3 run were made, so that"
            " each process holds a part of it; load it first, or shard it by FSDP2."
        )
    if getattr(target, "hf_device_map", None) is not None:
        return  # accelerate's hooks, or a quantiser, have placed it; offloaded weights are meta
    if any(weight.is_meta for weight in target.parameters()):
        raise ValueError(
            "The target has weights on the meta device, so this process has not loaded it; set"
            " `fsdp_cpu_ram_efficient_loading: false` for accelerate."
        )
    if trainer.is_fsdp_enabled and trainer.accelerator.is_fsdp2:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(trainer.args.device.type, (torch.distributed.get_world_size(),))
        # that transformers would not split over devices; of a target that an earlier stage has
        # sharded none are left, since that renames their class
        kinds = set(target._no_split_modules or ())
        for layer in [module for module in target.modules() if type(module).__name__ in kinds]:
            # each layer is a root of FSDP, which by default stays gathered after a forward pass
            fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    if target.device != trainer.args.device:  # some quantised targets cannot be moved at all
        target.to(trainer.args.device)


def mean_loss(trainer: Trainer, total: Tensor, labels: Tensor, num_items: Tensor | int | None):
    """Divide the sum of a batch's losses, (), by the tokens that are trained.

    Args:
        labels: (batch, length), counted where `num_items` is not known, as in an evaluation.
        num_items: trained tokens of all accumulated batches.
    """
    if num_items is None:
        return total / (labels != IGNORED).sum()
    # where the items are those of all processes, DDP averages over processes again
    is_global = trainer.args.average_tokens_across_devices
    return total * (trainer.accelerator.num_processes if is_global else 1) / num_items
