"""`verify` says whether a drafter leaves the output unchanged, and finds rules that do not."""

import pytest
import torch
from conftest import invoke, tiny_target
from scipy.stats import chisquare
from test_benchmark import tokenizer  # noqa: F401  of words
from test_examples import folder  # noqa: F401  a saved target and its conversations

import coral_hf
from coral_hf import CoralDrafter
from coral_hf.decoding import rules
from coral_hf.decoding.chance import Chance
from coral_hf.decoding.rules import Verdict
from coral_hf.measure import Prompt, VerifySettings
from coral_hf.measure.benchmark import Mismatch
from coral_hf.measure.lossless import REST, chi_square, count_outcomes, outcome_chances

PROMPTS = [Prompt("text", "a", text="w1 w2 w3"), Prompt("text", "b", text="w9 w4")]
TREE = {"tree_depth": 3, "tree_top_k": 4, "tree_nodes": 13}
SMALL = {"max_new_tokens": 10, "num_samples": 400, "sampled_prompts": 1, **TREE}


@pytest.fixture(scope="module")
def target():
    return tiny_target("llama", torch.float32)


@pytest.fixture(scope="module")
def drafter(target):
    torch.manual_seed(0)
    return CoralDrafter.from_target(target).eval()


@pytest.fixture
def check(target, drafter, tokenizer):  # noqa: F811
    """Verifies the drafter with some settings."""

    def verify(target=target, prompts=PROMPTS, **settings):
        settings = VerifySettings(**{**SMALL, **settings})
        return coral_hf.verify(target, drafter, tokenizer, prompts, settings)

    return verify


@pytest.mark.parametrize(
    "settings",
    [{}, {"drawn_tree": True, "temperature": 0.7, "top_p": 0.9}, {"verification": "traversal"}],
    ids=["chosen", "drawn", "traversal"],
)
def test_a_drafter_is_lossless_by_every_rule(check, settings):
    found = check(**settings)
    assert found.is_lossless, found.to_markdown()
    first, second, *_, last = found.checks
    assert [first.what, second.what] == ["greedy, float64", "greedy, float32"]
    assert first.found == "2 of 2 answers equal" and second.is_passed is None
    assert last.what.startswith("sampling") and last.is_passed
    assert found.to_markdown().rstrip().endswith("have passed.")


def keeps_first_children(tree, logits):
    """A greedy rule that keeps what was drafted first, whatever the target says."""
    batch = len(tree.tokens)
    path = torch.tensor([[0, 1]]).expand(batch, -1)[:, : tree.tokens.shape[1]]
    lengths = torch.full((batch,), path.shape[1])
    return Verdict(path, lengths, logits[range(batch), path[:, -1]].argmax(-1))


def test_a_greedy_rule_that_keeps_what_was_drafted_is_found(check, monkeypatch):
    monkeypatch.setattr(rules, "verify_greedy", keeps_first_children)
    found = check(sampled_prompts=0)
    assert not found.is_lossless and found.checks[0].is_passed is False
    assert "NOT LOSSLESS, failed: greedy, float64" in found.to_markdown()
    assert "first difference, float64 | token 1 of text/a | no tie" in found.to_markdown()


@pytest.mark.parametrize("rule", ["token", "traversal"])
def test_a_sampling_rule_that_keeps_every_token_is_found(check, monkeypatch, rule):
    monkeypatch.setattr(Chance, "accept", lambda self, chances: torch.ones_like(chances).bool())
    found = check(drawn_tree=True, verification=rule)
    assert found.checks[0].is_passed and not found.is_lossless
    assert found.checks[-1].what.startswith("sampling") and found.checks[-1].is_passed is False


def test_samples_that_top_k_rules_out_are_found(check, monkeypatch):
    monkeypatch.setattr(Chance, "draw", lambda self, probs: torch.randint(40, (len(probs),)))
    found = check(top_k=2).checks[-1]
    assert found.is_passed is False and "samples that the target never draws" in found.found


