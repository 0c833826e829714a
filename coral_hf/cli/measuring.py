"""Commands that measure a drafter."""

from typing import Annotated, Any

import typer

from .app import app
from .loading import count_bigrams, load_drafter, load_prompts, load_target
from .options import (
    DepthOption,
    DrafterOption,
    DrawnOption,
    DtypeOption,
    HeadOption,
    LastOption,
    LimitOption,
    NodesOption,
    PadOption,
    PromptsOption,
    ReportOption,
    RuleOption,
    TargetOption,
    TopKOption,
    UserTurnOption,
    given,
)

MeasuredDrafterOption = Annotated[
    str | None, typer.Option(help="The drafter; an untrained one by default.")
]
MethodsOption = Annotated[
    list[str], typer.Option("--method", help="plain, coral, bigram, prompt_lookup, assisted.")
]
AssistantOption = Annotated[
    str | None, typer.Option(help="A small model for the method 'assisted'.")
]
BigramOption = Annotated[str | None, typer.Option(help="Text that the method 'bigram' counts.")]
NotCountedOption = Annotated[
    int, typer.Option(help="Rows at the end of --bigram-dataset that are not counted.")
]
SpeculationOption = Annotated[
    str, typer.Option(help="'always' drafts in every round, 'adaptive' where it pays.")
]


@app.command()
def benchmark(
    target: TargetOption,
    prompts: PromptsOption,
    output: ReportOption,
    drafter: MeasuredDrafterOption = None,
    methods: MethodsOption = ["plain", "coral"],  # noqa: B006
    limit: LimitOption = None,
    last: LastOption = None,
    user_turn: UserTurnOption = -1,
    assistant: AssistantOption = None,
    bigram_dataset: BigramOption = None,
    bigram_hold_out: NotCountedOption = 0,
    pad_layers: PadOption = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of each answer.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    repeats: Annotated[int, typer.Option(help="Runs of each prompt and method.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    dtype: DtypeOption = "auto",
    speculation: SpeculationOption = "always",
    draft_head: HeadOption = None,
    tree_depth: DepthOption = None,
    tree_top_k: TopKOption = None,
    tree_nodes: NodesOption = None,
    verification: RuleOption = None,
    drawn_tree: DrawnOption = None,
) -> None:
    """Measure a drafter against plain generation, runs interleaved."""
    from rich.console import Console

    from ..measure import BenchmarkSettings, run_benchmark

    model, tokenizer = load_target(target, dtype, pad_layers)
    items = load_prompts(prompts, limit, last, user_turn)
    settings = BenchmarkSettings(
        methods=methods,
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        temperature=temperature or 1.0,
        repeats=repeats,
        seed=seed,
        speculation=speculation,
        tree=given(
            draft_head=draft_head,
            tree_depth=tree_depth,
            tree_top_k=tree_top_k,
            tree_nodes=tree_nodes,
            verification=verification,
            drawn_tree=drawn_tree,
        ),
    )
    others: dict[str, Any] = {}
    if assistant is not None:
        others["assistant"] = load_target(assistant, dtype)[0]
    if bigram_dataset is not None:
        others["bigram"] = count_bigrams(bigram_dataset, bigram_hold_out, model, tokenizer)
    loaded = load_drafter(drafter, model)
    report = run_benchmark(model, loaded, tokenizer, items, settings, **others)
    report.write(output)
    Console().print(report.to_rich_table())


@app.command()
def sweep(
    target: TargetOption,
    drafter: DrafterOption,
    prompts: PromptsOption,
    output: ReportOption,
    batch_size: Annotated[list[int] | None, typer.Option(help="Prompts at once.")] = None,
    context: Annotated[list[int] | None, typer.Option(help="Tokens before the answer.")] = None,
    limit: LimitOption = None,
    last: LastOption = None,
    user_turn: UserTurnOption = -1,
    pad_layers: PadOption = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of each answer.")] = 128,
    repeats: Annotated[int, typer.Option(help="Runs of each batch and method.")] = 3,
    dtype: DtypeOption = "auto",
    draft_head: HeadOption = None,
    tree_depth: DepthOption = None,
    tree_top_k: TopKOption = None,
    tree_nodes: NodesOption = None,
) -> None:
    """Measure a drafter by batch size and by length of the context."""
    from rich.console import Console

    from ..measure import SweepSettings, run_sweep

    tree = given(
        draft_head=draft_head,
        tree_depth=tree_depth,
        tree_top_k=tree_top_k,
        tree_nodes=tree_nodes,
    )
    settings = SweepSettings(batch_size or [], context or [], max_new_tokens, repeats, tree=tree)
    model, tokenizer = load_target(target, dtype, pad_layers)
    items = load_prompts(prompts, limit, last, user_turn)
    report = run_sweep(model, load_drafter(drafter, model), tokenizer, items, settings)
    report.write(output)
    Console().print(*report.to_rich_tables())
