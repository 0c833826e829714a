"""Where and with what a report was measured: hardware, versions, dtype, models, command line."""

import os
import platform
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedModel

from ..identity import weights_digest
from .hardware import hardware_name
from .padding import num_padded_layers
from .timing import process_peak_bytes


@dataclass(frozen=True)
class Environment:
    """What a reader needs in order to repeat the measurement."""

    hardware: str
    num_cores: int
    num_threads: int  # of torch
    device: str
    dtype: str
    versions: dict[str, str]
    target: str
    num_target_layers: int
    num_padded_layers: int  # of them add nothing: depth without function, see `pad_target`
    drafter: str | None
    num_drafter_parameters: int | None
    drafter_digest: str | None  # of its weights, in whichever dtype
    assistant: str | None
    process_peak_bytes: int  # of main memory, the whole process
    command: str


def describe_environment(
    target: PreTrainedModel, drafter: PreTrainedModel | None, assistant: PreTrainedModel | None
) -> Environment:
    """Read off the machine, the libraries and the models; after the runs, for the memory peak."""
    return Environment(
        hardware=hardware_name(target.device),
        num_cores=os.cpu_count() or 1,
        num_threads=torch.get_num_threads(),
        device=str(target.device),
        dtype=str(target.dtype).removeprefix("torch."),
        versions=versions(),
        target=model_name(target),
        num_target_layers=target.config.get_text_config().num_hidden_layers,
        num_padded_layers=num_padded_layers(target),
        drafter=None if drafter is None else model_name(drafter),
        num_drafter_parameters=None if drafter is None else drafter.num_parameters(),
        drafter_digest=None if drafter is None else weights_digest(drafter),
        assistant=None if assistant is None else model_name(assistant),
        process_peak_bytes=process_peak_bytes(),
        command=command_line(),
    )


def command_line() -> str:
    """As it was typed, but of paths the last part: the rest is nobody else's business."""
    return shlex.join(_without_folders(word) for word in sys.argv)


def _without_folders(word: str) -> str:
    option, equals, value = word.rpartition("=") if word.startswith("--") else ("", "", word)
    is_path = value.startswith(("/", ".", "~")) or ("/" in value and Path(value).exists())
    return f"{option}{equals}{Path(value).name if is_path else value}"


def versions() -> dict[str, str]:
    """Of everything that decides over speed."""
    from .. import __version__  # here, so that the package may import this file

    return {
        "coral_hf": __version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def model_name(model: PreTrainedModel) -> str:
    """A model's id; of a folder its last part: the rest of the path is nobody else's business."""
    name = model.config.name_or_path
    return (Path(name).name if Path(name).is_dir() else name) or type(model).__name__
