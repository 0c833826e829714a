"""Options that several commands have."""

from pathlib import Path
from typing import Annotated

import typer

TargetOption = Annotated[str, typer.Option(help="The target: a folder or a Hub id.")]
DrafterOption = Annotated[str, typer.Option(help="The drafter: a folder or a Hub id.")]
DtypeOption = Annotated[
    str, typer.Option(help="'auto', 'float32', 'bfloat16', 'float16' or 'float64'.")
]
HeadOption = Annotated[
    str | None,
    typer.Option(
        help="Draft head: 'full', 'routed', 'frequency', 'low_rank'; the drafter's own by default."
    ),
]
DepthOption = Annotated[int | None, typer.Option(help="Levels of the draft tree.")]
TopKOption = Annotated[
    int | None, typer.Option(help="Children of an expanded node; 1 drafts chains.")
]
RuleOption = Annotated[
    str | None, typer.Option(help="When sampling: 'token', 'traversal' or 'block'.")
]
DrawnOption = Annotated[
    bool | None, typer.Option(help="When sampling: draw the tree's tokens or choose them.")
]
NodesOption = Annotated[
    int | None, typer.Option(help="Rows of the target's pass, the root included.")
]
PromptsOption = Annotated[
    list[Path], typer.Option(help="MT-bench, HumanEval, GSM8K, Spec-Bench, messages or text.")
]
ReportOption = Annotated[Path, typer.Option(help="Folder of report.json, report.md and the plots.")]
LimitOption = Annotated[int | None, typer.Option(help="Prompts of each file at most.")]
LastOption = Annotated[int | None, typer.Option(help="Only the last rows of each file.")]
UserTurnOption = Annotated[
    int, typer.Option(help="Which user turn of a dialogue is answered; -1 is the last.")
]
PadOption = Annotated[int | None, typer.Option(help="Measure on a target padded to this depth.")]


def given(**settings) -> dict:
    """The settings that were given."""
    return {name: value for name, value in settings.items() if value is not None}
