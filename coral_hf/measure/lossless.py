"""Whether a drafter leaves the output of its target unchanged: checks and a verdict.

In: a target, a drafter, prompts. Out: a `Verification`.

    greedy, float64        every answer is the target's own: no rounding hides an error
    greedy, working dtype  answers may part where the target's two best tokens are within rounding
    sampling               the first tokens of many samples, by χ² against the target's own chances

    a sample                   "It" "was" "a"       "It" "was" "an"      "It" "rained"     "But" …
    the outcome it counts for  It was a             It was …             It …              …
Of each beginning the most probable tokens are outcomes of their own, the rest (…) is one."""

import logging
from collections import Counter
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..decoding.guard import TREE, accept_target
from ..identity import quantization_of
from .benchmark import measure_prompts
from .calls import Arguments, Bench, call_generate, sampling_arguments, seeded, until_stop
from .prompts import Prompt, encode, fitting, left_padded, user_message
from .report import Table, model_name
from .settings import VerifySettings
from .summary import tau_per_token

logger = logging.getLogger(__name__)

BUILT_IN = (  # what is asked where no prompts are given
    "Once upon a time there was a little girl who",
    "Tell me a story about a fox and a crow.",
    "Why is the sky blue? Explain it to a child.",
    "Write a Python function that reverses a list.",
)
FALSE_ALARM = 1e-3  # chance that a lossless drafter fails, of all sampled prompts together
NUM_TOKENS = 3  # of a sample that are compared
EXTRA_TOKENS = 2  # of a sample: trees end where it does, so one of some depth shall fit
NUM_LIKELY = 6  # tokens after a beginning that are outcomes of their own
LEAST_EXPECTED = 5.0  # samples of an outcome, as χ² needs; rarer ones are counted together
NEVER = 1e-9  # the chance of what top-k and top-p rule out, up to rounding
REST = -1  # in place of a token: any other
MARKS = {True: "passed", False: "FAILED", None: "–"}

Outcome = tuple[int, ...]  # tokens; after `REST` nothing is told apart


class Check(NamedTuple):
    """One check, and what came of it."""

    what: str
    compared: str
    found: str
    tau: float | None = None  # tokens of a row for each pass of the target
    is_passed: bool | None = None  # None where it decides nothing


@dataclass(frozen=True)
class Verification:
    """What was checked of a drafter and its target.

    Example:
        >>> found = coral_hf.verify(target, drafter, tokenizer)
        >>> print(found.to_markdown())
        >>> assert found.is_lossless
    """

    title: str
    checks: list[Check]

    @property
    def is_lossless(self) -> bool:
        """Whether no check has failed, of those that decide."""
        return all(check.is_passed is not False for check in self.checks)

    @property
    def verdict(self) -> str:
        """Say in one sentence whether the output is the target's own."""
        if not self.is_lossless:
            failed = dict.fromkeys(one.what for one in self.checks if one.is_passed is False)
            return f"NOT LOSSLESS, failed: {'; '.join(failed)}."
        if not any(check.is_passed for check in self.checks):
            return "Agreement only: no check decides for this target."
        return "Lossless: all checks that decide have passed."

    def to_markdown(self) -> str:
        """Return the table and the verdict."""
        rows = [
            (what, compared, found, "–" if tau is None else f"{tau:.2f}", MARKS[is_passed])
            for what, compared, found, tau, is_passed in self.checks
        ]
        header = ("check", "compared", "found", "tau", "verdict")
        return Table(self.title, header, rows, f"{self.verdict}\n").to_markdown()


def verify(
    target: PreTrainedModel,
    drafter: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt | str] = (),
    settings: VerifySettings | None = None,
) -> Verification:
    """Check on your own prompts that a drafter leaves the output of its target unchanged.

    Args:
        target: in the dtype and with the generation config that it is used with.
        drafter: for it, in the same dtype.
        tokenizer: the target's.
        prompts: from `read_prompts`, or texts, which a user says; four built-in ones by default.
        settings: how much is compared, and the sampling settings that are tested.

    Raises:
        ValueError: for a target that takes no drafter, and if no prompt fits its context.
    """
    judgement = accept_target(target)
    asked = [
        prompt if isinstance(prompt, Prompt) else Prompt("prompt", str(i), (user_message(prompt),))
        for i, prompt in enumerate(prompts or BUILT_IN)
    ]
    checker = Checker(tokenizer, asked, settings or VerifySettings())
    exact, obstacle = float64_pair(target, drafter)
    checks = [] if exact else [Check("greedy, float64", "nothing", f"not possible: {obstacle}")]
    if exact:
        checks += checker.greedy(*exact)
    if not exact or exact[0] is not target:
        checks += checker.greedy(target, drafter, decides=not exact and not judgement.notes)
    if not judgement.notes:
        checks += checker.sampled(*(exact or (target, drafter)))
    checks += [Check("no exact output", "the target", note) for note in judgement.notes]
    ways = "trees" if judgement.way == TREE else f"chains, since {judgement.obstacle}"
    return Verification(f"{model_name(drafter)} for {model_name(target)}: {ways}", checks)


