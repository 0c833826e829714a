"""Configuration of Medusa heads (Cai et al. 2024).

In: the config of a target. Out: `MedusaConfig`: how many heads there are, how deep each is, and the
tree that they draft where it is a static one.
"""

from collections.abc import Sequence

from huggingface_hub.dataclasses import strict

from ..configuration import FamilyConfig

Paths = Sequence[Sequence[int]]


@strict
class MedusaConfig(FamilyConfig):
    """Configuration of a [`MedusaDrafter`].

    `MedusaConfig.from_target` fills in everything that follows from a target. What it shares with
    other families is in `FamilyConfig`.

    Args:
        num_heads: each drafts one token further than the one before it.
        num_hidden_layers: residual blocks of each head.
        has_lm_heads: whether each head has an LM head of its own, as published first; else all read
            the target's, as in the last version of Medusa's code.
        tree_choices: the nodes of a static tree, each as the ranks of the tokens on its path, the
            most important ones first: `[[0], [0, 0], [1]]` are a head's best token, the next head's
            best one below it, and the first head's second best. None: the most confident nodes.

    Example:

    ```python
    >>> from transformers import LlamaConfig
    >>> from coral_hf import MedusaConfig
    >>> MedusaConfig.from_target(LlamaConfig(hidden_size=256), num_heads=3).hidden_size
    256
    ```
    """

    model_type = "coral_medusa"

    num_heads: int = 5
    num_hidden_layers: int = 1
    has_lm_heads: bool = True
    tree_choices: list | tuple | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        for name in ("num_heads", "num_hidden_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}; use a value of at least 1.")
        if self.tree_choices is not None:
            self.tree_choices = self.check_choices(self.tree_choices)

    def check_choices(self, choices: Paths) -> list[list[int]]:
        """Put the nodes of a static tree in an order in which parents come before children.

        Raises:
            ValueError: for what is no tree, one deeper than the heads, or ranks beyond the
                vocabulary.
        """
        if not all(isinstance(path, list | tuple) for path in choices):
            raise ValueError(
                f"`tree_choices` is {choices!r}; list the ranks on the path to each node, such as"
                " [[0], [0, 0], [1]]."
            )
        paths, known = [tuple(path) for path in choices], range(self.vocab_size)
        for index, path in enumerate(paths):
            ranks = [rank for rank in path if type(rank) is not int or rank not in known]
            problems = {
                "is empty": not path,
                f"has rank {ranks[:1]}, and the vocabulary {self.vocab_size} tokens": ranks,
                f"is {len(path)} tokens deep, and there are {self.num_heads} heads": (
                    len(path) > self.num_heads
                ),
                "is listed twice": path in paths[:index],
                f"has no parent: list {[*path[:-1]]} too": path[1:] and path[:-1] not in paths,
            }
            if found := next((said for said, is_so in problems.items() if is_so), None):
                raise ValueError(
                    f"`tree_choices` is no tree: {[*path]} {found}. List the ranks on the path to"
                    " each node, such as [[0], [0, 0], [1]]."
                )
        if not paths:
            raise ValueError("`tree_choices` is empty; use None for the most confident nodes.")
        whole = (path[: depth + 1] for path in paths for depth in range(len(path)))
        return [[*path] for path in dict.fromkeys(whole)]
