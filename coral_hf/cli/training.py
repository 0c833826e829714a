"""Commands that make a drafter."""

from pathlib import Path
from typing import Annotated

import typer

from .app import app
from .loading import load_held_out, load_rows, load_target
from .options import DtypeOption, TargetOption

DatasetsOption = Annotated[
    list[str], typer.Option(help="A file, a folder, a Hub id; or cached features.")
]
HoldOutOption = Annotated[
    int,
    typer.Option(
        help="Leave out the last rows of each dataset; with --eval_strategy they are evaluated."
    ),
]
EvalDatasetOption = Annotated[
    list[str] | None, typer.Option(help="Evaluated with --eval_strategy, not trained on.")
]
StageOption = Annotated[
    list[str],
    typer.Option(help="'drafter', 'joint', 'router', 'low_rank', one after the other."),
]
FreshHeadOption = Annotated[
    bool, typer.Option(help="Train new heads in place of those that the drafter has.")
]
RouterEpochsOption = Annotated[
    float, typer.Option(help="Epochs of the router's stage; 0 trains no router.")
]
FirstDrafterOption = Annotated[
    str | None, typer.Option(help="A drafter of this target, to be trained on.")
]
WarmStartOption = Annotated[
    str | None,
    typer.Option(
        help="Start from 'layer', the target's last layer, or from a folder or Hub id: a drafter of"
        " another target of the same width, an EAGLE checkpoint."
    ),
]
LoraRankOption = Annotated[
    int | None, typer.Option(help="Train a LoRA of this rank, not the drafter itself.")
]
LoraAlphaOption = Annotated[
    int | None, typer.Option(help="Alpha of the LoRA; twice its rank by default.")
]
LoraTargetOption = Annotated[
    list[str] | None, typer.Option(help="Layers of the LoRA: fc, q_proj, ...; all by default.")
]


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def train(
    context: typer.Context,
    target: TargetOption,
    dataset: DatasetsOption,
    output: Annotated[Path, typer.Option(help="Folder of the finished drafter.")],
    hold_out: HoldOutOption = 0,
    eval_dataset: EvalDatasetOption = None,
    layers: Annotated[int, typer.Option(help="Decoder layers of a fresh drafter.")] = 1,
    dtype: DtypeOption = "auto",
    drafter: FirstDrafterOption = None,
    warm_start: WarmStartOption = None,
    lora_r: LoraRankOption = None,
    lora_alpha: LoraAlphaOption = None,
    lora_target: LoraTargetOption = None,
    stage: StageOption = ["drafter", "router"],  # noqa: B006
    fresh_head: FreshHeadOption = False,
    router_epochs: RouterEpochsOption = 0.2,
    resume: Annotated[bool, typer.Option(help="Continue from the last checkpoint.")] = False,
) -> None:
    """Train a drafter and its router, or the stages that are given.

    Every other option is one of CoralTrainingArguments, as in any Trainer script: --learning_rate
    1e-3 --num_steps 3.
    """
    from ..training import parse_arguments
    from ..training.adapters import with_adapter
    from ..training.runs.run_lock import sole_run
    from ..training.stages import save
    from ..training.stages import train as train_stages

    adapter = _lora(drafter, lora_r, lora_alpha, lora_target)
    # each process of a run has a GPU of its own, to which its trainer moves the target
    model, tokenizer = load_target(target, dtype, device="cpu")
    first = _first_drafter(model, tokenizer, drafter, warm_start, layers)
    if fresh_head:
        _take_heads_away(first, stage, drafter is not None)
    first = with_adapter(first, "drafter", adapter)
    rows = load_rows(dataset, hold_out)
    chosen = _stages(stage, router_epochs, drafter is not None)
    folders = {"drafter": "drafter" if adapter is None else "adapter"}
    stages = [
        parse_arguments(output / folders.get(name, name), context.args, stage=name, **fields)
        for name, fields in chosen.items()
    ]
    if stages[0].push_to_hub and stages[0].hub_model_id is None:
        raise typer.BadParameter("--push_to_hub needs --hub_model_id organisation/name.")
    held_out = None
    if stages[0].eval_strategy != "no":
        held_out = load_rows(eval_dataset, 0) if eval_dataset else load_held_out(dataset, hold_out)
    # not before the arguments, which say how processes find each other
    with sole_run(output, stages[0].process_index == 0):
        trained = train_stages(model, tokenizer, rows, stages, first, resume, held_out)
        save(trained, tokenizer, output)
        typer.echo(f"The drafter is in {output}.")
        _push(output, stages[0])


def _push(folder: Path, args) -> None:
    """Publish what the stages, which push as they go, have become together."""
    from accelerate import PartialState

    from ..hub import publish

    if args.push_to_hub and PartialState().is_main_process:
        options = {"private": args.hub_private_repo, "revision": args.hub_revision}
        done = publish(folder, args.hub_model_id, token=args.hub_token, **options)
        typer.echo(f"Published: {done.commit_url}")


def _stages(names: list[str], router_epochs: float, has_drafter: bool) -> dict[str, dict]:
    """Stages and what is set for them alone, in their order."""
    first = next((name for name in names if name not in ("drafter", "joint")), None)
    if first == names[0] and not has_drafter:
        raise typer.BadParameter(
            f"--stage {first} trains a head of a trained drafter; pass it with --drafter."
        )
    found: dict[str, dict] = {name: {} for name in names}
    if len(names) > 1 and "router" in found:
        # the options count for the drafter's stage, which is longer
        found["router"] = {"num_train_epochs": router_epochs, "max_steps": -1}
        if router_epochs == 0:
            del found["router"]
    return found


def _take_heads_away(drafter, stages: list[str], is_given: bool) -> None:
    """Of a drafter that was given, the heads that stages train: they make new ones."""
    if not is_given:
        raise typer.BadParameter("--fresh-head is for the heads of a drafter; pass --drafter too.")
    if {"router", "joint"} & set(stages):
        drafter.heads.remove_router()
    if "low_rank" in stages:
        drafter.heads.remove_low_rank_head()


def _lora(drafter: str | None, rank: int | None, alpha: int | None, targets: list[str] | None):
    """The config of the LoRA that was asked for, if any."""
    from ..training.adapters import lora

    if rank is None and (alpha is not None or targets):
        raise typer.BadParameter("--lora-alpha and --lora-target are of a LoRA; pass --lora-r too.")
    if rank is None:
        return None
    if drafter is None:
        raise typer.BadParameter("--lora-r adapts a trained drafter; pass it with --drafter.")
    return lora(rank, alpha, targets)


def _first_drafter(target, tokenizer, drafter: str | None, source: str | None, layers: int):
    """The drafter that training starts from, in fp32."""
    import torch

    from ..drafters.coral.modeling import CoralDrafter
    from ..training.warm_start import warm_start

    if drafter is not None and source is not None:
        raise typer.BadParameter(
            "--drafter and --warm-start are two drafters to start from; pass one."
        )
    if source is not None:
        return warm_start(target, source, tokenizer)
    if layers != 1 and drafter is not None:
        raise typer.BadParameter(
            f"--layers {layers} is of a fresh drafter; leave it out with --drafter."
        )
    if drafter is None:
        return CoralDrafter.from_target(target, num_hidden_layers=layers).float()
    return CoralDrafter.from_pretrained(drafter, dtype=torch.float32).to(target.device)


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
