"""The parallel drafter: one pass a round, q by position, its training pass, P-EAGLE's files."""

import json

import pytest
import torch
from conftest import VOCAB, scatter_weights, shared_file, tiny_target
from datasets import Dataset
from test_eagle3_training import step_of
from test_export import written
from test_shared_prompts import ROOM, make_rows, make_trainer, share_prompts
from transformers import LlamaConfig

from coral_hf import CoralTrainingArguments, ParallelConfig, ParallelDrafter, import_drafter
from coral_hf.checkpoints import export_drafter
from coral_hf.decoding.drafting import TreeShape
from coral_hf.drafters.eagle3 import ParallelDrafting
from coral_hf.target import read_features, read_target
from coral_hf.training.steps.parallel import draw_chains

STEPS, LENGTH = 3, 9
SMALL = {"num_hidden_layers": 2}
QUIET = {"do_sample": False, "pad_token_id": 0, "speculation": "always"}


@pytest.fixture(scope="module")
def target():
    return tiny_target("llama")


def made(target, **overrides) -> ParallelDrafter:
    """A drafter of random weights that are not small."""
    drafter = ParallelDrafter.from_target(target, **{**SMALL, **overrides})
    scatter_weights(drafter, seed=1)
    return drafter.eval()


def marginals(drafter, target, ids, depth) -> torch.Tensor:
    """Logits of the next `depth` tokens after a text (1, length): each depth by a plain pass."""
    layers = tuple(drafter.config.target_layers)
    features = read_features(target, ids[:, :-1], torch.ones_like(ids[:, :-1]), layers=layers)
    hidden, embedded = drafter.fuse(features), target.model.embed_tokens(ids[:, 1:])
    found = []
    for _ in range(depth):
        found.append(drafter.draft_logits(drafter(embedded, hidden)[0, -1]))
        hidden = torch.cat([hidden, drafter.fuse(drafter.mask_hidden)], dim=1)
        embedded = torch.cat([embedded, drafter.mask_embedding], dim=1)
    return torch.stack(found)


def test_a_fresh_drafter_has_the_published_shape_and_starts_alike_with_a_seed(target):
    made_of = []
    for _ in range(2):
        torch.manual_seed(0)
        made_of.append(ParallelDrafter.from_target(target))
    drafter, again = made_of
    assert drafter.config.num_hidden_layers == len(drafter.layers) == 4
    assert drafter.mask_hidden.shape == (1, 1, 3 * 32) and drafter.mask_embedding.shape == (
        1,
        1,
        32,
    )
    assert drafter.mask_hidden.equal(again.mask_hidden) and drafter.mask_hidden.abs().min() > 0


@torch.no_grad()
def test_a_round_takes_one_pass_of_the_drafter(target, monkeypatch):
    drafter, passes, plain = made(target), [], ParallelDrafter.forward
    monkeypatch.setattr(
        ParallelDrafter,
        "forward",
        lambda *given: (passes.append(given[1].shape[1]), plain(*given))[1],
    )
    prompt = torch.tensor([[3, 9, 14, 20]])
    found = target.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        assistant_model=drafter,
        return_dict_in_generate=True,
        max_new_tokens=24,
        **QUIET,
    )
    # the prompt, the masks of the first tree, and one pass after each round
    assert passes[:2] == [4, 5] and len(passes) == 2 + found.stats.num_rounds
    assert found.stats.num_levels > 4 * found.stats.num_rounds


