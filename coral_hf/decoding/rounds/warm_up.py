"""Compiling ahead, so that no call waits for it."""

import time
from dataclasses import replace

import torch
from transformers import CompileConfig, PreTrainedModel

from ..generate import decoder


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
    loop = replace(decoder(drafter), only_compiles=True)
    ids = torch.zeros(batch_size, 1, dtype=torch.long, device=target.device)
    lengths = {"max_length": max_length, "compile_config": compile_config or CompileConfig()}
    mask = torch.ones_like(ids)
    target.generate(ids, attention_mask=mask, custom_generate=loop, **lengths, **settings)
    return time.perf_counter() - start
