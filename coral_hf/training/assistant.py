"""`AssistantTrainer`: a `Trainer` whose model is a small language model that drafts for a target.

In: a small model, perhaps a fresh one, its target, texts or answers of the target. Out: an ordinary
checkpoint, which transformers takes as `assistant_model` and `coral_hf.LanguageModelDrafter` for
trees.

    position          0     1     2     3
    token             x0    x1    x2    x3
    label             -     -     x2    x3
    small model       s0    s1    s2          s_i has read x_0 .. x_i: q, of the token after it
    target            f0    f1    f2          likewise, without gradient: p
    trained                 *     *           where the next token has a label
"""

import math
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from ..decoding.guard import accept_features
from ..drafters.language_model import UNIVERSAL, check_vocabulary, config_of
from ..identity import check_tokenizer
from ..target import FEATURE, Target, max_positions, read_features, read_target, text_config
from .arguments import AssistantTrainingArguments
from .data import CoralCollator
from .data.dataset import check_rows
from .data.encoding import IGNORED
from .distributed import mean_loss, place_target, shards_weights
from .evaluation.acceptance import acceptance_length, count_rounds, rounds_of, tree_depth
from .inputs import check_given, is_joined, token_rows, tokenizer_of
from .losses.divergence import Divergence, divergence
from .runs.callbacks import FiniteGuard
from .runs.checkpoints import AtomicCheckpoints

WIDEST = 1024  # with four layers the model of Direct Alignment (Goel et al. 2024)
HEAD_DIM = 64  # of a fresh model


