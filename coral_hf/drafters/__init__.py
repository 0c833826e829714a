"""Families of drafters, a file or a folder each: config, model, and its `Drafting`."""
