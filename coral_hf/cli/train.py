"""Commands that train a drafter, and make and store what it is trained on."""

from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from ..demo import DemoSettings
from ..measure.settings import option
from ..training.planning import PlanSettings
from ..training.regeneration import RegenerationSettings
from .options import DatasetOptions, TargetOptions, load_drafter

STAGES = Literal["drafter", "joint", "router", "low_rank"]


def demo(settings: DemoSettings) -> None:
    """Train a drafter on a small target, load it back, and measure it. Needs no network."""
    from ..demo.run import run_demo

    run_demo(settings)


@dataclass(kw_only=True)
class TrainOptions(TargetOptions, DatasetOptions):
    """What is trained, from where, and in which stages."""

    output: Path = option("Folder of the finished drafter.")
    eval_dataset: list[str] = option("For --eval-strategy, in place of --hold-out.", [])
    layers: int = option("Layers of a fresh drafter.", 1, least=1, excludes="drafter warm_start")
    drafter: str | None = option("A drafter of this target, to be trained further.", None)
    warm_start: str | None = option(
        "'layer', the target's, or a drafter.", None, excludes="drafter"
    )
    lora_r: int | None = option("Train a LoRA of this rank instead.", None, needs="drafter")
    lora_alpha: int | None = option("Its alpha; twice its rank by default.", None, needs="lora_r")
    lora_target: list[str] = option("Its layers, such as fc; default: all.", [], needs="lora_r")
    stage: list[STAGES] = option("Trained one after the other.", ["drafter", "router"])
    fresh_head: bool = option("Replace the drafter's own heads.", False, needs="drafter")
    router_epochs: float = option("Epochs of the router's stage; 0 trains no router.", 0.2)
    resume: bool = option("Continue from the last checkpoint.", False)

    def arguments(self, typed: list[str]) -> list:
        """Return the arguments of each stage: the options of transformers that were typed."""
        from ..training import parse_arguments

        found = []
        for name in self.stage:
            fields: dict[str, float] = {}
            if name == "router" and len(self.stage) > 1:
                if self.router_epochs == 0:
                    continue
                # the options are for the drafter's stage, which is longer
                fields = {"num_train_epochs": self.router_epochs, "max_steps": -1}
            folder = self.output / ("adapter" if name == "drafter" and self.lora_r else name)
            found.append(parse_arguments(folder, typed, stage=name, **fields))
        return found

    def eval_rows(self):
        """Return the conversations that are evaluated."""
        if self.eval_dataset:
            ignored = self.ignore_columns
            return DatasetOptions(dataset=self.eval_dataset, ignore_columns=ignored).rows()
        if not self.hold_out:
            raise ValueError("--eval-strategy goes with --hold-out or --eval-dataset.")
        return self.conversations(held_out=True)

    def plan(self, stages: list, rows, settings: PlanSettings):
        """Return the plan of the run."""
        from transformers import AutoConfig

        from ..drafters.coral import CoralConfig
        from ..training.planning.plan import plan as make_plan

        tokenizer, target = self.load_tokenizer(), AutoConfig.from_pretrained(self.target)
        drafter = CoralConfig.from_target(target, num_hidden_layers=self.layers)
        if self.drafter is not None:
            with suppress(OSError):  # the folder of an adapter has no config of its drafter
                drafter = CoralConfig.from_pretrained(self.drafter)
        settings = replace(settings, lora_rank=self.lora_r)
        return make_plan(self.target, rows, stages, settings, tokenizer, self.dtype, drafter)

    def show_plan(self, stages: list, rows) -> None:
        """Print the plan of the run, and raise a ValueError if the disk cannot hold it."""
        try:
            planned = self.plan(stages, rows, PlanSettings(measure=False))
        except (ValueError, OSError):  # of what was given
            raise
        except Exception as error:  # whatever a target's code raises without data
            print(f"This run cannot be planned: {error!r}.", flush=True)
            return
        if stages[0].process_index == 0:
            print(planned, flush=True)
        planned.check_disk()

    def first_drafter(self, target, tokenizer):
        """Return the drafter that training starts from, in fp32, with its adapter if it has one."""
        from ..drafters.coral import CoralDrafter
        from ..training.adapters import lora, with_adapter
        from ..training.warm_start import warm_start

        if self.warm_start is not None:
            return warm_start(target, self.warm_start, tokenizer)
        if self.drafter is None:
            return CoralDrafter.from_target(target, num_hidden_layers=self.layers).float()
        drafter = CoralDrafter.from_pretrained(self.drafter, dtype="float32")
        if self.fresh_head and {"router", "joint"} & set(self.stage):
            drafter.heads.remove_router()
        if self.fresh_head and "low_rank" in self.stage:
            drafter.heads.remove_low_rank_head()
        adapter = self.lora_r and lora(self.lora_r, self.lora_alpha, self.lora_target or None)
        return with_adapter(drafter.to(target.device), "drafter", adapter)


@dataclass(kw_only=True)
class PlanOptions(TrainOptions):
    """The run that is planned: the options of `coral-hf train`."""

    output: Path = option("Folder of the finished drafter.", Path("coral-drafter"))


def plan(own: PlanOptions, settings: PlanSettings, training_options: list[str]) -> None:
    """Plan a training run: its memory, disk and hours, and what makes it fit.

    Takes the options of `coral-hf train`, and loads no weights unless it times a few steps.
    """
    print(own.plan(own.arguments(training_options), own.rows(), settings))