@torch.no_grad()
def test_each_level_is_a_marginal_whatever_was_accepted_before(target):
    """Trees after commits of other lengths, in rows of their own, are those of the whole text."""
    drafter, shape = made(target, draft_vocab_size=VOCAB), TreeShape(3, 2, 7)
    bound = read_target(target)
    texts = torch.randint(2, VOCAB, (2, 12), generator=torch.Generator().manual_seed(3))
    layers = tuple(drafter.config.target_layers)
    features = read_features(target, texts, torch.ones_like(texts), layers=layers)
    drafting = ParallelDrafting(drafter, bound)
    drafting.begin(texts[:, :6], features[:, :5], torch.arange(5).expand(2, -1))
    ends = torch.tensor([6, 6])  # tokens that are known, the root included
    for counts in ([1, 3], [2, 1]):
        drafting.propose(texts.gather(1, ends[:, None] - 1)[:, 0], shape)
        steps = ends[:, None] + torch.arange(3)
        new = texts.gather(1, steps.clamp(max=11))
        index = (steps - 1).clamp(max=11)[..., None].expand(-1, -1, features.shape[2])
        drafting.commit(new, features.gather(1, index), torch.tensor(counts))
        ends = ends + torch.tensor(counts)
        assert drafting._output.shape[1] == 3
        for row, end in enumerate(ends.tolist()):
            ours = drafter.draft_logits(drafting._output[row])
            alone = marginals(drafter, target, texts[row : row + 1, :end], 3)
            torch.testing.assert_close(ours, alone, rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_all_nodes_of_a_level_draw_from_the_q_of_its_position(target):
    drafter, shape = made(target), TreeShape(3, 2, 15)
    ids = torch.tensor([[3, 9, 14, 20, 7]])
    layers = tuple(drafter.config.target_layers)
    features = read_features(target, ids[:, :-1], torch.ones_like(ids[:, :-1]), layers=layers)
    drafting = ParallelDrafting(drafter, read_target(target))
    drafting.begin(ids, features, torch.arange(4)[None])
    tree = drafting.propose(ids[:, -1], shape, warp=lambda logits: logits / 0.7)
    expected = marginals(drafter, target, ids, 3)
    for node in range(7):  # those with children
        depth = int(tree.depths[0, node])
        q = (expected[depth] / 0.7).softmax(-1)
        tokens = drafter.draft_tokens
        torch.testing.assert_close(
            tree.draft_probs[0, node, tokens].double(), q, rtol=1e-5, atol=1e-6
        )
    chosen = drafting.propose(ids[:, -1], shape)
    best = expected.log_softmax(-1).topk(2).indices  # (levels, 2)
    for token, depth in zip(chosen.tokens[0, 1:], chosen.depths[0, 1:], strict=True):
        assert token in drafter.draft_tokens[best[depth - 1]]


def defined_loss(drafter, target, ids, labels):
    """The loss by its definition: each depth of each chain alone, behind the text before it."""
    features = read_features(target, ids, torch.ones_like(ids), layers=(-1,))
    logits, tokens, total = target.lm_head(features), drafter.draft_tokens, 0.0
    for anchor in range(ids.shape[1] - 2):
        for depth, q in enumerate(marginals(drafter, target, ids[:, : anchor + 2], STEPS)):
            if anchor + depth + 2 >= ids.shape[1] or labels[0, anchor + depth + 2] == -100:
                break  # what is behind is never drafted from here
            p = logits[0, anchor + depth + 1]
            if int(p.argmax()) in tokens.tolist():
                total = total - (p[tokens].softmax(-1) * q.log_softmax(-1)).sum()
    return total


@pytest.mark.parametrize(
    "fields", [{}, {"draft_vocab_size": 17, "fc_norm": True}], ids=["", "part"]
)
def test_the_loss_is_that_of_single_chains_in_every_gradient(target, tmp_path, fields):
    drafter = made(target, **fields).train()
    if fields:
        drafter.set_draft_vocabulary(torch.arange(1, 2 * 17, 2))
    ids = torch.randint(2, VOCAB, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    labels = torch.cat([torch.full((1, 3), -100), ids[:, 3:]], dim=1)
    labels[0, 6] = -100  # chains end before it, and begin again behind it
    step = step_of(drafter, target, tmp_path, recipe="parallel", keep_ratio=1.0)
    batch = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}
    losses = step.losses(drafter, step.unroll(drafter, batch, STEPS).trained())
    expected = defined_loss(drafter, target, ids, labels)
    assert expected.detach() > 0
    torch.testing.assert_close(losses.total, expected, rtol=1e-6, atol=1e-6)
    weights = dict(drafter.named_parameters())
    ours = torch.autograd.grad(losses.total, [*weights.values()])
    theirs = torch.autograd.grad(expected, [*weights.values()])
    for name, one, other in zip(weights, ours, theirs, strict=True):
        # transformers' norms compute in fp32
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: n + m)