def test_the_targets_own_sampling_settings_are_tested_unless_others_are_given(target):
    own = target.generation_config
    assert VerifySettings().sampling(own) == {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
    own = type(own)(do_sample=True, temperature=0.6, top_p=0.9)
    assert VerifySettings(top_p=0.5).sampling(own) == {
        "temperature": 0.6,
        "top_p": 0.5,
        "top_k": 0,
    }


def test_without_float64_the_working_dtype_decides(check, monkeypatch):
    target = tiny_target("llama", torch.float32)
    target.config.quantization_config = {"quant_method": "gptq"}
    found = check(target, sampled_prompts=0)
    assert found.checks[0].found == "not possible: the target's weights are quantised"
    assert found.checks[1].what == "greedy, float32" and found.checks[1].is_passed
    monkeypatch.setattr(rules, "verify_greedy", keeps_first_children)
    assert not check(target, sampled_prompts=0).is_lossless


def test_a_target_that_only_agrees_is_said_to(check):
    target = tiny_target("llama", torch.float32)
    target.config.quantization_config = {"quant_method": "nvfp4"}
    found = check(target)
    assert found.is_lossless and found.verdict.startswith("Agreement only")
    assert "its kernel quantizes activations" in found.checks[-1].found


def test_prompts_may_be_texts_and_are_built_in(check):
    settings = {"sampled_prompts": 0, "max_new_tokens": 2}
    assert check(prompts=["w1 w2"], **settings).checks[0].compared == "1 prompts, 2 tokens"
    assert check(prompts=(), **settings).checks[0].compared == "4 prompts, 8 tokens"


def test_near_ties_count_as_equal():
    def mismatch(gap: float, roundings: float) -> Mismatch:
        return Mismatch("chat", "a", 0, "coral", 3, gap, roundings)

    assert mismatch(0.25, 2.0).is_tie("bfloat16") and not mismatch(9.0, 72.0).is_tie("bfloat16")
    assert mismatch(1e-9, 1e5).is_tie("float64") and not mismatch(1e-4, 1e10).is_tie("float64")


def test_chances_of_outcomes_are_the_targets_own():
    target = tiny_target("llama")
    ids = torch.tensor([[1, 2, 3]])
    sampling = {"do_sample": True, "temperature": 0.8, "top_k": 0, "top_p": 1.0}
    chances = outcome_chances(target, ids, sampling, num_samples=1000)
    assert sum(chances.values()) == pytest.approx(1.0)
    first, second, third = next(one for one in chances if len(one) == 3 and REST not in one)
    text = torch.tensor([[1, 2, 3, first, second]])
    with torch.no_grad():
        probs = (target(text).logits[0, -3:] / 0.8).softmax(-1)  # (3, vocab)
    expected = probs[0, first] * probs[1, second] * probs[2, third]
    assert chances[first, second, third] == pytest.approx(float(expected), rel=1e-5)


def test_a_sample_counts_for_the_one_outcome_it_begins_with():
    chances = {(1, 2, 5): 0.2, (1, 2, REST): 0.1, (1, REST): 0.2, (3,): 0.3, (REST,): 0.2}
    samples = [[1, 2, 5, 9], [1, 2, 4], [1, 7, 5], [3], [3, 4, 4], [8, 2, 5]]
    expected = {(1, 2, 5): 1, (1, 2, REST): 1, (1, REST): 1, (3,): 2, (REST,): 1}
    assert count_outcomes(samples, chances) == expected


def test_chi_square_counts_rare_outcomes_together():
    chances = {(0,): 0.5, (1,): 0.3, (2,): 0.18, (3,): 0.01, (4,): 0.01}
    fit = chi_square(chances, {(0,): 160, (1,): 75, (2,): 58, (3,): 4, (4,): 3})
    expected = chisquare([160, 75, 58, 7], [150, 90, 54, 6])
    assert fit.freedom == 3
    assert fit.statistic == pytest.approx(expected.statistic)
    assert fit.p_value == pytest.approx(expected.pvalue)


def test_the_command_prints_a_verdict_and_exits_with_1_if_it_is_bad(
    folder,  # noqa: F811
    tmp_path,
    monkeypatch,
):
    target = tiny_target("llama", torch.float32, vocab_size=256)
    CoralDrafter.from_target(target).save_pretrained(tmp_path)
    names = ["--target", folder / "target", "--drafter", tmp_path, "--max-new-tokens", 4]
    words = [*names, "--prompts", folder / "talk.jsonl", "--limit", 2, "--sampled-prompts", 0]
    result = invoke("verify", *words)
    assert result.exit_code == 0, result.output
    assert "Lossless: all checks" in result.output
    monkeypatch.setattr(rules, "verify_greedy", keeps_first_children)
    result = invoke("verify", *words)
    assert result.exit_code == 1 and "NOT LOSSLESS" in result.output
