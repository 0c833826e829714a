"""Medusa heads: which token each drafts, trees, training, and files."""

import pytest
import torch
from conftest import VOCAB, invoke, scatter_weights, tiny_target
from datasets import Dataset
from test_examples import folder  # noqa: F401  a saved target and its conversations
from test_families import drafted, prompts
from test_training_families import trainer_of
from torch.nn import functional as F
from transformers import AutoModel, LlamaConfig

from coral_hf import MedusaConfig, MedusaDrafter
from coral_hf.decoding.drafting import TreeShape
from coral_hf.drafters.medusa import MedusaDrafting
from coral_hf.hub.card import CardFacts, make_card
from coral_hf.target import read_features, read_target
from coral_hf.training.steps import step_kind
from coral_hf.training.warm_start import warm_start

MEDUSA = step_kind("coral_medusa")
GREEDY = {"do_sample": False, "max_new_tokens": 24, "pad_token_id": 0}


def made(target, **overrides) -> MedusaDrafter:
    torch.manual_seed(0)
    drafter = MedusaDrafter.from_target(target, **{"num_heads": 3, **overrides}).eval()
    scatter_weights(drafter, seed=1)
    return drafter


def begun(target, drafter, ids):
    """The drafting side of a call after a prompt, (batch, length + 1) with its root."""
    drafting = MedusaDrafting(drafter, read_target(target))
    features = read_features(target, ids[:, :-1], None)
    drafting.begin(ids, features, torch.arange(ids.shape[1] - 1).expand(len(ids), -1))
    return drafting, features[:, -1]


@pytest.fixture(scope="module")
def target():
    return tiny_target("llama")


@pytest.fixture(scope="module")
def ids():
    return torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))


def test_an_untrained_head_says_what_the_targets_lm_head_says(target):
    features = torch.randn(3, 5, target.config.hidden_size, dtype=target.dtype)
    wanted = target.lm_head(features)
    for own in (True, False):
        drafter = MedusaDrafter.from_target(target, num_heads=2, has_lm_heads=own)
        logits = drafter.logits(drafter(features), read_target(target).head)
        torch.testing.assert_close(logits, torch.stack([wanted, wanted]))


def test_heads_of_a_target_that_scales_its_logits_begin_with_the_scale():
    target = tiny_target("granite")
    features = torch.randn(4, target.config.hidden_size, dtype=target.dtype)
    head = read_target(target).head
    assert head.scale != 1.0
    drafter = MedusaDrafter.from_target(target)
    torch.testing.assert_close(drafter.logits(drafter(features), head)[0], head.logits(features))


@torch.no_grad()
def test_a_tree_holds_the_most_probable_products_of_what_the_heads_say(target, ids):
    drafter = made(target)
    drafting, feature = begun(target, drafter, ids)
    tree = drafting.propose(ids[:, -1], TreeShape(3, 3, 9))
    probs = drafter.logits(drafter(feature), drafting.target.head).softmax(-1)  # (3, 2, vocab)
    for row in range(2):
        best = [head[row].topk(3) for head in probs]
        chances = {
            path: torch.stack([best[d].values[rank] for d, rank in enumerate(path)]).prod().item()
            for depth in (1, 2, 3)
            for path in torch.cartesian_prod(*[torch.arange(3)] * depth).view(-1, depth).tolist()
            for path in [tuple(path)]
        }
        wanted = sorted(chances, key=lambda path: -chances[path])[:8]
        tokens = {tuple(best[d].indices[r].item() for d, r in enumerate(path)) for path in wanted}
        assert set(paths_of(tree, row)) == tokens


def paths_of(tree, row) -> list[tuple[int, ...]]:
    """The tokens on the path to each node, the root left out."""
    paths = {0: ()}
    nodes = zip(tree.tokens[row].tolist(), tree.parents[row].tolist(), strict=True)
    for node, (token, parent) in enumerate(nodes):
        if node and parent >= 0:
            paths[node] = (*paths[parent], token)
    return [*paths.values()][1:]


def test_a_tree_has_a_level_for_each_head(target):
    assert made(target).generation_config.tree_depth == 3


def test_a_config_takes_nothing_of_layers_that_it_has_not():
    config = MedusaConfig.from_target(LlamaConfig(hidden_size=64), num_heads=2)
    assert (config.hidden_size, config.num_heads, config.num_hidden_layers) == (64, 2, 1)
    assert {"num_attention_heads", "rope_parameters"}.isdisjoint(config.to_dict())
    with pytest.raises(ValueError, match="`num_heads` is 0; use 1 or more"):
        MedusaConfig(num_heads=0)


