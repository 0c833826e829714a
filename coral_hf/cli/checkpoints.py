"""Commands that take drafters in and hand them out."""

from pathlib import Path
from typing import Annotated

import typer

from .app import app
from .loading import load_target
from .options import DtypeOption, TargetOption

OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", help="Replace an earlier checkpoint in the output folder.")
]


@app.command("import")
def import_drafter(
    source: Annotated[
        str, typer.Argument(help="An EAGLE-1, EAGLE-2 or HASS checkpoint: a folder or a Hub id.")
    ],
    target: TargetOption,
    output: Annotated[Path, typer.Option(help="Folder of the drafter.")],
    revision: Annotated[str | None, typer.Option(help="Of the checkpoint's Hub id.")] = None,
    dtype: DtypeOption = "auto",
    overwrite: OverwriteOption = False,
) -> None:
    """Turn an EAGLE-1, EAGLE-2 or HASS checkpoint into a drafter."""
    from ..checkpoints import from_eagle, whole_folder

    model, tokenizer = load_target(target, dtype)
    with whole_folder(output, overwrite) as folder:
        drafter = from_eagle(model, source, revision, tokenizer=tokenizer)
        drafter.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    typer.echo(f"The drafter is in {output}.")


@app.command("export")
def export(
    drafter: Annotated[str, typer.Argument(help="The drafter: a folder or a Hub id.")],
    to: Annotated[str, typer.Option(help="'vllm', 'sglang' or 'eagle'.")],
    output: Annotated[Path, typer.Option(help="A new or an empty folder.")],
    target: Annotated[
        str | None, typer.Option(help="The target, whose embeddings are then copied or compared.")
    ] = None,
    dtype: DtypeOption = "auto",
    num_hot_tokens: Annotated[
        int | None,
        typer.Option(
            help="SGLang only: tokens that its drafter may propose, counted in --dataset."
        ),
    ] = None,
    dataset: Annotated[
        list[str] | None, typer.Option(help="Conversations in which proposals are counted.")
    ] = None,
    limit: Annotated[int, typer.Option(help="Conversations that are read of each dataset.")] = 200,
    overwrite: OverwriteOption = False,
) -> None:
    """Write a drafter as vLLM, SGLang or EAGLE's own code reads it."""
    from ..checkpoints import export_drafter

    if num_hot_tokens is not None and (target is None or not dataset):
        raise typer.BadParameter("--num-hot-tokens are counted with --target and --dataset.")
    model, tokenizer = (None, None) if target is None else load_target(target, "auto")
    loaded, own_dtype = _load(drafter, dtype, model)
    hot = None
    if num_hot_tokens is not None:
        hot = _hot_tokens(model, tokenizer, loaded, dataset or [], limit, num_hot_tokens)
    done = export_drafter(loaded, to, output, model, own_dtype, hot, overwrite)
    for note in done.notes:
        typer.echo(note)
    typer.echo(f"The drafter is in {done.folder}. Serve it with\n  {done.command}")


def _load(name: str, dtype: str, model):
    """The drafter and the dtype that it is written in; it runs in that of its target, if any."""
    import torch

    from .. import CoralDrafter

    loaded = CoralDrafter.from_pretrained(name, dtype="auto")
    written = loaded.dtype if dtype == "auto" else getattr(torch, dtype)
    return loaded if model is None else loaded.to(model.device), written


def _hot_tokens(model, tokenizer, drafter, dataset: list[str], limit: int, count: int) -> list[int]:
    """The tokens that a drafter proposes most in conversations, and those that end a text."""
    import torch

    from ..checkpoints import most_frequent, proposal_counts
    from ..training.data import load_conversations, prepare_dataset

    conversations = [load_conversations(path) for path in dataset]
    tokens = [
        torch.tensor([row["input_ids"]])
        for rows in conversations
        for row in prepare_dataset(rows.select(range(min(limit, len(rows)))), tokenizer, 2048)
    ]
    ends = drafter.config.eos_token_id
    always = ends if isinstance(ends, list) else [] if ends is None else [ends]
    return most_frequent(proposal_counts(model, drafter, tokens), count, always)
