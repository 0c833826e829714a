"""The demo's own target: a tokenizer and a small Llama, trained on the standard library's source.

In: a corpus. Out: a folder with both, as `save_pretrained` writes them.
"""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from .budget import BudgetCallback, trainer_arguments
from .settings import DemoSettings, OwnTarget
from .texts import pack

SPECIAL_TOKENS = PAD, BOS, EOS = "<pad>", "<s>", "</s>"  # the first ids, in this order
MAX_POSITIONS = 1024
# three times the usual: so narrow a model starts to learn much sooner
INITIALIZER_RANGE = 0.06


def train_tokenizer(documents: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE (as GPT-2's), so that no character is unknown."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(documents, trainer, length=len(documents))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, bos_token=BOS, eos_token=EOS
    )


def build_model(settings: OwnTarget, vocab_size: int) -> LlamaForCausalLM:
    """A fresh Llama, small enough for two CPU cores."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=settings.num_heads,
        max_position_embeddings=MAX_POSITIONS,
        initializer_range=INITIALIZER_RANGE,
        tie_word_embeddings=True,
        pad_token_id=SPECIAL_TOKENS.index(PAD),
        bos_token_id=SPECIAL_TOKENS.index(BOS),
        eos_token_id=SPECIAL_TOKENS.index(EOS),
    )
    return LlamaForCausalLM(config)


def train_target(
    documents: list[str], settings: DemoSettings, device: torch.device, folder: Path
) -> None:
    """Train tokenizer and model, and save both in `folder`."""
    own = settings.own_target
    tokenizer = train_tokenizer(documents, own.vocab_size)
    rows = pack(documents, tokenizer, settings.row_length)
    torch.manual_seed(settings.seed)
    model = build_model(own, len(tokenizer))
    arguments = TrainingArguments(
        **trainer_arguments(own.budget, folder, device),
        per_device_train_batch_size=settings.batch_size,
        learning_rate=own.learning_rate,
        weight_decay=0.1,
        adam_beta2=0.95,
        seed=settings.seed,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=rows.map(lambda row: {"labels": row["input_ids"]}, desc="Labelling"),
        data_collator=default_data_collator,
        callbacks=[BudgetCallback(own.budget)],
    )
    trainer.train()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