class AssistantTrainer(AtomicCheckpoints):
    """Train a small language model to draft for a larger one with the same tokenizer.

    Args:
        model: the small model, any `AutoModelForCausalLM`, in fp32.
        args: [`AssistantTrainingArguments`]; `loss="ce"` is any `Trainer`'s, for texts and for
            answers; "kl", "tvd" and "tvd++" compare with the target's probabilities.
        target_model: the target, frozen. With `loss="ce"` only evaluations need it.
        processing_class: the target's tokenizer, which is saved with the model.
        assistant_tokenizer: the small model's. Without it the vocabularies of both models must be
            equally large, paddings included.
        train_dataset, eval_dataset: texts or conversations in any form that `prepare_dataset`
            takes, or rows of token ids.

    Raises:
        ValueError: for what is none of these, and for settings that mean nothing here.

    Example:

    ```python
    >>> trainer = AssistantTrainer(small, AssistantTrainingArguments("small", loss="tvd++"), target,
    ...                            tokenizer, train_dataset=answers)
    >>> trainer.train()
    >>> trainer.save_model("small")
    ```
    """

    args: AssistantTrainingArguments

    def __init__(
        self,
        model: PreTrainedModel,
        args: AssistantTrainingArguments,
        target_model: PreTrainedModel | None = None,
        processing_class=None,
        assistant_tokenizer: Tokenizer | None = None,
        **kwargs,
    ):
        models = {"model": model} | ({} if target_model is None else {"target_model": target_model})
        is_plain = getattr(args, "loss", None) == "ce"  # the loss of any `Trainer`
        read = ["neftune_noise_alpha", "use_liger_kernel"]
        read += ["label_smoothing_factor"] if is_plain else []
        check_given(models, args, AssistantTrainingArguments, kwargs, read)
        if target_model is None and not is_plain:
            raise ValueError(f"`loss` is {args.loss!r}, for a target; pass `target_model`.")
        tokenizer, known = tokenizer_of(processing_class), config_of(model, assistant_tokenizer)
        try:
            if tokenizer is not None:
                check_tokenizer(tokenizer, known)
        except ValueError:
            raise ValueError(
                f"The small model {known._name_or_path} has another tokenizer than the target, so"
                f" the tokens of one say nothing of those of the other. {UNIVERSAL}"
            ) from None
        self.target: Target | None = None
        self.training_record: list[dict[str, Any]] = []
        if target_model is not None:
            remedy = "AssistantTrainer(..., assistant_tokenizer=tokenizer)"
            check_vocabulary(known, text_config(target_model).vocab_size, remedy)
            for one in (model, target_model):
                accept_features(one)
            self.target = read_target(target_model.eval().requires_grad_(False))
        kwargs.setdefault("data_collator", CoralCollator(text_config(model).pad_token_id or 0))
        super().__init__(model=model, args=args, processing_class=tokenizer, **kwargs)
        if target_model is not None:
            if shards_weights(self):
                raise ValueError(
                    "With a target the LM head of the whole model is read, but FSDP and ZeRO-3 hold"
                    " parts of it; train with DDP, ZeRO-1 or ZeRO-2, or with loss='ce' alone."
                )
            place_target(target_model, self)
        self._guard = FiniteGuard(self.accelerator)
        if args.loss != "ce":
            self.add_callback(self._guard)
            self.model_accepts_loss_kwargs = True  # losses are sums, divided by trained tokens
        self.train_dataset = self._rows(kwargs.get("train_dataset"))
        self.eval_dataset = self._rows(kwargs.get("eval_dataset"))
        # of the evaluation that is running: the overlap and number of positions, tokens of rounds
        self._counts, self._rounds = torch.zeros(2, dtype=torch.float64), list[int]()

    def _rows(self, dataset: Any) -> Any:
        """Return rows of token ids and labels, as both models can read them."""
        if dataset is None or isinstance(dataset, dict):
            return dataset and {name: self._rows(part) for name, part in dataset.items()}
        models = [self.drafter] if self.target is None else [self.drafter, self.target.model]
        texts = [text_config(model) for model in models]
        shortest = min(texts, key=lambda text: max_positions(text) or math.inf)
        rows = token_rows(dataset, self.processing_class, self.args, shortest)
        check_rows(rows, min(text.vocab_size for text in texts))
        if is_joined(rows):
            raise ValueError(
                "The rows are packed (`position_ids`), and a language model would read the"
                " documents of a row as one; pass the rows as they were before `pack_dataset`."
            )
        return rows

    def compare(self, model: PreTrainedModel, inputs: dict[str, Tensor], loss: str) -> Divergence:
        """Compare the model with the target at the trained positions of a batch, (batch, length).

        Args:
            model: the small model, perhaps wrapped.
            loss: "kl", "tvd" or "tvd++".
        """
        assert self.target is not None, "checked when the trainer is made"
        read = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        is_trained = inputs["labels"][:, 1:] != IGNORED  # (batch, length - 1)
        # logits of the last position alone: those of the others exist a few at a time
        output = model(**read, use_cache=False, logits_to_keep=1, output_hidden_states=FEATURE)
        states = output.hidden_states[FEATURE][:, :-1][is_trained]  # (positions, width)
        features = read_features(self.target.model, **read)[:, :-1][is_trained]
        head = read_target(self.drafter).head

        def logits_of(rows: Tensor) -> Tensor:  # (rows, width) → (rows, tokens)
            with self.accelerator.autocast():
                return head.logits(rows)

        heads = logits_of, self.target.head.logits
        found = divergence(states, features.to(states.device), heads, loss)
        if model.training:
            self.meter.add({"expected_acceptance": found.overlap}, len(features))
            self._guard.watch(inputs, features, {loss: found.loss})
        return found

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Compute the loss of a batch, of shape (), averaged over its trained tokens."""
        labels = inputs["labels"]
        if self.args.loss == "ce":
            if model.training:
                self.meter.add({}, int((labels != IGNORED).sum()))
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        found = self.compare(model, inputs, self.args.loss)
        loss = mean_loss(self, found.loss, labels, num_items_in_batch)
        return (loss, found) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """See [`~transformers.Trainer.prediction_step`]; an evaluation counts accepted tokens.

        Returns:
            The loss, of shape (); no predictions; the labels (batch, length).
        """
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, found = self.compute_loss(model, inputs, return_outputs=True)
            if self.target is not None:
                if self.args.loss == "ce":
                    found = self.compare(model, inputs, "tvd")
                self._counts += torch.tensor([float(found.overlap), len(found.agreed)])
                chain = found.agreed.expand(tree_depth(self.drafter), -1)
                self._rounds += rounds_of(chain, inputs["labels"])
        return (loss, None, None) if prediction_loss_only else (loss, (), inputs["labels"])

    def evaluate(self, eval_dataset=None, *args, **kwargs):
        """See [`~transformers.Trainer.evaluate`]; with a target, adds metrics of acceptance.

        `expected_acceptance` is the mean of 1 - TVD, the chance that the target accepts a token
        drawn at T = 1; `simulated_acceptance_length` is τ of a greedy chain along the rows' text.
        """
        if not isinstance(eval_dataset, dict | str):  # `Trainer` evaluates each of several alone
            eval_dataset = self._rows(eval_dataset)
        return super().evaluate(eval_dataset, *args, **kwargs)

    def evaluation_loop(self, *args, metric_key_prefix="eval", **kwargs):
        """See [`~transformers.Trainer.evaluation_loop`]."""
        self._counts.zero_()
        self._rounds.clear()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self.target is not None:
            rounds = count_rounds(self._rounds, tree_depth(self.drafter))
            sums = torch.cat([self._counts, rounds]).to(self.args.device)  # (depth + 4,)
            (overlap, count), rounds = self.accelerator.reduce(sums).cpu().split([2, len(rounds)])
            found = {"expected_acceptance": float(overlap / count)}
            found["simulated_acceptance_length"] = acceptance_length(rounds)
            output.metrics.update({f"{metric_key_prefix}_{name}": found[name] for name in found})
        return output


def small_model(
    target: PreTrainedConfig, num_layers: int = 4, hidden_size: int | None = None
) -> PreTrainedModel:
    """Make a fresh Llama with the tokens of a target, in fp32; its embedding is its LM head.

    Args:
        target: the target's config.
        num_layers: more of them agree more often and draft more slowly.
        hidden_size: half of the target's by default, at most 1024.
    """
    text = target.get_text_config(decoder=True)
    width = min(WIDEST, text.hidden_size // 2) if hidden_size is None else hidden_size
    most = max(1, width // HEAD_DIM)
    positions = max_positions(text)
    config = LlamaConfig(
        vocab_size=text.vocab_size,
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=num_layers,
        num_attention_heads=next(count for count in range(most, 0, -1) if width % count == 0),
        tie_word_embeddings=True,
        bos_token_id=text.bos_token_id,
        eos_token_id=text.eos_token_id,
        pad_token_id=text.pad_token_id,
        **({} if positions is None else {"max_position_embeddings": positions}),
    )
    return LlamaForCausalLM(config).float()
