"""Rounds of constant shapes, whose every step is a function of tensors."""