def test_heads_without_lm_heads_read_the_targets_and_follow_its_vocabulary(target):
    drafter = made(target, has_lm_heads=False, num_hidden_layers=2)
    assert not any("lm_heads" in name for name in drafter.state_dict())
    for one in (target, tiny_target("llama", vocab_size=VOCAB + 8)):
        plain = one.generate(**prompts(), **GREEDY)
        assert drafted(one, drafter, prompts(), **GREEDY).sequences.equal(plain)


@pytest.mark.parametrize("size", [VOCAB - 4, VOCAB + 8])
def test_a_target_with_more_or_fewer_tokens_is_drafted_for(size):
    drafter = made(tiny_target("llama"))
    target = tiny_target("llama", vocab_size=size)
    plain = target.generate(**prompts(), **GREEDY)
    assert drafted(target, drafter, prompts(), **GREEDY).sequences.equal(plain)


# ---- training


def rows_of(labels: list[int]) -> Dataset:
    tokens = torch.randint(3, VOCAB, (12,), generator=torch.Generator().manual_seed(3)).tolist()
    own = [token if label else -100 for token, label in zip(tokens, labels, strict=True)]
    row = {"input_ids": tokens, "labels": own, "attention_mask": [1] * 12}
    return Dataset.from_list([row] * 4)


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("first", [0, 4], ids=["all", "answer"])
def test_the_loss_is_the_papers(tmp_path, own, first):
    """Σ_i 0.8^i CE of head i + 1 at each position with the token i + 2 further, where trained."""
    target = tiny_target("llama")
    drafter = made(target, has_lm_heads=own).train()
    rows = rows_of([0] * first + [1] * (12 - first))
    trainer = trainer_of(MEDUSA, target, rows, tmp_path, drafter)
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(trainer.model, batch)
    features = read_features(target, batch["input_ids"], None)
    logits = drafter.logits(drafter(features), read_target(target).head)
    wanted = sum(
        0.8**head
        * F.cross_entropy(
            logits[head, :, : -(2 + head)].flatten(0, 1),
            batch["labels"][:, 2 + head :].flatten(),
            reduction="sum",
        )
        for head in range(3)
    )
    torch.testing.assert_close(loss, wanted / (batch["labels"] != -100).sum(), rtol=1e-6, atol=0)
    weights = [*drafter.parameters()]
    loss.backward()
    expected = torch.autograd.grad(wanted / (batch["labels"] != -100).sum(), weights)
    for weight, gradient in zip(weights, expected, strict=True):
        torch.testing.assert_close(weight.grad, gradient, rtol=1e-5, atol=1e-9)


def test_heads_beyond_the_steps_are_not_trained(target, tmp_path):
    drafter = made(target, num_heads=4)
    trainer_of(MEDUSA, target, rows_of([1] * 12), tmp_path, drafter, num_steps=2)
    frozen = {name.split(".")[1] for name, w in drafter.named_parameters() if not w.requires_grad}
    assert frozen == {"2", "3"}


@pytest.mark.parametrize("name", ["csra_weight", "regression_weight", "top_k_weight"])
def test_losses_that_heads_have_not_are_refused(target, tmp_path, name):
    with pytest.raises(ValueError, match=f"`{name}` is 0.5, which is not for a MedusaDrafter"):
        trainer_of(MEDUSA, target, rows_of([1] * 12), tmp_path, made(target), **{name: 0.5})


def test_heads_of_other_tokens_are_not_trained_but_are_a_warm_start(target, tmp_path):
    drafter, wider = made(target), tiny_target("llama", vocab_size=VOCAB + 8)
    with pytest.raises(ValueError, match="`vocab_size` of the target is 48, but the drafter's he"):
        trainer_of(MEDUSA, wider, rows_of([1] * 12), tmp_path, drafter)
    started = warm_start(wider, drafter)
    assert started.blocks[2][0].linear.weight.equal(drafter.blocks[2][0].linear.weight.float())
    assert started.lm_heads[2].weight.equal(wider.lm_head.weight.float())


def test_the_card_says_which_heads_there_are(target):
    card = make_card(made(target), CardFacts("org/heads")).text
    assert "| heads | 3, each with an LM head of its own |" in card
    assert "[Medusa (ICML 2024)]" in card and "CORAL" not in card
    assert (
        "the target's LM head |"
        in make_card(made(target, has_lm_heads=False), CardFacts("org/heads")).text
    )


def test_the_command_makes_a_head_for_each_step(folder, tmp_path):  # noqa: F811
    names = ["--target", folder / "target", "--dataset", folder / "talk.jsonl"]
    quick = ["--max-steps", 1, "--num-steps", 2, "--use-cpu", "True"]
    made = invoke("train", *names, *quick, "--recipe", "medusa", "--output", tmp_path / "made")
    assert made.exit_code == 0, made.output
    drafter = AutoModel.from_pretrained(tmp_path / "made")
    assert type(drafter) is MedusaDrafter and drafter.config.num_heads == 2
    assert drafter.generation_config.tree_depth == 2
