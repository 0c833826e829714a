"""Compiling ahead, so that no call waits for it."""

import time

import torch
from transformers import CompileConfig, PreTrainedModel

from ..generate import generate_with_drafter


@torch.no_grad()
def warm_up(
    target: PreTrainedModel,
    drafter: PreTrainedModel,
    batch_size: int = 1,
    max_length: int = 1024,
    compile_config: CompileConfig | None = None,
    **settings,
) -> float:
    """Compile what calls of `generate` need that pass the same `compile_config` and settings.

    Args:
        target: any decoder of transformers.
        drafter: of the target.
        batch_size: rows of the calls.
        max_length: tokens of their longest rows, which decides the capacity of caches: 256, 512,
            1024, 1536, 2048, 3072, … tokens, tree included. Shorter calls, down to a fourth of it,
            run in what is compiled; others compile for themselves.
        compile_config: transformers' own defaults by default.
        settings: of the calls, such as `tree_nodes`, `do_sample` and `temperature`.

    Returns:
        the seconds that it took.

    Raises:
        ValueError: if such calls have no rounds of constant shapes; it says why.

    Example:

    ```python
    >>> coral_hf.warm_up(target, drafter, max_length=512, compile_config=CompileConfig())
    >>> target.generate(**inputs, assistant_model=drafter, compile_config=CompileConfig())
    ```
    """
    if settings.get("speculation") == "never":
        raise ValueError("`speculation` is 'never', so that there are no rounds; leave it out.")
    start = time.perf_counter()
    ids = torch.zeros(batch_size, 1, dtype=torch.long, device=target.device)
    call = {"self": target, "inputs": ids, "attention_mask": torch.ones_like(ids), **settings}
    call |= {"assistant_model": drafter, "max_length": max_length}
    call["compile_config"] = compile_config or CompileConfig()
    generate_with_drafter(type(target).generate.__wrapped__, call, only_compiles=True)
    return time.perf_counter() - start
