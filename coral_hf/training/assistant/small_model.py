"""A fresh small language model for a target: a Llama of a few layers, with the target's tokens.

In: the target's config, a number of layers, a width. Out: a model to pretrain, in fp32.
"""

from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedConfig

from ...target import max_positions

WIDEST = 1024  # with four layers the model of Direct Alignment (Goel et al. 2024)
HEAD_DIM = 64


def small_model(
    target: PreTrainedConfig, num_layers: int = 4, hidden_size: int | None = None
) -> LlamaForCausalLM:
    """Make an untrained model with the tokens of a target; its embedding is its LM head.

    Args:
        target: the target's config.
        num_layers: more of them agree more often and draft more slowly.
        hidden_size: half of the target's by default, at most 1024.
    """
    text = target.get_text_config(decoder=True)
    width = min(WIDEST, text.hidden_size // 2) if hidden_size is None else hidden_size
    most = max(1, width // HEAD_DIM)
    positions = max_positions(text)
    config = LlamaConfig(
        vocab_size=text.vocab_size,
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=num_layers,
        num_attention_heads=next(count for count in range(most, 0, -1) if width % count == 0),
        tie_word_embeddings=True,
        bos_token_id=text.bos_token_id,
        eos_token_id=text.eos_token_id,
        pad_token_id=text.pad_token_id,
        **({} if positions is None else {"max_position_embeddings": positions}),
    )
    return LlamaForCausalLM(config).float()
