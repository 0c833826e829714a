"""Every family of targets: exactly its own text with a drafter, or a refusal that says why."""

from functools import cache

import pytest
import torch
from conftest import FAMILIES, VOCAB, any_target, tiny_target
from torch import Tensor
from transformers import PreTrainedModel

from coral_hf import CoralDrafter

TREE = {"tree_depth": 4, "tree_top_k": 6, "tree_nodes": 24}
CHAIN = {"tree_depth": 4, "tree_top_k": 1}
BATCHES = (1, 3)  # rows of a call
LENGTHS = (19, 3, 11)  # of the prompts; the first one is longer than the windows
NEW = 12  # tokens of a text; the shortest prompt grows beyond the windows
# how far apart the target's two best logits may be where texts differ: fp32 rounds a pass over many
# rows otherwise than one over a single row
TIES = {torch.float64: 0.0, torch.float32: 1e-4}
# float64 holds the tokens equal in every run of the tests, float32 in the slow ones
SLOWLY = {torch.float32: pytest.param(torch.float32, marks=pytest.mark.slow)}
# eager attention in every run of the tests: without sdpa, with its own scores, and plain ones
EAGER = ("gemma2", "gpt_oss", "deepseek_v3", "bitnet", "llama", "gpt2")
CHAIN_ONLY = ("bloom", "falcon_alibi", "gpt_neo", "llama4")
RECURRENT = ("mamba", "recurrent_gemma", "falcon_h1", "qwen3_next")


def make_prompts() -> list[Tensor]:
    """A row of tokens (length,) for each of `LENGTHS`."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(2, VOCAB, (length,), generator=generator) for length in LENGTHS]


def pad_left(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Rows (length,) as one batch: tokens and attention mask, both (rows, longest)."""
    longest = max(len(row) for row in rows)
    tokens = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for index, row in enumerate(rows):
        tokens[index, longest - len(row) :] = row
        mask[index, longest - len(row) :] = 1
    return tokens, mask


def continue_plainly(target: PreTrainedModel, prompt: Tensor, **settings) -> Tensor:
    """The target's own continuation (new,) of a prompt (length,), alone and unpadded."""
    tokens, mask = pad_left([prompt])
    settings = {"do_sample": False, "max_new_tokens": NEW, **settings}
    return target.generate(tokens, attention_mask=mask, **settings)[0, len(prompt) :]


def continue_drafted(
    target: PreTrainedModel, drafter: CoralDrafter, prompts: list[Tensor], batch: int, **settings
) -> list[Tensor]:
    """Each prompt's continuation (new,) with a drafter, `batch` rows to a call."""
    settings = {"do_sample": False, "max_new_tokens": NEW, "assistant_model": drafter, **settings}
    texts = []
    for start in range(0, len(prompts), batch):
        tokens, mask = pad_left(prompts[start : start + batch])
        texts += target.generate(tokens, attention_mask=mask, **settings)[:, tokens.shape[1] :]
    return texts


def gap_where_they_part(target: PreTrainedModel, prompt: Tensor, plain: Tensor, drafted: Tensor):
    """The gap of the target's two best logits where two texts (new,) first differ, 0 if nowhere."""
    differs = (plain != drafted[: len(plain)]).nonzero()
    if not len(differs):
        return 0.0
    with torch.no_grad():
        logits = target(torch.cat([prompt, plain[: differs[0, 0]]])[None]).logits[0, -1]
    best, second = logits.double().topk(2).values
    return float(best - second)


def set_attention(target: PreTrainedModel, attention: str) -> None:
    if attention == "sdpa" and not target._supports_sdpa:
        pytest.skip("transformers offers this family no sdpa")
    target.set_attn_implementation(attention)


def skip_what_padding_breaks(target: PreTrainedModel, batch: int) -> None:
    """In float64, the mask of a wholly padded row overflows the eager softmax, which is in fp32."""
    is_eager = target.config._attn_implementation == "eager"
    if batch > 1 and is_eager and target.dtype == torch.float64:
        pytest.skip("padding gives NaN in the target alone")


def random_drafter(target: PreTrainedModel) -> CoralDrafter:
    torch.manual_seed(0)
    return CoralDrafter.from_target(target).eval()


