"""What the cases share: texts with a drafter beside plain ones, what a trainer reads of rows."""

import datasets
import pytest
import torch
from conftest import invoke, tiny_target
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from coral_hf import CoralDrafter, CoralTrainer, CoralTrainingArguments

MARKS = ["<s>", "<|end|>", "<|user|>", "<|assistant|>"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(autouse=True)
def _own_chance_and_cache(tmp_path, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens, and the marks of a chat."""
    tokens = [*MARKS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    found = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="<|end|>", extra_special_tokens=MARKS
    )
    found.chat_template = TEMPLATE
    return found


@pytest.fixture
def target(tokenizer):
    """A target of that tokenizer."""
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    return tiny_target("llama", torch.float32, vocab_size=len(tokenizer), **ends)


@pytest.fixture
def compare():
    """Whether a greedy text with a fresh drafter is "equal" to plain generate's, or "other".

    Where the call is refused, it is "refused".
    """

    def compared(target, given: dict, **settings) -> str:
        given = {"do_sample": False, "max_new_tokens": 16, **given}
        plain = target.generate(**given)
        try:
            drafter = CoralDrafter.from_target(target).eval()
            ours = target.generate(**given, assistant_model=drafter, **settings)
        except ValueError:
            return "refused"
        return "equal" if ours.equal(plain) else "other"

    return compared


@pytest.fixture
def stepping_back(monkeypatch):
    """Calls give up drafting after two rounds."""

    def note(policy, sample):
        seen = vars(policy).setdefault("seen", [])
        seen.append(sample)
        policy.is_plain = len(seen) == 2

    monkeypatch.setattr("coral_hf.decoding.plain.draft_policy.DraftPolicy.note", note)


@pytest.fixture
def trainer_of(target, tmp_path):
    """Makes a trainer of a fresh drafter, for rows or a dataset."""

    def trainer(rows, tokenizer=None, target=target, args=None, **settings) -> CoralTrainer:
        fields = {
            "output_dir": str(tmp_path / "run"),
            "per_device_train_batch_size": 1,
            "max_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
        }
        return CoralTrainer(
            model=CoralDrafter.from_target(target).float(),
            target_model=target,
            args=args or CoralTrainingArguments(**{**fields, **settings}),
            train_dataset=datasets.Dataset.from_list(rows) if isinstance(rows, list) else rows,
            processing_class=tokenizer,
        )

    return trainer


@pytest.fixture
def read(trainer_of):
    """The text of each row that a trainer reads, sorted, and the part of it that is trained."""

    def pairs(rows, tokenizer) -> list[tuple[str, str]]:
        batches = trainer_of(rows, tokenizer).get_train_dataloader()
        found = [(batch["input_ids"][0], batch["labels"][0]) for batch in batches]
        trained = [ids[labels != -100] for ids, labels in found]
        texts = [tokenizer.batch_decode([ids for ids, _ in found]), tokenizer.batch_decode(trained)]
        return sorted(zip(*texts, strict=True))

    return pairs


@pytest.fixture
def command():
    """Runs `coral-hf` with some words, and returns what it printed."""

    def run(*words) -> str:
        result = invoke(*words)
        assert result.exit_code == 0, result.output
        return result.output

    return run
