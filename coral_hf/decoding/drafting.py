"""Drafters as the decoding loop knows them: the draft tree, the protocol `Drafting`, the registry.

In: committed tokens and the target's features of them. Out: a `DraftTree` a round. Whatever else a
drafter has (one layer or five, a table of counts) is behind the protocol. A family of drafters
joins with `register_drafting(model_type, factory)`.

    node       0           1        2        3        4        the root is the last committed token
    token      "It"        "is"     "was"    "a"      "the"
    parent     -           0        0        1        1
    depth      0           1        1        2        2
    the root's children in order: 1, 2; node 1's: 3, 4; siblings do not see each other
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

PADDING = -1  # parent index of padding nodes

# (rows, vocab) logits → the same after the call's warpers
Warp = Callable[[Tensor], Tensor]


def host_tensor(numbers: Sequence) -> Tensor:
    """Whole numbers as a tensor of their shape on the CPU, whatever torch's default device."""
    return torch.tensor(numbers, dtype=torch.long, device="cpu")


class TreeShape(NamedTuple):
    """How large a tree may grow."""

    depth: int  # levels below the root
    top_k: int  # children of an expanded node, and nodes expanded in a level
    nodes: int  # nodes in the target's pass, the root included
    node_floor: float = 0.0  # a node's confidence from which on it is worth a place in the pass
    level_floor: float = 0.0  # confidence of a beam, summed, from which on it is worth a level


class Level(NamedTuple):
    """How many nodes of the level above get how many children each."""

    families: int
    children: int


class DraftTree(NamedTuple):
    """A tree of drafted tokens; parents come before their children, siblings best first.

    `draws` says how siblings came about, and so which rule keeps the target's distribution:
    `"chosen"` by any rule that looks at nothing random, or drawn from `draft_probs`
    `"without_replacement"` or `"independent"` of each other.
    """

    tokens: Tensor  # (batch, nodes), the root is node 0
    parents: Tensor  # (batch, nodes), the root is its own parent; `PADDING` where there is no node
    depths: Tensor  # (batch, nodes)
    draft_probs: Tensor | None = None  # (batch, nodes, vocab), q after each node; None if chosen
    draws: Literal["chosen", "without_replacement", "independent"] = "chosen"
    levels: int = 0  # that were drafted, whether or not a node of theirs was kept; 0: not known
    branching: int = 0  # most children of a node; 0: not known
    # of each level whose nodes stand family after family, as they were planned; (): not known
    plan: tuple[Level, ...] = ()
    # (batch, nodes - 1), of the path to each node but the root; None: not known
    log_confidence: Tensor | None = None

    def to(self, device: torch.device) -> "DraftTree":
        """Copy the tree, (batch, nodes), to a device."""
        return self.each(lambda part: part.to(device))

    def each(self, change: Callable[[Tensor], Tensor]) -> "DraftTree":
        """The tree with all of its tensors changed, (batch, nodes) and so on."""
        parts = self._asdict().items()
        return self._replace(**{n: change(p) for n, p in parts if isinstance(p, Tensor)})

    @property
    def max_depth(self) -> int:
        """A bound of `depths`, of which the device is asked only if the drafter does not say."""
        if self.tokens.shape[1] == 1:
            return 0
        return self.levels or int(self.depths.max())

    def ancestry(self) -> Tensor:
        """Find which nodes lie on the path from the root to each: (batch, nodes, nodes), bool.

        [b, i, j] tells whether j is on the path to i; a node is on its own path.
        """
        batch, nodes = self.tokens.shape
        seen = torch.eye(nodes, dtype=torch.bool, device=self.tokens.device).repeat(batch, 1, 1)
        parents = self.parents.clamp(min=0)
        ancestor = parents
        for _ in range(self.max_depth):
            seen.scatter_(2, ancestor[..., None], True)
            ancestor = parents.gather(1, ancestor)
        return seen

    def children_of(self, node: Tensor) -> Tensor:
        """Find the children of each row's `node`, of shape (batch,): (batch, nodes), bool."""
        is_child = self.parents == node[:, None]
        is_child[:, 0].fill_(False)
        return is_child

    def with_padding(self, rows: list[int], pad_token: int) -> "DraftTree":
        """Replace the trees of some rows, by their index, by chains of a padding token.

        All parts of a tree are (batch, nodes).
        """
        nodes = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        is_chain = nodes <= self.max_depth
        parents = (nodes - 1).clamp(min=0).masked_fill(~is_chain, PADDING)
        chain = {"tokens": pad_token, "parents": parents, "depths": nodes * is_chain}
        parts = {name: getattr(self, name).clone() for name in chain}
        for name, value in chain.items():
            parts[name][rows] = value
        return self._replace(**parts)


