"""Training: data, unroll, losses → trainer; arguments."""

from .arguments import CoralTrainingArguments
from .trainer import CoralTrainer

__all__ = ["CoralTrainer", "CoralTrainingArguments"]
