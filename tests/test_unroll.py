"""Training sees exactly what drafting will see: the unroll is the drafter feeding on itself.

step 3 at position 3 attends to     f0  f1   target features up to t - 2
                                    q¹_2     the first step's at t - 1
                                    q²_3     its own input at t
"""

import pytest
import torch
from conftest import scatter_weights, tiny_config, tiny_target
from torch import Tensor

from coral_hf import CoralConfig, CoralDrafter
from coral_hf.decoding.caches.ragged_cache import RaggedCache
from coral_hf.decoding.drafting import TreeShape
from coral_hf.drafters.coral import CoralDrafting
from coral_hf.drafters.layers import CacheContext
from coral_hf.target import read_features, read_target
from coral_hf.training.steps.attention import mixed_attention, plain_mixed_attention
from coral_hf.training.steps.unroll import unroll

BATCH, LENGTH, HIDDEN = 2, 7, 32


def make_drafter(**overrides) -> CoralDrafter:
    drafter = CoralDrafter(CoralConfig.from_target(tiny_config("llama"), **overrides)).eval()
    scatter_weights(drafter)
    return drafter.double()


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def make_inputs() -> tuple[Tensor, Tensor]:
    """Embeddings and target features, (batch, length, hidden) each."""
    return randn(BATCH, LENGTH, HIDDEN), randn(BATCH, LENGTH, HIDDEN, seed=1)


# ---- attention over the target's features and the steps' own


@pytest.mark.parametrize("own_steps", [1, 2, 3])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2), (6, 1)])
def test_mixed_attention_equals_a_plain_mask_in_value_and_gradient(own_steps, heads, kv_heads):
    results = []
    for attention in (mixed_attention, plain_mixed_attention):
        query = randn(BATCH, heads, LENGTH, 4).requires_grad_()
        pairs = [
            tuple(
                randn(BATCH, kv_heads, LENGTH, 4, seed=1 + 2 * step + part).requires_grad_()
                for part in range(2)
            )
            for step in range(1 + own_steps)
        ]
        attended = attention(query, pairs[0], pairs[1:])
        leaves = [query, *(tensor for pair in pairs for tensor in pair)]
        gradients = torch.autograd.grad(attended.mul(randn(*attended.shape, seed=99)).sum(), leaves)
        results.append((attended, *gradients))
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain)


def test_without_steps_of_its_own_mixed_attention_is_causal():
    query, keys, values = (
        randn(BATCH, heads, LENGTH, 4, seed=heads + index) for index, heads in enumerate((4, 2, 2))
    )
    causal = CacheContext().attend(0, query, keys, values)
    torch.testing.assert_close(mixed_attention(query, (keys, values), []), causal)


@pytest.mark.parametrize("position", range(LENGTH))
def test_a_position_sees_what_the_drawing_says_and_nothing_else(position):
    query = randn(1, 1, LENGTH, 4)
    pairs = [[randn(1, 1, LENGTH, 4, seed=10 * k + part) for part in (1, 2)] for k in range(3)]
    values = [pair[1].requires_grad_() for pair in pairs]
    mixed_attention(query, tuple(pairs[0]), [tuple(pair) for pair in pairs[1:]])[
        :, :, position
    ].sum().backward()
    seen = [value.grad[0, 0].abs().sum(-1).nonzero()[:, 0].tolist() for value in values]
    assert seen == [
        list(range(position - 1)),  # target features up to t - 2
        [position - 1] if position > 0 else [],
        [position],
    ]


# ---- the unroll


def test_the_first_step_is_the_drafter_on_the_targets_features():
    drafter, inputs = make_drafter(), make_inputs()
    torch.testing.assert_close(unroll(drafter, *inputs, num_steps=3)[0], drafter(*inputs))


def test_more_steps_leave_the_earlier_ones_unchanged():
    drafter, inputs = make_drafter(), make_inputs()
    assert unroll(drafter, *inputs, num_steps=2).equal(unroll(drafter, *inputs, num_steps=4)[:2])


@torch.no_grad()
def draft(drafter: CoralDrafter, embeddings: Tensor, features: Tensor, own: int) -> Tensor:
    """The prediction at the last position when the last `own` features are the drafter's.

    As in decoding: the true features are committed to a cache at once, then one step at a time
    reads the prediction of the step before it, at the position after it. (1, hidden)
    """
    length = features.shape[1]
    context = CacheContext(RaggedCache([None] * len(drafter.layers)))
    true = length - own
    positions = torch.arange(length)[None]
    predicted = drafter(embeddings[:, :true], features[:, :true], positions[:, :true], context)
    for t in range(true, length):
        now = slice(t, t + 1)
        predicted = drafter(embeddings[:, now], predicted[:, -1:], positions[:, now], context)
    return predicted[:, -1]


@pytest.mark.parametrize("num_layers", [1, 2])
@torch.no_grad()
def test_a_step_of_the_unroll_is_what_the_drafter_computes_when_it_feeds_on_itself(num_layers):
    drafter = make_drafter(num_hidden_layers=num_layers)
    embeddings, features = (tensor[:1] for tensor in make_inputs())
    predicted = unroll(drafter, embeddings, features, num_steps=4)
    for step in range(4):
        for t in range(LENGTH):
            # the first feature is always the target's: nothing predicts it
            own = min(step, t)
            alone = draft(drafter, embeddings[:, : t + 1], features[:, : t + 1], own)
            torch.testing.assert_close(predicted[step, :, t], alone)


