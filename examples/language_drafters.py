"""Drafters by language: one for all languages, one for each, and a CORAL drafter, of one target.

    apt-get install manpages-de manpages-fr
    python examples/language_drafters.py --output languages --rows languages.jsonl

Without root, `apt-get download` the packages, `dpkg-deb -x` each into a folder, and pass its
`usr/share/man` by `--pages`, after `/usr/share/man` itself.

The recipe is to pretrain and fine-tune a small model for a language (Yi et al. 2024):

    pages       manual pages in English, German and French, without the commands of groff; those
                that are there in German or French, the same number of characters a language. Every
                tenth page is held out, in all languages
    target      byte-level BPE and a small Llama, trained on all of it
    answers     the target goes on from beginnings of passages, at T = 0, 0.3, 0.7 and 1
    drafters    `all`, `en`, `de`, `fr`: pretrained on pages (loss ce), then fine-tuned on answers
                (each --loss), of all languages or of one, for equal steps and batches;
                `coral`: a CORAL drafter on all answers, for the steps of both
    measured    tau on held-out passages of each language, T = 0 and 1, trees of one shape

An interrupted run resumes: models, answers and measured rows are kept. `--drafter all --loss ce
--loss kl --loss tvd --loss "tvd++"` compares the losses on the same answers.
"""

import argparse
import gzip
import json
import re
import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset, concatenate_datasets
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    set_seed,
)

from coral_hf import (
    AssistantTrainer,
    AssistantTrainingArguments,
    CoralDrafter,
    CoralTrainer,
    CoralTrainingArguments,
    LanguageModelDrafter,
)
from coral_hf.atomic import JsonLines, keep_settings, new_folder, sole_writer, write_json
from coral_hf.demo.models import small_llama, train_tokenizer
from coral_hf.identity import digest
from coral_hf.measure.calls import decoded_rounds
from coral_hf.measure.report import hardware_name
from coral_hf.target import read_target
from coral_hf.training.arguments import parse_arguments
from coral_hf.training.assistant import small_model
from coral_hf.training.data import load_conversations
from coral_hf.training.regeneration import RegenerationSettings
from coral_hf.training.regeneration.regenerate import regenerate
from coral_hf.training.runs.checkpoints import last_checkpoint

LANGUAGES = ("en", "de", "fr")
KEY = ("run", "drafter", "loss", "language", "temperature")  # of a row of results
NOT_KEPT = ("output", "rows", "pages", "drafter", "loss")  # options on which no model depends
RECORD = "training_record.json"  # as CORAL drafters keep it
DRAFTERS = ("all", *LANGUAGES, "coral")
TEMPERATURES = (0.0, 0.3, 0.7, 1.0)
OPTIONS = (
    "--per_device_train_batch_size 8 --max_length 256 --learning_rate 2e-3 --adam_beta2 0.95"
    " --lr_scheduler_type cosine --save_steps 200 --save_total_limit 1 --logging_steps 50"
)
TREE = {"tree_depth": 5, "tree_top_k": 4, "tree_nodes": 16}
COMMENT, COMMAND = re.compile(r"\\\".*$", re.MULTILINE), re.compile(r"^[.'][ \t]*(\w*)[ \t]*(.*)$")
WORDS = {"SH", "SS", "B", "I", "BR", "RB", "BI", "IB", "IR", "RI", "SM", "SB", "IP"}
ESCAPES = {r"\-": "-", r"\(aq": "'", r"\(dq": '"', r"\(bu": "-", r"\e": "\\"}
ESCAPES |= {r"\ ": " ", r"\~": " "}
ESCAPE = re.compile(r"\\(\[[^\]]*\]|[f*](\[[^\]]*\]|\(..|.)|s[-+]?\d+|\(..|.)", re.DOTALL)
Maker = Callable[[Path], Any]


