"""The command that puts a drafter on the Hub."""

from pathlib import Path
from typing import Annotated

import typer

from .app import app


@app.command()
def publish(
    folder: Annotated[Path, typer.Argument(help="Of a drafter: what `coral-hf train` wrote.")],
    repo: Annotated[str, typer.Option(help="Where it goes: organisation/name.")],
    report: Annotated[
        list[Path] | None,
        typer.Option(help="A report.json of `coral-hf benchmark`, for the card; several are fine."),
    ] = None,
    base_model: Annotated[
        str | None, typer.Option(help="The target's Hub id, where it was a folder here.")
    ] = None,
    license: Annotated[str | None, typer.Option(help="Such as apache-2.0.")] = None,
    language: Annotated[list[str] | None, typer.Option(help="Such as en.")] = None,
    dataset: Annotated[
        list[str] | None, typer.Option(help="Hub id of a dataset that it was trained on.")
    ] = None,
    private: Annotated[bool, typer.Option(help="A new repository that only you see.")] = False,
    revision: Annotated[str | None, typer.Option(help="A branch other than main.")] = None,
) -> None:
    """Write a drafter's card and upload both, with the token of `hf auth login` or HF_TOKEN."""
    from ..hub import CardFacts
    from ..hub import publish as publish_folder

    facts = CardFacts(repo, base_model, license, language or None, dataset or [])
    done = publish_folder(
        folder,
        repo,
        reports=report or [],
        facts=facts,
        private=private or None,
        revision=revision,
    )
    typer.echo(f"Published: {done.commit_url}")