def test_each_depth_keeps_a_part_of_the_chains_of_the_depth_before():
    labels = torch.arange(2 * 41).view(2, 41)
    labels[:, :2] = labels[1, 20:24] = -100
    trained = (labels[:, 2:] != -100).sum(1)
    everything = draw_chains(labels, 4)
    kept = draw_chains(labels, 4, 0.5, torch.Generator().manual_seed(0)).kept
    assert everything.anchors.shape == (2, 4 * 40)
    assert (everything.kept[0].sum(1) == trained).all() and (kept[0] == everything.kept[0]).all()
    chains = [kept[depth].roll(-depth, dims=1) for depth in range(4)]  # by anchor
    for depth in range(1, 4):
        assert not (chains[depth] & ~chains[depth - 1]).any()  # of the depth before
        assert not (kept[depth] & ~everything.kept[depth]).any()
        most = (everything.kept[1].sum(1) * 0.5**depth).ceil()
        assert (kept[depth].sum(1) <= most).all() and (kept[depth].sum(1) >= most - 4 * depth).all()
    assert (kept[1].sum(1) == (everything.kept[1].sum(1) * 0.5).ceil()).all()


def test_a_pass_is_as_long_as_what_is_kept_and_repeats_with_its_seed():
    labels = torch.arange(101)[None]
    drawn = [draw_chains(labels, 8, 0.8, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert drawn[0].anchors.shape[1] == 100 + 80 + 64 + 52 + 41 + 33 + 27 + 21
    assert drawn[0].anchors.equal(drawn[1].anchors) and not drawn[0].anchors.equal(drawn[2].anchors)


def test_shared_prompts_have_the_loss_of_single_rows(tmp_path):
    found, rows = [], Dataset.from_list(make_rows())
    target = tiny_target("llama", torch.float32)
    for dataset in (rows, share_prompts(rows, 2 * ROOM)):
        torch.manual_seed(0)
        drafter = ParallelDrafter.from_target(target, **SMALL)
        given = {"max_length": 2 * ROOM, "per_device_train_batch_size": 8, "keep_ratio": 1.0}
        trainer = make_trainer(target, dataset, tmp_path, drafter, recipe="parallel", **given)
        loss = trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader())))
        loss.backward()
        found.append((loss.detach(), trainer.model.mask_embedding.grad))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"num_steps": 1}, "`num_steps` is 1; use 2 or more"),
        ({"csra_weight": 0.1}, "`csra_weight` is 0.1, which is not for a ParallelDrafter"),
        ({"keep_ratio": 0.0}, "`keep_ratio` is 0.0; use 0.001 to 1"),
        ({"keep_ratio": 1.5}, "`keep_ratio` is 1.5; use 0.001 to 1"),
    ],
)
def test_settings_that_mean_nothing_here_are_refused(target, tmp_path, settings, said):
    with pytest.raises(ValueError, match=said):
        step_of(made(target), target, tmp_path, recipe="parallel", **settings)


def test_the_recipe_is_the_published_one(tmp_path):
    args = CoralTrainingArguments(str(tmp_path), recipe="parallel", report_to=[])
    assert (args.resolved.num_steps, args.keep_ratio) == (8, 0.8)


# P-EAGLE's files

DEEP = {"num_hidden_layers": 8}
EXPORTED = {"draft_vocab_size": 16, "mask_token_id": 5}


@pytest.fixture(scope="module")
def deep():
    return tiny_target("llama", **DEEP)


def exported(deep, folder, **overrides) -> ParallelDrafter:
    torch.manual_seed(0)
    drafter = made(deep, **{**EXPORTED, **overrides})
    if drafter.embed_tokens is not None:  # trained from the target's, as ever
        drafter.embed_tokens.weight.data = deep.model.embed_tokens.weight.detach() + 0.01
        drafter.embed_tokens.weight.data[5] = deep.model.embed_tokens.weight[5].detach()
    export_drafter(drafter, "vllm", folder, deep)
    return drafter