@torch.no_grad()
def test_the_steps_compared_above_differ():
    predicted = unroll(make_drafter(), *make_inputs(), num_steps=3)
    for one, other in ((0, 1), (1, 2), (0, 2)):
        difference = (predicted[one, :, 2:] - predicted[other, :, 2:]).abs().amax(-1)
        assert difference.min() > 1e-2


@torch.no_grad()
def test_the_unroll_ranks_tokens_as_the_tree_does():
    model = tiny_target("llama")
    drafter = CoralDrafter.from_target(model).eval()
    scatter_weights(drafter, seed=3)
    target = read_target(model)
    text = torch.tensor([[5, 9, 3, 17, 22, 8, 30]])
    features = read_features(model, text, torch.ones_like(text))
    drafting = CoralDrafting(drafter, target)
    positions = torch.arange(text.shape[1] - 1)[None]
    drafting.begin(text, features[:, :-1], positions)
    chain = drafting.propose(text[:, -1], TreeShape(depth=4, top_k=1, nodes=5)).tokens  # (1, 1 + 4)
    assert len(set(chain[0].tolist())) > 2

    # position        5             6              7              8
    # drafter reads   (x6, f5)      (c1, f̂¹)       (c2, f̂²)       (c3, f̂³)
    # step            1             2              3              4
    # predicts        c1            c2             c3             c4
    whole = torch.cat([text, chain[:, 1:4]], dim=1)
    features = read_features(model, whole, torch.ones_like(whole))[:, :-1]
    predicted = unroll(drafter, target.embed(whole[:, 1:]), features, num_steps=4)
    best = target.head.logits(predicted).argmax(-1)  # (steps, 1, length)
    assert [best[step, 0, 5 + step].item() for step in range(4)] == chain[0, 1:].tolist()


class Recorder(torch.nn.Module):
    """A drafter that doubles its features and remembers what it was given."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
        self.inputs = []

    def forward(self, embeddings, features, positions, context):
        self.inputs.append(features)
        return features * self.scale


def test_each_step_reads_the_last_ones_outputs_moved_right_and_detached():
    drafter, (embeddings, features) = Recorder(), make_inputs()
    predicted = unroll(drafter, embeddings, features, num_steps=3)
    assert drafter.inputs[0].equal(features)
    for step in (1, 2):
        given = drafter.inputs[step]
        assert given[:, 0].equal(features[:, 0])
        assert given[:, 1:].equal(predicted[step - 1, :, :-1])
        assert not given.requires_grad
    assert predicted.requires_grad


def test_no_gradient_reaches_the_inputs_of_an_earlier_step_through_its_outputs():
    features = randn(1, LENGTH, HIDDEN).requires_grad_()
    unroll(Recorder(), features, features, num_steps=3)[2].sum().backward()
    assert features.grad[:, 0].ne(0).all()  # the first position keeps the target's feature
    assert features.grad[:, 1:].eq(0).all()


def test_gradient_checkpointing_gives_the_same_gradients():
    gradients = []
    for saves in (False, True):
        drafter = make_drafter(num_hidden_layers=2).train()
        if saves:
            # by the newer of transformers' two names where there is one
            getattr(
                drafter, "activation_checkpointing_enable", drafter.gradient_checkpointing_enable
            )()
            assert drafter.layers[0].gradient_checkpointing
        unroll(drafter, *make_inputs(), num_steps=3).pow(2).sum().backward()
        gradients.append([parameter.grad for parameter in drafter.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_padding_on_the_right_changes_no_position_before_it():
    drafter, (embeddings, features) = make_drafter(), make_inputs()
    short = unroll(drafter, embeddings[:, :4], features[:, :4], num_steps=3)
    torch.testing.assert_close(unroll(drafter, embeddings, features, 3)[:, :, :4], short)


def test_a_sequence_of_one_token_unrolls():
    drafter, (embeddings, features) = make_drafter(), make_inputs()
    assert unroll(drafter, embeddings[:, :1], features[:, :1], 3).shape == (3, BATCH, 1, HIDDEN)


def test_the_unroll_on_the_fast_path_is_the_plain_one_in_gradient_too(monkeypatch):
    # not scattered: gradients through saturated weights would be all rounding
    torch.manual_seed(0)
    config = CoralConfig.from_target(tiny_config("llama"), num_hidden_layers=2)
    drafter, inputs = CoralDrafter(config).double(), make_inputs()
    found = []
    for attention in (mixed_attention, plain_mixed_attention):
        drafter.zero_grad()
        monkeypatch.setattr("coral_hf.training.steps.unroll.mixed_attention", attention)
        predicted = unroll(drafter, *inputs, 4)
        predicted.pow(2).sum().backward()
        found.append((predicted.detach(), *(p.grad for p in drafter.parameters())))
    torch.testing.assert_close(*found)
