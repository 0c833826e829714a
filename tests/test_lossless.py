"""Lossless: greedy gives the target's own tokens, sampling the target's own distribution."""

import itertools

import pytest
import torch
from conftest import FAMILIES, shared_file, tiny_target
from scipy.stats import chisquare
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.stopping_criteria import MaxLengthCriteria

from coral_hf import CoralDrafter
from coral_hf.decoding import verification
from coral_hf.decoding import verifier as verifier_module
from coral_hf.decoding.candidate_generator import CoralCandidateGenerator
from coral_hf.decoding.loop import DecodingLoop
from coral_hf.decoding.pace import Always
from coral_hf.decoding.records import Records
from coral_hf.decoding.scoring import TargetScorer
from coral_hf.decoding.texts import Texts
from coral_hf.decoding.tree import TreeShape
from coral_hf.decoding.verification import Siblings, share_among_siblings
from coral_hf.decoding.verifier import Verifier
from coral_hf.target import read_target

TREE = {"tree_depth": 4, "tree_top_k": 6, "tree_nodes": 24}
CHAIN = {"tree_depth": 4, "tree_top_k": 1}
PROMPT = torch.tensor([[1, 2, 3]])
VOCAB, LENGTH = 4, 3  # of the enumerated texts
TINY = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 1, "bos_token_id": None}
SEEDS = (11, 22, 33)


def greedy_texts(target, drafter, prompt, tree, max_new_tokens=24):
    settings = {"do_sample": False, "max_new_tokens": max_new_tokens}
    mask = torch.ones_like(prompt)
    plain = target.generate(prompt, attention_mask=mask, **settings)
    drafted = target.generate(
        prompt, attention_mask=mask, assistant_model=drafter, **settings, **tree
    )
    return plain, drafted


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_equal_the_target_alone(family, attention):
    target = tiny_target(family)
    if attention == "sdpa" and not target._supports_sdpa:
        pytest.skip("transformers offers this family no sdpa")
    target.set_attn_implementation(attention)
    torch.manual_seed(0)
    drafter = CoralDrafter.from_target(target).eval()
    for length, tree in itertools.product((3, 19), (TREE, CHAIN)):
        prompt = torch.randint(2, 40, (1, length))
        plain, drafted = greedy_texts(target, drafter, prompt, tree)
        assert torch.equal(plain, drafted), (length, tree)


@pytest.mark.parametrize("name", ["stories260k-hf", "bitnet3m-hf", "coral-bench"])
def test_greedy_tokens_equal_a_trained_target_alone(name):
    folder = shared_file(f"targets/{name}")
    target = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    drafter = CoralDrafter.from_target(target).eval()
    prompt = tokenizer("Once upon a time there was", return_tensors="pt").input_ids
    plain, drafted = greedy_texts(target, drafter, prompt, TREE, max_new_tokens=40)
    assert torch.equal(plain, drafted)


class Branch(Verifier):
    """The verifier along one branch of all that chance may do, and how likely that branch is."""

    def follow(self, text, rule=share_among_siblings):
        self.text, self.rule, self.chance = text, rule, 1.0
        return self

    def _next_tokens(self, rows, nodes, child_of, scores):
        # float64 all the way, where `generate` itself goes on in fp32
        probs = scores.logits[0, nodes[0]].double().softmax(-1)
        token = self.text[self._texts.longest - PROMPT.shape[1]]
        children = list(child_of[0])
        siblings = self.rule(probs, torch.tensor(children).long())
        self.chance *= chance_of(token, children, siblings)
        return [token]


def chance_of(token: int, children: list[int], siblings: Siblings) -> float:
    """How likely the rule is to give `token`, as a child after the others failed or at last."""
    rejected = 1.0
    chance = 0.0
    for child, accepted in zip(children, siblings.chances.tolist(), strict=True):
        if child == token:
            chance += rejected * accepted
        rejected *= 1 - accepted
    return chance + rejected * float(siblings.residual[token])


def without_residual(target_probs, child_tokens):
    """The rule with its residual step left out: what is drawn at last is drawn from p itself."""
    return share_among_siblings(target_probs, child_tokens)._replace(residual=target_probs)


def chances_of_all_texts(target, drafter, shape, rule=share_among_siblings) -> torch.Tensor:
    """The chance of each text of `LENGTH` tokens, through drafter, tree, target pass and commit."""
    chances = []
    for text in itertools.product(range(VOCAB), repeat=LENGTH):
        bound = read_target(target, drafter.config)
        end = PROMPT.shape[1] + LENGTH
        criteria = StoppingCriteriaList([MaxLengthCriteria(end)])
        # a round may look at tokens beyond the text, which no chance depends on
        config = GenerationConfig(do_sample=True)
        texts, records = Texts(PROMPT, LogitsProcessorList(), criteria), Records(config, 1)
        loop = DecodingLoop(
            CoralCandidateGenerator(drafter, bound),
            TargetScorer(bound, takes_tree=True),
            texts,
            records,
            config,
            Always(shape),
            end,
        )
        branch = loop.verifier = Branch(texts, records, True).follow(text, rule)
        loop.run({"use_cache": True})
        chances.append(branch.chance)
    return torch.tensor(chances, dtype=torch.float64)


