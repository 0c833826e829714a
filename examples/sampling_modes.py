"""Compare ways to draft when sampling: tables of docs/results/sampling_modes.md.

python examples/sampling_modes.py --target coral-bench --drafter mixed --seconds 600 \
    --prompts mixed/dialogues.jsonl --prompts mixed/stories.jsonl --rows sampling_modes.jsonl

Beside the modes of `generate`, two published ways to put drawn tokens into a tree that grows where
the drafter is confident, here in plain form over lists, one sequence at a time:

    replayed   the shape of the chosen tree is kept and its tokens are drawn, in a second pass of
               the drafter (Tsubame, Weng et al. 2026, arXiv 2609.33652)
    one drawn  in each family one child is drawn from q without its best token, and all others are
               chosen. Its rank does not depend on which token it is (RheoSampling, Hu et al. 2026,
               arXiv 2609.21827)

Rows are appended to ROWS as they end; after SECONDS no new answer is begun, and the same command
resumes.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import NamedTuple
from unittest.mock import patch

import torch
from list_rules import Accept, Outcome, Remainder, list_children
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from coral_hf import CoralDrafter
from coral_hf.atomic import JsonLines
from coral_hf.decoding import rules
from coral_hf.decoding.chance import Chance
from coral_hf.decoding.drafting import DraftTree, TreeShape, Warp, register_drafting
from coral_hf.decoding.rules import Verdict, verify_traversal
from coral_hf.drafters.coral import CoralConfig, CoralDrafting
from coral_hf.drafters.tree_builders import Beam
from coral_hf.drafters.tree_drafting import Grown
from coral_hf.measure import read_prompts
from coral_hf.measure.calls import Arguments, call_generate, sampling_arguments, seeded
from coral_hf.measure.prompts import encode, left_padded
from coral_hf.measure.report import tabulate

# tokens of some nodes of the newest level, and the place of each one's parent among the nodes that
# were expanded before → q after each, (nodes, vocab); the first call is for the root
Expand = Callable[[list[int], list[int]], Tensor]


class Node(NamedTuple):
    """A node of a growing tree."""

    token: int
    parent: int  # in the pool
    value: float  # confidence of the path, which is never more than the parent's


class ListTree(NamedTuple):
    """A tree below a root, and the q from which children of a node were drawn, if any were."""

    tokens: list[int]
    parents: list[int]
    probs: dict[int, Tensor]  # (vocab,) by node


# a family: tokens with their confidence, and the q of the first of them, if it was drawn
Family = Callable[[Tensor], tuple[list[tuple[int, float]], Tensor | None]]


def grow(expand: Expand, shape: TreeShape, family: Family) -> ListTree:
    """Grow a tree where its nodes are confident, and keep the most confident ones (EAGLE-2)."""
    pool, probs = [Node(0, 0, 1.0)], {}
    beam, places = [0], [0]
    for _ in range(shape.depth):
        level = []
        for node, q in zip(beam, expand([pool[node].token for node in beam], places), strict=True):
            children, own = family(q)
            if own is not None:
                probs[len(pool) + len(level)] = own  # by its drawn child
            level += [(node, token, pool[node].value * part) for token, part in children]
        first = len(pool)
        pool += [Node(token, parent, value) for parent, token, value in level]
        # of equal nodes the earlier
        best = sorted(range(first, len(pool)), key=lambda node: -pool[node].value)
        best = best[: shape.top_k]
        places = [beam.index(pool[node].parent) for node in best]
        beam = best
    ranked = sorted(range(1, len(pool)), key=lambda node: -pool[node].value)
    kept = [0, *sorted(ranked[: shape.nodes - 1])]
    place = {node: index for index, node in enumerate(kept)}
    return ListTree(
        [pool[node].token for node in kept],
        [place[pool[node].parent] for node in kept],
        {place[pool[node].parent]: own for node, own in probs.items() if node in place},
    )


def chosen_family(top_k: int, probs: Tensor) -> tuple[list[tuple[int, float]], None]:
    """Choose the most probable tokens of q, (vocab,)."""
    best = probs.topk(top_k)
    return list(zip(best.indices.tolist(), best.values.tolist(), strict=True)), None


def one_drawn_family(
    top_k: int, chance: Chance, probs: Tensor
) -> tuple[list[tuple[int, float]], Tensor | None]:
    """Draw one token of q, (vocab,), without the best one, and choose the rest.

    The drawn one comes first. Its confidence is that of the best token, or all that is left if that
    is less: no less than that of the others, and the same whichever token it is.
    """
    best = probs.topk(min(top_k, len(probs)))
    chosen = list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    rest = probs.clone()
    rest[chosen[0][0]] = 0
    left = float(rest.sum())
    if not left > 0 or top_k == 1:
        return chosen[:top_k], None
    rest /= left
    drawn = int(chance.draw(rest[None]))
    others = [child for child in chosen if child[0] != drawn][: top_k - 1]
    return [(drawn, min(chosen[0][1], left)), *others], rest


def replay(expand: Expand, parents: list[int], chance: Chance) -> ListTree:
    """Draw the tokens of a tree of known shape, siblings without replacement."""
    families, depths = list_children(parents), [0]
    for parent in parents[1:]:
        depths.append(depths[parent] + 1)
    tokens, found, probs = [0] * len(parents), list(parents), {}
    before: list[int] = []
    for depth in range(max(depths)):
        nodes = [n for n in range(len(parents)) if depths[n] == depth and families[n]]
        nodes = [node for node in nodes if found[node] >= 0]
        if not nodes:
            break
        places = [before.index(parents[node]) for node in nodes] if before else [0]
        for node, q in zip(nodes, expand([tokens[n] for n in nodes], places), strict=True):
            probs[node] = q
            order, drawn = chance.race(q).topk(len(families[node]))
            for child, token, is_node in zip(
                families[node], drawn.tolist(), (order > 0).tolist(), strict=True
            ):
                tokens[child], found[child] = token, node if is_node else -1
        before = nodes
    for node, parent in enumerate(parents[1:], start=1):  # below what was not drawn is nothing
        if found[parent] < 0:
            found[node] = -1
    return ListTree(tokens, found, probs)


def one_drawn_walk(
    tokens: list[int],
    parents: list[int],
    target_probs: Tensor,
    draft_probs: Tensor | None,
    accept: Accept,
    with_replacement: bool = False,
) -> Outcome:
    """Walk down a tree in which the first child of a node was drawn, if `draft_probs` has its q.

    It is accepted with min(1, p / q), and after a rejection the others as chosen ones are.

    Args:
        target_probs: (nodes, vocab), p after each node.
        draft_probs: (nodes, vocab), q after each node; zeros where all children were chosen.
    """
    children, path = list_children(parents), [0]
    while True:
        node = path[-1]
        draft = None if draft_probs is None else draft_probs[node]
        is_drawn = draft is not None and bool(draft.any())
        left = Remainder(1.0, target_probs[node], draft if is_drawn else None)
        for child in children[node]:
            if accept(left.chance(tokens[child])):
                path.append(child)
                break
            left = left.reject(tokens[child])._replace(draft=None)
        else:
            return Outcome(path, left.target)


def one_drawn_verdict(tree: DraftTree, probs: Tensor, chance: Chance) -> Verdict:
    """Walk as [`one_drawn_walk`] where `verify_traversal` is asked; `probs` (1, nodes, vocab)."""
    assert tree.draft_probs is not None

    def accept(share: float) -> bool:
        return bool(chance.accept(torch.tensor([share], dtype=torch.float64)))

    lists = tree.tokens[0].tolist(), tree.parents[0].tolist()
    found = one_drawn_walk(*lists, probs[0], tree.draft_probs[0], accept)
    path = torch.zeros(1, tree.max_depth + 1, dtype=torch.long)
    path[0, : len(found.path)] = torch.tensor(found.path)
    return Verdict(path, torch.tensor([len(found.path)]), chance.draw(found.probs[None]))


class ListDrafting(CoralDrafting):
    """Drafts trees of lists, for a batch of one."""

    def propose(self, root: Tensor, shape: TreeShape, warp: Warp | None = None) -> DraftTree:
        """Draft a tree below `root` (1,); see `Drafting`."""
        tree = self.grow(shape, warp, Chance())
        self._cache.truncate()  # what the levels wrote
        depths = [0]
        for parent in tree.parents[1:]:
            depths.append(depths[max(parent, 0)] + 1)
        parts = [torch.tensor([part]) for part in (tree.tokens, tree.parents, depths)]
        parts[0][0, 0] = root
        draft_probs = None
        for node, q in tree.probs.items():
            if draft_probs is None:
                draft_probs = q.new_zeros(1, len(tree.tokens), len(q))
            draft_probs[0, node] = q
        return DraftTree(*parts, draft_probs, "without_replacement", levels=shape.depth)

    def expander(self, warp: Warp) -> Expand:
        """Start at the root; the drafter reads a level at each call."""
        self._cache.truncate()
        grown, depth = Grown(self._output), 0

        def expand(tokens: list[int], places: list[int]) -> Tensor:
            nonlocal grown, depth
            if depth > 0:
                zeros = torch.zeros(1, len(tokens))
                beam = Beam(torch.tensor([tokens]), torch.tensor([places]), zeros)
                grown = self._grow(grown, beam, depth)
            depth += 1
            logits = self.head.logits(grown.features, torch.zeros(grown.features.shape[:2]))[0]
            return warp(logits).softmax(-1)  # (nodes, vocab)

        return expand

    def grow(self, shape: TreeShape, warp: Warp, chance: Chance) -> ListTree:
        raise NotImplementedError


class Replayed(ListDrafting):
    def grow(self, shape: TreeShape, warp: Warp, chance: Chance) -> ListTree:
        planned = grow(self.expander(warp), shape, partial(chosen_family, shape.top_k))
        return replay(self.expander(warp), planned.parents, chance)


class OneDrawn(ListDrafting):
    def grow(self, shape: TreeShape, warp: Warp, chance: Chance) -> ListTree:
        return grow(self.expander(warp), shape, partial(one_drawn_family, shape.top_k, chance))


class Mode(NamedTuple):
    """How tokens are drafted, and by which rule they are accepted."""

    drafting: type[CoralDrafting]
    arguments: Arguments
    rule: Callable[..., Verdict] = verify_traversal  # in place of the one over whole trees


BY_TOKEN, BY_PATH = {"verification": "token"}, {"verification": "traversal"}
MODES = {
    "chosen": Mode(CoralDrafting, BY_TOKEN | {"drawn_tree": False}),
    "drawn": Mode(CoralDrafting, BY_TOKEN | {"drawn_tree": True}),
    "drawn, traversal": Mode(CoralDrafting, BY_PATH),
    "replayed": Mode(Replayed, BY_TOKEN | {"drawn_tree": True}),
    "replayed, traversal": Mode(Replayed, BY_PATH),
    "one drawn": Mode(OneDrawn, BY_PATH, one_drawn_verdict),
}
SHAPES = ["5,4,16", "5,1,6", "4,2,16"]  # depth, top-k, nodes
COLUMNS = {
    "T": "{0[temperature]:g}",
    "depth, top-k, nodes": "{0[shape]}",
    "mode": "{0[mode]}",
    "τ": "{0[tau]:.2f}",
    "of dialogues, of stories": "{0[tau_dialogues]:.2f}, {0[tau_stories]:.2f}",
    "rounds": "{0[num_rounds]}",
}


def measure(target, prompts: dict[str, list[Tensor]], mode: Mode, arguments: Arguments) -> dict:
    """Answer all prompts, (length,) token ids each, and count tokens and rounds."""
    register_drafting(CoralConfig.model_type, mode.drafting, ("draft_head",))
    lengths: dict[str, list[int]] = {task: [] for task in prompts}
    own = arguments | mode.arguments | {"pad_token_id": 0}
    size = 8 if mode.drafting is CoralDrafting else 1
    with patch.object(rules, "verify_traversal", mode.rule), seeded(0, target.device):
        for task, rows in prompts.items():
            for start in range(0, len(rows), size):
                batch = left_padded(rows[start : start + size], 0)
                lengths[task] += call_generate(target, batch, own).round_lengths
    every = sum(lengths.values(), [])
    found = {f"tau_{task}": fmean(own) for task, own in lengths.items()}
    return found | {"tau": fmean(every), "num_rounds": len(every), "num_tokens": sum(every)}


def main(options: argparse.Namespace) -> None:
    end = time.perf_counter() + options.seconds
    tokenizer = AutoTokenizer.from_pretrained(options.target)
    target = AutoModelForCausalLM.from_pretrained(options.target, dtype="auto").eval()
    drafter = CoralDrafter.from_pretrained(options.drafter, dtype=target.dtype).eval()
    prompts = {
        Path(path).stem: [
            encode(prompt, tokenizer)[0] for prompt in read_prompts(path, options.num_prompts)
        ]
        for path in options.prompts
    }
    table = JsonLines(options.rows).mend()
    known = {(row["temperature"], row["shape"], row["mode"]) for row in table.read()}
    for temperature, shape, (name, mode) in product(
        options.temperature, options.shape, MODES.items()
    ):
        if (temperature, shape, name) in known or (
            "1" == shape.split(",")[1] and mode.drafting != CoralDrafting
        ):
            continue
        if time.perf_counter() > end:
            print("Time is up; the same command goes on.")
            break
        depth, top_k, nodes = map(int, shape.split(","))
        arguments = sampling_arguments(temperature, options.max_new_tokens) | {
            "assistant_model": drafter,
            "speculation": "always",
            "tree_depth": depth,
            "tree_top_k": top_k,
            "tree_nodes": nodes,
        }
        found = measure(target, prompts, mode, arguments)
        table.append([{"temperature": temperature, "shape": shape, "mode": name, **found}])
    print(tabulate("", COLUMNS, table.read()).to_markdown())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", required=True)
    parser.add_argument("--drafter", required=True)
    parser.add_argument("--prompts", action="append", required=True, help="dialogues and stories")
    parser.add_argument("--rows", type=Path, required=True, help="JSON lines, a mode each")
    parser.add_argument("--num-prompts", type=int, default=20, help="of each file")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--temperature", nargs="+", type=float, default=[1.0, 0.6])
    parser.add_argument("--shape", nargs="+", default=SHAPES, help="depth,top-k,nodes")
    parser.add_argument("--seconds", type=float, default=float("inf"))
    main(parser.parse_args())
