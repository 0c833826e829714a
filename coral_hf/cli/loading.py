"""What commands of `coral-hf` work on, from the names that a user types.

In: folders, Hub ids, files. Out: models, prompts, datasets. What is slow to import is imported
when it is needed.
"""

from pathlib import Path


def load_target(name: str, dtype: str, pad_layers: int | None = None, device: str | None = None):
    """A target, on the GPU where there is one, padded to a depth if asked for; its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype).to(device)
    if pad_layers is not None:
        from ..measure import pad_target

        model = pad_target(model, pad_layers)
    return model.eval(), AutoTokenizer.from_pretrained(name)


def load_tokenizer(name: str):
    """The tokenizer of a target, without the target."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(name)


def load_drafter(name: str | None, target):
    """A drafter in its target's dtype and on its device; an untrained one without a name."""
    from transformers import AutoModel

    from .. import CoralDrafter

    if name is None:
        return CoralDrafter.from_target(target).eval()
    return AutoModel.from_pretrained(name, dtype=target.dtype).to(target.device).eval()


def load_prompts(paths: list[Path], limit: int | None, last: int | None, user_turn: int) -> list:
    """The prompts of several files, see `read_prompts`."""
    from ..measure import read_prompts

    files = (read_prompts(path, limit=limit, last=last, user_turn=user_turn) for path in paths)
    return [prompt for prompts in files for prompt in prompts]


def count_bigrams(dataset: str, hold_out: int, target, tokenizer):
    """A BigramDrafter of the text of conversations, but for the last rows."""
    import torch

    from ..measure import BigramDrafter
    from ..training.data import prepare_dataset

    rows = without_last([dataset], hold_out)
    tokens = (torch.tensor(row["input_ids"]) for row in prepare_dataset(rows, tokenizer, 2048))
    return BigramDrafter.from_texts(tokens, target.config.get_text_config().vocab_size)


def without_last(paths: list[str], count: int):
    """The conversations of several datasets, each but for its last ones."""
    from ..training.data import join_datasets

    return join_datasets([_split(path, count)[0] for path in paths], paths)


def _split(path: str, count: int):
    """The conversations of a dataset without its last ones, and those."""
    import typer

    from ..training.data import load_conversations

    rows = load_conversations(path)
    if not 0 <= count < len(rows):
        raise typer.BadParameter(f"--hold-out {count} of {len(rows)} rows leaves none to train on.")
    cut = len(rows) - count
    last = range(cut, len(rows)) if count else []
    return rows.select(range(cut)), rows.select(last)


def load_held_out(paths: list[str], hold_out: int):
    """The last rows of each dataset, which `load_rows` leaves out."""
    import typer

    from ..training.data import join_datasets

    if hold_out < 1:
        raise typer.BadParameter(
            "--eval_strategy needs rows to evaluate: give --hold-out 200, or --eval-dataset."
        )
    return join_datasets([_split(path, hold_out)[1] for path in paths], paths)


def load_rows(paths: list[str], hold_out: int):
    """Conversations but for the last rows of each dataset, or the rows of a feature cache."""
    import typer

    from ..training.features import INDEX, CachedFeatures

    cached = [path for path in paths if (Path(path) / INDEX).is_file()]
    if not cached:
        return without_last(paths, hold_out)
    if len(paths) > 1 or hold_out:
        raise typer.BadParameter(
            f"{cached[0]} is a feature cache: it is read alone and whole. Give `--hold-out` and"
            " all datasets to `coral-hf features`."
        )
    return CachedFeatures(cached[0])
