"""Judgement of calls of `generate`, and what they may have."""
