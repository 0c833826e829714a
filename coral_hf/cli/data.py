"""Commands that look at training data."""

from typing import Annotated

import typer

from .app import app
from .loading import load_tokenizer

data = typer.Typer(help="Look at training data.", no_args_is_help=True)
app.add_typer(data, name="data")


@data.command()
def show(
    dataset: Annotated[str, typer.Option(help="A file, a folder or a Hub id.")],
    target: Annotated[
        str | None, typer.Option(help="The target, whose tokenizer is used: a folder or a Hub id.")
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(help="A tokenizer instead of a target.")] = None,
    row: Annotated[int, typer.Option(help="The first row shown, from 0; -1 is the last.")] = 0,
    limit: Annotated[int, typer.Option(min=1, help="Rows shown.")] = 1,
    max_length: Annotated[
        int | None, typer.Option(min=1, help="Cut rows as a training would.")
    ] = None,
) -> None:
    """Show which tokens of a dataset are trained, in colour or, through a pipe, with marks."""
    from ..training.data import load_conversations
    from ..training.data import show as show_rows

    name = target or tokenizer
    if name is None or (target and tokenizer):
        raise typer.BadParameter("give either --target or --tokenizer")
    rows = load_conversations(dataset)
    start = row if row >= 0 else len(rows) + row
    if not 0 <= start < len(rows):
        raise typer.BadParameter(f"--row is {row}, but the dataset has {len(rows)} rows, from 0")
    chosen = range(start, min(start + limit, len(rows)))
    show_rows(((index, rows[index]) for index in chosen), load_tokenizer(name), max_length)
