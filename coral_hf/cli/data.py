"""Commands that show, check, store and make what a drafter is trained on."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..measure.settings import option
from ..training.regeneration import RegenerationSettings
from .options import ChatOptions, DatasetOptions, TargetOptions, load_drafter


@dataclass(kw_only=True)
class DataOptions(ChatOptions, DatasetOptions):
    """Which rows are shown, or how a dataset is checked."""

    action: Literal["show", "check"] = option("What to do.", positional=True)
    target: str = option("The target or its tokenizer alone: a folder or a Hub id.")
    row: int = option("The first row shown, from 0; -1 is the last.", 0)
    limit: int = option("Rows shown.", 1, least=1)
    max_length: int | None = option("Cut rows here; `check` does at 2048.", None, least=1)
    num_proc: int | None = option("Processes that check.", None, least=1)
    json: bool = option("Print the check as JSON.", False)


def data(own: DataOptions) -> None:
    """Show what is read and trained of rows, or count what training would read of a dataset.

    `show` prints tokens in colour or, through a pipe, with marks. `check` prints numbers and
    strange rows; it exits with 1 if a row cannot be read.
    """
    from ..training.data import check_dataset, show

    rows = own.conversations()
    chosen = range(len(rows))[own.row :][: own.limit]
    if own.action == "show" and not chosen:
        raise ValueError(f"--row is {own.row}, but the dataset has {len(rows)} rows, from 0.")
    tokenizer = own.load_tokenizer()
    if own.action == "show":
        return show(((index, rows[index]) for index in chosen), tokenizer, own.max_length)
    found = check_dataset(rows, tokenizer, own.max_length or 2048, own.num_proc, own.vocab_size())
    if own.json:
        print(json.dumps(found, ensure_ascii=False))
    else:
        for name, value in found.items():
            parts = value.items() if isinstance(value, dict) else [("", value)]
            lines = [f"{key}: {part}" if key != "" else f"{part:,}" for key, part in parts]
            shown = f"\n{'':24}".join(lines)
            print(f"{name.removeprefix('num_').replace('_', ' '):24}{shown}")
    if found["unread"]:
        sys.exit(1)


@dataclass(kw_only=True)
class FeaturesOptions(TargetOptions, DatasetOptions):
    """Which features are stored, and how."""

    output: Path = option("Folder of the features.")
    # not read by --check
    target: str = option("The target: a folder or a Hub id.", "")
    dataset: list[str] = option("Conversations: a file, a folder or a Hub id.", [])
    max_length: int = option("Tokens after which a row is cut.", 2048, least=1)
    packing: bool = option("Put several conversations in each row.", False)
    share_prompts: bool = option("Put answers with the same prompt in one row.", True)
    recipe: str = option("'eagle3' and 'parallel' read inner layers too.", "one_step_first")
    start: str | None = option("A drafter to be trained.", None, flag="from", excludes="recipe")
    format: Literal["bfloat16", "int8"] = option("'int8' takes half the space.", "bfloat16")
    batch_size: int = option("Rows that are read at once.", 8, least=1)
    shard_megabytes: int = option("Size of a file, about.", 1000, least=1)
    plan: bool = option("Print time and space that it takes, and stop.", False)
    check: bool = option("Compare files and checksums, and stop.", False)

    def layers(self, target) -> tuple[int, ...]:
        """Return the layers that are stored, of a target with this config."""
        from transformers import AutoConfig

        from ..training.steps import kind_of_recipe, step_kind

        if self.start is not None:
            config = AutoConfig.from_pretrained(self.start)
            return step_kind(config.model_type).layers(config)
        kind = kind_of_recipe(self.recipe)
        return kind.layers(kind.drafter.config_class.from_target(target))


def features(own: FeaturesOptions) -> None:
    """Store the target's features on disk, so that training runs need not compute them.

    An interrupted run resumes where it stopped. Train with `coral-hf train --dataset` and this
    folder.
    """
    from transformers import AutoConfig

    from ..training.data import prepare_dataset
    from ..training.data.dataset import warn_of_other_ends
    from ..training.features import CachedFeatures, plan_features, write_features
    from ..training.inputs import joined_rows

    output, shard_bytes = own.output, own.shard_megabytes * 10**6
    if own.check:
        index = CachedFeatures(output, checksums=True).index
        print(f"{output} is whole: {index.num_rows} rows of {index.target}.")
        return
    if not own.target or not own.dataset:
        raise ValueError("Writing features needs --target and --dataset.")
    conversations, tokenizer = own.conversations(), own.load_tokenizer()
    # the rows as the trainer would read them
    config = AutoConfig.from_pretrained(own.target)
    text, layers = config.get_text_config(decoder=True), own.layers(config)
    rows = prepare_dataset(conversations, tokenizer, own.max_length, vocab_size=text.vocab_size)
    rows = joined_rows(rows, own.max_length, own.share_prompts, own.packing)
    plan = plan_features(config, rows, output, own.format, shard_bytes, layers)
    print(plan)
    if not own.plan:
        plan.check_room(sum(path.stat().st_size for path in output.glob("features-*.safetensors")))
        target, tokenizer = own.load_target()
        warn_of_other_ends(tokenizer, target)
        sizes = own.batch_size, shard_bytes
        index = write_features(target, rows, output, own.format, *sizes, layers)
        print(f"The features are in {output}. Storing them lost {index.lost:.2%} (RMS).")


@dataclass(kw_only=True)
class RegenerateOptions(TargetOptions, DatasetOptions):
    """What is answered, and where the answers go."""

    output: Path = option("JSONL file of the answers.")
    limit: int | None = option("Only the first rows.", None, least=1)
    drafter: str | None = option("A drafter of the target, to be faster.", None)
    endpoint: str | None = option("URL with OpenAI's API.", None, excludes="drafter dtype")
    endpoint_model: str | None = option("The target's name there.", None, needs="endpoint")


def regenerate(own: RegenerateOptions, settings: RegenerationSettings) -> None:
    """Let the target answer a dataset's prompts itself; an interrupted run resumes."""
    from ..training.regeneration.endpoint import Endpoint
    from ..training.regeneration.regenerate import regenerate as answer

    rows, drafter = own.conversations(own.limit), None
    if own.endpoint:
        target = Endpoint(own.endpoint, own.target, own.endpoint_model)
        tokenizer = own.load_tokenizer()
    else:
        target, tokenizer = own.load_target()
        drafter = load_drafter(own.drafter, target) if own.drafter else None
    done = answer(target, tokenizer, rows, own.output, settings, drafter)
    print(f"{done.num_rows} rows are in {own.output}; {done.num_unfinished} answers were cut off,")
    print(f"{done.num_left_out} rows have no answer and are left out.")
