"""Export of EAGLE-3 drafters: an engine's names and fields, the same predictions, or a refusal."""

import pytest
import torch
from conftest import invoke, printed, scatter_weights, tiny_target
from eagle3_checkpoint import DEPTH, DRAFT, PUBLISHED, eagle3_fuse, eagle3_step
from eagle_checkpoint import HIDDEN, VOCAB
from test_examples import folder  # noqa: F401  a saved target and its conversations
from test_export import written
from transformers import AutoModel, AutoModelForCausalLM

from coral_hf import Eagle3Drafter, import_drafter
from coral_hf.checkpoints import export_drafter

ENGINES = ("vllm", "sglang")
FIRST = {"vllm": "layers.0.", "sglang": "midlayer."}
BODY = {
    "hidden_norm.weight",
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
    *(f"self_attn.{name}_proj.weight" for name in "qkvo"),
    *(f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
}
OUTER = {"fc.weight", "norm.weight", "lm_head.weight", "d2t", "t2d"}
NORMS = {"norm_before_fc": True, "norm_output": True}
BIASES = {"attention_bias": True, "output_bias": True, "mlp_bias": True}
# what an engine takes beside the plain drafter
TAKEN = {
    "vllm": [
        {},
        NORMS,
        {"fc_norm": True},
        {"norm_before_residual": True},
        BIASES,
        {"attention_bias": True},
        {"qk_norm": True, "head_dim": 16},
        {"target_layers": [0, 1, 7], "draft_vocab_size": VOCAB},
        {"has_embeddings": True, "hidden_size": 24, "head_dim": 6},
        {"has_embeddings": True},
    ],
    "sglang": [
        {},
        NORMS,
        {"fc_norm": True},
        {"target_layers": [1, 4, 7], "draft_vocab_size": VOCAB},
        {"has_embeddings": True, "hidden_size": 24, "head_dim": 6},
    ],
}
CASES = [(engine, overrides) for engine in ENGINES for overrides in TAKEN[engine]]


def made(target, **overrides):
    """A drafter whose every tensor is random, so that none can be left out unseen."""
    torch.manual_seed(0)
    drafter = Eagle3Drafter.from_target(target, **{"draft_vocab_size": DRAFT, **overrides})
    table = None if drafter.embed_tokens is None else drafter.embed_tokens.weight.detach().clone()
    scatter_weights(drafter, seed=1)
    if table is not None and table.shape[1] == HIDDEN:  # trained from the target's, as ever
        drafter.embed_tokens.weight.data = table + 0.01
    size = drafter.config.draft_vocab_size
    chance = torch.Generator().manual_seed(3)
    drafter.set_draft_vocabulary(torch.randperm(VOCAB, generator=chance)[:size].sort().values)
    return drafter.eval()


@pytest.fixture(scope="module")
def target():
    return tiny_target("llama", num_hidden_layers=DEPTH)


def test_a_router_stays_behind_and_a_note_says_so(target, tmp_path):
    drafter = made(target, draft_vocab_size=VOCAB)
    drafter.heads.add_router(4, 2)
    drafter.heads.configure(is_router_trained=True, draft_head="routed")
    done = export_drafter(drafter, "vllm", tmp_path / "out", target)
    assert written(tmp_path / "out")[1].keys() & {*drafter.heads.state_dict()} == set()
    assert done.notes == [
        "Left behind, since vllm has no place for them: heads.router.fc.weight,"
        " heads.router.groups.weight. It reads the whole LM head."
    ]


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_gets_its_own_names_and_fields(target, tmp_path, engine):
    done = export_drafter(made(target), engine, tmp_path / "out", target)
    config, tensors = written(tmp_path / "out")
    outer = OUTER | ({"embed_tokens.weight"} if engine == "vllm" else set())
    assert tensors.keys() == outer | {FIRST[engine] + name for name in BODY} and done.notes == []
    assert tensors["d2t"].dtype == torch.int64 and tensors["t2d"].dtype == torch.bool
    assert config["architectures"] == ["LlamaForCausalLMEagle3"] and config["model_type"] == "llama"
    assert config["draft_vocab_size"] == DRAFT and config["vocab_size"] == VOCAB
    assert config["rope_theta"] == 10000.0 and config["tie_word_embeddings"] is False
    listed = config.get("eagle_aux_hidden_state_layer_ids")
    assert listed == (PUBLISHED if engine == "vllm" else None)
    assert "eagle3" in done.command.lower()


def test_sglang_gets_the_layers_that_made_the_hidden_states(target, tmp_path):
    export_drafter(made(target, target_layers=[1, 4, 7]), "sglang", tmp_path / "out", target)
    nested = written(tmp_path / "out")[0]["eagle_config"]
    assert nested["eagle_aux_hidden_state_layer_ids"] == [0, 3, 6]


@pytest.mark.parametrize(("engine", "overrides"), CASES)
def test_the_tensors_predict_in_an_engine_what_they_did_here(target, tmp_path, engine, overrides):
    drafter = made(target, **overrides)
    export_drafter(drafter, engine, tmp_path / "out", target)
    config, tensors = written(tmp_path / "out")
    ids, chance = torch.arange(7), torch.Generator().manual_seed(0)
    features = torch.randn(7, 3 * HIDDEN, dtype=torch.float64, generator=chance)
    own = target.model.embed_tokens.weight.detach()
    rows = tensors.get("embed_tokens.weight", own)[ids].double()
    fused = eagle3_fuse(config, tensors, features)
    found, logits = eagle3_step(config, FIRST[engine], config["rope_theta"], tensors, rows, fused)
    embedded = drafter.embed(ids) if drafter.config.has_embeddings else own[ids]
    expected = drafter(embedded[None], drafter.fuse(features[None]))
    # the norms of transformers are in float32
    torch.testing.assert_close(found, expected[0], rtol=1e-5, atol=1e-5)
    order = drafter.draft_tokens.argsort()  # a whole vocabulary is in the order of the tokens
    drafted = drafter.draft_logits(expected)[0][:, order]
    torch.testing.assert_close(logits, drafted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("engine", "overrides"), CASES)
def test_import_gives_back_what_was_exported(target, tmp_path, engine, overrides):
    drafter = made(target, **overrides)
    export_drafter(drafter, engine, tmp_path / "out", target)
    back = import_drafter(target, tmp_path / "out")
    assert back.state_dict().keys() >= drafter.state_dict().keys()
    for name, tensor in drafter.state_dict().items():
        assert back.state_dict()[name].equal(tensor), name
    extra = back.state_dict().keys() - drafter.state_dict().keys()
    # vLLM's attention has all four biases or none
    assert {back.state_dict()[name].abs().max().item() for name in extra} <= {0.0}
    changed = {"output_bias"} if extra else set()
    ours, theirs = drafter.config.to_dict(), back.config.to_dict()
    differ = {name for name in ours if ours[name] != theirs[name]}
    assert differ - changed <= {"max_position_embeddings", "dtype", "transformers_version"}


def test_rounds_are_the_same_after_export_and_import(target, tmp_path):
    drafter = made(target)
    export_drafter(drafter, "vllm", tmp_path / "out", target)
    prompt = torch.tensor([[3, 9, 14]])
    settings = {"do_sample": False, "max_new_tokens": 30, "attention_mask": prompt.ne(-1)}
    settings |= {"return_dict_in_generate": True, "speculation": "always"}
    before, after = (
        target.generate(prompt, assistant_model=one, **settings).stats.round_lengths
        for one in (drafter, import_drafter(target, tmp_path / "out"))
    )
    assert before == after


def test_a_scale_of_the_embeddings_goes_into_a_table_of_its_own(tmp_path):
    full = ["full_attention"] * DEPTH
    target = tiny_target("gemma3", num_hidden_layers=DEPTH, layer_types=full)
    drafter = made(target, hidden_act="silu")
    export_drafter(drafter, "vllm", tmp_path / "out", target)
    seen = target.get_input_embeddings()(torch.arange(VOCAB))
    torch.testing.assert_close(written(tmp_path / "out")[1]["embed_tokens.weight"], seen)


@pytest.mark.parametrize(
    ("engine", "overrides", "said"),
    [
        ("vllm", {"fc_bias": True}, "vllm's EAGLE-3 drafters have no fc_bias"),
        ("sglang", {"norm_before_residual": True}, "have no norm_before_residual"),
        ("sglang", BIASES, "have no attention_bias, output_bias, mlp_bias"),
        ("vllm", {"target_layers": [2, 4, 8]}, "hidden state 8 after the final norm, engines bef"),
        ("vllm", {"target_layers": [4, 2, 5]}, "engines read each once, lowest first"),
        ("sglang", {"target_layers": [0, 4, 7]}, "embeddings as a hidden state"),
        (
            "sglang",
            {"target_layers": [1, 4, 7], "target_model_type": "gpt_oss"},
            "counts the layers of a gpt_oss target otherwise",
        ),
        ("sglang", {"has_embeddings": True}, "SGLang feeds it the target's embeddings, not its"),
        ("sglang", {"num_hidden_layers": 2}, "`num_hidden_layers` is 2, and SGLang runs one"),
        ("vllm", {"hidden_act": "gelu"}, "`hidden_act` is 'gelu'"),
        ("vllm", {"target_num_layers": None}, "`target_num_layers` is not known"),
    ],
)
def test_what_an_engine_cannot_express_is_refused(target, tmp_path, engine, overrides, said):
    with pytest.raises(ValueError, match=f"cannot be exported for {engine}: .*{said}"):
        export_drafter(made(target, **overrides), engine, tmp_path / "out", target)
    assert not list(tmp_path.iterdir())


def test_the_commands_export_and_import_a_drafter(folder, tmp_path):  # noqa: F811
    target = AutoModelForCausalLM.from_pretrained(folder / "target")
    drafter = Eagle3Drafter.from_target(target, target_layers=[0, 1], draft_vocab_size=99)
    drafter.save_pretrained(tmp_path / "drafter")
    where = ["--target", folder / "target", "--output"]
    to = ["export", tmp_path / "drafter", "--to", "vllm", *where, tmp_path / "vllm"]
    assert '"method": "eagle3"' in printed(invoke(*to))
    assert "The drafter is in" in printed(
        invoke("import", tmp_path / "vllm", *where, tmp_path / "back")
    )
    back = AutoModel.from_pretrained(tmp_path / "back")
    assert type(back) is Eagle3Drafter and back.lm_head.weight.equal(drafter.lm_head.weight)
    assert (tmp_path / "back" / "tokenizer.json").exists()
