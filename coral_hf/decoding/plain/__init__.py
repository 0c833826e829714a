"""Plain decoding: transformers' own loop, and what rounds cost beside it."""
