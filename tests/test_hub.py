"""`push_to_hub` and loading by id, against a Hub on this machine that keeps what it is sent."""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

OID = "0" * 40  # every commit is the first one

PUBLISH_AND_LOAD = """
import sys
import torch
sys.path.insert(0, sys.argv[1])
from conftest import tiny_target
from transformers import AutoConfig, AutoModel
import coral_hf

target = tiny_target("llama", torch.float32)
drafter = coral_hf.CoralDrafter.from_target(target).eval()
drafter.push_to_hub("org/coral-tiny", token="hf_secret")
assert AutoConfig.from_pretrained("org/coral-tiny").model_type == "coral"
loaded = AutoModel.from_pretrained("org/coral-tiny")
prompt = torch.tensor([[5, 6, 7]])
settings = dict(do_sample=False, max_new_tokens=12, attention_mask=torch.ones_like(prompt))
drafted = target.generate(prompt, assistant_model=loaded, **settings)
assert torch.equal(drafted, target.generate(prompt, **settings))
for one, other in zip(drafter.parameters(), loaded.parameters(), strict=True):
    assert torch.equal(one, other)
print("published and loaded")
"""


class Hub(BaseHTTPRequestHandler):
    """The few calls of the Hub that publishing and loading make."""

    files: dict[str, bytes] = {}

    def log_message(self, *args):
        pass

    def answer(self, body: bytes = b"", status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def answer_json(self, content: dict, status: int = 200) -> None:
        self.answer(json.dumps(content).encode(), status, Content_Type="application/json")

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/repos/create":
            url = f"http://{self.headers['Host']}/org/coral-tiny"
            self.answer_json({"url": url, "id": "org/coral-tiny"})
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            kept = [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]
            self.answer_json({"files": kept})
        elif "/commit/" in self.path:
            self.keep(body)
            url = f"http://{self.headers['Host']}/org/coral-tiny/commit/{OID}"
            self.answer_json({"commitUrl": url, "commitOid": OID})
        else:
            self.answer_json({})

    def keep(self, body: bytes) -> None:
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                content = base64.b64decode(entry["value"]["content"])
                self.files[entry["value"]["path"]] = content

    def do_GET(self):
        name = re.sub(r"^/org/coral-tiny/resolve/[^/]+/", "", self.path.split("?")[0])
        if name not in self.files:
            error = "RepoNotFound" if "/api/" in self.path else "EntryNotFound"
            self.answer(status=404, X_Error_Code=error, X_Repo_Commit=OID)
            return
        content = self.files[name]
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        self.answer(content, ETag=etag, X_Repo_Commit=OID)

    do_HEAD = do_GET


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_published_drafter_is_loaded_by_its_id(hub, tmp_path):
    variables = {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}
    tests = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", PUBLISH_AND_LOAD, str(tests)],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "published and loaded" in done.stdout, done.stderr[-2000:]
    assert {"config.json", "generation_config.json", "model.safetensors"} <= set(Hub.files)
    assert not any(b"hf_secret" in content for content in Hub.files.values())
