"""Calls whose passes are prepared by the target itself, as in plain `generate`, and why."""
