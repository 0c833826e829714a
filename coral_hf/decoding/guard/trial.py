"""A trial of a target: drafted as a tree and as a chain, against plain decoding, on small texts.

In: a target, or a small copy of it. Out: the highest way in which it gives the logits of plain
`generate`. The drafter of a trial knows the text, and drafts wrong tokens beside it:

    node     0      1      2    3      4    5      6    7          the true tokens are t1, t2, t3
    token    root   wrong  t1   wrong  t2   wrong  t3   wrong
    parent   -      0      0    2      2    4      4    1
"""

from typing import NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.utils import GenerateDecoderOnlyOutput

from ...target import read_target, sliding_windows, text_config
from ..draft_policy import DraftPolicy
from ..drafting import DraftTree, TreeShape, Warp, host_tensor
from ..loop import DecodingLoop, Plan
from ..outputs import OutputCollector
from ..preparation.needs import Preparation, choose_preparation
from ..preparation.runner import make_runner
from ..sequences import Sequences
from ..settings import Rule
from .entries import CHAIN, REFUSED, TREE, Way

SHAPE = TreeShape(depth=3, top_k=2, nodes=8)
PARENTS = (0, 0, 0, 2, 2, 4, 4, 1)
DEPTHS = (0, 1, 1, 2, 2, 3, 3, 2)
TRUE_NODES = (2, 4, 6)
# how far logits may be off, in their standard deviation; another mask moves them much further
ROUNDING = {torch.float64: 1e-4, torch.float32: 1e-3}  # some compute attention in float32
LOOSE = 0.2  # in lower precision


class Verdict(NamedTuple):
    """What a trial has found."""

    way: Way
    said: str = ""  # what was wrong with the next higher way


class KnownText:
    """A drafter that knows the texts (batch, length) which come, prompts included."""

    layers: tuple[int, ...] = (-1,)

    def __init__(self, texts: Tensor, vocab: int, takes_tree: bool):
        self._texts, self._vocab, self._takes_tree = texts.tolist(), vocab, takes_tree
        self._lengths = [0] * len(texts)
        self._rounds = 0

    def begin(self, tokens: Tensor, features: Tensor, positions: Tensor) -> None:
        """Count the prompts' tokens, (batch, length)."""
        self._lengths = [tokens.shape[1]] * len(tokens)

    def commit(self, tokens: Tensor, features: Tensor, counts: Tensor) -> None:
        """Count new tokens, (batch, new)."""
        pairs = zip(self._lengths, counts.tolist(), strict=True)
        self._lengths = [length + count for length, count in pairs]

    def select(self, rows: Tensor) -> None:
        """Keep some rows, by their index of shape (batch,)."""
        self._texts = [self._texts[row] for row in rows.tolist()]
        self._lengths = [self._lengths[row] for row in rows.tolist()]

    def memory(self) -> None:
        """Return None: nothing is continued."""

    def propose(self, root: Tensor, shape: TreeShape, warp: Warp | None = None) -> DraftTree:
        """The true tokens below `root` (batch,) and wrong ones; of a chain, the last are wrong.

        All parts of the tree are (batch, nodes).
        """
        depth = min(shape.depth, SHAPE.depth)
        if self._takes_tree:
            nodes = [node for node, level in enumerate(DEPTHS) if level <= depth]
            parents, depths = ([part[node] for node in nodes] for part in (PARENTS, DEPTHS))
            parents = [nodes.index(parent) for parent in parents]
            is_true = [node in TRUE_NODES for node in nodes]
        else:
            depths, kept = list(range(depth + 1)), depth - self._rounds % (depth + 1)
            parents = [max(node - 1, 0) for node in depths]
            is_true = [node <= kept for node in depths]
        self._rounds += 1
        rows = []
        for last, text, length in zip(root.tolist(), self._texts, self._lengths, strict=True):
            known = [last, *text[length : length + depth]]
            known += [0] * (depth + 1 - len(known))
            tokens = [known[level] for level in depths]
            pairs = zip(tokens, is_true, strict=True)
            rows.append([last, *[t if true else (t + 1) % self._vocab for t, true in pairs][1:]])
        made, below, at = (host_tensor(part).to(root.device) for part in (rows, parents, depths))
        return DraftTree(made, below.expand_as(made), at.expand_as(made), levels=depth)


