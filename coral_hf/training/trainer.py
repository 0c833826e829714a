"""`CoralTrainer`: a `Trainer` whose model is a drafter and whose data are its target's features.

In: a drafter, its target, conversations. Out: the trained drafter, or its trained router. Each
batch goes target features (no gradient) → unroll → losses.

    position           0       1       2       3       4
    token              x0      x1      x2      x3      x4
    label              -100    -100    x2      x3      x4         -100 where not trained
    feature            f0      f1      f2      f3      f4
    the drafter reads  (x1,f0) (x2,f1) (x3,f2) (x4,f3)
    and predicts       f1      f2      f3      f4                 whose tokens are x2, x3, x4, (x5)
"""

from collections import defaultdict
from typing import NamedTuple

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor
from transformers import PreTrainedModel, Trainer

from ..draft_head import group_mass
from ..modeling_coral import CoralDrafter
from ..target import check_tokenizer, read_features, read_target, tokenizer_hash
from .adapters import check_target, is_adapted, with_adapter
from .arguments import CoralTrainingArguments
from .data import CoralCollator, prepare_dataset
from .losses import classification_loss, csra_loss, regression_loss, router_loss
from .unroll import unroll

COLUMNS = ["input_ids", "attention_mask", "labels"]


class Unrolled(NamedTuple):
    """The trained positions of a batch."""

    predicted: Tensor  # (steps, positions, hidden)
    target: Tensor  # (positions, hidden), the features that were to be predicted
    lengths: list[int]  # trained positions of each row of the batch


