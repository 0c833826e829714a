"""Whether a drafter leaves the output of its target unchanged: checks and a verdict.

In: a target, a drafter, prompts. Out: a `Verification`.

    greedy, float64        every answer is the target's own: no rounding hides an error
    greedy, working dtype  answers may part where the target's two best tokens are within rounding
    sampling               the first tokens of many samples, by χ² against the target's own chances
"""

import logging
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...decoding.guard import TREE, accept_target
from ...identity import quantization_of
from ..benchmark import Mismatch, measure_prompts
from ..calls import Bench, sampling_arguments
from ..prompts import Prompt, encode, fitting, user_message
from ..report import Table, model_name
from ..settings import VerifySettings
from ..summary import tau_per_token
from .samples import NUM_TOKENS, chi_square, count_outcomes, draw, outcome_chances

logger = logging.getLogger(__name__)

# what is asked where no prompts are given
BUILT_IN = (
    "Once upon a time there was a little girl who",
    "Tell me a story about a fox and a crow.",
    "Why is the sky blue? Explain it to a child.",
    "Write a Python function that reverses a list.",
)
FLOAT64 = "float64"
NO_FLOAT64 = ("flash", "flex")  # beginnings of names of attention functions
TIE = 1e-6  # gap of the two best logits in float64, below which they are in no order
ROUNDINGS = 64  # of the working dtype, within which two logits count as equal
FALSE_ALARM = 1e-3  # chance that a lossless drafter fails, of all sampled prompts together
EXTRA_TOKENS = 2  # of a sample: trees end where it does, so one of some depth shall fit


class Check(NamedTuple):
    """One check, and what came of it."""

    what: str
    compared: str
    tau: float | None  # tokens of a row for each pass of the target
    found: str
    is_passed: bool | None  # None where it decides nothing


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
        failed = [check.what for check in self.checks if check.is_passed is False]
        if failed:
            return f"NOT LOSSLESS, failed: {'; '.join(dict.fromkeys(failed))}."
        if not any(check.is_passed for check in self.checks):
            return "Agreement only: no check decides for this target."
        return "Lossless: all checks that decide have passed."

    def to_markdown(self) -> str:
        """Return the table and the verdict."""
        said = {True: "passed", False: "FAILED", None: "–"}
        rows = [
            (what, compared, found, "–" if tau is None else f"{tau:.2f}", said[is_passed])
            for what, compared, tau, found, is_passed in self.checks
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
    settings, judgement = settings or VerifySettings(), accept_target(target)
    asked = [
        prompt if isinstance(prompt, Prompt) else Prompt("prompt", str(i), (user_message(prompt),))
        for i, prompt in enumerate(prompts or BUILT_IN)
    ]
    exact, obstacle = float64_pair(target, drafter)
    agrees_only, checks = bool(judgement.notes), []
    if exact is None:
        checks.append(Check("greedy, float64", "nothing", None, f"not possible: {obstacle}", None))
    else:
        checks += greedy_checks(*exact, tokenizer, asked, settings)
    if exact is None or exact[0] is not target:
        decides = exact is None and not agrees_only
        checks += greedy_checks(target, drafter, tokenizer, asked, settings, decides)
    if not agrees_only:
        checks += sampling_checks(*(exact or (target, drafter)), tokenizer, asked, settings)
    checks += [Check("no exact output", "the target", None, note, None) for note in judgement.notes]
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
    if copied[0].config._attn_implementation.startswith(NO_FLOAT64):
        copied[0].set_attn_implementation("sdpa")
    return copied, ""


def greedy_checks(
    target: PreTrainedModel,
    drafter: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    settings: VerifySettings,
    decides: bool = True,
) -> list[Check]:
    """Compare greedy answers with and without the drafter, and list where they part.

    `decides`: whether a difference that is more than a tie is a failure. A tie is one of the two
    best logits of a token, (1, vocab).
    """
    name = str(target.dtype).removeprefix("torch.")
    logger.info("greedy answers in %s", name)
    plain = sampling_arguments(0.0, settings.max_new_tokens)
    drafting = {"assistant_model": drafter, "speculation": "always", **settings.shape()}
    bench = Bench(target, {"plain": plain, "coral": plain | drafting})
    calls, mismatches, _ = measure_prompts(bench, tokenizer, prompts)
    calls = [call for call in calls if call.method == "coral"]
    ties = [one for one in mismatches if is_tie(one, name)]
    compared = f"{len(calls)} prompts, {sum(call.num_tokens for call in calls)} tokens"
    found = f"{len(calls) - len(mismatches)} of {len(calls)} answers equal"
    is_passed = len(ties) == len(mismatches) if decides else None
    checks = [Check(f"greedy, {name}", compared, tau_per_token(calls), found, is_passed)]
    for one in mismatches:
        kind = "a tie" if one in ties else "no tie"
        gap = f"{kind}: top-2 gap {one.top2_gap:.2g}, {one.num_roundings:.2g} roundings"
        where = f"token {one.position} of {one.task}/{one.prompt}"
        is_passed = one in ties if decides else None
        checks.append(Check(f"first difference, {name}", where, None, gap, is_passed))
    return checks


def is_tie(one: Mismatch, name: str) -> bool:
    """Whether the target's two best logits were too close to be told apart in a dtype."""
    return one.top2_gap <= TIE if name == FLOAT64 else one.num_roundings <= ROUNDINGS


def sampling_checks(
    target: PreTrainedModel,
    drafter: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    settings: VerifySettings,
) -> list[Check]:
    """Compare samples after the first prompts with the target's own distribution."""
    sampling = settings.sampling(target.generation_config)
    shown = ", ".join(f"{name} {value:g}" for name, value in sampling.items())
    sampling |= {"do_sample": True, "max_new_tokens": NUM_TOKENS + EXTRA_TOKENS}
    drafting = {"assistant_model": drafter, "speculation": "always", **settings.drafting()}
    chosen = fitting(prompts, tokenizer, target, NUM_TOKENS + EXTRA_TOKENS)
    chosen, checks = chosen[: settings.sampled_prompts], []
    for prompt in chosen:
        ids = encode(prompt, tokenizer).to(target.device)  # (1, length)
        logger.info("samples of %s/%s", prompt.task, prompt.id)
        chances = outcome_chances(target, ids, sampling, settings.num_samples)
        calls = draw(target, ids, sampling | drafting, settings)
        counts = count_outcomes([row for call in calls for row in call.tokens], chances)
        fit = chi_square(chances, counts)
        compared = f"{settings.num_samples} samples of {prompt.task}/{prompt.id}"
        is_passed = fit.p_value >= FALSE_ALARM / len(chosen)
        own = compared, tau_per_token(calls), str(fit), is_passed
        checks.append(Check(f"sampling, {shown}", *own))
    return checks
