"""A small language model that drafts for a target: a fresh one, and its training."""
