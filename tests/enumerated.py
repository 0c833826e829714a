"""The chance of every short text through drafter, tree, target and rule, and samples beside it.

In: a target of `VOCAB` tokens and a drafter of any family. Out: chances (texts,), by the target
alone, or summed over all that the rule of verification may draw.
"""

import itertools

import torch
from scipy.stats import chisquare
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.stopping_criteria import MaxLengthCriteria

from coral_hf.decoding.chance import Chance
from coral_hf.decoding.drafting import family_of
from coral_hf.decoding.loop import DecodingLoop, Plan
from coral_hf.decoding.outputs import OutputCollector
from coral_hf.decoding.plain.draft_policy import DraftPolicy
from coral_hf.decoding.rules import Verdict, siblings_at, token_step
from coral_hf.decoding.sequences import Sequences
from coral_hf.decoding.settings import Rule
from coral_hf.decoding.target_runner import TargetRunner
from coral_hf.decoding.verifier import Verifier
from coral_hf.target import read_target

PROMPT = torch.tensor([[1, 2, 3]])
VOCAB, LENGTH = 4, 3  # of the enumerated texts
TINY = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 1, "bos_token_id": None}


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
        drafting = family_of(drafter).start(drafter, bound, None)
        loop = DecodingLoop(
            drafting,
            TargetRunner(bound, takes_tree=True, layers=drafting.layers),
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
    """The chance of each text by the target alone: all texts in a batch, a token at a time."""
    texts = torch.cartesian_prod(*[torch.arange(VOCAB)] * LENGTH)
    ids, chances = PROMPT.expand(len(texts), -1), torch.ones(len(texts), dtype=torch.float64)
    for tokens in texts.T[..., None]:  # (texts, 1)
        logits = target(ids).logits[:, -1]
        logits = logits if processors is None else processors(ids, logits.float())
        chances *= logits.double().softmax(-1).gather(1, tokens)[:, 0]
        ids = torch.cat([ids, tokens], dim=1)
    return chances


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


def p_value(counts: torch.Tensor, chances: torch.Tensor, least: float = 5.0) -> float:
    """χ² of the counts against the chances; texts that cannot be are required not to be.

    The rarest texts are counted as one of at least `least` expected: the distribution of χ² is
    that of many draws, and one draw of a text that is expected 0.1 times would decide alone.
    """
    counts, chances = counts.flatten().double(), chances.flatten().double()
    assert counts[chances <= 0].sum() == 0
    expected, order = (chances / chances.sum() * counts.sum()).sort()
    first = int((expected.cumsum(0) < least).sum()) + 1  # texts that are counted as one
    observed, expected = (
        torch.cat([part[:first].sum()[None], part[first:]]) for part in (counts[order], expected)
    )
    return float(chisquare(observed.numpy(), expected.numpy()).pvalue)
