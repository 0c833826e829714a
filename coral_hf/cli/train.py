"""Commands that plan a training run, train a drafter, and train a small model to draft."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ..measure.settings import option
from ..training.planning import PlanSettings
from .options import TargetOptions, TrainingDataOptions

STAGES = Literal["drafter", "joint", "router"]
LOSSES = Literal["ce", "kl", "tvd", "tvd++"]  # of a small language model
DEFAULT_STAGES: tuple[STAGES, ...] = ("drafter", "router")  # of a family that has them
ROUTER_EPOCHS = 0.2
LEAST_VOCAB = 8192  # tokens, of which reading all takes longer than a router does


@dataclass(kw_only=True)
class TrainOptions(TargetOptions, TrainingDataOptions):
    """What is trained, from where, and in which stages."""

    output: Path = option("Folder of the finished drafter.", Path("coral-drafter"))
    layers: int | None = option("Layers of a fresh drafter.", None, least=1, excludes="start")
    draft_vocab_size: int | None = option(
        "Tokens of a fresh EAGLE-3 or parallel drafter.", None, least=1, excludes="start"
    )
    start: str | None = option("A drafter of any target to start from.", None, flag="from")
    lora_r: int | None = option("Train a LoRA of this rank instead.", None, needs="start")
    lora_alpha: int | None = option("Its alpha; twice its rank by default.", None, needs="lora_r")
    lora_target: list[str] = option("Its layers, such as fc; default: all.", [], needs="lora_r")
    stage: list[STAGES] = option("One after the other; default: drafter, and its router.", [])
    fresh_head: bool = option("Replace the drafter's own heads.", False, needs="start")
    router_epochs: float | None = option(
        f"Of the router. Default: 0.2; 0 below {LEAST_VOCAB} tokens or with an own LM head.", None
    )
    resume: bool = option("Continue from the last checkpoint.", False)
    kind: Any = None  # the training step of the drafter's family, once `arguments` has chosen it

    def arguments(self, typed: list[str]) -> list:
        """Return the arguments of each stage: the options of transformers that were typed."""
        from ..training import parse_arguments
        from ..training.steps import kind_of_recipe
        from ..training.warm_start import kind_of_source

        if self.start:
            self.kind = kind_of_source(self.start)
        else:
            self.kind = kind_of_recipe(parse_arguments(self.output, typed).recipe)
        found, own = [], dict[str, Any]()
        if not any(word.split("=")[0] == "--recipe" for word in typed):
            own["recipe"] = self.kind.recipes[0]
        self.stage = self.stage or self._default_stages()
        for name in self.stage:
            fields = {**own}
            if name == "router" and len(self.stage) > 1:
                epochs = ROUTER_EPOCHS if self.router_epochs is None else self.router_epochs
                if epochs == 0:
                    continue
                # the options are for the drafter's stage, which is longer
                fields |= {"num_train_epochs": epochs, "max_steps": -1}
            folder = self.output / ("adapter" if name == "drafter" and self.lora_r else name)
            found.append(parse_arguments(folder, typed, stage=name, **fields))
        return found

    @property
    def _has_draft_vocabulary(self) -> bool:
        """Whether drafters of the family choose the tokens that they can propose."""
        return "draft_vocab_size" in self.kind.drafter.config_class.own_names()

    def _default_stages(self) -> list[STAGES]:
        """Return the stages of a family, without a router that costs more than it saves."""
        from transformers import AutoConfig

        stages = [name for name in DEFAULT_STAGES if name in self.kind.stages]
        if self.router_epochs is None and "router" in stages:
            config = AutoConfig.from_pretrained(self.target).get_text_config()
            if config.vocab_size < LEAST_VOCAB or self._has_draft_vocabulary:
                stages.remove("router")
        return stages

    def _fields(self, args) -> dict[str, Any]:
        """Return what the config of a fresh drafter is given."""
        fields = dict(self.kind.fresh_fields(args))
        if self.layers is not None:
            fields["num_hidden_layers"] = self.layers
        if self.draft_vocab_size is not None:
            if not self._has_draft_vocabulary:
                raise ValueError("--draft-vocab-size goes with --recipe eagle3 or parallel.")
            fields["draft_vocab_size"] = self.draft_vocab_size
        return fields

    def plan(self, stages: list, rows, settings: PlanSettings):
        """Return the plan of the run."""
        from transformers import AutoConfig

        from ..training.planning.plan import plan as make_plan
        from ..training.warm_start import own_config

        target = AutoConfig.from_pretrained(self.target)
        drafter = self.kind.drafter.config_class.from_target(target, **self._fields(stages[0]))
        if self.start:
            drafter = own_config(self.start) or drafter
        settings, tokenizer = replace(settings, lora_rank=self.lora_r), self.load_tokenizer()
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
        from ..training.warm_start import start_from

        if self.start is None:
            return self.kind.drafter.from_target(target, **self._fields(args)).float()
        drafter = start_from(target, self.start, tokenizer)
        if self.fresh_head and {"router", "joint"} & set(self.stage):
            drafter.heads.remove_router()
        adapter = self.lora_r and lora(self.lora_r, self.lora_alpha, self.lora_target or None)
        return with_adapter(drafter, "drafter", adapter)


def plan(own: TrainOptions, settings: PlanSettings, training_options: list[str]) -> None:
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
    if own.start is None and args.stage == "router":
        raise ValueError("--stage router goes with --from.")
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
class DistillOptions(TargetOptions, TrainingDataOptions):
    """What is trained, on what, and with which loss."""

    output: Path = option("Folder of the finished model.")
    loss: LOSSES = option("On the tokens (ce), or on the target's probabilities.", "kl")
    start: str | None = option("A small model to start from.", None, flag="from")
    layers: int = option("Layers of a fresh one.", 4, least=1, excludes="start")
    hidden_size: int | None = option("Its width; default: half.", None, least=2, excludes="start")
    resume: bool = option("Continue from the last checkpoint.", False)


def distill(own: DistillOptions, training_options: list[str]) -> None:
    """Train a small language model that drafts for a target: pretrain it, then fine-tune it.

    Every other option is one of AssistantTrainingArguments, as in any Trainer script:
    --learning-rate 3e-4 --max-steps 10000. Pretrain with --loss ce on text, then fine-tune with
    --loss kl, tvd or tvd++ on answers of the target, which coral-hf regenerate writes.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, set_seed

    from ..training import AssistantTrainer, AssistantTrainingArguments, parse_arguments
    from ..training.assistant import small_model
    from ..training.pipeline import save
    from ..training.runs.checkpoints import last_checkpoint, sole_run

    folder = own.output / "run"
    kind = AssistantTrainingArguments
    args = parse_arguments(folder, training_options, kind, loss=own.loss)
    rows, eval_rows = own.conversations(), own.eval_rows(args.eval_strategy)
    target, tokenizer = None, own.load_tokenizer()
    if own.loss != "ce" or eval_rows is not None:
        # each process of a run has a GPU of its own, to which its trainer moves the target
        target, tokenizer = own.load_target(device="cpu")
    with sole_run(own.output, args.process_index == 0):
        set_seed(args.seed)  # before weights are drawn
        if own.start is None:
            config, known = AutoConfig.from_pretrained(own.target), None
            model = small_model(config, own.layers, own.hidden_size)
        else:
            known = AutoTokenizer.from_pretrained(own.start)
            model = AutoModelForCausalLM.from_pretrained(own.start, dtype="float32")
        data = {"train_dataset": rows, "eval_dataset": eval_rows}
        trainer = AssistantTrainer(model, args, target, tokenizer, known, **data)
        trainer.train(resume_from_checkpoint=last_checkpoint(folder, own.resume))
        save(trainer.drafter, tokenizer, own.output)
        print(f"The model is in {own.output}.")