@pytest.mark.parametrize(
    "overrides",
    [{}, {"has_embeddings": True}, {"draft_vocab_size": VOCAB}, {"norm_before_residual": True}],
    ids=str,
)
def test_import_gives_back_what_was_exported(deep, tmp_path, overrides):
    drafter = exported(deep, tmp_path / "out", **overrides)
    config, tensors = written(tmp_path / "out")
    assert config["ptd_token_id"] == 5 and config["num_hidden_layers"] == 2
    assert tensors["embed_tokens.weight"][5].equal(drafter.mask_embedding[0, 0])
    back = import_drafter(deep, tmp_path / "out")
    assert type(back) is ParallelDrafter and back.config.mask_token_id == 5
    assert back.state_dict().keys() == drafter.state_dict().keys()
    for name, tensor in drafter.state_dict().items():
        assert back.state_dict()[name].equal(tensor), name
    export_drafter(back, "vllm", tmp_path / "again", deep)
    for name, tensor in written(tmp_path / "again")[1].items():
        assert tensors[name].equal(tensor), name


@pytest.mark.parametrize("names", ["AWS", "speculators"])
def test_other_names_of_the_same_are_read(deep, tmp_path, names):
    drafter = exported(deep, tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    if names == "speculators":
        config["mask_token_id"] = config.pop("ptd_token_id")
        config["speculators_model_type"] = "peagle"
    path.write_text(json.dumps(config | {"architectures": ["PEagleDraftModel"]}))
    assert import_drafter(deep, tmp_path / "out").mask_embedding.equal(drafter.mask_embedding)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"ptd_token_id": None}, "names its mask token as one of pard_token, ptd_token_id, mask"),
        ({"ptd_token_id": VOCAB}, f"expected a token from 0 to {VOCAB - 1}, found {VOCAB}"),
    ],
)
def test_a_checkpoint_without_its_mask_token_is_refused(deep, tmp_path, changes, said):
    exported(deep, tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=said):
        import_drafter(deep, tmp_path / "out")


@pytest.mark.parametrize(
    ("engine", "overrides", "said"),
    [
        ("sglang", {}, "sglang drafts no tokens in parallel"),
        ("vllm", {"mask_token_id": None}, "`mask_token_id` is None; set it"),
        ("vllm", {"target_layers": [2, 4]}, "a shared hidden state of three layers"),
    ],
)
def test_what_an_engine_cannot_draft_is_refused(deep, tmp_path, engine, overrides, said):
    drafter = made(deep, **{**EXPORTED, **overrides})
    with pytest.raises(ValueError, match=f"cannot be exported for {engine}: .*{said}"):
        export_drafter(drafter, engine, tmp_path / "out", deep)


def test_a_mask_token_that_is_none_is_refused():
    with pytest.raises(ValueError, match="`mask_token_id` is 40; use 0 to 39"):
        ParallelConfig.from_target(LlamaConfig(vocab_size=40), mask_token_id=40)


def test_a_published_config_gives_the_published_shapes(deep):
    fields = json.loads(shared_file("drafter_configs/specforge/qwen3-8b-peagle.json").read_text())
    names = ("hidden_size", "num_hidden_layers", "draft_vocab_size", "vocab_size", "head_dim")
    heads = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
    config = ParallelConfig(**{name: fields[name] for name in (*names, *heads)})
    with torch.device("meta"):
        shapes = {name: (*one.shape,) for name, one in ParallelDrafter(config).state_dict().items()}
    assert shapes["mask_hidden"] == (1, 1, 3 * 4096) and shapes["fc.weight"] == (4096, 3 * 4096)
    assert shapes["layers.0.self_attn.q_proj.weight"] == (32 * 128, 2 * 4096)
    assert shapes["layers.3.self_attn.k_proj.weight"] == (8 * 128, 4096)
