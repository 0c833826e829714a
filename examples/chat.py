"""Chat with a target and a drafter: each turn reads only its new tokens.

python examples/chat.py --target org/my-llama --drafter org/coral-my-llama "Hi." "And then?"
"""

import argparse

from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import coral_hf  # noqa: F401  registers the drafter and lets `generate` take it


def main(options: argparse.Namespace) -> None:
    tokenizer = AutoTokenizer.from_pretrained(options.target)
    target = AutoModelForCausalLM.from_pretrained(options.target).eval()
    drafter = AutoModel.from_pretrained(options.drafter, dtype=target.dtype).eval()
    messages, cache = [], {}
    for turn in options.turns:
        messages.append({"role": "user", "content": turn})
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        output = target.generate(
            **inputs,
            assistant_model=drafter,
            **cache,
            max_new_tokens=options.max_new_tokens,
            do_sample=False,
            return_dict_in_generate=True,
        )
        # holds what target and drafter have read; the next turn continues from it
        name = "cache" if "cache" in output else "past_key_values"  # before transformers 5.24
        cache = {name: output[name]}
        start = inputs["input_ids"].shape[1]  # (1, length)
        reply = tokenizer.decode(output.sequences[0, start:], skip_special_tokens=True)
        messages.append({"role": "assistant", "content": reply})
        print(f"> {turn}\n{reply}\n[{output.stats.acceptance_length:.2f} tokens per target pass]")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", required=True)
    parser.add_argument("--drafter", required=True)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("turns", nargs="+")
    main(parser.parse_args())