def root_only(tokens: Tensor) -> DraftTree:
    """Make trees of one node, which turn a round into a plain decoding step.

    `tokens`: of shape (batch,).
    """
    tokens = tokens[:, None].long()  # a prompt's may be of another integer type
    zeros = torch.zeros_like(tokens)
    return DraftTree(tokens, zeros, zeros)


class Drafting(Protocol):
    """The drafting side of one call of `generate`, for all rows of its batch.

    `layers`: which of the target's hidden states its features are, as indices into
    `hidden_states`: `(-1,)` the one after the final norm, several side by side for a drafter that
    fuses layers, `()` for one that reads tokens alone; then none are computed.
    """

    layers: tuple[int, ...]

    def begin(self, tokens: Tensor, features: Tensor, positions: Tensor) -> None:
        """Start at prompts, or continue sequences that were read before.

            position     0     1     2     3
            token        x0    x1    x2    x3       x3 was just emitted, the target has not read it
            feature      f0    f1    f2             f_i has read x_0 … x_i

        Args:
            tokens: (batch, length + 1), all of them, or of continued sequences those from the
                first unread feature on.
            features: (batch, length, len(layers) · hidden), the target's.
            positions: (batch, length), of the features; negative where the prompt is padded.
        """

    def propose(self, root: Tensor, shape: TreeShape, warp: Warp | None = None) -> DraftTree:
        """Draft a tree below each row's last committed token, no larger than `shape`.

        Args:
            root: (batch,), that token, which the loop puts into the tree itself too.
            shape: of one level at least.
            warp: where given, tokens are drawn from the drafter's distribution, which warpers such
                as the temperature change first; else they are the most probable ones.
        """

    def commit(self, tokens: Tensor, features: Tensor, counts: Tensor) -> None:
        """Read the tokens that a round committed, each with the feature before it.

        Args:
            tokens: (batch, new), padded on the right.
            features: (batch, new, len(layers) · hidden).
            counts: (batch,), on the CPU, how many are no padding.
        """

    def select(self, rows: Tensor) -> None:
        """Keep some rows of the batch only; `rows`, of shape (kept,), is on the CPU."""

    def memory(self) -> object | None:
        """Return what a later call with the same sequences may continue from, if anything."""


class FixedDrafting(Drafting, Protocol):
    """A drafting side that can go on in rounds of constant shapes, which one calls once begun.

    From then on `propose` and `commit` are functions of tensors alone: no value decides a shape,
    nothing is read on the host, and what they keep stays in the same buffers. `propose` gets
    `chance`, which a drawn tree takes all its numbers from. `commit` gets
    `counts` on the device, and tokens of (batch, depth + 1); of rows that have ended it keeps none.
    `select` is not called.

    `kind`: what its graphs depend on beside shapes, such as which draft head is read; `device`: of
    the drafter.
    """

    kind: Hashable
    device: torch.device

    def propose(
        self, root: Tensor, shape: TreeShape, warp: Warp | None = None, chance: Any = None
    ) -> DraftTree:
        """See [`Drafting`]; `root` is (batch,), `chance` an `chance.Uniforms`."""

    def fix(self, capacity: int, shape: TreeShape, is_drawn: bool) -> tuple[Level, ...]:
        """Make room for rows of `capacity` tokens, and trees of `shape`.

        `is_drawn`: whether `propose` will be asked for trees that are drawn; then their plan is
        returned, else ().
        """

    def unfix(self, lengths: list[int]) -> None:
        """Go back to buffers that grow, with what was read of each row's first tokens."""


class Family(NamedTuple):
    """How a family of drafters joins `generate`."""

    # (drafter, target, memory, **options) → Drafting
    start: Callable[..., Drafting]
    options: tuple[str, ...]  # keywords of `generate` that go to `start`


_FAMILIES: dict[str, Family] = {}


def register_drafting(
    model_type: str, factory: Callable[..., Drafting], options: tuple[str, ...] = ()
) -> None:
    """Let `generate` take drafters of a family as `assistant_model`.

    Args:
        model_type: of their config.
        factory: called as `factory(drafter, target, memory=None, **options)` when a call begins.
            `target` is a [`coral_hf.target.Target`]; `memory` what `Drafting.memory` of an earlier
            call with the same sequences returned.
        options: names of keywords of `generate` that `factory` takes.
    """
    _FAMILIES[model_type] = Family(factory, options)


def family_of(assistant: Any) -> Family | None:
    """The family of an assistant, None for one that is not ours, such as a small model."""
    config = getattr(assistant, "config", None)
    return _FAMILIES.get(getattr(config, "model_type", None) or "")


def family_options() -> set[str]:
    """The keywords of `generate` that some family takes."""
    return {name for family in _FAMILIES.values() for name in family.options}
