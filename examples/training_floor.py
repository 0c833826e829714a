"""Training speed against its floor, and CORAL against EAGLE: docs/results/training_speed.md.

python examples/training_floor.py --rows training_speed.jsonl

The floor of a step is the time of the target's forward pass and of the drafter's products, each
measured alone: products of features with the drafter's matrices and with the LM head, forward and
backward, and attention. The target and the drafter have random weights. A row, of one vocabulary,
length, recipe and source of features, is appended to ROWS as it ends, and the same command goes on.
"""

import argparse
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import pandas
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback, set_seed

from coral_hf import CoralDrafter, CoralTrainer, CoralTrainingArguments
from coral_hf.atomic import JsonLines
from coral_hf.measure.report import Table, describe_environment
from coral_hf.training.data import prepare_dataset
from coral_hf.training.features import CachedFeatures, write_features

WARM_UP, COUNTED = 2, 1  # steps: until all is allocated, and whose operations are counted
CHUNKS = 128, 512, 2048  # positions whose logits a floor may hold; the fastest counts
CASE = ["vocabulary", "length", "features"]


class Clock(TrainerCallback):
    """Times the steps of a run, and counts the operations of one of them."""

    def __init__(self) -> None:
        self.seconds = list[float]()
        self.counter = FlopCounterMode(display=False)

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        """See [`~transformers.TrainerCallback`]."""
        if state.global_step == WARM_UP:
            self.counter.__enter__()
        self.begin = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """See [`~transformers.TrainerCallback`]."""
        self.seconds.append(time.perf_counter() - self.begin)
        if state.global_step == WARM_UP + COUNTED:
            self.counter.__exit__(None, None, None)

    @property
    def step_seconds(self) -> float:
        """The median of the steps whose operations were not counted, after the first ones."""
        return median(self.seconds[WARM_UP + COUNTED :])


def seconds_of(function: Callable[[], object], repeats: int) -> float:
    """Return the median of some calls after one."""
    seconds = []
    for _ in range(1 + repeats):
        begin = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - begin)
    return median(seconds[1:])


def products(inputs: Tensor, weight: Tensor, is_trained: bool) -> None:
    """Multiply (rows, in) by (out, in), and a gradient of the result by both."""
    outputs = inputs @ weight.T
    outputs @ weight
    if is_trained:
        outputs.T @ inputs


def drafter_floor(drafter: nn.Module, head: Tensor, length: int, steps: int, repeats: int) -> float:
    """Return the seconds of the products of `steps` steps; `head` is (vocab, hidden)."""
    config = drafter.config
    features = torch.randn(length, head.shape[1], dtype=torch.bfloat16)
    layers = [layer for layer in drafter.modules() if isinstance(layer, nn.Linear)]
    weights = [layer.weight.detach().bfloat16() for layer in layers]
    inputs = [torch.randn(length, one.shape[1], dtype=torch.bfloat16) for one in weights]
    of_layers = sum(
        seconds_of(lambda pair=pair: products(*pair, is_trained=True), repeats)
        for pair in zip(inputs, weights, strict=True)
    )
    shape = 1, config.num_attention_heads, length, config.head_dim
    heads = [torch.randn(shape, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    of_attention = seconds_of(
        lambda: F.scaled_dot_product_attention(*heads, is_causal=True).sum().backward(), repeats
    )

    def read_head(chunk: int) -> None:
        for some in features.split(chunk):
            some @ head.T  # the goal
            for _ in range(steps):
                products(some, head, is_trained=False)

    of_head = min(seconds_of(lambda chunk=chunk: read_head(chunk), repeats) for chunk in CHUNKS)
    return steps * (of_layers + of_attention) + of_head


def measure(options: argparse.Namespace, vocab: int, length: int) -> list[dict]:
    """Measure all recipes and sources of features with one vocabulary and length."""
    set_seed(0)
    size = options.hidden_size
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=size,
        intermediate_size=3 * size,
        num_hidden_layers=options.layers,
        num_attention_heads=size // 64,
        num_key_value_heads=size // 64,
        max_position_embeddings=4096,
    )
    target = LlamaForCausalLM(config).bfloat16().requires_grad_(False).eval()
    steps = WARM_UP + COUNTED + options.repeats
    ids = torch.randint(3, vocab, (steps, length)).tolist()
    text = prepare_dataset(Dataset.from_dict({"input_ids": ids}), None, length)
    with torch.no_grad():
        row = torch.tensor(ids[:1])
        target_floor = seconds_of(lambda: target.model(row, use_cache=False), options.repeats)
    rows = []
    with TemporaryDirectory() as folder:
        write_features(target, text, Path(folder, "features"))
        sources = {"online": text, "cached": CachedFeatures(Path(folder, "features"))}
        for (features, dataset), recipe in product(sources.items(), ("eagle", "coral")):
            set_seed(0)
            drafter = CoralDrafter.from_target(target).float()
            args = CoralTrainingArguments(
                output_dir=folder,
                recipe=recipe,
                max_steps=steps,
                max_length=length,
                per_device_train_batch_size=1,
                bf16=True,
                use_cpu=True,
                logging_steps=steps,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                dataloader_pin_memory=False,
            )
            clock = Clock()
            CoralTrainer(
                model=drafter,
                target_model=target,
                args=args,
                train_dataset=dataset,
                callbacks=[clock],
            ).train()
            num_steps = args.resolved.num_steps
            floor = drafter_floor(drafter, target.lm_head.weight, length, num_steps, 3)
            floor += target_floor if features == "online" else 0
            case = {"vocabulary": vocab, "length": length, "features": features}
            found = {"recipe": recipe, "seconds": clock.step_seconds, "floor": floor}
            found["teraflop"] = clock.counter.get_total_flops() / 1e12
            environment = vars(describe_environment(target, drafter))
            rows.append(case | found | {"environment": environment})
    return rows


def print_tables(rows: list[dict]) -> None:
    """Print speeds, and how a step of CORAL compares with one of EAGLE."""
    every = pandas.DataFrame(rows)
    every["tokens/s"] = every["length"] / every["seconds"]
    every["of the floor's"] = every["floor"] / every["seconds"]
    show(every[[*CASE, "recipe", "tokens/s", "of the floor's", "teraflop"]])
    paired = every.pivot(index=CASE, columns="recipe", values=["seconds", "teraflop"])
    time, count = (paired[of]["coral"] / paired[of]["eagle"] for of in ("seconds", "teraflop"))
    show(pandas.DataFrame({"time": time, "operations": count, "over": time / count}).reset_index())


def show(frame: pandas.DataFrame) -> None:
    """Print a frame as Markdown."""
    rows = [[x if isinstance(x, str) else f"{x:.4g}" for x in row] for row in frame.to_numpy()]
    print(Table("", [*frame.columns], rows).to_markdown() + "\n")


def main(options: argparse.Namespace) -> None:
    table = JsonLines(options.rows).mend()
    for vocab, length in product(options.vocab_size, options.length):
        known = [(row["vocabulary"], row["length"]) for row in table.read()]
        if (vocab, length) not in known:
            table.append(measure(options, vocab, length))
    print_tables(list(table.read()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=Path, required=True, help="JSON lines")
    parser.add_argument("--vocab-size", type=int, nargs="+", default=[32000, 152064])
    parser.add_argument("--length", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--layers", type=int, default=16, help="of the target")
    parser.add_argument("--repeats", type=int, default=5, help="steps that are timed")
    main(parser.parse_args())
