"""Training: data, unroll, losses → trainer; arguments."""

from .arguments import CoralTrainingArguments, parse_arguments
from .trainer import CoralTrainer

__all__ = ["CoralTrainer", "CoralTrainingArguments", "parse_arguments"]
