"""The command that compares trainings."""

from pathlib import Path
from typing import Annotated

import typer

from .app import app
from .loading import load_prompts, load_rows, load_target
from .options import (
    DepthOption,
    DtypeOption,
    LastOption,
    LimitOption,
    NodesOption,
    PromptsOption,
    TargetOption,
    TopKOption,
    UserTurnOption,
    given,
)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def compare(
    context: typer.Context,
    target: TargetOption,
    dataset: Annotated[list[str], typer.Option(help="Conversations to train on.")],
    prompts: PromptsOption,
    output: Annotated[Path, typer.Option(help="Folder of the results; continued if it has some.")],
    trial: Annotated[
        list[str], typer.Option(help="A recipe and settings: 'coral csra_weight=0.5'.")
    ],
    steps: Annotated[
        list[int], typer.Option(min=1, help="Of each training; of the first rung if halving.")
    ],
    seeds: Annotated[
        int | None, typer.Option(min=1, help="Trainings of each trial; 3 by default.")
    ] = None,
    keep: Annotated[
        int | None, typer.Option(min=1, help="Halve the trials down to so many, with one seed.")
    ] = None,
    hold_out: Annotated[int, typer.Option(help="Leave out the last rows of each dataset.")] = 0,
    temperature: Annotated[list[float] | None, typer.Option(help="Measured at; 0 and 1.")] = None,
    # a round of decoding follows the token of the prompt's pass
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Tokens of each answer.")] = 64,
    limit: LimitOption = None,
    last: LastOption = None,
    user_turn: UserTurnOption = -1,
    dtype: DtypeOption = "auto",
    tree_depth: DepthOption = None,
    tree_top_k: TopKOption = None,
    tree_nodes: NodesOption = None,
) -> None:
    """Train drafters with different settings and compare what they are worth.

    Every other option is one of CoralTrainingArguments, the same for all trials.
    """
    from ..training.comparison import Comparison, ComparisonSettings, Trial, search
    from ..training.comparison import compare as compare_trials

    if keep is not None and (seeds is not None or len(steps) > 1):
        raise typer.BadParameter("`--keep` searches with one seed from one `--steps` on.")
    model, tokenizer = load_target(target, dtype)
    settings = ComparisonSettings(
        output=output,
        options=context.args,
        temperatures=temperature or (0.0, 1.0),
        max_new_tokens=max_new_tokens,
        tree=given(tree_depth=tree_depth, tree_top_k=tree_top_k, tree_nodes=tree_nodes),
    )
    rows = load_rows(dataset, hold_out)
    items = load_prompts(prompts, limit, last, user_turn)
    comparison = Comparison(model, tokenizer, rows, items, settings)
    trials = [Trial.parse(text) for text in trial]
    if keep is None:
        typer.echo(compare_trials(comparison, trials, steps, seeds or 3))
    else:
        typer.echo(search(comparison, trials, steps[0], keep))
