"""A trial of a target: drafted as a tree and as a chain, against plain decoding, on small texts.

In: a target, or a small copy of it, which has a layer of each kind and random weights. Out: the
highest way in which it gives the logits of plain `generate`. The drafter of a trial knows the text,
and drafts wrong tokens beside it:

    node     0      1      2    3      4    5      6      7        the true tokens are t1, t2, t3
    token    root   wrong  t1   wrong  t2   wrong  wrong  t3
    parent   -      0      0    2      2    1      4      4
"""

import copy
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from ...target import read_target, sliding_windows, text_config
from ..drafting import DraftTree, TreeShape, Warp, host_tensor
from ..loop import DecodingLoop, Plan
from ..outputs import OutputCollector
from ..plain.draft_policy import DraftPolicy
from ..preparation.needs import Preparation, choose_preparation
from ..preparation.runner import make_runner
from ..sequences import Sequences
from ..settings import Rule
from .entries import CHAIN, REFUSED, TREE, Way

SHAPE = TreeShape(depth=3, top_k=2, nodes=8)
PARENTS = (0, 0, 0, 2, 2, 1, 4, 4)
DEPTHS = (0, 1, 1, 2, 2, 2, 3, 3)
IS_TRUE = (1, 0, 1, 0, 1, 0, 0, 1)
# how far logits may be off, in their standard deviation; another mask moves them much further
ROUNDING = {torch.float64: 1e-4, torch.float32: 1e-3}  # some compute attention in float32
LOOSE = 0.2  # in lower precision
# of a copy: the largest numbers of config fields that name a length, or a width that no attention
# depends on; the number of tokens at which rotary parameters switch; and the spread of a matrix's
# outputs, such that tokens tell each other apart
VOCAB, SWITCH, SPREAD = 64, 16, 1.5
WIDTHS = "intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size", "ffn_dim"
LARGEST = {
    SWITCH: ("original_max_position_embeddings",),
    8: ("sliding_window", "window_size", "attention_window_size", "attention_chunk_size"),
    VOCAB: WIDTHS,
    128: ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"),
}


class Verdict(NamedTuple):
    """What a trial has found."""

    way: Way
    said: str = ""  # what was wrong with the next higher way


