"""Training of EAGLE-3 drafters: the training-time test, the draft vocabulary, imported heads."""

import pytest
import torch
from conftest import VOCAB, any_target, scatter_weights, tiny_target
from datasets import Dataset, IterableDataset
from eagle3_checkpoint import DEPTH
from test_import_eagle3 import written
from test_trainer import logged, make_trainer
from test_training_families import FAMILIES, trainer_of

from coral_hf import CoralTrainingArguments, Eagle3Drafter
from coral_hf.target import read_features, read_target
from coral_hf.training.data import CoralCollator
from coral_hf.training.features import CachedFeatures, write_features
from coral_hf.training.pipeline import train
from coral_hf.training.steps import step_kind, training_step
from coral_hf.training.steps.own_head import Eagle3Step
from coral_hf.training.warm_start import kind_of_source, warm_start

EAGLE3 = step_kind(FAMILIES[1])
STEPS, LENGTH = 3, 9


@pytest.fixture(scope="module")
def target():
    return tiny_target("llama", torch.float64)


def drafter_of(target, **fields) -> Eagle3Drafter:
    """A random drafter whose weights are not small."""
    drafter = Eagle3Drafter.from_target(target, **fields)
    scatter_weights(drafter)
    return drafter


def rows_of(tokens: list[int], count: int = 8) -> Dataset:
    """Rows of the same tokens, the first two not trained."""
    row = {"input_ids": tokens, "labels": [-100, -100, *tokens[2:]]}
    return Dataset.from_list([{**row, "attention_mask": [1] * len(tokens)}] * count)


def step_of(drafter, target, tmp_path, **settings) -> Eagle3Step:
    given = {"recipe": "eagle3", "report_to": "none", "use_cpu": True, "num_steps": STEPS}
    args = CoralTrainingArguments(str(tmp_path), **{**given, **settings})
    return training_step(drafter.config, read_target(target), args)


def chained_loss(drafter, target, ids, labels, decay=0.8):
    """The loss by its definition: each depth of each chain alone, from the features before it."""
    layers = (*drafter.config.target_layers, -1)
    features = read_features(target, ids, torch.ones_like(ids), layers=layers)
    read, last = features[..., :-32], features[..., -32:]
    logits, tokens = target.lm_head(last), drafter.draft_tokens
    embeddings, fused, total = target.model.embed_tokens(ids[:, 1:]), drafter.fuse(read), 0.0
    for t in range(ids.shape[1] - 2):
        if labels[0, t + 2] == -100 or int(logits[0, t + 1].argmax()) not in tokens.tolist():
            continue
        p = logits[0, t + 1][tokens].softmax(-1)
        for step in range(STEPS):
            own = min(step, t)  # nothing predicts the first feature
            hidden = fused[:, : t + 1 - own]
            for _ in range(own):  # one by one, as in decoding: all before it are read again
                made = drafter(embeddings[:, : hidden.shape[1]], hidden)[:, -1:]
                hidden = torch.cat([hidden, made], dim=1)
            found = drafter(embeddings[:, : t + 1], hidden)[0, -1]
            q = drafter.draft_logits(found).log_softmax(-1)
            total = total - decay**step * (p * q).sum()
    return total


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"draft_vocab_size": 17, "norm_output": True, "fc_norm": True},
        {"num_hidden_layers": 2, "norm_before_residual": True, "norm_before_fc": True},
    ],
)
def test_the_loss_is_that_of_chains_which_feed_on_themselves_in_every_gradient(
    target, tmp_path, fields
):
    drafter = drafter_of(target, **fields)
    if "draft_vocab_size" in fields:
        drafter.set_draft_vocabulary(torch.arange(1, 2 * 17, 2))
    torch.manual_seed(0)
    ids = torch.randint(2, VOCAB, (1, LENGTH))
    labels = torch.cat([torch.full((1, 3), -100), ids[:, 3:]], dim=1)
    step = step_of(drafter, target, tmp_path)
    batch = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}
    losses = step.losses(drafter, step.unroll(drafter, batch, STEPS).trained())
    expected = chained_loss(drafter, target, ids, labels)
    assert expected.detach() > 0
    torch.testing.assert_close(losses.total, expected, rtol=1e-6, atol=1e-6)
    weights = dict(drafter.named_parameters())
    ours = torch.autograd.grad(losses.total, [*weights.values()])
    theirs = torch.autograd.grad(expected, [*weights.values()])
    for name, one, other in zip(weights, ours, theirs, strict=True):
        # transformers' norms compute in fp32
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: n + m)


