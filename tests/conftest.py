"""What the tests share: tiny random targets of every family, and where the shared data lies.

Import the helpers by name: `from conftest import FAMILIES, tiny_target`.
"""

import contextlib
import gc
import io
import os
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import first_import  # noqa: F401  before anything else imports the package
import pytest
import torch
from loopback_hub import Client, running_hub
from transformers import (
    AutoModelForCausalLM,
    BitNetConfig,
    BloomConfig,
    Cohere2Config,
    CohereConfig,
    DeepseekV3Config,
    FalconConfig,
    FalconH1Config,
    Gemma2Config,
    Gemma3TextConfig,
    Gemma4TextConfig,
    GemmaConfig,
    Glm4Config,
    GPT2Config,
    GPTNeoConfig,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    Lfm2Config,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    MptConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
    RecurrentGemmaConfig,
    SmolLM3Config,
    StableLmConfig,
    Starcoder2Config,
)

from coral_hf import register_drafting
from coral_hf.cli import main

VOCAB = 40
WINDOW = 8
# real prompts, conversations and small targets, which are no part of this repository
SHARED = Path(os.environ.get("CORAL_HF_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))


def pytest_configure(config):
    """Give each of several test processes one core, and the programs that it starts."""
    if hasattr(config, "workerinput"):
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)


def pytest_collection_finish():
    """Leave what was imported out of garbage collections, which else are a tenth of a run."""
    gc.freeze()
    gc.enable()


def slowly(*values):
    """Parameters that are tried with the slow tests."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


def pytest_unconfigure():
    """Let the process clear up as any other does."""
    gc.unfreeze()


# files that take over ten seconds: they go first, so that no process is left alone with one
LONG = """
    test_targets test_lossless test_fixed_rounds test_cli_starts test_trainer test_families
    test_verification_rules test_resume test_adapters test_evaluation test_distributed
    test_properties test_other_vocabulary test_hub test_hub_again test_hub_refusals
    test_hub_training test_regenerate_served test_demo test_target_variants test_planning
    test_rounds_on_a_device
""".split()


def pytest_collection_modifyitems(items):
    """Put long files first, each whole and in its order."""
    items.sort(key=lambda item: item.path.stem not in LONG)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Give the tests of a file to one process, and all of the Hub: they share what takes long."""
    from xdist.scheduler import LoadFileScheduling

    config.option.loadscopereorder = False

    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid):
            file = super()._split_scope(nodeid)
            return "hub" if "/test_hub" in file else file

    return ByFile(config, log)


class Invoked(NamedTuple):
    """What became of a command."""

    exit_code: int
    output: str  # standard output and standard error
    exception: Exception | None


def invoke(*words: object) -> Invoked:
    """Run `coral-hf` with some words in this process."""
    output, code, raised = io.StringIO(), 0, None
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            main([str(word) for word in words])
        except SystemExit as left:
            code = left.code
        except Exception as error:
            code, raised = 1, error
    return Invoked(code or 0, output.getvalue(), raised)


def printed(result: Invoked) -> str:
    """What a command printed, as one line."""
    return " ".join(result.output.split())


SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
LLAMA_LIKE = {"intermediate_size": 48, "num_key_value_heads": 2}
HALF_WINDOWED = {
    **LLAMA_LIKE,
    "head_dim": 8,
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"],
}
GEMMA_LIKE = {
    **HALF_WINDOWED,
    "query_pre_attn_scalar": 8,
    # tied, the scaled embedding of a random model's last token outweighs all else
    "tie_word_embeddings": False,
}

EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
LATENT_ATTENTION = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}

