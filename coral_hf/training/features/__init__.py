"""A cache of the target's features on disk, for training runs that read the same rows again.

`plan_features` → `write_features` (safetensors and an index) → `CachedFeatures`, a dataset of the
trainer.
"""

from .cache import INDEX, CachedFeatures
from .writer import plan_features, write_features
