"""A cache of the target's features on disk, for training runs that read the same rows again.

`plan_features` → `write_features` (safetensors and an index) → `CachedFeatures`, a dataset of the
trainer.
"""

from .dataset import CachedFeatures
from .index import INDEX, delete_features
from .writer import plan_features, write_features
