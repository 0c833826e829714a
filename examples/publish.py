"""Measure a drafter and publish it with the report in its model card.

hf auth login
python examples/publish.py --target org/my-llama --drafter my-drafter --prompts mt_bench.jsonl \
    --repo org/coral-my-llama
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import coral_hf  # noqa: F401  lets AutoModel load the drafter
from coral_hf.hub import CardFacts, publish
from coral_hf.measure import BenchmarkSettings, read_prompts, run_benchmark


def main(options: argparse.Namespace) -> None:
    folder, repo_id = options.drafter, options.repo
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(options.target)
    target = AutoModelForCausalLM.from_pretrained(options.target).to(device)
    drafter = AutoModel.from_pretrained(folder, dtype=target.dtype).to(device)
    settings = BenchmarkSettings(max_new_tokens=options.max_new_tokens)
    report = run_benchmark(target, drafter, tokenizer, read_prompts(options.prompts), settings)
    report.write(folder / "report")
    done = publish(
        folder,
        repo_id,
        reports=[folder / "report" / "report.json"],
        facts=CardFacts(repo_id, license="apache-2.0", language="en"),
    )
    print(f"published: {done.commit_url}")
    loaded = AutoModel.from_pretrained(repo_id, revision=done.oid)
    print(f"loaded by its id: {loaded.num_parameters():,} parameters")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", required=True)
    parser.add_argument("--drafter", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--repo", required=True)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    main(parser.parse_args())
