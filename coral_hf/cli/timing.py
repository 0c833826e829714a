"""The command that times LM heads alone."""

from typing import Annotated

import typer

from .app import app
from .options import ReportOption, given


@app.command()
def time_heads(
    output: ReportOption,
    shape: Annotated[
        list[str] | None,
        typer.Option(help="Llama-3-8B, Qwen2.5-7B or Gemma-2-2B; all of them by default."),
    ] = None,
    vocab_size: Annotated[int | None, typer.Option(help="Of a head of another shape.")] = None,
    hidden_size: Annotated[int | None, typer.Option(help="Of a head of another shape.")] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(help="'bfloat16', 'float32' or 'float16'; the first two.")
    ] = None,
    rows: Annotated[list[int] | None, typer.Option(help="Of a tree level; 1 and 10.")] = None,
    groups: Annotated[list[int] | None, typer.Option(help="Of the router; 16 and 32.")] = None,
    share: Annotated[
        list[int] | None, typer.Option(help="One group of so many is read; 4, 8 and 16.")
    ] = None,
    grouping: Annotated[
        str, typer.Option(help="'contiguous', or 'random': groups of a random order of the tokens.")
    ] = "contiguous",
    top_k: Annotated[int, typer.Option(help="Children of a row.")] = 10,
    repeats: Annotated[int, typer.Option(help="Timed calls of each head.")] = 20,
    device: Annotated[str | None, typer.Option(help="The GPU by default, if there is one.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the random weights and features.")] = 0,
) -> None:
    """Time the full LM head against the routed one, without a model, on random weights."""
    import torch
    from rich.console import Console

    from ..measure import HeadTimingSettings
    from ..measure import time_heads as run

    settings = HeadTimingSettings(
        grouping=grouping,
        top_k=top_k,
        repeats=repeats,
        device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
        seed=seed,
        **given(
            shapes=chosen_shapes(shape, vocab_size, hidden_size),
            dtypes=dtype,
            rows=rows,
            groups=groups,
            shares=share,
        ),
    )
    report = run(settings)
    report.write(output)
    Console().print(report.to_rich_table())


def chosen_shapes(names: list[str] | None, vocab_size: int | None, hidden_size: int | None):
    """The shapes that were asked for, by name or by size; None if none was."""
    from ..measure import HEAD_SHAPES, HeadShape

    unknown = [name for name in names or [] if name not in HEAD_SHAPES]
    if unknown:
        raise typer.BadParameter(f"--shape {unknown[0]} is not one of {', '.join(HEAD_SHAPES)}.")
    if (vocab_size is None) != (hidden_size is None):
        raise typer.BadParameter("Give both --vocab-size and --hidden-size, or neither.")
    shapes = [HEAD_SHAPES[name] for name in names or []]
    if vocab_size is not None and hidden_size is not None:
        shapes.append(HeadShape(f"{vocab_size} x {hidden_size}", vocab_size, hidden_size))
    return shapes or None
