"""Commands that give a trained drafter a draft head, and compare such heads."""

from pathlib import Path
from typing import Annotated

import typer

from .app import app
from .loading import load_drafter, load_prompts, load_rows, load_target
from .options import (
    DepthOption,
    DrafterOption,
    DtypeOption,
    LastOption,
    LimitOption,
    NodesOption,
    PadOption,
    PromptsOption,
    TargetOption,
    TopKOption,
    UserTurnOption,
    given,
)

DatasetOption = Annotated[
    list[str], typer.Option(help="Conversations to train on, or cached features.")
]


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def compare_heads(
    context: typer.Context,
    target: TargetOption,
    drafter: DrafterOption,
    dataset: DatasetOption,
    prompts: PromptsOption,
    output: Annotated[Path, typer.Option(help="Folder of the heads and the report.")],
    trial: Annotated[
        list[str], typer.Option(help="'routed grouping=kmeans num_groups=16 num_active_groups=2'.")
    ],
    hold_out: Annotated[int, typer.Option(help="Leave out the last rows of each dataset.")] = 0,
    temperature: Annotated[list[float] | None, typer.Option(help="Measured at; 0 and 1.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of each answer.")] = 64,
    repeats: Annotated[int, typer.Option(help="Runs of each prompt and head.")] = 1,
    limit: LimitOption = None,
    last: LastOption = None,
    user_turn: UserTurnOption = -1,
    pad_layers: PadOption = None,
    dtype: DtypeOption = "auto",
    tree_depth: DepthOption = None,
    tree_top_k: TopKOption = None,
    tree_nodes: NodesOption = None,
) -> None:
    """Make draft heads for one drafter and measure them in turn, beside the whole head.

    Every other option is one of CoralTrainingArguments, for the heads that are trained.
    """
    from rich.console import Console

    from ..measure.head_comparison import HeadComparison, HeadSettings, HeadTrial

    trials = [HeadTrial.parse(text) for text in trial]
    model, tokenizer = load_target(target, dtype, pad_layers)
    settings = HeadSettings(
        output=output,
        options=context.args,
        temperatures=temperature or (0.0, 1.0),
        max_new_tokens=max_new_tokens,
        repeats=repeats,
        tree=given(tree_depth=tree_depth, tree_top_k=tree_top_k, tree_nodes=tree_nodes),
    )
    rows = load_rows(dataset, hold_out)
    items = load_prompts(prompts, limit, last, user_turn)
    comparison = HeadComparison(model, tokenizer, load_drafter(drafter, model), rows, settings)
    report = comparison.report(trials, items)
    report.write(output)
    Console().print(*(report.table(value).to_rich() for value in report.runs))