class CoralTrainer(Trainer):
    """Train a [`CoralDrafter`] or its router.

    Args:
        model: the drafter, or one in a `PeftModel`, of which the adapter is trained.
        target_model: the target, frozen; its features are computed as training goes.
        args: [`CoralTrainingArguments`]; `stage="router"` trains the router of a trained drafter.
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
        self.target = read_target(target_model.eval().requires_grad_(False), model.config)
        check_target(target_model)
        model = with_adapter(model, args.stage, peft_config)
        self._prepare_drafter(model, args)
        if processing_class is not None:
            self._bind_tokenizer(model, processing_class)
            for name in ("train_dataset", "eval_dataset"):
                if kwargs.get(name) is not None:
                    kwargs[name] = _tokenized(kwargs[name], processing_class, args.max_length)
        kwargs.setdefault("data_collator", CoralCollator(model.config.pad_token_id or 0))
        # `Trainer` looks for labels by name in the signature of forward, which has none here
        args.label_names = ["labels"]
        super().__init__(model=model, args=args, processing_class=processing_class, **kwargs)
        # losses are sums over trained tokens, divided by their number over all accumulated batches
        self.model_accepts_loss_kwargs = True
        self._sums: dict[str, float] = defaultdict(float)
        if getattr(target_model, "hf_device_map", None) is None:
            target_model.to(self.args.device)

    @staticmethod
    def _prepare_drafter(model: CoralDrafter | PeftModel, args: CoralTrainingArguments) -> None:
        """Choose what is trained: all but the router, or the router alone, or an adapter."""
        if is_adapted(model):
            return
        if args.stage == "router" and model.router is None:
            model.add_router(args.num_groups, args.num_active_groups)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith("router.") == (args.stage == "router"))

    @staticmethod
    def _bind_tokenizer(model: CoralDrafter | PeftModel, tokenizer) -> None:
        check_tokenizer(tokenizer, model.config)
        model.config.tokenizer_hash = tokenizer_hash(tokenizer)

    def train(self, *args, **kwargs):
        """See [`~transformers.Trainer.train`]; a trained router becomes the drafter's head."""
        if self.args.stage == "router":
            self.model.config.is_router_trained = True
            self.model.config.draft_head = "routed"
        return super().train(*args, **kwargs)

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = COLUMNS

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss of a batch, (): a sum over trained positions over `num_items_in_batch`."""
        num_items, num_processes = num_items_in_batch, 1
        if num_items is None:
            num_items = (inputs["labels"] != -100).sum()
        elif self.args.average_tokens_across_devices:
            # the items are those of all processes, over which DDP averages once more
            num_processes = self.accelerator.num_processes
        stage_losses = self._router_losses if self.args.stage == "router" else self._drafter_losses
        losses = stage_losses(model, self._unroll(model, inputs))
        loss = sum(losses.values()) * num_processes / num_items
        return (loss, {"loss": loss}) if return_outputs else loss

    def _unroll(self, model, inputs: dict[str, Tensor]) -> Unrolled:
        """Target features → unroll → what lies at the trained positions."""
        input_ids, labels = inputs["input_ids"], inputs["labels"]
        features = read_features(self.target.model, input_ids, inputs["attention_mask"])
        embeddings = self.target.embed(input_ids[:, 1:])
        with torch.set_grad_enabled(self.args.stage == "drafter" and torch.is_grad_enabled()):
            predicted = unroll(model, embeddings, features[:, :-1], self.args.num_steps)
        # position t predicts feature t + 1, whose token is t + 2; the last is beyond the text
        trained = torch.zeros_like(labels[:, 1:], dtype=torch.bool)
        trained[:, :-1] = labels[:, 2:] != -100
        return Unrolled(predicted[:, trained], features[:, 1:][trained], trained.sum(1).tolist())

    def _drafter_losses(self, model, unrolled: Unrolled) -> dict[str, Tensor]:
        """Weighted losses, each () and summed over positions."""
        args, positions = self.args, len(unrolled.target)
        regression = regression_loss(unrolled.predicted, unrolled.target)
        classification = classification_loss(
            unrolled.predicted, unrolled.target, self.target.head.logits
        )
        losses = {
            "regression": args.regression_weight * regression.sum(),
            "classification": args.classification_weight * classification.loss.sum(),
        }
        if args.csra_weight:
            lengths = unrolled.lengths if args.csra_negatives == "sequence" else None
            csra = csra_loss(unrolled.predicted, args.csra_temperature, lengths)
            losses["csra"] = args.csra_weight * csra
            self._note("csra_loss", csra, positions)
        self._note("regression_loss", regression.mean(), positions)
        self._note("classification_loss", classification.loss.mean(), positions)
        for step, agreed in enumerate(classification.agreement, start=1):
            self._note(f"agreement_{step}", agreed, positions)
        return losses

    def _router_losses(self, model, unrolled: Unrolled) -> dict[str, Tensor]:
        router = self.drafter.router
        assert router is not None, "the router's stage starts by adding one"
        log_mass = router(unrolled.predicted)  # (steps, positions, groups)

        def mass_of(features: Tensor) -> Tensor:
            probs = self.target.head.logits(features).float().softmax(-1)
            return group_mass(probs, log_mass.shape[-1])

        loss = router_loss(log_mass, unrolled.target, mass_of)
        self._note("router_loss", loss.mean(), len(unrolled.target))
        return {"router": loss.mean()}

    @property
    def drafter(self) -> CoralDrafter:
        """The drafter without wrappers."""
        return self.accelerator.unwrap_model(self.model)

    def _note(self, name: str, total: Tensor, positions: int) -> None:
        """Collect a sum over positions for the next log entry."""
        if self.model.training:
            self._sums[name] += float(total.detach())
            self._sums[f"{name}/positions"] += positions

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """See [`~transformers.Trainer.log`].

        Adds the average of each loss and the agreement since the last entry.
        """
        if "loss" in logs:
            names = [name for name in self._sums if not name.endswith("/positions")]
            logs |= {
                name: self._sums[name] / max(self._sums[f"{name}/positions"], 1) for name in names
            }
            self._sums.clear()
        super().log(logs, *args, **kwargs)


def _tokenized(dataset, tokenizer, max_length: int):
    """Token ids of a dataset, or of each of several."""
    if isinstance(dataset, dict):
        return {
            name: prepare_dataset(part, tokenizer, max_length) for name, part in dataset.items()
        }
    return prepare_dataset(dataset, tokenizer, max_length)