# family → its config class, and what it takes beside `SIZES`
FAMILIES = {
    "llama": (LlamaConfig, LLAMA_LIKE),
    "qwen2": (Qwen2Config, LLAMA_LIKE),
    "qwen3": (Qwen3Config, {**LLAMA_LIKE, "head_dim": 16}),
    "mistral": (MistralConfig, {**LLAMA_LIKE, "sliding_window": None}),
    "mistral_window": (MistralConfig, {**LLAMA_LIKE, "sliding_window": WINDOW}),
    "gemma2": (Gemma2Config, GEMMA_LIKE),
    "gemma3": (Gemma3TextConfig, GEMMA_LIKE),
    "phi3": (Phi3Config, LLAMA_LIKE),
    "olmo2": (Olmo2Config, LLAMA_LIKE),
    "gpt_neox": (GPTNeoXConfig, {"intermediate_size": 48}),
    "gpt2": (GPT2Config, {}),
    "qwen3_moe": (
        Qwen3MoeConfig,
        {
            **LLAMA_LIKE,
            "head_dim": 8,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
        },
    ),
    "mixtral": (MixtralConfig, {**LLAMA_LIKE, **EXPERTS, "sliding_window": None}),
    "gemma": (GemmaConfig, {**LLAMA_LIKE, "head_dim": 8, "tie_word_embeddings": False}),
    "granite": (
        GraniteConfig,
        {**LLAMA_LIKE, "embedding_multiplier": 3.0, "logits_scaling": 2.0},
    ),
    "cohere": (CohereConfig, {**LLAMA_LIKE, "logit_scale": 0.25}),
    "cohere2": (Cohere2Config, {**HALF_WINDOWED, "logit_scale": 0.25}),
    "starcoder2_window": (Starcoder2Config, {**LLAMA_LIKE, "sliding_window": WINDOW}),
    "stablelm": (StableLmConfig, LLAMA_LIKE),
    "glm4": (Glm4Config, {**LLAMA_LIKE, "head_dim": 8}),
    "smollm3": (SmolLM3Config, {**LLAMA_LIKE, "no_rope_layers": [1, 0]}),
    "deepseek_v3": (
        DeepseekV3Config,
        {
            **LATENT_ATTENTION,
            "intermediate_size": 48,
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
        },
    ),
    "bitnet": (BitNetConfig, LLAMA_LIKE),
    "gemma4": (
        Gemma4TextConfig,
        {
            **GEMMA_LIKE,
            "global_head_dim": 16,
            "vocab_size_per_layer_input": VOCAB,
            "rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE},
        },
    ),
    "gpt_oss": (
        GptOssConfig,
        {
            **HALF_WINDOWED,
            **EXPERTS,
            "rope_parameters": ROPE,
        },
    ),
}


# families that take chains alone, or no drafter at all
GROUPED = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2}
OTHERS = {
    "bloom": BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4),
    "mpt": MptConfig(vocab_size=VOCAB, d_model=32, n_layers=2, n_heads=4),
    "falcon_alibi": FalconConfig(**SIZES, alibi=True),
    "mamba": MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, state_size=4),
    "recurrent_gemma": RecurrentGemmaConfig(
        **SIZES, intermediate_size=48, lru_width=32, attention_window_size=WINDOW
    ),
    "llama4": Llama4TextConfig(
        **GROUPED,
        intermediate_size_mlp=48,
        head_dim=8,
        num_local_experts=2,
        attention_chunk_size=WINDOW,
    ),
    "falcon_h1": FalconH1Config(
        **GROUPED,
        mamba_d_ssm=32,
        mamba_n_heads=4,
        mamba_d_head=8,
        mamba_n_groups=1,
        mamba_d_state=8,
    ),
    "qwen3_next": Qwen3NextConfig(
        **GROUPED,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=24,
        layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
    ),
    "lfm2": Lfm2Config(**GROUPED, layer_types=["conv", "full_attention"]),
    "gpt_neo": GPTNeoConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=WINDOW,
        max_position_embeddings=128,
    ),
}


def tiny_config(family: str, **overrides) -> PreTrainedConfig:
    """The config of a tiny target; `overrides` are fields of its class."""
    config_class, fields = FAMILIES[family]
    return config_class(**{**SIZES, **fields, **overrides})


def tiny_target(
    family: str, dtype: torch.dtype = torch.float64, seed: int = 0, **overrides
) -> PreTrainedModel:
    """A random target whose argmax varies: as it is initialised, a tiny one repeats one token."""
    return make_target(tiny_config(family, **overrides), dtype, seed)


