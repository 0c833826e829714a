"""Targets as they are met: adapted, compiled, spread over devices, quantised, in half precision."""

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from conftest import LLAMA_LIKE, SIZES, VOCAB, scatter_weights, tiny_target
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from test_targets import (
    CHAIN,
    TREE,
    assert_same_texts,
    continue_drafted,
    continue_plainly,
    make_prompts,
    random_drafter,
)
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from coral_hf import CoralDrafter

IMAGE = VOCAB - 4  # and three more of its kind after it
HALVES = (torch.bfloat16, torch.float16)
# of the two best logits, which are near 10: a few roundings of bf16 and fp16
TIES = {torch.bfloat16: 0.5, torch.float16: 0.05, torch.float32: 1e-4, torch.float64: 0.0}
LORA = {
    "attention": {"target_modules": ["q_proj", "v_proj"]},
    "embeddings and head": {"target_modules": ["embed_tokens", "q_proj", "lm_head"]},
    "saved head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}
# PEFT asks for a property that newer versions of transformers have renamed
WITH_PEFT = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is dep:FutureWarning")
PARTS = (
    "model.embed_tokens",
    "model.layers.0",
    "model.layers.1",
    "model.norm",
    "model.rotary_emb",
    "lm_head",
)


def adapt(target: PreTrainedModel, config) -> PeftModel:
    """A target with an adapter whose weights are not the zeros it starts with."""
    model = get_peft_model(target, config)
    scatter_weights(model, seed=1)
    return model.eval()


# ---- adapters


@WITH_PEFT
@pytest.mark.parametrize("fields", LORA.values(), ids=LORA)
def test_a_lora_target_keeps_the_adapted_text(fields):
    target = tiny_target("llama")
    drafter = random_drafter(target)
    prompt = make_prompts()[0]
    unadapted = continue_plainly(target, prompt)
    model = adapt(target, LoraConfig(r=4, task_type="CAUSAL_LM", **fields))
    assert not torch.equal(continue_plainly(model, prompt), unadapted)
    assert_same_texts(model, drafter, 1)
    with model.disable_adapter():
        assert_same_texts(model, drafter, 1, shapes=(TREE,))


@WITH_PEFT
def test_a_drafter_is_made_of_an_adapted_target():
    model = adapt(tiny_target("llama"), LoraConfig(task_type="CAUSAL_LM"))
    assert_same_texts(model, random_drafter(model), 1)


@WITH_PEFT
@pytest.mark.parametrize(
    ("config", "said"),
    [
        (PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4), "virtual tokens"),
        (PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4), "virtual tokens"),
        (LoraConfig(task_type="CAUSAL_LM", alora_invocation_tokens=[5, 6]), "aLoRA"),
    ],
)
def test_an_adapter_that_looks_at_the_place_of_a_token_is_refused(config, said):
    target = tiny_target("llama")
    drafter, model = random_drafter(target), adapt(target, config)
    with pytest.raises(ValueError, match=f"cannot take a drafter: its adapter.*{said}"):
        continue_drafted(model, drafter, make_prompts(), 1)


# ---- compiled targets


def compile_forward(target: PreTrainedModel, backend: str) -> None:
    target.forward = torch.compile(target.forward, backend=backend)


def compile_module(target: PreTrainedModel, backend: str) -> None:
    target.compile(backend=backend)


