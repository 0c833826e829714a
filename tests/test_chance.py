"""Chance: float64 from one generator, whatever torch's default dtype and device are."""

import ast
from itertools import chain
from pathlib import Path

import pytest
import torch
from conftest import tiny_target
from scipy.stats import chisquare
from torch import Tensor

import coral_hf
from coral_hf import CoralDrafter
from coral_hf.decoding.chance import Chance
from coral_hf.decoding.plain.draft_policy import DraftPolicy
from coral_hf.drafters.tree_builders import SampledTreeBuilder

PACKAGE = Path(coral_hf.__file__).parent
DTYPES = [torch.float16, torch.bfloat16, torch.float64]
# what makes a tensor out of nothing, and whether its dtype may be torch's default one
FACTORIES = {
    **dict.fromkeys(("arange", "randint", "randperm"), False),
    **dict.fromkeys(("empty", "eye", "full", "linspace", "ones", "rand", "randn"), True),
    **dict.fromkeys(("normal", "scalar_tensor", "tensor", "zeros"), True),
}
DRAWS = {"rand", "randn", "randint", "randperm", "multinomial", "bernoulli", "normal", "poisson"}
DRAWS |= {"rand_like", "randn_like", "randint_like", "gumbel_softmax"}
DRAWS |= {"exponential_", "uniform_", "normal_", "bernoulli_", "random_", "geometric_", "cauchy_"}
# of these, whoever loads a model sets dtype and device
LOADED = ("__init__", "_make")
# files that draw: all of a call of `generate` is in the first, the others train
DRAWING = {
    "decoding/chance.py",
    "decoding/guard/trial.py",  # weights of small copies
    "heads/collection.py",  # initial weights of a router
    "training/grouping.py",
    "training/steps/base.py",
    "training/steps/parallel.py",  # positions that are dropped
}


def calls(path: Path) -> list[ast.Call]:
    """All calls in a file, but for those where a module makes its parameters and buffers."""
    tree = ast.parse(path.read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    loaded = {*chain(*(ast.walk(node) for node in functions if node.name in LOADED))}
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call) and node not in loaded]


def called(call: ast.Call) -> str:
    """`exponential_` of `x.exponential_()`, nothing of a plain name."""
    return call.func.attr if isinstance(call.func, ast.Attribute) else ""


@pytest.mark.parametrize("part", ["decoding", "drafters", "heads"])
def test_every_tensor_that_is_made_names_its_dtype_and_device(part):
    wrong = []
    for path in (PACKAGE / part).rglob("*.py"):
        for call in calls(path):
            is_factory = isinstance(call.func, ast.Attribute) and called(call) in FACTORIES
            if not is_factory or ast.unparse(call.func.value) != "torch":
                continue
            given = {keyword.arg for keyword in call.keywords}
            if not given >= {"device", *(["dtype"] if FACTORIES[called(call)] else [])}:
                wrong.append(f"{path.name}:{call.lineno}: {ast.unparse(call)}")
    assert not wrong


def test_nothing_is_drawn_outside_of_known_files():
    found = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if any(called(call) in DRAWS for call in calls(path))
    }
    assert found == DRAWING


@pytest.fixture
def default_dtype():
    """Sets torch's default dtype for a test."""
    before = torch.get_default_dtype()
    yield torch.set_default_dtype
    torch.set_default_dtype(before)


# the last token is rarer than a coarse dtype's numbers near 1 are apart
PROBS = torch.tensor([0.5, 0.3, 0.0, 0.197, 0.0025, 0.0005])


def fits(counts: Tensor, probs: Tensor) -> bool:
    """Whether counts follow probabilities, (vocab,) each; wrong in 1 of 10 000 cases."""
    possible = probs > 0
    assert not counts[~possible].any()
    expected = counts.sum() * (probs.double() / probs.double().sum())[possible]
    return chisquare(counts[possible].double().numpy(), expected.numpy()).pvalue > 1e-4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("probs_dtype", [torch.float32, torch.float64])
def test_draws_follow_their_distribution(default_dtype, dtype, probs_dtype):
    torch.manual_seed(0)
    default_dtype(dtype)
    probs = PROBS.to(probs_dtype).expand(100_000, -1)
    assert fits(Chance().draw(probs).bincount(minlength=6), PROBS)
    assert fits(Chance().race(probs).argmax(-1).bincount(minlength=6), PROBS)


