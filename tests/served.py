"""What tests start in vLLM's own environment: greedy texts of a target, with and without a drafter.

python tests/served.py FOLDER

FOLDER/jobs.json is a list of jobs: a target, a drafter or null, prompts as token ids, how many are
answered at once, tokens drafted and written. FOLDER/served.json gets what each of them gave.
"""

import gc
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

# one process less for each engine
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

from openai import OpenAI  # noqa: E402
from vllm import LLM, SamplingParams  # noqa: E402

COUNTS = {
    "vllm:spec_decode_num_drafts": "rounds",
    "vllm:spec_decode_num_accepted_tokens_per_pos": "accepted",
}


def speculation(job: dict) -> dict:
    method = job.get("method", "eagle")
    named = {"method": method, "model": job["drafter"], "num_speculative_tokens": job["depth"]}
    return named | job.get("speculation", {})


def serve(job: dict) -> dict:
    """Answer a job's prompts; `accepted` is by position in the draft, over all `rounds`."""
    engine = LLM(
        model=job["target"],
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=job["max_length"],
        max_num_seqs=job["batch"],
        enforce_eager=True,
        enable_prefix_caching=False,
        disable_log_stats=False,
        speculative_config=speculation(job) if job["drafter"] else None,
    )
    sampling = SamplingParams(
        temperature=0, max_tokens=job["new_tokens"], ignore_eos=True, detokenize=False
    )
    prompts = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
    outputs = engine.generate(prompts, sampling, use_tqdm=False)
    counts = {
        COUNTS[metric.name]: getattr(metric, "values", None) or metric.value
        for metric in engine.get_metrics()
        if metric.name in COUNTS
    }
    engine.llm_engine.engine_core.shutdown()
    return {"tokens": [list(output.outputs[0].token_ids) for output in outputs], **counts}


def serve_http(job: dict) -> dict:
    """The same through the server, asked by an OpenAI client."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [str(Path(sys.executable).with_name("vllm")), "serve", job["target"]]
    command += ["--enforce-eager", "--port", str(port), "--dtype", "float32"]
    command += ["--max-model-len", str(job["max_length"]), "--max-num-seqs", str(job["batch"])]
    server = subprocess.Popen([*command, "--speculative-config", json.dumps(speculation(job))])
    try:
        wait_for(f"{url}/health", server)
        client = OpenAI(base_url=f"{url}/v1", api_key="none", timeout=300)
        answers = [
            client.completions.create(
                model=job["target"],
                prompt=prompt,
                max_tokens=job["new_tokens"],
                temperature=0,
                extra_body={"return_token_ids": True, "ignore_eos": True},
            )
            for prompt in job["prompts"]
        ]
        metrics = urllib.request.urlopen(f"{url}/metrics").read().decode()
    finally:
        server.terminate()
        server.wait(60)
    rounds = re.search(r"^vllm:spec_decode_num_drafts_total\{.*\} (\S+)$", metrics, re.MULTILINE)
    tokens = [list(answer.choices[0].token_ids) for answer in answers]
    return {"tokens": tokens, "rounds": float(rounds[1]) if rounds else 0}


def wait_for(url: str, server: subprocess.Popen) -> None:
    """Until a server answers; an error if it ends first."""
    while server.poll() is None:
        try:
            urllib.request.urlopen(url).close()
            return
        except OSError:
            time.sleep(1)
    raise RuntimeError(f"the server ended with exit code {server.returncode}")


def main(folder: Path) -> None:
    jobs = json.loads((folder / "jobs.json").read_text())
    results = []
    for job in jobs:
        try:
            results.append(serve_http(job) if job.get("server") else serve(job))
        except Exception as error:  # what a job is refused with is a result too
            results.append({"error": f"{type(error).__name__}: {error}"})
        gc.collect()
    (folder / "served.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
