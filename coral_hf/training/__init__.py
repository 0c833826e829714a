"""Training: data → features → a step's unroll and losses → trainer; settings."""

from .arguments import CoralTrainingArguments, parse_arguments
from .steps import coral as coral  # registers the step of CORAL drafters
from .trainer import CoralTrainer

__all__ = ["CoralTrainer", "CoralTrainingArguments", "parse_arguments"]