class KnownText:
    """A drafter that knows the texts (batch, length) which come, prompts included."""

    layers: tuple[int, ...] = (-1,)

    def __init__(self, texts: Tensor, vocab: int, takes_tree: bool):
        self._texts, self._vocab, self._takes_tree = texts.cpu(), vocab, takes_tree
        self._rounds = 0

    def begin(self, tokens: Tensor, features: Tensor, positions: Tensor) -> None:
        """Count the prompts' tokens, (batch, length)."""
        self._lengths = host_tensor([tokens.shape[1]] * len(tokens))

    def commit(self, tokens: Tensor, features: Tensor, counts: Tensor) -> None:
        """Count new tokens, (batch, new)."""
        self._lengths = self._lengths + counts

    def select(self, rows: Tensor) -> None:
        """Keep some rows, by their index of shape (batch,)."""
        self._texts, self._lengths = self._texts[rows], self._lengths[rows]

    def memory(self) -> None:
        """Return None: nothing is continued."""

    def propose(self, root: Tensor, shape: TreeShape, warp: Warp | None = None) -> DraftTree:
        """The true tokens below `root` (batch,) and wrong ones; of a chain, the last are wrong.

        All parts of the tree are (batch, nodes).
        """
        depth = min(shape.depth, SHAPE.depth)
        if self._takes_tree:
            parts = (host_tensor(part) for part in (PARENTS, DEPTHS, IS_TRUE))
            nodes = sum(level <= depth for level in DEPTHS)
            parents, depths, is_true = (part[:nodes] for part in parts)
        else:
            depths = host_tensor(range(depth + 1))
            parents = (depths - 1).clamp(min=0)
            is_true = depths <= depth - self._rounds % (depth + 1)
        self._rounds += 1
        places = (self._lengths[:, None] - 1 + depths).clamp(max=self._texts.shape[1] - 1)
        known = self._texts.gather(1, places)
        tokens = torch.where(is_true.bool(), known, (known + 1) % self._vocab)
        tree = DraftTree(tokens, parents.expand_as(tokens), depths.expand_as(tokens), levels=depth)
        return tree.to(root.device)


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
    longest, padding = max(lengths), host_tensor([max(lengths) - one for one in lengths])
    ids = torch.arange(len(lengths) * longest, device=device).view(len(lengths), -1) * 7 % vocab
    seen = torch.arange(longest, device=device) >= padding.to(device)[:, None]
    # a text of all tokens, which tells their places apart
    how = {"do_sample": False, "num_beams": 1, "no_repeat_ngram_size": 1, "pad_token_id": 0}
    how |= {"return_dict_in_generate": True, "output_logits": True}
    settings = GenerationConfig(max_new_tokens=new, min_new_tokens=new, **how)
    call = {"attention_mask": seen.long(), "generation_config": settings}
    plain = model.generate(ids, **call)
    known = KnownText(plain.sequences, vocab, takes_tree)

    def decode(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        need = choose_preparation(model, kwargs, len(input_ids), longest + new)
        assert need < Preparation.CHECKED or not takes_tree, "each round is compared with steps"
        stays = keeps_rows or need > Preparation.DIRECT
        watched = input_ids, logits_processor, stopping_criteria
        sequences = Sequences(*watched, is_lockstep=not takes_tree, keeps_rows=stays)
        collector = OutputCollector(generation_config, len(input_ids), sliding_windows(model))
        passes = known.layers, None, collector.extras
        runner = make_runner(read_target(model), need, takes_tree, *passes)
        plan = Plan(Rule("greedy", False), longest + new)
        loop = DecodingLoop(known, runner, sequences, collector, DraftPolicy(SHAPE), plan)
        loop.run(kwargs)
        return loop.output(runner.cache)

    drafted = model.generate(ids, **call, custom_generate=decode)
    _compare(plain, drafted, longest, ROUNDING.get(model.dtype, LOOSE))


def _compare(plain: ModelOutput, drafted: ModelOutput, start: int, rounding: float) -> None:
    """Raise an AssertionError where logits differ by more than rounding at equal texts.

    The logits of a token are (batch, vocab), and the texts (batch, length).
    """
    same = torch.ones(len(plain.sequences), dtype=torch.bool, device=plain.sequences.device)
    for step, (expected, found) in enumerate(zip(plain.logits, drafted.logits, strict=True)):
        off = (found.to(expected.device) - expected).abs().amax(-1) / expected.std(dim=-1)
        if rows := (same & (off > rounding)).nonzero()[:, 0].tolist():
            raise AssertionError(
                f"logits of token {step + 1} in row {rows[0] + 1} are off by"
                f" {float(off[rows[0]]):.1g} standard deviations"
            )
        same &= plain.sequences[:, start + step] == drafted.sequences[:, start + step]


def small_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a target's class with random weights; the global generator is left as it was."""
    config = small_config(model.config)
    device = read_target(model).device
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.device(device):
        torch.manual_seed(0)
        made = type(model)._from_config(
            config, dtype=torch.float32, attn_implementation=model.config._attn_implementation
        )
        for weight in made.parameters():
            if weight.dim() > 1:
                torch.nn.init.normal_(weight, 0, SPREAD * weight.shape[-1] ** -0.5)
    return made.eval().requires_grad_(False)


def small_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """A config with one layer of each kind, a small vocabulary and short lengths."""
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    text = config.get_text_config(decoder=True)
    _keep_layers(text)
    for part in {id(config): config, id(text): text}.values():
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(part, name, None)
        if getattr(part, "vocab_size", None):
            part.vocab_size = min(part.vocab_size, VOCAB)
    fields = vars(text)
    for largest, names in LARGEST.items():
        for name in names:
            if isinstance(fields.get(name), int):
                setattr(text, name, min(largest, fields[name]))
    rope = fields.get("rope_parameters") or {}
    for part in (rope, *rope.values()):  # of all layers, or by layer type
        if isinstance(part, dict) and "original_max_position_embeddings" in part:
            part["original_max_position_embeddings"] = SWITCH
    return config


def _keep_layers(text: PreTrainedConfig) -> None:
    """Keep the first layer of each kind, by all lists that have an entry a layer."""
    layers = text.num_hidden_layers
    lists = {
        name: value
        for name, value in vars(text).items()
        if isinstance(value, (list, tuple)) and len(value) == layers and name != "architectures"
    }
    kinds: dict[tuple, int] = {}
    for layer in range(layers):
        kinds.setdefault(tuple(str(value[layer]) for value in lists.values()), layer)
    kept = sorted(kinds.values()) if lists else list(range(min(layers, 2)))
    for name, value in lists.items():
        setattr(text, name, type(value)(value[at] for at in kept))
    text.num_hidden_layers = len(kept)
