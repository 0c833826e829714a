"""The command that stores a target's features."""

from pathlib import Path
from typing import Annotated

import typer

from .app import app
from .loading import load_target, without_last
from .options import DtypeOption


@app.command()
def features(
    output: Annotated[Path, typer.Option(help="Folder of the features.")],
    target: Annotated[str | None, typer.Option(help="The target: a folder or a Hub id.")] = None,
    dataset: Annotated[list[str] | None, typer.Option(help="Conversations.")] = None,
    hold_out: Annotated[
        int, typer.Option(min=0, help="Leave out the last rows of each dataset.")
    ] = 0,
    max_length: Annotated[int, typer.Option(min=1, help="Tokens after which a row is cut.")] = 2048,
    packing: Annotated[bool, typer.Option(help="Several conversations in each row.")] = False,
    format: Annotated[str, typer.Option(help="'bfloat16', or 'int8' in half the space.")] = (
        "bfloat16"
    ),
    batch_size: Annotated[int, typer.Option(min=1, help="Rows that are read at once.")] = 8,
    shard_megabytes: Annotated[int, typer.Option(min=1, help="Of a file, about.")] = 1000,
    dtype: DtypeOption = "auto",
    plan: Annotated[bool, typer.Option("--plan", help="Say what it takes, and stop.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Compare files and checksums.")] = False,
    delete: Annotated[bool, typer.Option("--delete", help="Delete the features.")] = False,
) -> None:
    """Store the target's features on disk, so that trainings need not compute them.

    A run that was broken off goes on where it stopped. Train with `coral-hf train --dataset` and
    this folder.
    """
    from ..training.features import CachedFeatures, delete_features, plan_features, write_features

    if delete:
        typer.echo(f"Deleted {delete_features(output) / 1e9:.3g} GB in {output}.")
    elif check:
        index = CachedFeatures(output, checksums=True).index
        typer.echo(f"{output} is whole: {index.num_rows} rows of {index.target}.")
    else:
        if target is None or not dataset:
            raise typer.BadParameter("Writing features needs `--target` and `--dataset`.")
        model, rows = _read(target, dataset, hold_out, max_length, packing, dtype)
        shard_bytes = shard_megabytes * 10**6
        typer.echo(plan_features(model, rows, output, format, shard_bytes))
        if not plan:
            index = write_features(model, rows, output, format, batch_size, shard_bytes)
            typer.echo(
                f"The features are in {output}. Storing them lost {index.error.relative:.2%} (root"
                f" mean square), at most {index.error.largest:.3g}."
            )


def _read(
    target: str, dataset: list[str], hold_out: int, max_length: int, packing: bool, dtype: str
):
    """The target, and the rows as the trainer would read them."""
    from ..training.data import pack_dataset, prepare_dataset
    from ..training.data.vocabulary import warn_of_other_ends

    model, tokenizer = load_target(target, dtype)
    warn_of_other_ends(tokenizer, model)
    conversations = without_last(dataset, hold_out)
    vocab_size = model.config.get_text_config(decoder=True).vocab_size
    rows = prepare_dataset(conversations, tokenizer, max_length, vocab_size=vocab_size)
    return model, pack_dataset(rows, max_length) if packing else rows