def train(own: TrainOptions, training_options: list[str]) -> None:
    """Train a drafter and its router, or the stages that are given.

    Every other option is one of CoralTrainingArguments, as in any Trainer script:
    --learning-rate 1e-3 --num-steps 3.
    """
    from transformers import set_seed

    from ..hub import publish
    from ..training import pipeline
    from ..training.runs.checkpoints import sole_run

    if own.drafter is None and own.stage[0] in ("router", "low_rank"):
        raise ValueError(f"--stage {own.stage[0]} goes with --drafter.")
    stages = own.arguments(training_options)
    args = stages[0]
    if args.push_to_hub and args.hub_model_id is None:
        raise ValueError("--push-to-hub needs --hub-model-id organisation/name.")
    rows = own.rows()
    eval_rows = own.eval_rows() if args.eval_strategy != "no" else None
    own.show_plan(stages, rows)  # before the target is loaded
    # each process of a run has a GPU of its own, to which its trainer moves the target
    target, tokenizer = own.load_target(device="cpu")
    with sole_run(own.output, args.process_index == 0):
        set_seed(args.seed)  # before weights of a drafter or an adapter are drawn
        drafter = own.first_drafter(target, tokenizer)
        inputs = (target, tokenizer, rows, stages, drafter, own.resume, eval_rows)
        trained = pipeline.train(*inputs)
        pipeline.save(trained, tokenizer, own.output)
        print(f"The drafter is in {own.output}.")
        if args.push_to_hub and args.process_index == 0:
            # each stage pushes its own checkpoints; here goes the drafter with all of its heads
            options = {"private": args.hub_private_repo, "token": args.hub_token}
            done = publish(own.output, args.hub_model_id, revision=args.hub_revision, **options)
            print(f"Published: {done.commit_url}")


@dataclass(kw_only=True)
class RegenerateOptions(TargetOptions, DatasetOptions):
    """What is answered, and where the answers go."""

    output: Path = option("JSONL file of the answers.")
    limit: int | None = option("Only the first rows.", None, least=1)
    drafter: str | None = option("A drafter of the target, to be faster.", None)
    endpoint: str | None = option(
        "URL of a server that holds the target, with OpenAI's API.", None, excludes="drafter dtype"
    )
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


@dataclass(kw_only=True)
class FeaturesOptions(TargetOptions, DatasetOptions):
    """Which features are stored, and how."""

    output: Path = option("Folder of the features.")
    # not read by --check and --delete
    target: str = option("The target: a folder or a Hub id.", "")
    dataset: list[str] = option("Conversations: a file, a folder or a Hub id.", [])
    max_length: int = option("Tokens after which a row is cut.", 2048, least=1)
    packing: bool = option("Put several conversations in each row.", False)
    share_prompts: bool = option("Put answers with the same prompt in one row.", True)
    format: Literal["bfloat16", "int8"] = option("'int8' takes half the space.", "bfloat16")
    batch_size: int = option("Rows that are read at once.", 8, least=1)
    shard_megabytes: int = option("Size of a file, about.", 1000, least=1)
    plan: bool = option("Print time and space that it takes, and stop.", False)
    check: bool = option("Compare files and checksums, and stop.", False)
    delete: bool = option("Delete the features, and stop.", False)


def features(own: FeaturesOptions) -> None:
    """Store the target's features on disk, so that training runs need not compute them.

    An interrupted run resumes where it stopped. Train with `coral-hf train --dataset` and this
    folder.
    """
    from transformers import AutoConfig

    from ..training.data import prepare_dataset
    from ..training.data.dataset import warn_of_other_ends
    from ..training.features import CachedFeatures, delete_features, plan_features, write_features
    from ..training.features.writer import cache_bytes, check_room
    from ..training.train_dataset import joined_rows

    output, shard_bytes = own.output, own.shard_megabytes * 10**6
    if own.delete:
        print(f"Deleted {delete_features(output) / 1e9:.3g} GB in {output}.")
        return
    if own.check:
        index = CachedFeatures(output, checksums=True).index
        print(f"{output} is whole: {index.num_rows} rows of {index.target}.")
        return
    if not own.target or not own.dataset:
        raise ValueError("Writing features needs --target and --dataset.")
    conversations, tokenizer = own.conversations(), own.load_tokenizer()
    # the rows as the trainer would read them
    text = AutoConfig.from_pretrained(own.target).get_text_config(decoder=True)
    rows = prepare_dataset(conversations, tokenizer, own.max_length, vocab_size=text.vocab_size)
    rows = joined_rows(rows, own.max_length, own.share_prompts, own.packing)
    written = sum(path.stat().st_size for path in output.glob("features-*.safetensors"))
    needed = cache_bytes(rows, text.hidden_size, own.format)
    if not own.plan:
        check_room(needed - written, output)  # before the target is loaded
    target, tokenizer = own.load_target()
    warn_of_other_ends(tokenizer, target)
    print(plan_features(target, rows, output, own.format, shard_bytes))
    if not own.plan:
        index = write_features(target, rows, output, own.format, own.batch_size, shard_bytes)
        print(f"The features are in {output}. Storing them lost {index.lost:.2%} (RMS).")
