"""The target's features on disk, for trainings that read the same texts again and again.

plan → write (shards of safetensors and an index) → `CachedFeatures`, a dataset for the trainer.
"""

from .dataset import CachedFeatures, Outline
from .index import INDEX, delete_features
from .plan import Plan, plan_features
from .writer import write_features

__all__ = [
    "INDEX",
    "CachedFeatures",
    "Outline",
    "Plan",
    "delete_features",
    "plan_features",
    "write_features",
]
