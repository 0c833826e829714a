"""Commands that train a drafter."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..demo import DemoSettings
from ..measure.settings import option
from .options import DatasetOptions, TargetOptions
from .parser import refuse

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
        "Initial weights: 'layer' (the target's last) or a drafter.", None, excludes="drafter"
    )
    lora_r: int | None = option("Train a LoRA of this rank instead.", None, needs="drafter")
    lora_alpha: int | None = option("Its alpha; twice its rank by default.", None, needs="lora_r")
    lora_target: list[str] = option("Its layers, such as fc; default: all.", [], needs="lora_r")
    stage: list[STAGES] = option("Trained one after the other.", ["drafter", "router"])
    fresh_head: bool = option("Replace the drafter's own heads.", False, needs="drafter")
    router_epochs: float = option("Epochs of the router's stage; 0 trains no router.", 0.2)
    resume: bool = option("Continue from the last checkpoint.", False)

    def __post_init__(self) -> None:
        is_headless = self.drafter is None and self.stage[0] in ("router", "low_rank")
        refuse(is_headless, f"--stage {self.stage[0]} goes with --drafter.")

    def arguments(self, typed: list[str]) -> list:
        """Return the arguments of each stage: the options of transformers that were typed."""
        from ..training import parse_arguments

        found = []
        for name in self.stage:
            fields: dict[str, float] = {}
            if name == "router" and len(self.stage) > 1:
                # the options are for the drafter's stage, which is longer
                fields = {"num_train_epochs": self.router_epochs, "max_steps": -1}
            if fields.get("num_train_epochs") != 0:
                is_adapter = name == "drafter" and self.lora_r is not None
                folder = self.output / ("adapter" if is_adapter else name)
                found.append(parse_arguments(folder, typed, stage=name, **fields))
        return found

    def eval_rows(self):
        """Return the conversations that are evaluated."""
        if self.eval_dataset:
            return DatasetOptions(dataset=self.eval_dataset).rows()
        refuse(not self.hold_out, "--eval-strategy goes with --hold-out or --eval-dataset.")
        return self.conversations(held_out=True)

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


def train(own: TrainOptions, training_options: list[str]) -> None:
    """Train a drafter and its router, or the stages that are given.

    Every other option is one of CoralTrainingArguments, as in any Trainer script:
    --learning-rate 1e-3 --num-steps 3.
    """
    from transformers import set_seed

    from ..hub import publish
    from ..training.pipeline import save
    from ..training.pipeline import train as train_stages
    from ..training.runs.checkpoints import sole_run

    stages = own.arguments(training_options)
    args = stages[0]
    is_nameless = args.push_to_hub and args.hub_model_id is None
    refuse(is_nameless, "--push-to-hub needs --hub-model-id organisation/name.")
    rows = own.rows()
    eval_rows = own.eval_rows() if args.eval_strategy != "no" else None
    # each process of a run has a GPU of its own, to which its trainer moves the target
    target, tokenizer = own.load_target(device="cpu")
    with sole_run(own.output, args.process_index == 0):
        set_seed(args.seed)  # before weights of a drafter or an adapter are drawn
        drafter = own.first_drafter(target, tokenizer)
        trained = train_stages(target, tokenizer, rows, stages, drafter, own.resume, eval_rows)
        save(trained, tokenizer, own.output)
        print(f"The drafter is in {own.output}.")
        if args.push_to_hub and args.process_index == 0:
            # each stage pushes its own checkpoints; here goes the drafter with all of its heads
            options = {"private": args.hub_private_repo, "token": args.hub_token}
            done = publish(own.output, args.hub_model_id, revision=args.hub_revision, **options)
            print(f"Published: {done.commit_url}")
