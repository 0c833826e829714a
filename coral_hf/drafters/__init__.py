"""Families of drafters, a file or a folder each: config, model, and its `Drafting`.

A family of your own builds its trees with what is exported here; see `coral_hf.decoding` for the
protocol and the registry.
"""

from .tree_builders import Beam, SampledTreeBuilder, TreeBuilder, plan_levels
