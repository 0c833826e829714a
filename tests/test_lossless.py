"""Lossless: greedy gives the target's own tokens, sampling the target's own distribution."""

import copy
import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import shared_file, tiny_target
from scipy.stats import chisquare
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CompileConfig,
    GenerationConfig,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.stopping_criteria import MaxLengthCriteria

from coral_hf import CoralDrafter
from coral_hf.decoding import verifier as verifier_module
from coral_hf.decoding.acceptance_rules import Chance
from coral_hf.decoding.draft_policy import DraftPolicy
from coral_hf.decoding.drafting import TreeShape
from coral_hf.decoding.loop import DecodingLoop, Plan
from coral_hf.decoding.outputs import OutputCollector
from coral_hf.decoding.sequences import Sequences
from coral_hf.decoding.settings import Rule
from coral_hf.decoding.target_runner import TargetRunner
from coral_hf.decoding.verifier import Step, Verdict, Verifier, siblings_at, token_step
from coral_hf.drafters.coral.drafting import CoralDrafting
from coral_hf.drafters.tree_builders import SampledTreeBuilder
from coral_hf.target import read_target

TREE = {"tree_depth": 4, "tree_top_k": 6, "tree_nodes": 24}
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


CHAIN = {"tree_depth": 4, "tree_top_k": 1, "tree_nodes": 5}
WAYS = {
    "growing": {},
    "static": {"cache_implementation": "static"},
    "compiled": {"compile_config": CompileConfig(backend="eager")},
}