def test_alignment_of_the_steps_can_be_added(target, tmp_path):
    drafter = drafter_of(target)
    ids = torch.arange(3, 3 + LENGTH)[None]
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    plain = step_of(drafter, target, tmp_path)
    aligned = step_of(drafter, target, tmp_path, csra_weight=0.5)
    trained = plain.unroll(drafter, batch, STEPS).trained()
    without, with_it = (one.losses(drafter, trained) for one in (plain, aligned))
    assert with_it.terms["csra"] == 0.5 * with_it.notes["csra_loss"] > 0
    torch.testing.assert_close(with_it.total, without.total + with_it.terms["csra"])


GROUPS = {"num_groups": 5, "num_active_groups": 2}


def test_the_routers_stage_trains_it_alone_on_the_targets_mass_of_its_groups(target, tmp_path):
    drafter = drafter_of(target)
    before = {name: tensor.clone() for name, tensor in drafter.state_dict().items()}
    settings = {"drafter": drafter, "stage": "router", "max_steps": 12, **GROUPS}
    trainer = trainer_of(EAGLE3, target, rows_of([*range(3, 15)]), tmp_path, **settings)
    batch = CoralCollator()([trainer.train_dataset[0]])
    order = drafter.heads.router.order.view(5, -1)  # (groups, tokens), by which rows are sorted
    trained = trainer.step.unroll(drafter, batch, STEPS).trained()
    mass = target.lm_head(trained.target).softmax(-1)[:, order].sum(-1)  # (positions, groups)
    read = trained.predicted if drafter.config.norm_output else drafter.norm(trained.predicted)
    expected = -(mass * drafter.heads.router(read)).sum((-1, -2)).mean()
    found = trainer.step.losses(drafter, trained).total.double()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    trainer.train()
    losses = logged(trainer, "router_loss")
    assert losses[-1] < losses[0]
    assert all(drafter.state_dict()[name].equal(tensor) for name, tensor in before.items())
    assert drafter.config.draft_head == "routed"


def test_the_joint_loss_is_the_drafters_and_the_routers(target, tmp_path):
    drafter = drafter_of(target)
    drafter.heads.add_router(5, 2)
    ids = torch.arange(3, 3 + LENGTH)[None]
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    steps = {name: {"stage": name} for name in ("drafter", "router")}
    steps["joint"] = {"stage": "joint", "router_weight": 0.25}
    steps = {name: step_of(drafter, target, tmp_path, **one) for name, one in steps.items()}
    trained = steps["drafter"].unroll(drafter, batch, STEPS).trained()
    total = {name: step.losses(drafter, trained).total for name, step in steps.items()}
    torch.testing.assert_close(total["joint"], total["drafter"] + 0.25 * total["router"])


def test_a_router_that_reads_all_groups_chooses_as_the_whole_head(tmp_path):
    target, rows = tiny_target("llama", torch.float32), rows_of([*range(3, 15)])
    drafter = Eagle3Drafter.from_target(target)
    drafter.heads.add_router(5, 5)
    settings = {"drafter": drafter, "stage": "router", "eval_prompts": 0}
    trainer = trainer_of(EAGLE3, target, rows, tmp_path, **settings)
    trainer.train()
    read = [trainer.evaluate(rows)["eval_simulated_acceptance_length"]]
    drafter.heads.configure(draft_head="full")
    read.append(trainer.evaluate(rows)["eval_simulated_acceptance_length"])
    assert read[0] == read[1]  # all groups are the whole head


def test_a_router_needs_the_whole_vocabulary_in_its_order(target, tmp_path):
    part, shuffled = drafter_of(target, draft_vocab_size=17), drafter_of(target)
    shuffled.set_draft_vocabulary(torch.arange(VOCAB).roll(1))
    rows = rows_of([*range(3, 15)])
    for drafter in (part, shuffled):
        drafter.training_record = [{"stage": "drafter"}]
        with pytest.raises(ValueError, match="a row for each token, in order; .* for 40 tok"):
            stages = [
                CoralTrainingArguments(str(tmp_path / stage), recipe="eagle3", stage=stage)
                for stage in ("drafter", "router")
            ]
            train(target, None, rows, stages, drafter)
    assert not (tmp_path / "drafter").exists()  # nothing was trained before
    with pytest.raises(ValueError, match="has 17 rows for 40 tokens. Train one with"):
        ids = torch.tensor([[1, 2, 3]])
        target.generate(ids, max_new_tokens=3, assistant_model=part, draft_head="routed")