def assert_same_texts(target, drafter, batch, tie=0.0, shapes=(TREE, CHAIN), plain=None) -> None:
    """The target's continuations with and without a drafter; ties closer than `tie` may part.

    `plain`: those without, where they are known.
    """
    prompts = make_prompts()
    plain = plain or [continue_plainly(target, prompt) for prompt in prompts]
    assert any(len(set(text.tolist())) > 1 for text in plain), "the target repeats one token"
    for shape in shapes:
        drafted = continue_drafted(target, drafter, prompts, batch, **shape)
        for prompt, own, text in zip(prompts, plain, drafted, strict=True):
            assert len(own) == len(text)
            gap = gap_where_they_part(target, prompt, own, text)
            assert torch.equal(own, text) or gap < tie, (len(prompt), shape, gap)


@cache
def pair_and_texts(family: str, attention: str, dtype: torch.dtype):
    """A target with its random drafter, and its own continuations."""
    target = tiny_target(family, dtype)
    set_attention(target, attention)
    plain = [continue_plainly(target, prompt) for prompt in make_prompts()]
    return target, random_drafter(target), plain


@pytest.mark.parametrize("dtype", [one if one == torch.float64 else SLOWLY[one] for one in TIES])
@pytest.mark.parametrize(
    ("family", "attention", "batch"),
    [
        pytest.param(family, attention, batch, marks=() if is_quick else pytest.mark.slow)
        for family in FAMILIES
        for attention in ("sdpa", "eager")
        for batch in BATCHES
        for is_quick in [batch > 1 if attention == "sdpa" else batch == 1 and family in EAGER]
    ],
)
def test_greedy_tokens_equal_the_target_alone(family, attention, dtype, batch):
    target, drafter, plain = pair_and_texts(family, attention, dtype)
    skip_what_padding_breaks(target, batch)
    assert_same_texts(target, drafter, batch, TIES[dtype], plain=plain)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_a_row_ends_at_its_own_end_token(family, batch):
    target = tiny_target(family)
    drafter, prompts = random_drafter(target), make_prompts()
    ends = [int(continue_plainly(target, prompt)[5]) for prompt in prompts[:2]]
    for shape in (TREE, CHAIN):
        texts = continue_drafted(target, drafter, prompts, batch, eos_token_id=ends, **shape)
        for prompt, text in zip(prompts, texts, strict=True):
            own = continue_plainly(target, prompt, eos_token_id=ends)
            assert torch.equal(text[: len(own)], own)
            assert (text[len(own) :] == target.config.pad_token_id).all()


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("dtype", TIES)
@pytest.mark.parametrize("name", CHAIN_ONLY)
def test_a_target_without_trees_keeps_its_own_text_in_chains(name, dtype, batch):
    target = any_target(name, dtype)
    skip_what_padding_breaks(target, batch)
    chains = ({"tree_depth": 4}, CHAIN)
    assert_same_texts(target, random_drafter(target), batch, TIES[dtype], chains)


@pytest.mark.parametrize("name", CHAIN_ONLY)
def test_a_tree_asked_of_a_target_without_trees_is_refused(name):
    target = any_target(name)
    with pytest.raises(ValueError, match="cannot verify a tree"):
        continue_drafted(target, random_drafter(target), make_prompts(), 1, **TREE)


@pytest.mark.parametrize("shape", [TREE, CHAIN])
@pytest.mark.parametrize("name", RECURRENT)
def test_a_recurrent_target_is_refused(name, shape):
    # Mamba has no attention heads to derive a drafter from; any drafter of its sizes will do
    target, drafter = any_target(name), random_drafter(tiny_target("llama"))
    with pytest.raises(ValueError, match="cannot drop rejected tokens"):
        continue_drafted(target, drafter, make_prompts(), 1, **shape)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("dtype", TIES)
def test_a_target_with_convolutions_keeps_its_own_text_in_chains(dtype, batch):
    target = any_target("lfm2", dtype)
    chains = ({"tree_depth": 4}, CHAIN, {**CHAIN, "prefill_chunk_size": 3})
    assert_same_texts(target, random_drafter(target), batch, TIES[dtype], chains)


@pytest.mark.parametrize("batch", BATCHES)
def test_layers_that_share_keys_keep_their_own_text(batch):
    types = ["sliding_attention", "full_attention"] * 2
    target = tiny_target("gemma4", num_hidden_layers=4, layer_types=types, num_kv_shared_layers=2)
    assert_same_texts(target, random_drafter(target), batch)
