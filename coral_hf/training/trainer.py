"""`CoralTrainer`: a `Trainer` whose model is a drafter and whose data are its target's features.

In: a drafter, its target, conversations. Out: the trained drafter, or its trained head. Each batch
goes target features (no gradient) → unroll → losses.

    position           0       1       2       3       4
    token              x0      x1      x2      x3      x4
    label              -100    -100    x2      x3      x4         -100 where not trained
    feature            f0      f1      f2      f3      f4
    the drafter reads  (x1,f0) (x2,f1) (x3,f2) (x4,f3)
    and predicts       f1      f2      f3      f4                 whose tokens are x2, x3, x4, (x5)
"""

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback

from ..drafters.coral.modeling import CoralDrafter
from ..drafters.fit import check_target
from ..identity import check_tokenizer, tokenizer_hash
from ..target import read_target
from .adapters import check_target_adapter, is_adapted, with_adapter
from .arguments import CoralTrainingArguments
from .data import CoralCollator
from .data.encoding import IGNORED
from .data.vocabulary import warn_of_other_ends
from .distributed import give_back, place_target, set_ddp_defaults, shares_out_weights, trained_copy
from .evaluation import Evaluation, PlotCallback, check_best_metric
from .features import CachedFeatures
from .features.online import TargetFeatures
from .head_stages import FROZEN_DRAFTER, add_heads, announced, check_same_groups, choose_trained
from .losses.liger_loss import check_liger
from .rows import outline, training_rows
from .runs.averages import RunningAverages
from .runs.guards import FiniteGuard
from .runs.publishing import PublishingTrainer
from .steps.noise import FeatureNoise
from .steps.objectives import Losses, Unrolled, drafter_losses, low_rank_losses, router_losses
from .steps.unroll import unroll

TOKENS = "input_ids"  # what `Trainer` counts of a batch
COLUMNS = ["input_ids", "attention_mask", "labels", "position_ids", "features"]


class CountTokens(TrainerCallback):
    """Has `Trainer` count the tokens of batches, once checkpointing of activations is set up."""

    def on_train_begin(self, args, state, control, model, **kwargs):
        """See [`~transformers.TrainerCallback.on_train_begin`]."""
        model.main_input_name = TOKENS


