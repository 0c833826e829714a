"""Commands that make a drafter."""

from pathlib import Path
from typing import Annotated

import typer

from .app import app
from .loading import load_rows, load_target
from .options import DtypeOption, TargetOption


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def train(
    context: typer.Context,
    target: TargetOption,
    dataset: Annotated[
        list[str],
        typer.Option(help="A file, a folder, a Hub id; or cached features."),
    ],
    output: Annotated[Path, typer.Option(help="Folder of the finished drafter.")],
    hold_out: Annotated[
        int, typer.Option(help="Leave out the last rows of each dataset, for measuring.")
    ] = 0,
    dtype: DtypeOption = "auto",
    router_epochs: Annotated[
        float, typer.Option(help="Epochs of the router's stage; 0 trains no router.")
    ] = 0.2,
    resume: Annotated[bool, typer.Option(help="Continue from the last checkpoint.")] = False,
) -> None:
    """Train a drafter and its router.

    Every other option is one of CoralTrainingArguments, as in any Trainer script: --learning_rate
    1e-3 --num_steps 3.
    """
    from ..training import parse_arguments
    from ..training.stages import save
    from ..training.stages import train as train_stages

    # each process of a run has a GPU of its own, to which its trainer moves the target
    model, tokenizer = load_target(target, dtype, device="cpu")
    rows = load_rows(dataset, hold_out)
    stages = [parse_arguments(output / "drafter", context.args, stage="drafter")]
    if router_epochs > 0:
        router = {"stage": "router", "num_train_epochs": router_epochs, "max_steps": -1}
        stages.append(parse_arguments(output / "router", context.args, **router))
    drafter = train_stages(model, tokenizer, rows, stages, resume=resume)
    save(drafter, tokenizer, output)
    typer.echo(f"The drafter is in {output}.")


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder of the drafter and the plot.")] = Path(
        "coral-demo"
    ),
    target: Annotated[
        str | None, typer.Option(help="A target of your own; a small one is trained by default.")
    ] = None,
    dataset: Annotated[str | None, typer.Option(help="Conversations of your own.")] = None,
    fresh: Annotated[bool, typer.Option(help="Train again instead of reading the cache.")] = False,
) -> None:
    """Train a drafter on a small target, load it back, and measure it. Needs no network."""
    from ..demo import DemoSettings, run_demo

    run_demo(DemoSettings(output=output, target=target, dataset=dataset, fresh=fresh))