def page_text(file: Path) -> str:
    """The words of a page in the `man` macros of groff; nothing of other pages."""
    with gzip.open(file) as compressed:
        source = COMMENT.sub("", compressed.read().decode("utf-8", "replace"))
    lines = []
    for line in source.splitlines():
        command = COMMAND.match(line)
        if command and command[1] in ("Dd", "so"):  # other macros, and links to another page
            return ""
        if command is None or command[1] in WORDS:
            lines.append(line if command is None else command[2].replace('"', ""))
        elif command[1] in ("P", "PP", "LP", "TP"):
            lines.append("")
    text = ESCAPE.sub(lambda found: ESCAPES.get(found[0], ""), "\n".join(lines))
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def read_pages(folders: list[Path], characters: int) -> dict[str, dict[str, str]]:
    """The pages of each language by name, up to a number of characters of each language."""
    files: dict[str, dict[str, Path]] = {language: {} for language in LANGUAGES}
    for language, found in files.items():
        for folder in folders:
            place = folder if language == "en" else folder / language
            for file in place.glob("man*/*.gz"):
                if not file.is_symlink():
                    found.setdefault(f"{file.parent.name}/{file.name}", file)
    names = sorted({*files["de"], *files["fr"]}, key=digest)  # in an order of no meaning
    pages: dict[str, dict[str, str]] = {language: {} for language in LANGUAGES}
    for language, texts in pages.items():
        for name in names:
            text = page_text(files[language][name]) if name in files[language] else ""
            if len(text) > 500 and sum(map(len, texts.values())) < characters:
                texts[name] = text
        if not texts:
            raise SystemExit(f"No manual page in {language!r} is below {[*map(str, folders)]}.")
    return pages


def is_held_out(name: str) -> bool:
    return int(digest(name), 16) % 10 == 0


def passages(pages: dict[str, str], held_out: bool, length: int = 400) -> Iterator[str]:
    """Parts of pages, each from the beginning of a paragraph on."""
    for name in sorted(pages, key=digest):
        if is_held_out(name) == held_out:
            text = pages[name]
            starts = [0, *(found.end() for found in re.finditer(r"\n\n", text))]
            last = -length
            for start in starts:
                if start >= last + length and len(text) - start >= length:
                    last = start
                    yield text[start : start + length]


