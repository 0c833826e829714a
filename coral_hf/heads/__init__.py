"""Draft heads: from a drafter's features to tokens, by all of the target's LM head or a part."""