def float64_pair(
    target: PreTrainedModel, drafter: PreTrainedModel
) -> tuple[tuple[PreTrainedModel, PreTrainedModel] | None, str]:
    """Return both models in float64, copied where they are not; or None, and why that cannot be."""
    if target.dtype == torch.float64:
        return (target, drafter), ""
    if quantization_of(target) is not None:
        return None, "the target's weights are quantised"
    if any(weight.is_meta for weight in target.parameters()):
        return None, "the target's weights are offloaded"
    try:
        copied = deepcopy(target).double(), deepcopy(drafter).double()
    except torch.OutOfMemoryError:
        return None, "there is no memory for a copy of the target"
    copied[0].set_experts_implementation("eager")  # the grouped kernels know no float64
    if copied[0].config._attn_implementation.startswith(("flash", "flex")):  # nor do these
        copied[0].set_attn_implementation("sdpa")
    return copied, ""


class Checker(NamedTuple):
    """The two kinds of checks, and what they share."""

    tokenizer: PreTrainedTokenizerBase
    prompts: Sequence[Prompt]
    settings: VerifySettings

    def greedy(
        self, target: PreTrainedModel, drafter: PreTrainedModel, decides: bool = True
    ) -> list[Check]:
        """Compare greedy answers with and without the drafter, and list where they part.

        `decides`: whether a difference that is more than a tie is a failure.
        """
        name = str(target.dtype).removeprefix("torch.")
        logger.info("greedy answers in %s", name)
        plain = sampling_arguments(0.0, self.settings.max_new_tokens)
        drafting = {"assistant_model": drafter, "speculation": "always", **self.settings.shape()}
        bench = Bench(target, {"plain": plain, "coral": plain | drafting})
        calls, mismatches, _ = measure_prompts(bench, self.tokenizer, self.prompts)
        calls = [call for call in calls if call.method == "coral"]
        ties = [one for one in mismatches if one.is_tie(name)]
        compared = f"{len(calls)} prompts, {sum(call.num_tokens for call in calls)} tokens"
        found = f"{len(calls) - len(mismatches)} of {len(calls)} answers equal"
        is_passed = len(ties) == len(mismatches) if decides else None
        checks = [Check(f"greedy, {name}", compared, found, tau_per_token(calls), is_passed)]
        for one in mismatches:
            gap = f"top-2 gap {one.top2_gap:.2g}, {one.num_roundings:.2g} roundings"
            gap = f"{'a tie' if one in ties else 'no tie'}: {gap}"
            where = f"token {one.position} of {one.task}/{one.prompt}"
            is_passed = one in ties if decides else None
            checks.append(Check(f"first difference, {name}", where, gap, None, is_passed))
        return checks

    def sampled(self, target: PreTrainedModel, drafter: PreTrainedModel) -> list[Check]:
        """Compare samples after the first prompts with the target's own distribution."""
        settings, checks = self.settings, list[Check]()
        sampling = settings.sampling(target.generation_config)
        shown = ", ".join(f"{name} {value:g}" for name, value in sampling.items())
        sampling |= {"do_sample": True, "max_new_tokens": NUM_TOKENS + EXTRA_TOKENS}
        drafting = {"assistant_model": drafter, "speculation": "always", **settings.drafting()}
        chosen = fitting(self.prompts, self.tokenizer, target, NUM_TOKENS + EXTRA_TOKENS)
        chosen = chosen[: settings.sampled_prompts]
        size, total = settings.batch_size, settings.num_samples
        sizes = [min(size, total - start) for start in range(0, total, size)]
        for prompt in chosen:
            ids = encode(prompt, self.tokenizer).to(target.device)  # (1, length)
            logger.info("samples of %s/%s", prompt.task, prompt.id)
            chances = outcome_chances(target, ids, sampling, total)
            with seeded(settings.seed, target.device):
                batches = [left_padded(ids.expand(size, -1), 0, ids.device) for size in sizes]
                calls = [call_generate(target, batch, sampling | drafting) for batch in batches]
            fit = chi_square(chances, count_outcomes(sum((c.tokens for c in calls), []), chances))
            compared = f"{total} samples of {prompt.task}/{prompt.id}"
            is_passed = fit.p_value >= FALSE_ALARM / len(chosen)
            tau = tau_per_token(calls)
            checks.append(Check(f"sampling, {shown}", compared, fit.said, tau, is_passed))
        return checks