def test_a_router_of_a_target_that_has_gained_or_lost_tokens_reads_those_of_before(tmp_path):
    target = tiny_target("llama", torch.float32)
    drafter = Eagle3Drafter.from_target(target)
    target.resize_token_embeddings(VOCAB + 3, mean_resizing=False)
    rows = rows_of([*range(3, 15)])
    settings = {"drafter": drafter, "stage": "router", "max_steps": 2, "eval_prompts": 0, **GROUPS}
    trainer = trainer_of(EAGLE3, target, rows, tmp_path, **settings)
    trainer.train()
    assert len(drafter.heads.router.order) == VOCAB
    trainer.evaluate(rows)
    for size in (VOCAB + 3, VOCAB - 7):
        target.resize_token_embeddings(size, mean_resizing=False)
        given = {"input_ids": torch.tensor([[3, 4, 5]]), "max_new_tokens": 8}
        plain = target.generate(**given, do_sample=False)
        for head in ("full", "routed"):
            ours = target.generate(**given, assistant_model=drafter, draft_head=head)
            assert ours.equal(plain)


@pytest.mark.parametrize("is_cached", [False, True])
def test_the_draft_vocabulary_is_counted_from_trained_tokens(tmp_path, is_cached):
    target = tiny_target("llama", torch.float32)
    #        not trained ↓  7 four times, 30 thrice, 5 and 9 twice
    rows = rows_of([20, 20, 7, 30, 7, 5, 30, 9, 7, 30, 9, 5, 7, 11], count=3)
    if is_cached:
        layers = EAGLE3.layers(Eagle3Drafter.config_class.from_target(target.config))
        write_features(target, rows, tmp_path / "cache", layers=layers)
        rows = CachedFeatures(tmp_path / "cache")
    drafter = Eagle3Drafter.from_target(target, draft_vocab_size=3)
    trainer_of(EAGLE3, target, rows, tmp_path, drafter=drafter)
    assert drafter.draft_tokens.tolist() == [5, 7, 30]  # of equally frequent ones the first
    assert drafter.t2d.nonzero()[:, 0].tolist() == [5, 7, 30]
    # a trained one keeps its tokens, whatever it is trained on next
    other = rows_of([20, 20, 8, 8, 8, 8, 6, 6, 6, 3, 3])
    trainer_of(EAGLE3, target, other, tmp_path, drafter=drafter)
    assert drafter.draft_tokens.tolist() == [5, 7, 30]


def test_a_small_vocabulary_is_taken_whole(tmp_path):
    target = tiny_target("llama", torch.float32)
    drafter = Eagle3Drafter.from_target(target)
    trainer_of(EAGLE3, target, rows_of([20, 20, 7, 30]), tmp_path, drafter=drafter)
    assert drafter.draft_tokens.equal(torch.arange(VOCAB))


def test_an_imported_head_keeps_its_tokens(tmp_path):
    target = tiny_target("llama", torch.float32)
    drafter = Eagle3Drafter.from_target(target, draft_vocab_size=3)
    drafter.training_record = [{"stage": "import", "source": None, "revision": None}]
    trainer_of(EAGLE3, target, rows_of([20, 20, 7, 30, 9]), tmp_path, drafter=drafter)
    assert drafter.draft_tokens.tolist() == [0, 1, 2]


def test_a_stream_cannot_be_counted(tmp_path):
    target = tiny_target("llama", torch.float32)
    rows = rows_of([20, 20, 7, 30, 9])
    stream = IterableDataset.from_generator(lambda: iter(rows))
    drafter = Eagle3Drafter.from_target(target, draft_vocab_size=3)
    with pytest.raises(ValueError, match="counted from the training rows, but .* is a stream"):
        trainer_of(EAGLE3, target, stream, tmp_path, drafter=drafter)
    drafter.set_draft_vocabulary(torch.tensor([7, 9, 30]))
    trainer_of(EAGLE3, target, stream, tmp_path, drafter=drafter, max_steps=1).train()


def test_embeddings_of_its_own_are_read_and_stay(tmp_path):
    target = tiny_target("llama", torch.float32)
    drafter = drafter_of(target, has_embeddings=True)
    before = drafter.embed_tokens.weight.clone()
    trainer = trainer_of(EAGLE3, target, rows_of([*range(3, 15)]), tmp_path, drafter=drafter)
    batch = CoralCollator()([trainer.train_dataset[0]])
    losses = []
    for _ in range(2):
        losses.append(trainer.compute_loss(drafter, batch).item())
        drafter.embed_tokens.weight.data.copy_(before.flip(0))
    assert abs(losses[0] - losses[1]) > 1e-3
    drafter.embed_tokens.weight.data.copy_(before)
    trainer.train()
    assert drafter.embed_tokens.weight.equal(before)