@pytest.mark.parametrize(
    "way", ["growing", "static", pytest.param("compiled", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("shape", [TREE, CHAIN], ids=["tree", "chain"])
@pytest.mark.parametrize(
    "name",
    ["stories260k-hf", "bitnet3m-hf", pytest.param("coral-bench", marks=pytest.mark.slow)],
)
def test_greedy_tokens_equal_a_trained_target_alone(name, shape, way):
    folder = shared_file(f"targets/{name}")
    target = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    drafter = CoralDrafter.from_target(target).eval()
    prompt = tokenizer("Once upon a time there was", return_tensors="pt").input_ids
    settings = shape | WAYS[way]
    plain, drafted = greedy_texts(target, drafter, prompt, settings, max_new_tokens=40)
    assert torch.equal(plain, drafted)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "mistral_window", "phi3", "gpt2"])
@pytest.mark.parametrize("shape", [TREE, CHAIN], ids=["tree", "chain"])
def test_greedy_tokens_equal_the_target_alone_when_inductor_compiles(family, shape):
    target = tiny_target(family)
    target.generation_config.pad_token_id = 0
    torch.manual_seed(0)
    drafter = CoralDrafter.from_target(target).eval()
    prompt = torch.randint(3, 40, (2, 9), generator=torch.Generator().manual_seed(0))
    compiled = {"compile_config": CompileConfig()}
    plain, drafted = greedy_texts(target, drafter, prompt, shape | compiled, max_new_tokens=30)
    assert torch.equal(plain, drafted)


@pytest.mark.parametrize("way", ["static", pytest.param("compiled", marks=pytest.mark.slow)])
def test_threads_share_a_target_and_a_drafter(way):
    target = tiny_target("llama")
    torch.manual_seed(0)
    drafter = CoralDrafter.from_target(target).eval()
    chance = torch.Generator().manual_seed(0)
    texts = [torch.randint(3, 40, (1, length), generator=chance) for length in (5, 9, 14, 20)]
    expected = [greedy_texts(target, drafter, text, TREE)[0] for text in texts]
    with ThreadPoolExecutor(4) as threads:
        found = threads.map(
            lambda text: greedy_texts(target, drafter, text, TREE | WAYS[way]), texts
        )
        assert all(one[1].equal(text) for one, text in zip(found, expected, strict=True))


class Branch(Verifier):
    """The verifier along one branch of all that chance may do, and how likely that branch is."""

    def follow(self, text, rule):
        self.text, self.rule_of_step, self.likelihood = text, rule, 1.0
        return self

    def verdict(self, tree, logits):
        # float64 all the way, where `generate` itself goes on in fp32
        start, path = self.sequences.longest - PROMPT.shape[1], [0]
        for token in self.text[start:]:
            probs = logits[:, path[-1]].double().softmax(-1)
            siblings = siblings_at(tree, torch.tensor([path[-1]]))
            self.likelihood *= chance_of(token, siblings, probs, self.rule_of_step)
            child = int(siblings.with_token(torch.tensor([token])))
            if child == 0 or start + len(path) == LENGTH:
                break
            path.append(child)
        return Verdict(torch.tensor([path]), torch.tensor([len(path)]), torch.tensor([token]))


class Script(Chance):
    """Answers as was laid down, then the first way; `others` turn off from this one."""

    def __init__(self, answers):
        self.answers, self.asked, self.weight, self.others = answers, 0, 1.0, []

    def decide(self, weights) -> int:
        possible = [answer for answer, weight in enumerate(weights) if weight > 0]
        if self.asked == len(self.answers):
            self.others += [[*self.answers, answer] for answer in possible[1:]]
            self.answers = [*self.answers, possible[0]]
        self.asked += 1
        answer = self.answers[self.asked - 1]
        self.weight *= weights[answer]
        return answer

    def accept(self, chances):
        chance = float(chances[0])
        return torch.tensor([self.decide([1 - chance, chance]) == 1])

    def draw(self, probs):
        return torch.tensor([self.decide(probs[0].tolist())])


def chance_of(token, siblings, probs, rule) -> float:
    """How likely the rule is to give `token`, summed over every draw that it may make."""
    scripts, likely = [[]], 0.0
    while scripts:
        script = Script(scripts.pop())
        step = rule(siblings, probs, script)
        likely += script.weight * (int(step.token) == token)
        scripts += script.others
    return likely


def without_residual(siblings, target_probs, chance):
    """A mistake: what comes after the accepted nodes is drawn from p, whatever was rejected."""
    step = token_step(siblings, target_probs, chance)
    return Step(torch.where(step.child > 0, step.token, chance.draw(target_probs)), step.child)


def chances_of_all_texts(target, drafter, shape, rule=token_step) -> torch.Tensor:
    """The chance of each text of `LENGTH` tokens, through drafter, tree, target pass and commit."""
    chances = []
    for text in itertools.product(range(VOCAB), repeat=LENGTH):
        bound = read_target(target)
        end = PROMPT.shape[1] + LENGTH
        criteria = StoppingCriteriaList([MaxLengthCriteria(end)])
        # a round may look at tokens beyond the text, which no chance depends on
        config = GenerationConfig(do_sample=True)
        sequences = Sequences(PROMPT, LogitsProcessorList(), criteria)
        collector = OutputCollector(config, 1)
        loop = DecodingLoop(
            CoralDrafting(drafter, bound),
            TargetRunner(bound, takes_tree=True, layers=(-1,)),
            sequences,
            collector,
            DraftPolicy(shape),
            Plan(Rule("token", is_drawn=False), end),
        )
        branch = loop.verifier = Branch(sequences, collector, "token").follow(text, rule)
        loop.run({"use_cache": True})
        chances.append(branch.likelihood)
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


def with_heads(target, drafter, **config):
    """A copy of the drafter with every draft head, none of which has learned anything."""
    drafter = copy.deepcopy(drafter)
    torch.manual_seed(0)
    drafter.heads.add_router(3, 1, torch.tensor([2, 0, 3, 1]))  # groups of 2, 2 and no tokens
    drafter.heads.add_frequency_head(torch.tensor([3, 1]))
    drafter.heads.add_low_rank_head(2, read_target(target).head)
    for name, value in {"is_router_trained": True, "active_mass": None, **config}.items():
        setattr(drafter.config, name, value)
    return drafter


# every way to read less than the whole head as it is
HEADS = {
    "shared": {"draft_head": "routed"},
    "shared until sure": {"draft_head": "routed", "num_active_groups": 2, "active_mass": 0.6},
    "union": {"draft_head": "routed", "routing": "union", "max_active_groups": 1},
    "per_node": {"draft_head": "routed", "routing": "per_node"},
    "frequency": {"draft_head": "frequency"},
    "low_rank": {"draft_head": "low_rank"},
    "quantized": {"draft_head": "quantized"},
    "routed_quantized": {"draft_head": "routed_quantized"},
}


@pytest.mark.parametrize("head", HEADS)
@torch.no_grad()
def test_what_the_drafter_reads_does_not_change_the_distribution(pair, head):
    target, drafter = pair[0], with_heads(*pair, **HEADS[head])
    # trees of one and of two children: a head of two tokens has no third
    for shape in (TreeShape(2, 1, 3), TreeShape(2, 2, 7)):
        found = chances_of_all_texts(target, drafter, shape)
        torch.testing.assert_close(found, own_chances(target), rtol=0, atol=1e-9)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("rule", ["chosen", "drawn", "traversal"])
@torch.no_grad()
def test_samples_drafted_by_every_head_fit_the_target(pair, head, rule):
    target, drafter = pair[0], with_heads(*pair, **HEADS[head])
    counts = sample_texts(target, drafter, seed=0, count=3_000, batch=500, **RULES[rule])
    assert p_value(counts, own_chances(target)) > 1e-3


@torch.no_grad()
def test_the_enumeration_notices_a_missing_residual_step(pair):
    found = chances_of_all_texts(*pair, TreeShape(2, 2, 7), rule=without_residual)
    assert (found - own_chances(pair[0])).abs().max() > 1e-3


def sample_texts(
    target, drafter, seed, count, processors=None, batch=250, **settings
) -> torch.Tensor:
    """How often each text came out of the public `generate`, `batch` of them a call."""
    torch.manual_seed(seed)
    counts = torch.zeros(VOCAB**LENGTH)
    places = VOCAB ** torch.arange(LENGTH - 1, -1, -1)
    for _ in range(count // batch):
        texts = target.generate(
            PROMPT,
            do_sample=True,
            top_k=0,
            max_new_tokens=LENGTH,
            assistant_model=drafter,
            logits_processor=processors,
            num_return_sequences=batch,
            **{"tree_depth": 2, "tree_top_k": 2, "tree_nodes": 5, **settings},
        )
        counts += (texts[:, -LENGTH:] * places).sum(1).bincount(minlength=len(counts))
    return counts


def p_value(counts: torch.Tensor, chances: torch.Tensor) -> float:
    """χ² of the counts against the chances; texts that cannot be are required not to be."""
    possible = chances > 0
    assert counts[~possible].sum() == 0
    expected = (chances / chances.sum() * counts.sum())[possible]
    return float(chisquare(counts[possible].double().numpy(), expected.numpy()).pvalue)


@torch.no_grad()
def test_sampling_through_generate_fits_the_target(pair):
    counts = sample_texts(*pair, seed=0, count=400, batch=1)
    # so few samples tell little of a whole text; the first tokens are of a round's tree as well
    starts = [
        texts.unflatten(0, (VOCAB**2, VOCAB)).sum(1) for texts in (counts, own_chances(pair[0]))
    ]
    assert p_value(*starts) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
@torch.no_grad()
def test_fifty_thousand_samples_fit_the_target(pair, seed):
    p = p_value(sample_texts(*pair, seed, count=50_000), own_chances(pair[0]))
    print(f"seed {seed}: p = {p:.3f}")
    assert p > 0.01 / len(SEEDS)


@pytest.mark.slow
@torch.no_grad()
def test_fifty_thousand_samples_without_the_residual_step_do_not_fit(pair, monkeypatch):
    monkeypatch.setattr(verifier_module, "token_step", without_residual)
    counts = sample_texts(*pair, SEEDS[0], count=50_000)
    assert p_value(counts, own_chances(pair[0])) < 1e-6


# every way to draft and verify when sampling
RULES = {
    "chosen": {},
    "drawn": {"drawn_tree": True},
    "traversal": {"verification": "traversal"},
    "traversal of a wide tree": {"verification": "traversal", "tree_top_k": 3, "tree_nodes": 13},
    "traversal of a chosen tree": {"verification": "traversal", "drawn_tree": False},
    "block": {"verification": "block", "tree_top_k": 1},
}


def processors():
    warpers = [TemperatureLogitsWarper(0.7), TopPLogitsWarper(0.9)]
    return LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.3), *warpers])