def test_what_is_no_distribution_raises_as_in_the_plain_call():
    for probs in ([0.5, torch.nan], [0.0, 0.0], [torch.inf, 1.0]):
        with pytest.raises(RuntimeError, match="invalid multinomial|probability tensor"):
            Chance().draw(torch.tensor([probs]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_rare_acceptance_is_as_rare_as_it_should_be(default_dtype, dtype):
    torch.manual_seed(0)
    default_dtype(dtype)
    accepted = int(Chance().accept(torch.full((400_000,), 1e-4, dtype=torch.float32)).sum())
    assert 20 < accepted < 62  # 40 expected, with a standard deviation of 6.3


@pytest.mark.parametrize("dtype", DTYPES)
def test_siblings_are_drawn_as_the_drafter_says_also_where_it_speaks_in_halves(
    default_dtype, dtype
):
    torch.manual_seed(0)
    default_dtype(dtype)
    probs = PROBS.to(torch.bfloat16).expand(100_000, 1, -1)
    builder = SampledTreeBuilder(torch.zeros(100_000, dtype=torch.long))
    builder.best(1)
    builder.draw(probs, 2)
    tree = builder.build()
    assert fits(tree.tokens[:, 1].bincount(minlength=6), probs[0, 0].float())
    rest = tree.tokens[tree.tokens[:, 1] == 0, 2].bincount(minlength=6)
    assert fits(rest, probs[0, 0].float().index_fill(0, torch.tensor(0), 0))


def test_the_numbers_of_another_device_follow_from_the_seed_of_the_one_source(monkeypatch):
    made = []

    class Recorded(torch.Generator):
        def manual_seed(self, seed):
            made.append(seed)
            return super().manual_seed(seed)

    monkeypatch.setattr(torch, "Generator", lambda device: Recorded("cpu"))
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        first, second = Chance(), Chance()
        assert first.of(torch.device("cpu")) is None
        generator = first.of(torch.device("cuda", 0))
        assert first.of(torch.device("cuda", 0)) is generator
        second.of(torch.device("cuda", 1))
    assert made[:2] == made[2:4] and len(set(made)) == 4


@pytest.fixture
def elsewhere():
    """Sets torch's default device to one that holds no numbers: nothing may be made there."""
    yield lambda: torch.set_default_device("meta")
    torch.set_default_device(None)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"repetition_penalty": 1.2},
        {"do_sample": True, "drawn_tree": True},
        {"do_sample": True, "verification": "traversal"},
        {"return_dict_in_generate": True, "output_scores": True},
    ],
    ids=str,
)
def test_torchs_default_device_changes_nothing(elsewhere, settings):
    target = tiny_target("llama", torch.float32)
    drafter, ids = CoralDrafter.from_target(target).eval(), torch.randint(3, 40, (3, 9))
    given = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False}
    found = []
    for change in (lambda: None, elsewhere):
        torch.manual_seed(0)
        change()
        output = target.generate(
            ids, assistant_model=drafter, speculation="always", **{**given, **settings}
        )
        found.append(output.sequences if "output_scores" in settings else output)
    assert found[0].equal(found[1])


RULES = [
    {},
    {"drawn_tree": True},
    {"verification": "traversal"},
    {"verification": "block", "tree_top_k": 1},
]


def counts_of_second_tokens(target, drafter, ids: Tensor, samples: int, **settings) -> Tensor:
    """How often each token comes second after a prompt (1, length): (vocab,)."""
    given = {"do_sample": True, "top_k": 0, "max_new_tokens": 3, "speculation": "always"}
    tree = {"tree_depth": 2, "tree_top_k": 3, "tree_nodes": 7}
    rows = min(samples, 500)
    mask = torch.ones(rows, ids.shape[1], dtype=torch.long)
    counts = torch.zeros(8, dtype=torch.long)
    for _ in range(samples // rows):
        texts = target.generate(
            ids.repeat(rows, 1),
            attention_mask=mask,
            assistant_model=drafter,
            **{**given, **tree, **settings},
        )
        counts += texts[:, -2].bincount(minlength=8)
    return counts


def second_tokens(target, ids: Tensor) -> Tensor:
    """The target's distribution of the second token after a prompt (1, length): (vocab,)."""
    with torch.no_grad():
        first = target(ids).logits[0, -1].double().softmax(-1)
        longer = torch.cat([ids.repeat(8, 1), torch.arange(8)[:, None]], 1)
        return first @ target(longer).logits[:, -1].double().softmax(-1)


def pair(drafter_dtype: torch.dtype = torch.float32):
    """A tiny target with few tokens, its drafter, and a prompt."""
    target = tiny_target("llama", torch.float32, vocab_size=8)
    torch.manual_seed(5)
    return target, CoralDrafter.from_target(target).to(drafter_dtype).eval(), torch.arange(4)[None]


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_samples_follow_the_target_whatever_the_default_dtype(default_dtype, dtype, rule):
    target, drafter, ids = pair()
    expected = second_tokens(target, ids)
    default_dtype(dtype)
    assert fits(counts_of_second_tokens(target, drafter, ids, 1500, **rule), expected)


class StepsBackAtOnce(DraftPolicy):
    """Gives up drafting before the first round."""

    def __init__(self, shape):
        super().__init__(shape)
        self.is_plain = True


@pytest.mark.parametrize("way", ["never", "stepped back"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_samples_that_are_not_drafted_follow_the_target_whatever_the_default_dtype(
    default_dtype, dtype, way, monkeypatch
):
    target, drafter, ids = pair()
    expected = second_tokens(target, ids)
    settings = {"speculation": "never"} if way == "never" else {}
    if way != "never":
        monkeypatch.setattr(
            "coral_hf.decoding.generate.choose_policy",
            lambda _, shape, *rest: StepsBackAtOnce(shape),
        )
    default_dtype(dtype)
    assert fits(counts_of_second_tokens(target, drafter, ids, 1500, **settings), expected)
    texts = []
    for _ in range(2):
        torch.manual_seed(3)
        given = {"do_sample": True, "max_new_tokens": 8, "assistant_model": drafter, **settings}
        texts.append(target.generate(ids, **given))
    assert texts[0].equal(texts[1])


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize(("dtype", "drafter_dtype"), [*zip(DTYPES, DTYPES[::-1], strict=True)])
def test_many_samples_follow_the_target_whatever_the_dtypes(
    default_dtype, dtype, rule, drafter_dtype
):
    target, drafter, ids = pair(drafter_dtype)
    expected = second_tokens(target, ids)
    default_dtype(dtype)
    assert fits(counts_of_second_tokens(target, drafter, ids, 20_000, **rule), expected)