def spread(texts: list[str], number: int) -> list[str]:
    """Some of many, evenly."""
    number = min(number, len(texts))
    return [texts[index * len(texts) // number] for index in range(number)]


def kept(folder: Path, make: Maker) -> Path:
    """A folder that `make` fills, unless it is there."""
    if not folder.exists():
        with new_folder(folder) as unfinished:
            make(unfinished)
    return folder


class Experiment:
    """Everything of a run, made when it is first asked for, and kept."""

    def __init__(self, options: argparse.Namespace, pages: dict[str, dict[str, str]]):
        self.options, self.folder, self.pages = options, options.output, pages
        self.tokenizer = AutoTokenizer.from_pretrained(kept(self.folder / "target", self._target))
        self.target = AutoModelForCausalLM.from_pretrained(self.folder / "target").eval()
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.target.to(device)

    def texts(self, languages: tuple[str, ...]) -> Dataset:
        parts = (self.pages[language].items() for language in languages)
        return Dataset.from_dict(
            {"text": [t for part in parts for n, t in part if not is_held_out(n)]}
        )

    def answers(self, languages: tuple[str, ...]) -> Dataset:
        """The target's answers in some languages, at all temperatures."""
        found = []
        for language in languages:
            asked = spread([*passages(self.pages[language], held_out=False)], self.options.prompts)
            for temperature in TEMPERATURES:
                path = self.folder / "answers" / f"{language}-{temperature}.jsonl"
                chosen = RegenerationSettings(
                    temperature=temperature, max_new_tokens=96, prompt_tokens=32, batch_size=32
                )
                rows = Dataset.from_dict({"text": asked})
                regenerate(self.target, self.tokenizer, rows, path, chosen)
                found.append(load_conversations(str(path)))
        return concatenate_datasets(found)

    def _target(self, folder: Path) -> None:
        texts = self.texts(LANGUAGES)
        tokenizer = train_tokenizer(texts["text"], self.options.vocab_size)
        width = self.options.width
        config = small_llama(tokenizer, width, self.options.layers, heads=width // 32)
        set_seed(0)
        run = "target", self.options.target_steps
        self._train(LlamaForCausalLM(config), run, None, tokenizer, texts, folder, loss="ce")

    def _train(
        self, model, run: tuple[str, int], target, tokenizer, rows: Dataset, folder: Path, **chosen
    ) -> None:
        """Train a model for the steps of a run, and save it; checkpoints lie under its name."""
        name, steps = run
        is_coral = isinstance(model, CoralDrafter)
        kind = CoralTrainingArguments if is_coral else AssistantTrainingArguments
        chosen |= {"max_steps": steps, "warmup_steps": min(20, steps)}
        chosen["use_cpu"] = not torch.cuda.is_available()
        chosen |= {"recipe": "coral"} if is_coral else {}
        args = parse_arguments(self.folder / f"{name}-run", OPTIONS.split(), kind, **chosen)
        given = {"args": args, "target_model": target, "processing_class": tokenizer}
        trainer_kind = CoralTrainer if is_coral else AssistantTrainer
        trainer = trainer_kind(model, train_dataset=rows, **given)
        trainer.train(resume_from_checkpoint=last_checkpoint(args.output_dir, resume=True))
        trainer.save_model(str(folder))
        write_json(folder / RECORD, trainer.training_record)

    def pretrained(self, name: str) -> Path:
        """A small model that has read pages of its languages."""
        run = f"pretrained-{name}", self.options.pretrain_steps

        def make(folder: Path) -> None:
            set_seed(0)
            model = small_model(self.target.config, 1, self.options.width // 2)
            texts = self.texts(LANGUAGES if name == "all" else (name,))
            self._train(model, run, None, self.tokenizer, texts, folder, loss="ce")

        return kept(self.folder / run[0], make)

    def fine_tuned(self, name: str, loss: str) -> Path:
        """The same, fine-tuned on answers of the target."""
        run = f"{name}-{loss}", self.options.finetune_steps

        def make(folder: Path) -> None:
            model = AutoModelForCausalLM.from_pretrained(self.pretrained(name))
            rows = self.answers(LANGUAGES if name == "all" else (name,))
            own = {"loss": loss, "learning_rate": 1e-3}
            self._train(model, run, self.target, self.tokenizer, rows, folder, **own)

        return kept(self.folder / run[0], make)

    def coral(self) -> Path:
        """A CORAL drafter, trained on the answers for as many steps."""
        run = "coral", self.options.pretrain_steps + self.options.finetune_steps

        def make(folder: Path) -> None:
            set_seed(0)
            drafter = CoralDrafter.from_target(self.target).float()
            drafter.generation_config.update(**TREE)
            rows = self.answers(LANGUAGES)
            own = {"classification_weight": 1.0}
            self._train(drafter, run, self.target, self.tokenizer, rows, folder, **own)

        return kept(self.folder / run[0], make)

    def load(self, name: str, loss: str) -> Any:
        """A drafter on the target's device."""
        if name == "coral":
            return AutoModel.from_pretrained(self.coral()).to(self.target.device)
        model = AutoModelForCausalLM.from_pretrained(self.fine_tuned(name, loss))
        vars(model.generation_config).update(TREE)
        return LanguageModelDrafter(model.to(self.target.device), self.tokenizer)

    def training_seconds(self, name: str, loss: str) -> float:
        """How long the models of a drafter were trained."""
        is_coral = name == "coral"
        folders = (
            [self.coral()] if is_coral else [self.pretrained(name), self.fine_tuned(name, loss)]
        )
        records = [json.loads((folder / RECORD).read_text()) for folder in folders]
        return round(sum(entry["seconds"] for record in records for entry in record), 1)

    def measure(self, drafter: Any, language: str, temperature: float) -> dict[str, Any]:
        """Rounds of a drafter on held-out passages of a language."""
        held_out = spread([*passages(self.pages[language], held_out=True)], self.options.held_out)
        prompts = [self.tokenizer(text)["input_ids"][:32] for text in held_out]
        bos = [self.tokenizer.bos_token_id]
        prompts = [ids if ids[:1] == bos else bos + ids for ids in prompts]
        start = time.perf_counter()
        rounds = decoded_rounds(drafter, read_target(self.target), prompts, 64, temperature)
        return {
            "tau": round(sum(rounds) / len(rounds), 4),
            "prompts": len(prompts),
            "tokens": sum(rounds),
            "rounds": len(rounds),
            "decoding_seconds": round(time.perf_counter() - start, 2),
        }


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Lines of a Markdown table: tau of a drafter and loss, by language and temperature."""
    columns = [(t, language) for t in (0.0, 1.0) for language in LANGUAGES]
    yield f"| drafter | loss | {' | '.join(f'{n}, T={t:g}' for t, n in columns)} |"
    yield "|---" * (len(columns) + 2) + "|"
    for key in dict.fromkeys((row["drafter"], row["loss"]) for row in rows):
        found = {
            (r["temperature"], r["language"]): r["tau"]
            for r in rows
            if key == (r["drafter"], r["loss"])
        }
        cells = [f"{found[column]:.2f}" if column in found else "" for column in columns]
        yield f"| {' | '.join([*map(str, key), *cells])} |"


def main(options: argparse.Namespace) -> None:
    pages = read_pages(options.pages, options.characters)
    own = {name: value for name, value in vars(options).items() if name not in NOT_KEPT}
    own["pages_digest"] = digest(pages)
    keep_settings(options.output / "settings.json", own, options.output)
    lines = JsonLines(options.rows or options.output / "rows.jsonl").mend()
    run = digest(own)[:12]
    known = {tuple(row[name] for name in KEY): row for row in lines.read()}
    experiment = Experiment(options, pages)
    facts = {
        **own,
        "target_parameters": experiment.target.num_parameters(),
        "dtype": "float32",
        "hardware": hardware_name(experiment.target.device),
        "threads": torch.get_num_threads(),
        "versions": {"torch": str(torch.__version__), "transformers": transformers.__version__},
    }
    found = []
    for name in options.drafter or DRAFTERS:
        for loss in ["coral"] if name == "coral" else options.loss or ["kl"]:
            drafter = None
            for key in product([run], [name], [loss], LANGUAGES, (0.0, 1.0)):
                if key not in known:
                    drafter = drafter or experiment.load(name, loss)
                    known[key] = dict(zip(KEY, key, strict=True))
                    known[key] |= experiment.measure(drafter, *key[-2:])
                    known[key]["parameters"] = drafter.num_parameters()
                    known[key]["training_seconds"] = experiment.training_seconds(name, loss)
                    lines.append([facts | known[key]])
                found.append(known[key])
    print("\n".join(table(found)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--pages", type=Path, action="append", default=None)
    parser.add_argument("--rows", type=Path, help="JSON lines of all results; default: in OUTPUT")
    parser.add_argument("--drafter", action="append", choices=DRAFTERS)
    parser.add_argument("--loss", action="append", choices=("ce", "kl", "tvd", "tvd++"))
    parser.add_argument("--characters", type=int, default=1_000_000, help="of each language")
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--width", type=int, default=256, help="of the target")
    parser.add_argument("--layers", type=int, default=4, help="of the target")
    parser.add_argument("--target-steps", type=int, default=2000)
    parser.add_argument("--pretrain-steps", type=int, default=400)
    parser.add_argument("--finetune-steps", type=int, default=400)
    parser.add_argument("--prompts", type=int, default=256, help="answered, of each language")
    parser.add_argument("--held-out", type=int, default=16, help="passages of each language")
    typed = parser.parse_args()
    typed.pages = typed.pages or [Path("/usr/share/man")]
    with sole_writer(typed.output):
        main(typed)
