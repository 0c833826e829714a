"""A target's own text beside its text with a drafter, and what kind of error came instead.

In: a target, and lengths of prompts. Out: a `Call` with the target's own text; for a drafter, its
text, a `Refusal` or a `Crash`.
"""

from typing import NamedTuple

import torch
from conftest import VOCAB, noted_passes
from torch import Tensor
from transformers import PreTrainedModel

from coral_hf import CoralDrafter
from coral_hf.decoding import DraftTree

NEW = 24  # tokens of a text, which crosses every length that the tiny configs name
LENGTHS = ((3,), (19, 3, 11))  # of the prompts of each call
TIE = 1e-3  # of two best logits in float32, which takes the place of float64 where that fails


class Recorded:
    """A drafter that knows the text, and is wrong at every fourth token of a chain.

    `texts`: (batch, length), prompts included.
    """

    layers = ()

    def __init__(self, texts: Tensor):
        self.texts = torch.nn.functional.pad(texts, (0, 8))

    def begin(self, tokens, features, positions):
        self.read = torch.full((len(tokens),), tokens.shape[1])

    def commit(self, tokens, features, counts):
        self.read = self.read + counts

    def select(self, rows):
        self.read, self.texts = self.read[rows], self.texts[rows]

    def memory(self):
        return None

    def propose(self, root, shape, warp=None) -> DraftTree:
        """A chain, or a tree whose levels are a wrong token and the right one."""
        width = 1 if shape.top_k == 1 else 2
        depth = min(shape.depth, (shape.nodes - 1) // width)
        levels = torch.arange(depth)
        steps = self.read[:, None] + levels  # (batch, depth)
        right = self.texts.gather(1, steps.clamp(max=self.texts.shape[1] - 1))
        wrong = (right + 1) % VOCAB
        if width == 1:
            below, parents = torch.where(steps % 4 == 3, wrong, right), levels
        else:
            below = torch.stack([wrong, right], 2).flatten(1)
            parents = 2 * levels.repeat_interleave(2)
        root, rows = root[:, None].cpu(), len(root)
        return DraftTree(
            torch.cat([root, below], 1),
            torch.cat([torch.zeros(1, dtype=torch.long), parents]).expand(rows, -1),
            torch.cat(
                [torch.zeros(1, dtype=torch.long), 1 + levels.repeat_interleave(width)]
            ).expand(rows, -1),
            levels=depth,
        )


class Call(NamedTuple):
    """Prompts of a call of `generate`, and the target's own text."""

    inputs: dict
    texts: Tensor  # (batch, length)
    gaps: Tensor  # (batch, new), of the two best logits at each token
    dtype: torch.dtype

    @property
    def new(self) -> Tensor:
        """The tokens after the prompts, (batch, new)."""
        return self.texts[:, self.inputs["input_ids"].shape[1] :]

    @property
    def is_varied(self) -> bool:
        """Whether the text of the first row has several tokens, and so would show a mistake."""
        return len(set(self.new[0].tolist())) > 2

    def difference(self, texts: Tensor) -> int | None:
        """The new token at which a drafted text (batch, length) first leaves the target's own."""
        new = texts[:, self.inputs["input_ids"].shape[1] :]
        if new.shape != self.new.shape:
            return min(new.shape[1], self.new.shape[1])
        for own, text, gaps in zip(self.new, new, self.gaps, strict=True):
            first = next(iter((own != text).nonzero()[:, 0].tolist()), None)
            # in float32, ties part, and nothing is known of what follows them
            if first is not None and (self.dtype == torch.float64 or not gaps[first] < TIE):
                return first
        return None


class Refusal(Exception):
    """A ValueError before the first pass of the target."""


class Crash(Exception):
    """Any other error."""


def own_call(target: PreTrainedModel, lengths: tuple[int, ...]) -> Call:
    """What a target writes alone, after random prompts that are padded on the left."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, VOCAB, (len(lengths), max(lengths)), generator=generator)
    mask = torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]
    inputs = {"input_ids": ids * mask, "attention_mask": mask.long()}
    inputs |= {"do_sample": False, "max_new_tokens": NEW}
    output = target.generate(**inputs, return_dict_in_generate=True, output_logits=True)
    best = torch.stack(output.logits, 1).double().topk(2).values
    return Call(inputs, output.sequences, best[..., 0] - best[..., 1], target.dtype)


def own_calls(target: PreTrainedModel) -> list[Call]:
    """One row, and three padded rows; in float32 where float64 is not possible."""
    calls = []
    for lengths in LENGTHS:
        try:
            call = own_call(target.double(), lengths)
        except RuntimeError:  # some kernels know no float64
            call = None
        # an eager softmax is often in float32, where the mask of a padded row overflows
        fails = call is None or bool(call.gaps.isnan().any())
        calls.append(own_call(target.float(), lengths) if fails else call)
    return calls


def drafted(target: PreTrainedModel, drafter, call: Call, shape: dict) -> Tensor:
    """What `generate` returns with a drafter: (batch, length)."""
    passes = []
    settings = {**shape, "speculation": "always", "assistant_model": drafter}
    try:
        with noted_passes(target, lambda *_: passes.append(1)):
            return target.generate(**call.inputs, **settings)
    except TimeoutError:
        raise
    except ValueError as error:
        if passes:
            raise Crash(f"ValueError after the first pass: {error}") from error
        raise Refusal(str(error)) from error
    except Exception as error:
        raise Crash(f"{type(error).__name__}: {error}") from error


def untrained(target: PreTrainedModel) -> CoralDrafter:
    """A drafter of the target."""
    torch.manual_seed(0)
    try:
        return CoralDrafter.from_target(target).eval()
    except ValueError as error:
        raise Refusal(str(error)) from error
    except Exception as error:
        raise Crash(f"from_target: {type(error).__name__}: {error}") from error