class CoralTrainer(PublishingTrainer):
    """Train a [`CoralDrafter`] or its draft head.

    Args:
        model: the drafter, or one in a `PeftModel`, of which the adapter is trained.
        target_model: the target, frozen; its features are computed as training goes.
        args: [`CoralTrainingArguments`]; `stage="router"` trains the router of a trained drafter,
            `stage="low_rank"` its low-rank head, `stage="joint"` drafter and router at once.
        train_dataset, eval_dataset: conversations in any form that `prepare_dataset` takes, or
            token ids.
        processing_class: the target's tokenizer.
        peft_config: of PEFT, to train a new adapter of the drafter instead of the drafter itself.

    Example:

    ```python
    >>> trainer = CoralTrainer(model=drafter, target_model=target, args=args,
    ...                        train_dataset=conversations, processing_class=tokenizer)
    >>> trainer.train()
    >>> trainer.save_model("coral-llama3")
    ```
    """

    def __init__(
        self,
        model: CoralDrafter | PeftModel,
        target_model: PreTrainedModel,
        args: CoralTrainingArguments,
        processing_class=None,
        peft_config: PeftConfig | None = None,
        **kwargs,
    ):
        check_target(model.config, target_model)
        self.target = read_target(target_model.eval().requires_grad_(False))
        check_target_adapter(target_model)
        if args.use_liger_kernel:
            check_liger(args)
        self.features = TargetFeatures(target_model)
        model = with_adapter(model, args.stage, peft_config)
        if processing_class is not None:
            self._bind_tokenizer(model, processing_class)
            warn_of_other_ends(processing_class, target_model)
        for name, packing in (("train_dataset", args.packing), ("eval_dataset", False)):
            if kwargs.get(name) is not None:
                kwargs[name] = training_rows(
                    kwargs[name], processing_class, args, model.config.vocab_size, packing
                )
        kwargs.setdefault("data_collator", CoralCollator(model.config.pad_token_id or 0))
        # `Trainer` looks for labels by name in the signature of forward, which has none here
        args.label_names = ["labels"]
        set_ddp_defaults(args)
        model.main_input_name = TOKENS
        super().__init__(model=model, args=args, processing_class=processing_class, **kwargs)
        # losses are sums over trained tokens, divided by their number over all accumulated batches
        self.model_accepts_loss_kwargs = True
        if self.compute_metrics is None:  # else only a run can tell what there will be
            check_best_metric(args, self.eval_dataset, model)
        self.evaluation = Evaluation(self.target, self.args)
        if self.args.plots:
            self.add_callback(PlotCallback(self.callback_handler))
        self.averages = RunningAverages()
        self.noise = FeatureNoise(args.feature_noise, args.seed, args.process_index, args.device)
        self._guard = FiniteGuard(self.args.process_index, self._gather)
        self.add_callback(self._guard)
        self.add_callback(CountTokens())
        place_target(target_model, self)
        if not is_adapted(model):
            size = model.config.vocab_size
            num_tokens = size if processing_class is None else min(len(processing_class), size)
            add_heads(model, args, self.target, self.train_dataset, num_tokens)
            choose_trained(model, args.stage)
        self._drafter = model
        if shares_out_weights(self):
            self.model = self.model_wrapped = trained_copy(model)
        self._check_caches(self.train_dataset)
        self._check_caches(self.eval_dataset)

    def _check_caches(self, dataset) -> None:
        """That cached features, in a dataset or in one of several, are the target's."""
        for part in dataset.values() if isinstance(dataset, dict) else (dataset,):
            if isinstance(part, CachedFeatures):
                part.check_target(self.target.model)

    @staticmethod
    def _bind_tokenizer(model: CoralDrafter | PeftModel, tokenizer) -> None:
        check_tokenizer(tokenizer, model.config)
        model.config.tokenizer_hash = tokenizer_hash(tokenizer)

    def train(self, *args, **kwargs):
        """See [`~transformers.Trainer.train`]; a draft head that it trains is read from then on."""
        # with tokens as its input, transformers would look for embeddings to checkpoint from
        self.model.main_input_name = CoralDrafter.main_input_name
        with announced((self._drafter, self.model), self.args.stage):
            output = super().train(*args, **kwargs)
        if shares_out_weights(self):
            give_back(self.accelerator.unwrap_model(self.model), self._drafter)
        return output

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if self.args.stage in ("router", "joint"):
            check_same_groups(self.drafter, resume_from_checkpoint)
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def evaluate(self, eval_dataset=None, *args, **kwargs):
        """See [`~transformers.Trainer.evaluate`]; adds acceptance lengths to its metrics.

        Args:
            eval_dataset: conversations, as when the trainer is made, or several by name.
        """
        self._check_caches(eval_dataset)
        # of several, by name or as a dict, `Trainer` evaluates each on its own
        if eval_dataset is not None and not isinstance(eval_dataset, dict | str):
            size = self.drafter.config.vocab_size
            eval_dataset = training_rows(eval_dataset, self.processing_class, self.args, size)
        with self.evaluation.running():
            return super().evaluate(eval_dataset, *args, **kwargs)

    def evaluation_loop(self, dataloader, *args, metric_key_prefix="eval", **kwargs):
        """See [`~transformers.Trainer.evaluation_loop`]."""
        output = super().evaluation_loop(
            dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs
        )
        if self.evaluation.is_running:
            found = self.evaluation.metrics(self.drafter, dataloader.dataset, self.accelerator)
            output.metrics.update({f"{metric_key_prefix}_{name}": found[name] for name in found})
        return output

    def _get_train_sampler(self, train_dataset=None):
        dataset = self.train_dataset if train_dataset is None else train_dataset
        return super()._get_train_sampler(outline(dataset))

    def _get_eval_sampler(self, eval_dataset):
        return super()._get_eval_sampler(outline(eval_dataset))

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = COLUMNS

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss of a batch, (): a sum over trained positions over `num_items_in_batch`."""
        num_items, num_processes = num_items_in_batch, 1
        if num_items is None:
            num_items = (inputs["labels"] != IGNORED).sum()
        elif self.args.average_tokens_across_devices:
            # the items are those of all processes, over which DDP averages once more
            num_processes = self.accelerator.num_processes
        unrolled = self._unroll(model, inputs)
        losses = self._losses(unrolled)
        loss = sum(losses.terms.values()) * num_processes / num_items
        if model.training:
            self.averages.add(losses.notes, len(unrolled.target))
            self.record.add(len(unrolled.target))
            terms = {**losses.terms, "total": loss}
            self._guard.watch(inputs["input_ids"], inputs["labels"], unrolled.target, terms)
        return (loss, {"loss": loss}) if return_outputs else loss

    def _unroll(self, model, inputs: dict[str, Tensor]) -> Unrolled:
        """Target features → unroll → what lies at the trained positions.

        Args:
            inputs: of the collator, (batch, length) each; of a cache also features
                (batch, length, hidden).
        """
        input_ids, labels = inputs["input_ids"], inputs["labels"]
        positions = inputs["position_ids"][:, :-1] if "position_ids" in inputs else None
        features = self.features.read(inputs)
        embeddings = self.target.embed(input_ids[:, 1:])
        read = self.noise.on(features[:, :-1]) if model.training else features[:, :-1]
        steps = self.evaluation.num_steps(self.drafter)
        # with gradients on also where only a head learns: DDP prepares its reduction in `forward`
        predicted = unroll(model, embeddings, read, steps, positions)
        self.evaluation.note(self.drafter, predicted, features, labels)
        predicted = predicted[: self.args.num_steps]
        # position t predicts feature t + 1, whose token is t + 2; the last is beyond the text
        trained = torch.zeros_like(labels[:, 1:], dtype=torch.bool)
        trained[:, :-1] = labels[:, 2:] != IGNORED
        lengths = _lengths(trained, positions)
        return Unrolled(predicted[:, trained], features[:, 1:][trained], lengths)

    def _losses(self, unrolled: Unrolled) -> Losses:
        head, stage = self.target.head, self.args.stage
        if stage == "low_rank":
            low_rank = self.drafter.heads.low_rank
            assert low_rank is not None, "the stage has added one"
            squeezed = low_rank(unrolled.predicted)
            return low_rank_losses(unrolled._replace(predicted=squeezed), head)
        losses = Losses({}, {})
        if self._trains_drafter:
            losses = drafter_losses(unrolled, self.args, head)
        if stage == "drafter":
            return losses
        router = self.drafter.heads.router
        assert router is not None, "the stage has added one"
        log_mass = router(unrolled.predicted)  # (steps, positions, groups)
        groups = router.groups_of(self.drafter.config.vocab_size)
        weight = self.args.router_weight if stage == "joint" else 1.0
        return losses + router_losses(log_mass, unrolled.target, head, groups, weight)

    @property
    def _trains_drafter(self) -> bool:
        return self.args.stage not in FROZEN_DRAFTER

    @property
    def drafter(self) -> CoralDrafter:
        """The drafter without wrappers."""
        return self.accelerator.unwrap_model(self.model)

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """See [`~transformers.Trainer.log`].

        Adds the averages since the last entry: losses, agreement, similarity of the steps.
        """
        if "loss" in logs:
            logs |= self.averages.take(self.accelerator.reduce)
        super().log(logs, *args, **kwargs)


def _lengths(trained: Tensor, positions: Tensor | None) -> list[int]:
    """Trained positions of each document: (batch, length) → a number for each."""
    if positions is None:
        return trained.sum(1).tolist()
    document = (positions == 0).flatten().cumsum(0) - 1  # (batch * length,)
    return torch.bincount(document[trained.flatten()]).tolist()
