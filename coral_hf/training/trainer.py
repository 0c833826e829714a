"""`CoralTrainer`: a `Trainer` whose model is a drafter and whose data are its target's features.

In: a drafter, its target, conversations. Out: the trained drafter, or its trained head. Each batch
goes target features (no gradient) → unroll → losses, by the step of the drafter's family (`steps`).

Of `Trainer`'s private names these are used, since nothing public does the same:

    _get_output_dir, _save_checkpoint      a checkpoint is written aside and appears in one move
    _push_from_checkpoint                  uploads in the background read it from its final place
    _get_train_sampler, _get_eval_sampler  grouping by length would read all cached features
"""

from typing import Any

import torch
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel, set_seed

from ..decoding.guard import accept_features, accept_target
from ..drafters.model import Drafter
from ..identity import record_tokenizer
from ..measure.chat import keep_chat_options
from ..target import check_target, read_target
from .arguments import CoralTrainingArguments
from .data import CoralCollator
from .data.dataset import warn_of_other_ends
from .data.encoding import IGNORED
from .distributed import GiveBack, mean_loss, place_target, sharded_copy, shards_weights
from .evaluation import Evaluation
from .inputs import check_given, lengths_only, prepare_rows, tokenizer_of
from .runs.callbacks import DrafterPushes, FiniteGuard, PushCallback
from .runs.checkpoints import AtomicCheckpoints
from .stages import ROUTER_STAGES, with_adapter
from .steps import training_step


