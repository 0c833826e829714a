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
    cache_dir: Annotated[
        Path | None, typer.Option(help="Where a Hub id is downloaded to; its cache by default.")
    ] = None,
    local_files_only: Annotated[
        bool, typer.Option("--local-files-only", help="Read a Hub id from the cache alone.")
    ] = False,
    dtype: DtypeOption = "auto",
    overwrite: OverwriteOption = False,
) -> None:
    """Turn an EAGLE-1, EAGLE-2 or HASS checkpoint into a drafter."""
    from ..checkpoints import (
        DRAFTER_FILES,
        Download,
        check_output,
        config_folder,
        from_eagle,
        read_shape,
        whole_folder,
    )

    _check_dtype(dtype)
    check_output(output, overwrite, DRAFTER_FILES, (source, target))
    download = Download(revision, cache_dir, local_files_only=local_files_only)
    read_shape(config_folder(source, download))  # before the target is loaded, which takes longer
    model, tokenizer = load_target(target, dtype)
    with whole_folder(output, overwrite, DRAFTER_FILES, (source, target)) as folder:
        drafter = from_eagle(model, source, tokenizer=tokenizer, **vars(download))
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
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="Conversations that are read of each dataset; 200 by default."),
    ] = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Write a drafter as vLLM, SGLang or EAGLE's own code reads it."""
    from ..checkpoints import check_drafter, check_output, export_drafter, export_files

    _check_dtype(dtype)
    _check_engine(to, num_hot_tokens)
    _check_counting(num_hot_tokens, target, dataset, limit)
    check_output(output, overwrite, export_files(to), (drafter, target))
    check_drafter(drafter)
    model, tokenizer = (None, None) if target is None else load_target(target, "auto")
    loaded, own_dtype = _load(drafter, dtype, model)
    hot = None
    if num_hot_tokens is not None:
        hot = _hot_tokens(model, tokenizer, loaded, dataset or [], limit or 200, num_hot_tokens)
    done = export_drafter(loaded, to, output, model, own_dtype, hot, overwrite)
    for note in done.notes:
        typer.echo(note)
    typer.echo(f"The drafter is in {done.folder}. Serve it with\n  {done.command}")


def _check_dtype(dtype: str) -> None:
    from ..checkpoints import DTYPES

    if dtype not in ("auto", *DTYPES):
        raise typer.BadParameter(f"--dtype is {dtype!r}; use 'auto' or one of {', '.join(DTYPES)}.")


def _check_engine(to: str, num_hot_tokens: int | None) -> None:
    """Refuse what no engine reads before anything is loaded."""
    from ..checkpoints import ENGINES

    if to not in ENGINES:
        raise typer.BadParameter(f"--to is {to!r}; use one of {', '.join(ENGINES)}.")
    if num_hot_tokens is not None and to != "sglang":
        raise typer.BadParameter(f"--num-hot-tokens are for --to sglang; leave it out for {to}.")


def _check_counting(
    count: int | None, target: str | None, dataset: list[str] | None, limit: int | None
) -> None:
    """Refuse options of the hot tokens that would do nothing."""
    if count is not None and (target is None or not dataset):
        raise typer.BadParameter("--num-hot-tokens are counted with --target and --dataset.")
    if count is None and (dataset or limit is not None):
        raise typer.BadParameter(
            "--dataset and --limit are read to count hot tokens; pass --num-hot-tokens too."
        )


def _load(name: str, dtype: str, model):
    """The drafter and the dtype that it is written in; it runs in that of its target, if any."""
    from .. import CoralDrafter
    from ..checkpoints import DTYPES

    loaded = CoralDrafter.from_pretrained(name, dtype="auto")
    written = loaded.dtype if dtype == "auto" else DTYPES[dtype]
    return loaded if model is None else loaded.to(model.device), written


def _hot_tokens(model, tokenizer, drafter, dataset: list[str], limit: int, count: int) -> list[int]:
    """The tokens that a drafter proposes most in conversations, and those that end a text."""
    import torch

    from ..checkpoints import check_size, most_frequent, proposal_counts
    from ..training.data import load_conversations, prepare_dataset

    ends = drafter.config.eos_token_id
    always = ends if isinstance(ends, list) else [] if ends is None else [ends]
    check_size(count, drafter.config.vocab_size, always)
    conversations = [load_conversations(path) for path in dataset]
    tokens = [
        torch.tensor([row["input_ids"]])
        for rows in conversations
        for row in prepare_dataset(rows.select(range(min(limit, len(rows)))), tokenizer, 2048)
    ]
    found = most_frequent(proposal_counts(model, drafter, tokens), count, always)
    if len(found) < count:
        typer.echo(
            f"Only {len(found)} of {count} hot tokens: the drafter proposes no others in these"
            " conversations. Count in more of them (--dataset, --limit)."
        )
    return found