@pytest.mark.parametrize(
    "settings, said",
    [
        (
            {"regression_weight": 1.0},
            "`regression_weight` is 1.0, which is not for a Eagle3",
        ),
        ({"top_k_weight": 0.5}, "`top_k_weight` is 0.5, which is not for a Eagle3Drafter"),
    ],
)
def test_losses_that_it_has_not_are_refused(target, tmp_path, settings, said):
    with pytest.raises(ValueError, match=said):
        step_of(drafter_of(target), target, tmp_path, **settings)


def test_a_target_of_another_depth_is_refused_and_takes_a_warm_start(target, tmp_path):
    drafter = drafter_of(target)
    deeper = tiny_target("llama", torch.float64, num_hidden_layers=4)
    with pytest.raises(ValueError, match="`num_hidden_layers` of the target is 4, .* with 2"):
        trainer_of(EAGLE3, deeper, rows_of([*range(3, 15)]), tmp_path, drafter=drafter)
    assert warm_start(deeper, drafter).config.target_layers == [1, 2, 3]


def test_a_head_is_tuned_on_a_target_with_the_same_tokens_and_made_anew_for_others(tmp_path):
    target = tiny_target("llama", torch.float32)
    other = drafter_of(target, draft_vocab_size=5).float()
    other.set_draft_vocabulary(torch.tensor([3, 5, 8, 13, 21]))
    tuned = warm_start(tiny_target("llama", torch.float32, seed=3), other)
    assert tuned.draft_tokens.equal(other.draft_tokens)
    assert tuned.lm_head.weight.equal(other.lm_head.weight)
    whole = drafter_of(target).float()
    whole.heads.add_router(5, 2)
    again = warm_start(tiny_target("llama", torch.float32, seed=3), whole)
    assert again.heads.router.fc.weight.equal(whole.heads.router.fc.weight)
    grown = tiny_target("llama", torch.float32, vocab_size=VOCAB + 8)
    assert warm_start(grown, whole).heads.router is None
    fresh = warm_start(grown, other)
    assert fresh.config.draft_vocab_size == VOCAB + 8
    assert fresh.fc.weight.equal(other.fc.weight)
    assert fresh.layers[0].mlp.up_proj.weight.equal(other.layers[0].mlp.up_proj.weight)
    trainer_of(EAGLE3, grown, rows_of([20, 20, 7, 45, 9]), tmp_path, drafter=fresh).train()


@pytest.mark.parametrize("name", ["SafeAILab", "speculators"])
def test_a_published_head_is_tuned_on_ones_own_target(tmp_path, name):
    target = tiny_target("llama", torch.float32, num_hidden_layers=DEPTH)
    (tmp_path / "head").mkdir()
    written(tmp_path / "head", name)
    assert kind_of_source(tmp_path / "head") is EAGLE3
    drafter = warm_start(target, tmp_path / "head")
    before = {name: tensor.clone() for name, tensor in drafter.state_dict().items()}
    rows = rows_of([20, 20, 7, 30, 9, 11, 3, 12])
    trainer_of(EAGLE3, target, rows, tmp_path, drafter=drafter, max_steps=2).train()
    assert drafter.d2t.equal(before["d2t"])  # its tokens are not counted again
    assert not drafter.lm_head.weight.equal(before["lm_head.weight"])


@pytest.mark.parametrize("name", ["gemma2", "qwen3_moe", "gpt_neo", "mistral_window"])
def test_layers_of_any_kind_of_target_are_those_of_its_hidden_states(name):
    target = any_target(name, torch.float32)
    ids = torch.randint(2, VOCAB, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    found = read_features(target, ids, mask, layers=(0, 1, -1))
    states = target(ids, attention_mask=mask, output_hidden_states=True).hidden_states
    torch.testing.assert_close(found, torch.cat([states[0], states[1], states[-1]], dim=-1))


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing`:FutureWarning")  # renamed in 5.23
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is dep:FutureWarning")
def test_bf16_and_activation_checkpointing_change_no_loss(tmp_path):
    target = tiny_target("llama", torch.float32)
    rows = rows_of([*range(3, 15)])
    found = []
    for settings in ({}, {"bf16": True}, {"gradient_checkpointing": True}):
        torch.manual_seed(0)
        drafter = Eagle3Drafter.from_target(target)
        given = {"recipe": "eagle3", "max_steps": 2, **settings}
        trainer = make_trainer(target, rows, tmp_path, drafter=drafter, **given)
        trainer.train()
        found.append(trainer.state.log_history[1]["loss"])
    assert found[1] == pytest.approx(found[0], rel=0.02)
    assert found[2] == pytest.approx(found[0], rel=1e-6)
