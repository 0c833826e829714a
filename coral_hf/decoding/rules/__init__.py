"""Acceptance rules: which path of a draft tree the target accepts, and the token after it."""