def own_chances(target, processors=None) -> torch.Tensor:
    """The chance of each text by the target alone."""
    chances = []
    for text in itertools.product(range(VOCAB), repeat=LENGTH):
        ids, chance = PROMPT, 1.0
        for token in text:
            logits = target(ids).logits[:, -1]
            logits = logits if processors is None else processors(ids, logits.float())
            chance *= float(logits.double().softmax(-1)[0, token])
            ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
        chances.append(chance)
    return torch.tensor(chances, dtype=torch.float64)


@pytest.fixture(scope="module")
def pair():
    """A target of four tokens, of which every text is likely enough, and a random drafter."""
    target = tiny_target("llama", **TINY)
    torch.manual_seed(0)
    drafter = CoralDrafter.from_target(target).eval()
    for parameter in drafter.parameters():
        parameter.data.mul_(3)
    return target, drafter


@pytest.mark.parametrize(
    "shape", [TreeShape(2, 1, 3), TreeShape(2, 2, 7), TreeShape(2, 3, 6), TreeShape(1, 4, 5)]
)
@torch.no_grad()
def test_output_distribution_is_exactly_the_targets(pair, shape):
    found, own = chances_of_all_texts(*pair, shape), own_chances(pair[0])
    assert abs(float(found.sum()) - 1) < 1e-9
    torch.testing.assert_close(found, own, rtol=0, atol=1e-9)


@torch.no_grad()
def test_the_enumeration_notices_a_missing_residual_step(pair):
    found = chances_of_all_texts(*pair, TreeShape(2, 2, 7), rule=without_residual)
    assert (found - own_chances(pair[0])).abs().max() > 1e-3


def sample_texts(target, drafter, seed, count, processors=None) -> torch.Tensor:
    """How often each text came out of the public `generate`."""
    torch.manual_seed(seed)
    counts = torch.zeros(VOCAB**LENGTH)
    places = VOCAB ** torch.arange(LENGTH - 1, -1, -1)
    for _ in range(count):
        text = target.generate(
            PROMPT,
            do_sample=True,
            top_k=0,
            max_new_tokens=LENGTH,
            assistant_model=drafter,
            logits_processor=processors,
            tree_depth=2,
            tree_top_k=2,
            tree_nodes=5,
        )
        counts[int((text[0, -LENGTH:] * places).sum())] += 1
    return counts


def p_value(counts: torch.Tensor, chances: torch.Tensor) -> float:
    """χ² of the counts against the chances; texts that cannot be are required not to be."""
    possible = chances > 0
    assert counts[~possible].sum() == 0
    expected = (chances / chances.sum() * counts.sum())[possible]
    return float(chisquare(counts[possible].double().numpy(), expected.numpy()).pvalue)


@torch.no_grad()
def test_sampling_through_generate_fits_the_target(pair):
    counts = sample_texts(*pair, seed=0, count=400)
    # so few samples tell little of a whole text; the first tokens are of a round's tree as well
    starts = [
        texts.unflatten(0, (VOCAB**2, VOCAB)).sum(1) for texts in (counts, own_chances(pair[0]))
    ]
    assert p_value(*starts) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
@torch.no_grad()
def test_fifty_thousand_samples_fit_the_target(pair, seed):
    counts = sample_texts(*pair, seed, count=50_000)
    assert p_value(counts, own_chances(pair[0])) > 0.01 / len(SEEDS)


@pytest.mark.slow
@torch.no_grad()
def test_fifty_thousand_samples_without_the_residual_step_do_not_fit(pair, monkeypatch):
    monkeypatch.setattr(verification, "share_among_siblings", without_residual)
    counts = sample_texts(*pair, SEEDS[0], count=50_000)
    assert p_value(counts, own_chances(pair[0])) < 1e-6


@pytest.mark.slow
@torch.no_grad()
def test_samples_fit_the_target_with_processors(pair):
    def processors():
        warpers = [TemperatureLogitsWarper(0.7), TopPLogitsWarper(0.9)]
        return LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.3), *warpers])

    counts = sample_texts(*pair, SEEDS[0], count=20_000, processors=processors())
    assert p_value(counts, own_chances(pair[0], processors())) > 0.01


def test_the_loop_draws_by_the_tested_rule():
    assert verifier_module.draw_token is verification.draw_token