@pytest.mark.parametrize("rule", RULES)
@torch.no_grad()
def test_samples_of_every_rule_fit_the_target(pair, rule):
    counts = sample_texts(*pair, seed=1, count=5_000, batch=500, **RULES[rule])
    assert p_value(counts, own_chances(pair[0])) > 1e-3


@torch.no_grad()
def test_a_tree_that_was_drawn_from_another_distribution_does_not_fit(pair, monkeypatch):
    drawn = SampledTreeBuilder.build

    def forged(self):
        tree = drawn(self)
        return tree._replace(draft_probs=tree.draft_probs.sqrt())

    monkeypatch.setattr(SampledTreeBuilder, "build", forged)
    counts = sample_texts(*pair, seed=0, count=20_000, batch=500, drawn_tree=True)
    assert p_value(counts, own_chances(pair[0])) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("rule", RULES)
@torch.no_grad()
def test_batches_with_processors_and_every_head_fit_the_target(pair, rule, head):
    target, drafter = pair[0], with_heads(*pair, **HEADS[head])
    counts = sample_texts(target, drafter, SEEDS[0], 20_000, processors(), batch=50, **RULES[rule])
    chances = own_chances(target, processors())
    print(f"{rule}, {head}: p = {p_value(counts, chances):.3f}")
    assert p_value(counts, chances) > 0.01 / len(RULES) / len(HEADS)