def make_target(
    config: PreTrainedConfig, dtype: torch.dtype = torch.float64, seed: int = 0
) -> PreTrainedModel:
    """A random target of a config, its weights as in `tiny_target`."""
    model = AutoModelForCausalLM.from_config(config)
    model.set_experts_implementation("eager")  # the grouped kernels know no float64
    scatter_weights(model, seed)
    return model.to(dtype).eval()


def any_target(name: str, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """A random target of `FAMILIES` or `OTHERS`."""
    return tiny_target(name, dtype) if name in FAMILIES else make_target(OTHERS[name], dtype)


def scatter_weights(model: torch.nn.Module, seed: int = 0) -> None:
    """Draw matrices with a standard deviation of 0.4; move biases and norms off their 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.empty_like(parameter)
            if parameter.dim() > 1:
                parameter.copy_(noise.normal_(0, 0.4, generator=generator))
            else:
                parameter.add_(noise.normal_(0, 0.1, generator=generator))


def shared_file(name: str) -> Path:
    """A path below the shared data; skips the test where it is absent."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"no {path}: real data are elsewhere, see CORAL_HF_TEST_DATA")
    return path


@pytest.fixture(scope="session")
def hub(tmp_path_factory):
    """A Hub on this machine that has a target, for all tests of publishing."""
    from test_examples import save_target_and_talk

    folder = tmp_path_factory.mktemp("hub")
    save_target_and_talk(folder)
    with running_hub() as hub:
        hub.put("org/target", folder / "target")
        yield hub


@pytest.fixture(scope="session")
def client(hub, tmp_path_factory):
    """A process of somebody who may write."""
    client = Client(hub.url, tmp_path_factory.mktemp("author"))
    yield client
    client.close()


@pytest.fixture(scope="session")
def stranger(hub, client, tmp_path_factory):
    """A process of somebody without a token.

    `first` is what it printed when it loaded published code before it had imported this package.
    """
    from test_hub import WITHOUT_IMPORT, publish, save_drafter

    home = tmp_path_factory.mktemp("stranger")
    save_drafter(home / "drafter")
    publish(client, home / "drafter", "org/code")
    stranger = Client(hub.url, home, HF_TOKEN="")
    stranger.first = stranger.run(WITHOUT_IMPORT, saved=home / "saved")
    yield stranger
    stranger.close()


@pytest.fixture(scope="session")
def trained_folder(tmp_path_factory):
    """A folder with a target, conversations, and `trained`, a drafter that the command made."""
    from test_cli import TINY_TRAINING
    from test_examples import save_target_and_talk

    folder = tmp_path_factory.mktemp("trained")
    save_target_and_talk(folder)
    names = ["--target", folder / "target", "--dataset", folder / "talk.jsonl"]
    options = ["--output", folder / "trained", "--router-epochs", 1, *TINY_TRAINING]
    result = invoke("train", *names, *options)
    assert result.exit_code == 0, result.output
    return folder


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Tiny matrices are slower on many threads than on one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _always_draft(monkeypatch):
    """Tiny targets are faster than any drafter, so calls would soon step back."""
    monkeypatch.setattr("coral_hf.decoding.plain.draft_policy.DEFAULT_SPECULATION", "always")


@contextlib.contextmanager
def noted_passes(module: torch.nn.Module, note):
    """Call `note(module, args, kwargs)` before each pass of a module, for a while.

    Not by a hook: the guard would try it, and keep all rows.
    """
    kind, call = type(module), type(module).__call__

    def noted(self, *args, **kwargs):
        if self is module:
            note(self, args, kwargs)
        return call(self, *args, **kwargs)

    kind.__call__ = noted
    try:
        yield
    finally:
        kind.__call__ = call


def as_drafter(drafting):
    """A drafter of a family of its own, whose calls of `generate` draft with `drafting`."""
    register_drafting("known_drafting", lambda drafter, target, memory=None: drafter.drafting)
    return SimpleNamespace(config=SimpleNamespace(model_type="known_drafting"), drafting=drafting)
