"""Convert an EAGLE or HASS drafter, and export it for vLLM and SGLang.

python examples/serve.py --target meta-llama/Meta-Llama-3-8B-Instruct \
    --eagle yuhuili/EAGLE-LLaMA3-Instruct-8B --output served
"""

import argparse
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import coral_hf
from coral_hf.checkpoints import export_drafter


def main(options: argparse.Namespace) -> None:
    output = options.output
    tokenizer = AutoTokenizer.from_pretrained(options.target)
    target = AutoModelForCausalLM.from_pretrained(options.target)
    drafter = coral_hf.import_drafter(target, options.eagle, tokenizer=tokenizer)
    drafter.save_pretrained(output / "coral")
    tokenizer.save_pretrained(output / "coral")
    for engine in ("vllm", "sglang"):
        done = export_drafter(drafter, engine, output / engine, target)
        print(f"{engine}: {done.command}")
        for note in done.notes:
            print(f"  {note}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", required=True)
    parser.add_argument("--eagle", required=True, help="a folder or a Hub id")
    parser.add_argument("--output", type=Path, required=True)
    main(parser.parse_args())
