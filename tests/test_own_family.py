"""A drafter of a family of its own: what it takes to join `generate`, in about twenty lines.

The toy reads two of the target's layers and the tokens, has no heads and no cache: it scores the
vocabulary by a random projection of the last feature and of the last token's embedding.
"""

import pytest
import torch
from conftest import VOCAB, tiny_target
from scipy.stats import chisquare
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

import coral_hf
from coral_hf.decoding import DraftTree
from coral_hf.drafters import TreeBuilder


class ToyConfig(PreTrainedConfig):
    model_type = "toy_drafter"
    hidden_size: int = 32
    vocab_size: int = VOCAB


class ToyDrafter(PreTrainedModel):
    config_class = ToyConfig

    def __init__(self, config):
        super().__init__(config)
        self.scores = nn.Linear(2 * config.hidden_size, config.vocab_size)
        self.successors = nn.Embedding(config.vocab_size, config.vocab_size)
        self.post_init()


class ToyDrafting:
    """Level after level: the two layers' feature of the last accepted token, and each node's."""

    layers = (1, -1)

    def __init__(self, drafter, target, memory=None):
        self.drafter = drafter

    def begin(self, tokens, features, positions):
        assert not hasattr(self, "feature")  # a prompt in chunks comes whole
        assert features.shape[1] + 1 == tokens.shape[1]  # all tokens, the first included
        assert features.shape[2] == 2 * self.drafter.config.hidden_size
        self.feature = features[:, -1]

    def commit(self, tokens, features, counts):
        last = counts[:, None] - 1
        self.feature = features.gather(1, last[..., None].expand(-1, -1, features.shape[2]))[:, 0]

    def select(self, rows):
        self.feature = self.feature[rows]

    def memory(self):
        return None

    def logits(self, tokens):
        """(batch, nodes) → (batch, nodes, vocab)"""
        dtype = self.drafter.dtype
        return self.drafter.scores(self.feature.to(dtype))[:, None] + self.drafter.successors(
            tokens
        )

    def propose(self, root, shape, warp=None) -> DraftTree:
        builder, tokens = TreeBuilder(root, shape), root[:, None]
        for _ in range(shape.depth):
            log_probs, children = self.logits(tokens).log_softmax(-1).topk(shape.top_k)
            tokens = builder.add_level(children, log_probs).tokens
        return builder.build()


AutoConfig.register("toy_drafter", ToyConfig)
AutoModel.register(ToyConfig, ToyDrafter)
coral_hf.register_drafting("toy_drafter", ToyDrafting)

PROMPTS = torch.tensor([[5, 9, 3, 17], [0, 7, 22, 8], [0, 0, 30, 4]])
BATCH = {"attention_mask": (PROMPTS != 0).long(), "max_new_tokens": 20, "pad_token_id": 0}


@pytest.fixture(scope="module")
def target():
    return tiny_target("llama")


@pytest.fixture(scope="module")
def toy():
    torch.manual_seed(0)
    return ToyDrafter(ToyConfig()).double().eval()


@pytest.mark.parametrize(
    "shape",
    [
        {"tree_depth": 3, "tree_top_k": 3, "tree_nodes": 9},
        {"tree_top_k": 1},
        {"tree_top_k": 1, "prefill_chunk_size": 2},
    ],
)
def test_greedy_tokens_of_a_batch_are_the_targets_own(target, toy, shape):
    plain = target.generate(PROMPTS, do_sample=False, **BATCH)
    drafted = target.generate(PROMPTS, assistant_model=toy, do_sample=False, **shape, **BATCH)
    assert torch.equal(plain, drafted)


class WrongRoots(ToyDrafting):
    """Puts some other token where the last committed one belongs."""

    def propose(self, root, shape, warp=None):
        return super().propose((root + 1) % VOCAB, shape)


def test_a_drafter_that_names_another_root_changes_no_token(target, toy):
    coral_hf.register_drafting("toy_drafter", WrongRoots)
    plain = target.generate(PROMPTS, do_sample=False, **BATCH)
    drafted = target.generate(PROMPTS, assistant_model=toy, do_sample=False, **BATCH)
    coral_hf.register_drafting("toy_drafter", ToyDrafting)
    assert torch.equal(plain, drafted)


def test_samples_of_a_batch_follow_the_targets_own_distribution(target, toy):
    """The first two tokens of each of three prompts, by χ² against the target's probabilities."""
    settings = {**BATCH, "max_new_tokens": 3, "do_sample": True, "top_k": 4, "assistant_model": toy}
    repeats = 700
    prompts = PROMPTS.repeat(repeats, 1)
    settings["attention_mask"] = (prompts != 0).long()
    torch.manual_seed(1)
    tokens = target.generate(prompts, tree_depth=2, tree_top_k=2, tree_nodes=5, **settings)
    for row, prompt in enumerate(PROMPTS):
        drawn = tokens[row :: len(PROMPTS), 4:6]
        expected = chances_of_pairs(target, prompt[prompt != 0])
        counts = dict.fromkeys(expected, 0)
        for pair in map(tuple, drawn.tolist()):
            counts[pair] += 1  # a pair that the target never writes is a KeyError
        # the least likely pairs are one class of at least ten expected draws
        pairs, rare = sorted(expected, key=lambda pair: -expected[pair]), []
        while sum(expected[pair] for pair in rare) * repeats < 10:
            rare.append(pairs.pop())
        classes = [*([pair] for pair in pairs), rare]
        observed = [sum(counts[pair] for pair in group) for group in classes]
        chances = [repeats * sum(expected[pair] for pair in group) for group in classes]
        assert chisquare(observed, chances).pvalue > 1e-4


@torch.no_grad()
def chances_of_pairs(target, prompt) -> dict[tuple[int, int], float]:
    """The chance of each pair of tokens after `prompt` (length,), of the four best each."""

    def best(text):
        values, tokens = target(text[None]).logits[0, -1].topk(4)
        return zip(tokens.tolist(), values.softmax(-1).tolist(), strict=True)

    return {
        (first, second): one * two
        for first, one in best(prompt)
        for second, two in best(torch.cat([prompt, prompt.new_tensor([first])]))
    }


def test_a_drafter_of_another_family_loads_with_the_auto_classes(toy, tmp_path):
    toy.save_pretrained(tmp_path)
    assert torch.equal(AutoModel.from_pretrained(tmp_path).scores.weight, toy.scores.weight)


def test_options_of_another_family_are_refused(target, toy):
    with pytest.raises(ValueError, match="Unknown settings .'draft_head'.; use .'tree_depth'"):
        target.generate(PROMPTS, assistant_model=toy, draft_head="full", do_sample=False, **BATCH)