@pytest.fixture
def _fresh_compiler():
    """Each test traces anew: past a limit of traces torch goes on uncompiled."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.usefixtures("_fresh_compiler")
def test_a_traced_target_keeps_its_text():
    target, prompts = tiny_target("llama", num_hidden_layers=1), make_prompts()[:1]
    drafter = random_drafter(target)
    own = continue_plainly(target, prompts[0], max_new_tokens=4)
    compile_forward(target, "eager")  # traces and guards as any backend does, without a compiler
    text = continue_drafted(target, drafter, prompts, 1, max_new_tokens=4, **TREE)[0]
    assert torch.equal(own, text)
    assert torch._dynamo.utils.counters["stats"]["calls_captured"] > 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own modules
@pytest.mark.parametrize("compile_target", [compile_forward, compile_module])
@pytest.mark.usefixtures("_fresh_compiler")
def test_a_compiled_target_keeps_its_text(compile_target):
    target = tiny_target("llama")
    drafter = random_drafter(target)
    compile_target(target, "inductor")
    try:
        target(make_prompts()[0][None])
    except torch._inductor.exc.InductorError as error:
        pytest.skip(f"no compiler: {error}")
    assert_same_texts(target, drafter, 1)


# ---- targets spread over devices


# older versions of transformers take the prompt's device for a mistake
WITH_OFFLOADING = pytest.mark.filterwarnings("ignore:You are calling .generate:UserWarning")


def offload(folder, at: tuple[str, ...]) -> PreTrainedModel:
    """A target loaded from `folder` with the parts `at` on disk."""
    places = {part: "disk" if part in at else "cpu" for part in PARTS}
    return AutoModelForCausalLM.from_pretrained(
        folder, device_map=places, offload_folder=folder / "offload", dtype=torch.float64
    ).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("target")
    tiny_target("llama").save_pretrained(folder)
    return folder


@WITH_OFFLOADING
@pytest.mark.parametrize(
    "at",
    [
        ("model.layers.1",),
        ("lm_head",),
        ("model.layers.0", "model.norm", "lm_head"),
        ("model.embed_tokens",),
    ],
    ids="+".join,
)
def test_a_target_partly_on_disk_keeps_its_text(folder, at):
    target = offload(folder, at)
    drafter = random_drafter(target)
    assert not drafter.fc.weight.is_meta
    assert_same_texts(target, drafter, 1)


def test_a_target_with_device_hooks_keeps_its_text():
    target = dispatch_model(tiny_target("llama"), {"": "cpu"}, force_hooks=True)
    assert_same_texts(target, random_drafter(target), 1)


@WITH_OFFLOADING
def test_a_wholly_offloaded_target_keeps_its_text():
    target = cpu_offload(tiny_target("llama"), execution_device=torch.device("cpu"))
    assert_same_texts(target, random_drafter(target), 1)


def test_a_routed_head_on_an_offloaded_lm_head_is_refused(folder):
    target = offload(folder, ("lm_head",))
    drafter = CoralDrafter.from_target(target, num_groups=4, is_router_trained=True)
    drafter.config.draft_head = "routed"
    with pytest.raises(ValueError, match="quantised, offloaded or adapted.*draft_head='full'"):
        continue_drafted(target, drafter, make_prompts(), 1)


# ---- quantised targets


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_an_int8_target_keeps_its_text():
    quantization = pytest.importorskip("torchao.quantization")
    target = tiny_target("llama", torch.float32)
    quantization.quantize_(target, quantization.Int8WeightOnlyConfig())
    assert "Int8" in type(target.lm_head.weight).__name__
    assert_same_texts(target, random_drafter(target), 1, TIES[torch.float32])


# ---- dtypes


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_a_target_in_half_precision_parts_from_its_text_only_at_ties(family, half):
    target = tiny_target(family, half)
    assert_same_texts(target, random_drafter(target), 1, TIES[half])


@pytest.mark.parametrize(
    ("own", "drafters"),
    [
        (torch.float64, torch.bfloat16),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.bfloat16),
    ],
)
def test_a_drafter_of_another_dtype_leaves_the_text_as_it_is(own, drafters):
    target = tiny_target("llama", own)
    assert_same_texts(target, random_drafter(target).to(drafters), 1, TIES[own])


@pytest.mark.parametrize("shape", [TREE, CHAIN])
def test_autocast_parts_from_the_text_only_at_ties(shape):
    target = tiny_target("llama", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_texts(target, random_drafter(target), 1, TIES[torch.bfloat16], (shape,))


# ---- positions of the call's own


@pytest.mark.parametrize("shape", [TREE, CHAIN])
def test_positions_that_a_call_gives_are_followed_or_refused(shape):
    target, prompt = tiny_target("llama"), make_prompts()[0]
    positions = {"position_ids": 2 * torch.arange(len(prompt))[None]}
    own = continue_plainly(target, prompt, **positions)
    assert follows_or_refuses(target, own, prompt, **positions, **shape)


def seeing_target() -> PreTrainedModel:
    """A target whose text after an image does not go on at the position that its tokens count."""
    config = Qwen2VLConfig(
        text_config={
            **SIZES,
            **LLAMA_LIKE,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [1, 1, 2],
            },
        },
        vision_config={
            "depth": 1,
            "embed_dim": 16,
            "hidden_size": 32,
            "num_heads": 2,
            "patch_size": 2,
            "spatial_merge_size": 1,
            "temporal_patch_size": 1,
        },
        image_token_id=IMAGE,
        video_token_id=IMAGE + 1,
        vision_start_token_id=IMAGE + 2,
        vision_end_token_id=IMAGE + 3,
    )
    model = Qwen2VLForConditionalGeneration(config)
    scatter_weights(model)
    return model.double().eval()


@pytest.mark.parametrize("shape", [TREE, CHAIN])
def test_text_after_an_image_is_followed_or_refused(shape):
    """An image of 4 × 4 patches takes 16 tokens and 4 positions."""
    target = seeing_target()
    prompt = torch.tensor([1, 2, IMAGE + 2, *[IMAGE] * 16, IMAGE + 3, 5, 6, 7])
    image = {
        "pixel_values": torch.randn(16, 12, generator=torch.Generator().manual_seed(0)).double(),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "mm_token_type_ids": (prompt == IMAGE).int()[None],
    }
    own = continue_plainly(target, prompt, **image)
    assert follows_or_refuses(target, own, prompt, **image, **shape)


def follows_or_refuses(target, own, prompt, **settings) -> bool:
    """Whether a drafted text is the target's `own` (new,), or a ValueError says why it is not."""
    drafter = random_drafter(target)
    try:
        text = continue_drafted(target, drafter, [prompt], 1, **settings)[0]
    except ValueError:
        return True
    return torch.equal(own, text)