@torch.no_grad()
def try_target(
    model: PreTrainedModel, prompts: list[tuple[int, ...]], new: int, keeps_rows: bool = False
) -> Verdict:
    """Find the highest way in which a target gives the logits of plain `generate`.

    Args:
        prompts: lengths of the prompts of each call.
        new: tokens of each text.
        keeps_rows: whether all rows stay in each pass.
    """
    said = ""
    for way in (TREE, CHAIN):
        try:
            for lengths in prompts:
                _try_call(model, lengths, new, way == TREE, keeps_rows)
        except Exception as error:  # whatever other people's code raises is its answer
            said = f"{type(error).__name__}: {error}".splitlines()[0]
        else:
            return Verdict(way, said)
    return Verdict(REFUSED, said)


def _try_call(
    model: PreTrainedModel, lengths: tuple[int, ...], new: int, takes_tree: bool, keeps_rows: bool
) -> None:
    """Raise an error if a drafted call does not give the logits of the plain one."""
    device, vocab = read_target(model).device, text_config(model).vocab_size
    longest = max(lengths)
    ids = torch.arange(len(lengths) * longest, device=device).view(len(lengths), -1) * 7 % vocab
    seen = (
        torch.arange(longest, device=device) >= longest - host_tensor(lengths).to(device)[:, None]
    )
    settings = GenerationConfig(
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        num_beams=1,
        no_repeat_ngram_size=1,  # a text of all tokens, which tells their places apart
        return_dict_in_generate=True,
        output_logits=True,
        pad_token_id=0,
    )
    call = {"attention_mask": seen.long(), "generation_config": settings}
    plain = model.generate(ids, **call)
    known = KnownText(plain.sequences, vocab, takes_tree)

    def decode(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        windows, target = sliding_windows(model), read_target(model)
        need = choose_preparation(model, kwargs, len(input_ids), input_ids.shape[1] + new)
        assert need < Preparation.CHECKED or not takes_tree, "each round is compared with steps"
        sequences = Sequences(
            *(input_ids, logits_processor, stopping_criteria),
            is_lockstep=not takes_tree,
            keeps_rows=keeps_rows or need > Preparation.DIRECT,
        )
        collector = OutputCollector(generation_config, len(input_ids), windows)
        passes = known.layers, None, collector.extras
        runner = make_runner(target, need, takes_tree, *passes)
        plan = Plan(Rule("greedy", False), input_ids.shape[1] + new)
        loop = DecodingLoop(known, runner, sequences, collector, DraftPolicy(SHAPE), plan)
        loop.run(kwargs)
        return loop.output(runner.cache)

    drafted = model.generate(ids, **call, custom_generate=decode)
    _compare(plain, drafted, longest, ROUNDING.get(model.dtype, LOOSE))


def _compare(
    plain: GenerateDecoderOnlyOutput,
    drafted: GenerateDecoderOnlyOutput,
    start: int,
    rounding: float,
) -> None:
    """Raise an AssertionError where logits differ by more than rounding at equal texts.

    The logits of a token are (batch, vocab), and the texts (batch, length).
    """
    same = torch.ones(len(plain.sequences), dtype=torch.bool, device=plain.sequences.device)
    for step, (expected, found) in enumerate(zip(plain.logits, drafted.logits, strict=True)):
        scale = expected.std(dim=-1)
        off = (found.to(expected.device) - expected).abs().amax(-1) / scale
        is_off = same & (off > rounding)
        if is_off.any():
            row = int(is_off.nonzero()[0])
            raise AssertionError(
                f"logits of token {step + 1} in row {row + 1} are off by {float(off[row]):.1g}"
                " standard deviations"
            )
        same &= plain.sequences[:, start + step] == drafted.sequences[:, start + step]
