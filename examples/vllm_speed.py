"""Compare vLLM with and without drafters on the same prompts, greedy, engines in turn.

python examples/vllm_speed.py --target T --drafter D [--drafter D2] --prompts FILE --batch-size 8

Needs an environment with vLLM and coral_hf (docs/use/serve.md).
"""

import argparse
import statistics
import time

from transformers import AutoTokenizer
from vllm import LLM, SamplingParams

from coral_hf.measure.prompts import encode, read_prompts

DRAFTS = "vllm:spec_decode_num_drafts"
ACCEPTED = "vllm:spec_decode_num_accepted_tokens_per_pos"


def start(options: argparse.Namespace, drafter: str | None) -> LLM:
    method = {"method": "eagle", "num_speculative_tokens": options.depth}
    return LLM(
        model=options.target,
        dtype=options.dtype,
        max_model_len=options.max_length,
        max_num_seqs=options.batch_size,
        enforce_eager=True,
        enable_prefix_caching=False,  # so that repeated runs read their prompts again
        disable_log_stats=False,  # keeps the metrics
        speculative_config=None if drafter is None else {**method, "model": drafter},
    )


def answer(engine: LLM, prompts: list[list[int]], max_tokens: int) -> tuple[list, float]:
    """Return the new tokens of each prompt, and the seconds for all prompts."""
    sampling = SamplingParams(temperature=0, max_tokens=max_tokens)
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    begin = time.perf_counter()
    outputs = engine.generate(inputs, sampling, use_tqdm=False)
    seconds = time.perf_counter() - begin
    return [output.outputs[0].token_ids for output in outputs], seconds


def acceptance(engine: LLM) -> str:
    """Return τ and the share of rounds that accept each position, from vLLM's own counters."""
    metrics = {metric.name: metric for metric in engine.get_metrics()}
    if DRAFTS not in metrics:
        return ""
    rounds = metrics[DRAFTS].value
    shares = [accepted / rounds for accepted in metrics[ACCEPTED].values]
    return f"τ {1 + sum(shares):.2f}, by position " + " ".join(f"{s:.3f}" for s in shares)


def main(options: argparse.Namespace) -> None:
    tokenizer = AutoTokenizer.from_pretrained(options.target)
    rows = read_prompts(
        options.prompts, limit=options.limit, last=options.last, user_turn=options.user_turn
    )
    prompts = [encode(row, tokenizer)[0].tolist() for row in rows]
    engines, accepted = {}, {}
    for name in [None, *options.drafter]:
        engines[name] = engine = start(options, name)
        answer(engine, prompts, options.max_new_tokens)  # warm-up
        accepted[name] = acceptance(engine)  # read now, since the next engine resets the counters
    seconds: dict[str | None, list[float]] = {name: [] for name in engines}
    answers = {}
    for _ in range(options.repeats):
        for name, engine in engines.items():
            answers[name], taken = answer(engine, prompts, options.max_new_tokens)
            seconds[name].append(taken)
    for name in engines:
        tokens = sum(map(len, answers[name]))
        ratio = statistics.median(a / b for a, b in zip(seconds[None], seconds[name], strict=True))
        same = sum(map(lambda a, b: a == b, answers[name], answers[None]))
        speed = tokens / statistics.median(seconds[name])
        print(f"{name or 'no drafter'}: {speed:.1f} tokens/s, {ratio:.2f} times plain")
        print(f"    {same} of {len(prompts)} answers equal. {accepted[name]}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", required=True)
    parser.add_argument("--drafter", action="append", default=[])
    parser.add_argument("--prompts", required=True)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--last", type=int)
    parser.add_argument("--user-turn", type=int, default=-1)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeats", type=int, default=3)
    main(parser.parse_args())