class CoralTrainer(AtomicCheckpoints, DrafterPushes):
    """Train a drafter of any family that has a training step, or a draft head of it.

    Args:
        model: the drafter, or one in a `PeftModel`, of which the adapter is trained.
        target_model: the target, frozen; its features are computed during training.
        args: [`CoralTrainingArguments`]; `stage="router"` trains the router of a trained drafter,
            `stage="joint"` drafter and router at once.
        train_dataset, eval_dataset: conversations in any form that `prepare_dataset` takes, or
            rows of token ids.
        processing_class: the target's tokenizer, or a processor with it.
        peft_config: of PEFT, to train a new adapter of the drafter instead of the drafter itself.

    Raises:
        ValueError: for what is none of these, and for settings that mean nothing here.

    Example:

    ```python
    >>> trainer = CoralTrainer(model=drafter, target_model=target, args=args,
    ...                        train_dataset=conversations, processing_class=tokenizer)
    >>> trainer.train()
    >>> trainer.save_model("coral-llama3")
    ```
    """

    args: CoralTrainingArguments

    def __init__(
        self,
        model: Drafter | PeftModel,
        target_model: PreTrainedModel,
        args: CoralTrainingArguments,
        processing_class=None,
        peft_config: PeftConfig | None = None,
        **kwargs,
    ):
        models = {"model": model, "target_model": target_model}
        check_given(models, args, CoralTrainingArguments, kwargs)
        processing_class = tokenizer_of(processing_class)
        accept_target(target_model)
        accept_features(target_model)
        check_target(model.config, target_model, takes_other_vocabulary=True)
        if processing_class is not None:
            record_tokenizer(processing_class, model.config)
            keep_chat_options(processing_class, model.config)
            warn_of_other_ends(processing_class, target_model)
        self.target = read_target(target_model.eval().requires_grad_(False))
        self.step = training_step(model.config, self.target, args)
        self._evaluation: Evaluation | None = None  # the one that is running
        set_seed(args.seed)  # `Trainer` does so too, after an adapter was drawn
        model = with_adapter(model, args.stage, peft_config)
        kwargs.setdefault("data_collator", CoralCollator(model.config.pad_token_id or 0))
        super().__init__(model=model, args=args, processing_class=processing_class, **kwargs)
        # losses are sums over trained tokens, divided by their number over all accumulated batches
        self.model_accepts_loss_kwargs = True
        place_target(target_model, self)
        self.train_dataset = prepare_rows(kwargs.get("train_dataset"), self, is_trained=True)
        self.eval_dataset = prepare_rows(kwargs.get("eval_dataset"), self)
        self.step.prepare(model, self.train_dataset, processing_class)
        self._guard = FiniteGuard(self.accelerator)
        self.add_callback(self._guard)
        self.add_callback(PushCallback(self))
        if shards_weights(self):
            if not self.step.can_shard:
                raise ValueError(
                    f"FSDP and ZeRO-3 cannot hold parts of a {self.step.drafter.__name__}; train it"
                    " with plain data parallelism (DDP, ZeRO-1 or ZeRO-2)."
                )
            self.model = self.model_wrapped = sharded_copy(model)
            self.add_callback(GiveBack(model))

    @property
    def training_record(self) -> list[dict[str, Any]]:
        """What the runs of the drafter did; it is saved with it."""
        return self.drafter.training_record

    def train(self, *args, **kwargs):
        """See [`~transformers.Trainer.train`]; the drafter reads the head that the stage trains.

        Evaluations and checkpoints during training need it; if the stage fails, it is undone.
        """
        config, has_router = self.drafter.config, self.args.stage in ROUTER_STAGES
        fields = {"is_router_trained": True, "draft_head": "routed"} if has_router else {}
        before = {name: getattr(config, name) for name in fields}
        config.update(fields)
        try:
            return super().train(*args, **kwargs)
        except BaseException:
            config.update(before)
            raise

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Compute the loss of a batch, of shape (), a sum divided by `num_items_in_batch`."""
        num_steps = self._num_steps()
        trained = self.step.unroll(model, inputs, num_steps).trained()
        losses = self.step.losses(self.drafter, trained)
        loss = mean_loss(self, losses.total, inputs["labels"], num_items_in_batch)
        if model.training:
            self.meter.add(losses.notes, len(trained.target))
            self._guard.watch(inputs, trained.target, {**losses.terms, "total": loss})
        return (loss, {"loss": loss}) if return_outputs else loss

    def _num_steps(self) -> int:
        """Count the steps of the unroll now: a run never goes back to one, if it is lengthened."""
        recipe, length = self.args.resolved, self.state.max_steps
        if self._run.get("is_unrolled"):
            return recipe.num_steps
        if recipe.csra_weight and 0 < length <= self.args.steps_alone(length):
            raise ValueError(
                f"`csra_weight` is {recipe.csra_weight}, but all {length} steps of the run train"
                " step 1 of the unroll alone; train longer, or pass a smaller `single_step_share`."
            )
        found = self.args.steps_at(self.state.global_step, length)
        self._run["is_unrolled"] = found > 1
        return found

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """See [`~transformers.Trainer.prediction_step`]; an evaluation counts accepted tokens.

        Returns:
            The loss, of shape (); no predictions; the labels (batch, length).
        """
        num_steps = self.args.resolved.num_steps
        depth = 0 if self._evaluation is None else self._evaluation.depth
        with torch.no_grad(), self.compute_loss_context_manager():
            unrolled = self.step.unroll(model, inputs, max(num_steps, depth))
            if self._evaluation is not None:
                self._evaluation.add(unrolled)
            trained = unrolled.first(num_steps).trained()
            total = self.step.losses(self.drafter, trained).total
            loss = total / (inputs["labels"] != IGNORED).sum()
        return (loss, None, None) if prediction_loss_only else (loss, (), inputs["labels"])

    def evaluate(self, eval_dataset=None, *args, **kwargs):
        """See [`~transformers.Trainer.evaluate`]; adds acceptance lengths to its metrics.

        Args:
            eval_dataset: conversations, in the form of the constructor, or several by name.
        """
        # `Trainer` evaluates each of several datasets by another call
        if not isinstance(eval_dataset, dict | str):
            eval_dataset = prepare_rows(eval_dataset, self)
        device = self.args.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            self._evaluation = Evaluation(self.step, self.drafter, self.target, self.args)
            try:
                return super().evaluate(eval_dataset, *args, **kwargs)
            finally:
                self._evaluation = None

    def evaluation_loop(self, dataloader, *args, metric_key_prefix="eval", **kwargs):
        """See [`~transformers.Trainer.evaluation_loop`]."""
        output = super().evaluation_loop(
            dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs
        )
        if self._evaluation is not None:
            found = self._evaluation.metrics(dataloader.dataset, self.accelerator)
            output.metrics.update({f"{metric_key_prefix}_{name}": found[name] for name in found})
        return output

    def _get_train_sampler(self, train_dataset=None):
        return super()._get_train_sampler(lengths_only(train_dataset))

    def _get_eval_sampler(self, eval_dataset):
        return super()._get_eval_sampler(lengths_only(eval_dataset))
