"""The commands of `coral-hf`, thin: each calls one public function."""

import logging
from pathlib import Path
from typing import Annotated

import typer

from .loading import count_bigrams, load_drafter, load_prompts, load_target, without_last

app = typer.Typer(
    name="coral-hf",
    help="Speculative decoding with CORAL drafters.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    add_completion=False,
)

TargetOption = Annotated[str, typer.Option(help="The target: a folder or a Hub id.")]
DrafterOption = Annotated[str, typer.Option(help="The drafter: a folder or a Hub id.")]
DtypeOption = Annotated[
    str, typer.Option(help="'auto', 'float32', 'bfloat16', 'float16' or 'float64'.")
]
HeadOption = Annotated[
    str | None, typer.Option(help="Draft head: 'full' or 'routed'; the drafter's own by default.")
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


@app.callback()
def main() -> None:
    """Speculative decoding with CORAL drafters."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("coral_hf").setLevel(logging.INFO)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def train(
    context: typer.Context,
    target: TargetOption,
    dataset: Annotated[
        list[str], typer.Option(help="Conversations: JSON, JSONL, text, a folder or a Hub id.")
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
    from .training.data import load_conversations
    from .training.recipe import save
    from .training.recipe import train as train_stages

    model, tokenizer = load_target(target, dtype)
    rows = without_last([load_conversations(path) for path in dataset], hold_out)
    stages = [_training_arguments(output / "drafter", context.args, stage="drafter")]
    if router_epochs > 0:
        router = {"stage": "router", "num_train_epochs": router_epochs, "max_steps": -1}
        stages.append(_training_arguments(output / "router", context.args, **router))
    drafter = train_stages(model, tokenizer, rows, stages, resume=resume)
    save(drafter, tokenizer, output)
    typer.echo(f"The drafter is in {output}.")


def _training_arguments(folder: Path, extra: list[str], **fields):
    """CoralTrainingArguments of the options that typer left over; `fields` win over them."""
    import torch
    from transformers import HfArgumentParser

    from .training import CoralTrainingArguments

    defaults = {"output_dir": folder, "report_to": "none"}
    defaults["dataloader_pin_memory"] = torch.cuda.is_available()  # else torch warns of it
    options = [*_options(defaults), *extra, *_options(fields)]
    return HfArgumentParser(CoralTrainingArguments).parse_args_into_dataclasses(options)[0]


def _options(fields: dict) -> list[str]:
    return [part for name, value in fields.items() for part in (f"--{name}", str(value))]


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What to say to the target.")],
    target: TargetOption,
    drafter: DrafterOption,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    dtype: DtypeOption = "auto",
    draft_head: HeadOption = None,
    tree_depth: DepthOption = None,
    tree_top_k: TopKOption = None,
    tree_nodes: NodesOption = None,
    verification: RuleOption = None,
    drawn_tree: DrawnOption = None,
) -> None:
    """Generate with a drafter, streaming the text."""
    from transformers import TextStreamer

    from .benchmark import Prompt, encode
    from .benchmark.prompts import user_message

    model, tokenizer = load_target(target, dtype)
    asked = {"messages": (user_message(prompt),)} if tokenizer.chat_template else {"text": prompt}
    tree = _given(
        draft_head=draft_head,
        tree_depth=tree_depth,
        tree_top_k=tree_top_k,
        tree_nodes=tree_nodes,
        verification=verification,
        drawn_tree=drawn_tree,
    )
    sampling = (
        {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    )
    output = model.generate(
        encode(Prompt(task="prompt", id="0", **asked), tokenizer).to(model.device),
        assistant_model=load_drafter(drafter, model),
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        tokenizer=tokenizer,
        max_new_tokens=max_new_tokens,
        return_dict_in_generate=True,
        **sampling,
        **tree,
    )
    stats = output.stats
    passes = len(stats.round_lengths)
    typer.echo(f"[{stats.acceptance_length:.2f} tokens per target pass, {passes} passes]", err=True)


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
    from .demo import DemoSettings, run_demo

    run_demo(DemoSettings(output=output, target=target, dataset=dataset, fresh=fresh))


@app.command()
def benchmark(
    target: TargetOption,
    prompts: PromptsOption,
    output: ReportOption,
    drafter: Annotated[
        str | None, typer.Option(help="The drafter; an untrained one by default.")
    ] = None,
    methods: Annotated[
        list[str], typer.Option("--method", help="plain, coral, bigram, prompt_lookup, assisted.")
    ] = ["plain", "coral"],  # noqa: B006
    limit: LimitOption = None,
    last: LastOption = None,
    user_turn: UserTurnOption = -1,
    assistant: Annotated[
        str | None, typer.Option(help="A small model for the method 'assisted'.")
    ] = None,
    bigram_dataset: Annotated[
        str | None, typer.Option(help="Text that the method 'bigram' counts.")
    ] = None,
    hold_out: Annotated[
        int, typer.Option(help="Rows at the end of --bigram-dataset that are not counted.")
    ] = 0,
    pad_layers: PadOption = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of each answer.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    repeats: Annotated[int, typer.Option(help="Runs of each prompt and method.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    dtype: DtypeOption = "auto",
    speculation: Annotated[
        str, typer.Option(help="'always' drafts in every round, 'adaptive' where it pays.")
    ] = "always",
    draft_head: HeadOption = None,
    tree_depth: DepthOption = None,
    tree_top_k: TopKOption = None,
    tree_nodes: NodesOption = None,
    verification: RuleOption = None,
    drawn_tree: DrawnOption = None,
) -> None:
    """Measure a drafter against plain generation, runs interleaved."""
    from rich.console import Console

    from .benchmark import BenchmarkSettings, run_benchmark

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
        tree=_given(
            draft_head=draft_head,
            tree_depth=tree_depth,
            tree_top_k=tree_top_k,
            tree_nodes=tree_nodes,
            verification=verification,
            drawn_tree=drawn_tree,
        ),
    )
    report = run_benchmark(
        model,
        load_drafter(drafter, model),
        tokenizer,
        items,
        settings,
        assistant=None if assistant is None else load_target(assistant, dtype)[0],
        bigram=None
        if bigram_dataset is None
        else count_bigrams(bigram_dataset, hold_out, model, tokenizer),
    )
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

    from .benchmark import SweepSettings, run_sweep

    tree = _given(
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


def _given(**settings) -> dict:
    """The settings that were given."""
    return {name: value for name, value in settings.items() if value is not None}
