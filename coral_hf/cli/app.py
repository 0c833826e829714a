"""The program `coral-hf`, to which each file of this folder adds its commands."""

import logging

import typer

app = typer.Typer(
    name="coral-hf",
    help="Speculative decoding with CORAL drafters.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    add_completion=False,
)


@app.callback()
def main() -> None:
    """Speculative decoding with CORAL drafters."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("coral_hf").setLevel(logging.INFO)
