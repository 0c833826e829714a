"""Where target and drafter lie when several processes train.

In: a target as the user loaded it, and what accelerate was told. Out: the target on the devices of
the run. The drafter is accelerate's own business.
"""

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainingArguments


def set_ddp_defaults(args: TrainingArguments) -> None:
    """Spare DDP the search for unused parameters: all that is trained is used in every batch."""
    if args.ddp_find_unused_parameters is None:
        args.ddp_find_unused_parameters = False


def place_target(target: PreTrainedModel, trainer: Trainer) -> None:
    """Put a target on the devices of a run; under FSDP2 its layers are shared out.

    Its embeddings and LM head stay whole on every device: losses read the head many times a batch,
    and each time it would have to be gathered.
    """
    if any(weight.is_meta for weight in target.parameters()) and not _is_offloaded(target):
        raise ValueError(
            "The target has weights on the meta device, so this process has not loaded it; set"
            " `fsdp_cpu_ram_efficient_loading: false` for accelerate, or load it without"
            " `device='meta'`."
        )
    if getattr(target, "hf_device_map", None) is not None:
        return  # accelerate's hooks, or a quantiser, have placed it
    if trainer.is_fsdp_enabled and trainer.accelerator.is_fsdp2:
        _shard_layers(target, trainer.args.device)
    target.to(trainer.args.device)


def _is_offloaded(target: PreTrainedModel) -> bool:
    return bool({"cpu", "disk"} & set(map(str, getattr(target, "hf_device_map", {}).values())))


def _shard_layers(target: PreTrainedModel, device: torch.device) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for layer in _layers(target):
        fully_shard(layer, mesh=mesh)


def _layers(target: PreTrainedModel) -> list[nn.Module]:
    """The blocks that transformers would not split over devices, outermost first."""
    kinds = set(target._no_split_modules or ())
    return [module for module in target.modules() if type(module).__name__ in kinds]
