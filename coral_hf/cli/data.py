"""Commands that look at training data, or make it."""

from pathlib import Path
from typing import Annotated

import typer

from .app import app
from .loading import load_drafter, load_target, load_tokenizer, without_last
from .options import DtypeOption, TargetOption

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


@app.command()
def regenerate(
    target: TargetOption,
    dataset: Annotated[str, typer.Option(help="A file, a folder or a Hub id.")],
    output: Annotated[Path, typer.Option(help="JSONL file of the answers.")],
    hold_out: Annotated[
        int, typer.Option(min=0, help="Leave out the last rows, for measuring.")
    ] = 0,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first rows.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of an answer at most.")] = 512,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Share of the probability drawn from.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    unfinished: Annotated[
        str, typer.Option(help="What becomes of answers that are cut off: 'keep' or 'drop'.")
    ] = "keep",
    prompt_tokens: Annotated[
        int, typer.Option(help="Tokens of a plain text that the target continues.")
    ] = 16,
    batch_size: Annotated[int, typer.Option(help="Rows answered at a time.")] = 16,
    drafter: Annotated[
        str | None, typer.Option(help="A drafter of the target, to be faster.")
    ] = None,
    dtype: DtypeOption = "auto",
) -> None:
    """Let the target answer a dataset's prompts itself; run again, it goes on where it stopped."""
    from ..training.regeneration import RegenerationSettings
    from ..training.regeneration import regenerate as answer

    settings = RegenerationSettings(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        unfinished=unfinished,
        prompt_tokens=prompt_tokens,
        batch_size=batch_size,
    )
    rows = without_last([dataset], hold_out)
    rows = rows if limit is None else rows.select(range(min(limit, len(rows))))
    model, tokenizer = load_target(target, dtype)
    helper = None if drafter is None else load_drafter(drafter, model)
    done = answer(model, tokenizer, rows, output, settings, helper)
    typer.echo(
        f"{done.num_rows} rows are in {output}; {done.num_unfinished} end with an answer that was"
        f" cut off; {done.num_left_out} have no answer and are left out."
    )
