"""The program `coral-hf`, to which each file of this folder adds its commands."""

import logging
from typing import Annotated

import typer
from typer.core import TyperGroup

# what the library raises for input that cannot be used, with what to do about it
EXPECTED = (ValueError, OSError, FloatingPointError)


class Commands(TyperGroup):
    """Commands whose expected errors are a message, as those of options are."""

    def invoke(self, ctx):
        """Run a command; `--traceback` lets its errors through as they are."""
        try:
            return super().invoke(ctx)
        except EXPECTED as error:
            # whoever reads what is printed may have had enough of it, which is no error
            if ctx.params["traceback"] or isinstance(error, BrokenPipeError):
                raise
            typer.echo(f"Error: {error}", err=True)
            raise typer.Exit(1) from error


app = typer.Typer(
    name="coral-hf",
    cls=Commands,
    help="Speculative decoding with CORAL drafters.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    add_completion=False,
)


@app.callback()
def main(
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Show where in the code an error was raised.")
    ] = False,
) -> None:
    """Speculative decoding with CORAL drafters."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("coral_hf").setLevel(logging.INFO)
