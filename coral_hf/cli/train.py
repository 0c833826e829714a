"""Commands that train a drafter, and make and store what it is trained on."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ..demo import DemoSettings
from ..measure.settings import option
from ..training.planning import PlanSettings
from ..training.regeneration import RegenerationSettings
from .options import DatasetOptions, TargetOptions, TrainingDataOptions, load_drafter

STAGES = Literal["drafter", "joint", "router", "low_rank"]
DEFAULT_STAGES: tuple[STAGES, ...] = ("drafter", "router")  # of a family that has them
ROUTER_EPOCHS = 0.2
LEAST_VOCAB = 8192  # tokens, of which reading all takes longer than a router does


def demo(settings: DemoSettings) -> None:
    """Train a drafter on a small target, load it back, and measure it. Needs no network."""
    from datasets import disable_progress_bars
    from transformers.utils import logging

    from ..demo.run import run_demo

    disable_progress_bars()  # a stage has one bar
    logging.disable_progress_bar()
    run_demo(settings)


@dataclass(kw_only=True)
class TrainOptions(TargetOptions, TrainingDataOptions):
    """What is trained, from where, and in which stages."""

    output: Path = option("Folder of the finished drafter.")
    layers: int | None = option(
        "Layers of a fresh drafter; default: its family's.", None, least=1, excludes="start"
    )
    draft_vocab_size: int | None = option(
        "Tokens that a fresh EAGLE-3 or parallel drafter can propose.",
        None,
        least=1,
        excludes="start",
    )
    start: str | None = option(
        "A drafter to start from, whatever target it was made for; or 'layer' or 'mtp', a layer of"
        " this target.",
        None,
        flag="from",
    )
    lora_r: int | None = option("Train a LoRA of this rank instead.", None, needs="start")
    lora_alpha: int | None = option("Its alpha; twice its rank by default.", None, needs="lora_r")
    lora_target: list[str] = option("Its layers, such as fc; default: all.", [], needs="lora_r")
    stage: list[STAGES] = option("One after the other; default: drafter, and its router.", [])
    fresh_head: bool = option("Replace the drafter's own heads.", False, needs="start")
    router_epochs: float | None = option(
        "Epochs of the router's stage; 0 trains no router. Default: 0.2, and 0 for a vocabulary of"
        f" fewer than {LEAST_VOCAB} tokens, and for a drafter with an LM head of its own.",
        None,
    )
    resume: bool = option("Continue from the last checkpoint.", False)

    def arguments(self, typed: list[str]) -> list:
        """Return the arguments of each stage: the options of transformers that were typed."""
        from ..training import parse_arguments

        kind, found, own = self._kind(typed), [], dict[str, str]()
        if not any(word.split("=")[0] == "--recipe" for word in typed):
            own["recipe"] = kind.recipes[0]
        self.stage = self.stage or self._default_stages(kind)
        for name in self.stage:
            fields: dict[str, Any] = {**own}
            if name == "router" and len(self.stage) > 1:
                epochs = ROUTER_EPOCHS if self.router_epochs is None else self.router_epochs
                if epochs == 0:
                    continue
                # the options are for the drafter's stage, which is longer
                fields |= {"num_train_epochs": epochs, "max_steps": -1}
            folder = self.output / ("adapter" if name == "drafter" and self.lora_r else name)
            found.append(parse_arguments(folder, typed, stage=name, **fields))
        return found

    def _default_stages(self, kind) -> list[STAGES]:
        """Return the stages of a family, without a router that costs more than it saves."""
        from transformers import AutoConfig

        stages = [name for name in DEFAULT_STAGES if name in kind.stages]
        if self.router_epochs is None and "router" in stages:
            config = AutoConfig.from_pretrained(self.target).get_text_config()
            if config.vocab_size < LEAST_VOCAB or has_draft_vocabulary(kind):
                stages.remove("router")
        return stages

    def _kind(self, typed: list[str]):
        """Return the training step of the drafter's family: its own, or the one of a recipe."""
        from ..training import parse_arguments
        from ..training.steps import kind_of_recipe
        from ..training.warm_start import OF_TARGET, kind_of_source

        if self.start and self.start not in OF_TARGET:
            return kind_of_source(self.start)
        return kind_of_recipe(parse_arguments(self.output, typed).recipe)

    def _fields(self, kind, args) -> dict[str, Any]:
        """Return what the config of a fresh drafter is given."""
        fields = dict(kind.fresh_fields(args))
        if self.layers is not None:
            fields["num_hidden_layers"] = self.layers
        if self.draft_vocab_size is not None:
            if not has_draft_vocabulary(kind):
                raise ValueError("--draft-vocab-size goes with --recipe eagle3 or parallel.")
            fields["draft_vocab_size"] = self.draft_vocab_size
        return fields

    def plan(self, stages: list, rows, settings: PlanSettings):
        """Return the plan of the run."""
        from transformers import AutoConfig

        from ..training.planning.plan import plan as make_plan
        from ..training.steps import kind_of_recipe
        from ..training.warm_start import OF_TARGET, own_config

        tokenizer, target = self.load_tokenizer(), AutoConfig.from_pretrained(self.target)
        kind = kind_of_recipe(stages[0].recipe)
        drafter = kind.drafter.config_class.from_target(target, **self._fields(kind, stages[0]))
        if self.start and self.start not in OF_TARGET:
            drafter = own_config(self.start) or drafter
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

    def first_drafter(self, target, tokenizer, args):
        """Return the drafter that training starts from, in fp32, with its adapter if it has one."""
        from ..training.stages import lora, with_adapter
        from ..training.steps import kind_of_recipe
        from ..training.warm_start import start_from

        if self.start is None:
            kind = kind_of_recipe(args.recipe)
            return kind.drafter.from_target(target, **self._fields(kind, args)).float()
        drafter = start_from(target, self.start, tokenizer)
        if self.fresh_head and {"router", "joint"} & set(self.stage):
            drafter.heads.remove_router()
        if self.fresh_head and "low_rank" in self.stage:
            drafter.heads.remove_low_rank_head()
        adapter = self.lora_r and lora(self.lora_r, self.lora_alpha, self.lora_target or None)
        return with_adapter(drafter, "drafter", adapter)


def has_draft_vocabulary(kind) -> bool:
    """Whether drafters of a kind of training step choose the tokens that they can propose."""
    return "draft_vocab_size" in kind.drafter.config_class.own_names()


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
    --learning-rate 1e-3 --num-steps 3. A fresh drafter is of the family that the recipe is for:
    --recipe eagle3 makes an EAGLE-3 drafter, --recipe medusa Medusa heads, --recipe parallel a
    parallel drafter.
    """
    from transformers import set_seed

    from ..hub import publish
    from ..training import pipeline
    from ..training.runs.checkpoints import sole_run

    stages = own.arguments(training_options)
    args = stages[0]
    if own.start is None and args.stage in ("router", "low_rank"):
        raise ValueError(f"--stage {args.stage} goes with --from.")
    if args.push_to_hub and args.hub_model_id is None:
        raise ValueError("--push-to-hub needs --hub-model-id organisation/name.")
    rows = own.rows()
    eval_rows = own.eval_rows(args.eval_strategy)
    own.show_plan(stages, rows)  # before the target is loaded
    # each process of a run has a GPU of its own, to which its trainer moves the target
    target, tokenizer = own.load_target(device="cpu")
    with sole_run(own.output, args.process_index == 0):
        set_seed(args.seed)  # before weights of a drafter or an adapter are drawn
        drafter = own.first_drafter(target, tokenizer, args)
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
