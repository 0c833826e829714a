"""Generate with a drafter: the target's own text in fewer forward passes.

python examples/generate.py --target org/my-llama --drafter org/coral-my-llama "Tell a story."
"""

import argparse

from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, TextStreamer

import coral_hf  # noqa: F401  registers the drafter and lets `generate` take it


def main(options: argparse.Namespace) -> None:
    tokenizer = AutoTokenizer.from_pretrained(options.target)
    target = AutoModelForCausalLM.from_pretrained(options.target).eval()
    drafter = AutoModel.from_pretrained(options.drafter, dtype=target.dtype).eval()
    output = target.generate(
        **tokenizer(options.prompt, return_tensors="pt", return_token_type_ids=False),
        assistant_model=drafter,
        streamer=TextStreamer(tokenizer),
        max_new_tokens=options.max_new_tokens,
        do_sample=False,
        return_dict_in_generate=True,
    )
    print(f"{output.stats.acceptance_length:.2f} tokens per target pass")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", required=True)
    parser.add_argument("--drafter", required=True)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("prompt")
    main(parser.parse_args())