def outcome_chances(
    target: PreTrainedModel, ids: Tensor, arguments: Arguments, num_samples: int
) -> dict[Outcome, float]:
    """Compute how likely the outcomes are after a prompt (1, length), as plain `generate` says.

    It is asked for a token at a time, so its processors are those of the call.
    """
    stops = target.generation_config.eos_token_id
    asked = {"max_new_tokens": 1, "output_scores": True, "return_dict_in_generate": True}
    chances: dict[Outcome, float] = {}
    beginnings: dict[Outcome, float] = {(): 1.0}
    for length in range(1, NUM_TOKENS + 1):
        tails = ids.new_tensor([*beginnings]).view(len(beginnings), -1)
        rows = torch.cat([ids.expand(len(tails), -1), tails], dim=1)
        with seeded(0, target.device):
            output = target.generate(**left_padded(rows, 0, ids.device), **arguments | asked)
        probs = output.scores[0].double().softmax(-1)  # (beginnings, vocab)
        best = probs.topk(min(NUM_LIKELY, probs.shape[1]))
        found: dict[Outcome, float] = {}
        pairs = zip(best.values.tolist(), best.indices.tolist(), strict=True)
        for (beginning, chance), (values, tokens) in zip(beginnings.items(), pairs, strict=True):
            found |= {(*beginning, t): chance * p for p, t in zip(values, tokens, strict=True)}
            rest = float(probs.shape[1] > len(values)) * max(1 - sum(values), 0.0)
            chances |= {(*beginning, REST): chance * rest}
        # what goes on, and is told apart by its next token
        beginnings = {
            outcome: chance
            for outcome, chance in found.items()
            if chance * num_samples >= LEAST_EXPECTED
            and len(until_stop([*outcome, REST], stops)) > length
        }
        chances |= {outcome: found[outcome] for outcome in found.keys() - beginnings.keys()}
        if not beginnings:
            break
    return chances | beginnings


def count_outcomes(
    samples: Sequence[list[int]], chances: dict[Outcome, float]
) -> dict[Outcome, int]:
    """Count the outcome of each sample, which is the only one of `chances` that it begins with."""
    counts = Counter[Outcome]()
    going_on = {outcome[:length] for outcome in chances for length in range(1, len(outcome))}
    for tokens in samples:
        length = 1
        while tuple(tokens[:length]) in going_on:
            length += 1
        exact = tuple(tokens[:length])
        counts[exact if exact in chances else (*exact[:-1], REST)] += 1
    return counts


class Fit(NamedTuple):
    """How well counts fit chances."""

    statistic: float
    freedom: int  # degrees of it
    p_value: float
    said: str


def chi_square(chances: dict[Outcome, float], counts: dict[Outcome, int]) -> Fit:
    """Test counts against chances (Pearson); rare outcomes are counted as one."""
    total = sum(counts.values())
    impossible = sum(counts.get(one, 0) for one, chance in chances.items() if chance < NEVER)
    if impossible:
        said = f"{impossible} samples that the target never draws"
        return Fit(float("inf"), 0, 0.0, said)
    pairs = [(chance * total, counts.get(outcome, 0)) for outcome, chance in chances.items()]
    pooled, cells = (0.0, 0), list[tuple[float, int]]()
    for expected, count in sorted(pairs):
        if pooled[0] < LEAST_EXPECTED:
            pooled = pooled[0] + expected, pooled[1] + count
        else:
            cells.append((expected, count))
    cells.append(pooled)
    statistic = sum((count - expected) ** 2 / expected for expected, count in cells)
    freedom = len(cells) - 1
    halves = torch.tensor([freedom / 2, statistic / 2], dtype=torch.float64)
    p_value = float(torch.special.gammaincc(*halves)) if freedom else 1.0
    said = f"χ² = {statistic:.1f}, {freedom} degrees of freedom, p = {p_value:.2g}"
    return Fit(statistic, freedom, p_value, said)
