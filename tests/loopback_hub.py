"""A Hub on this machine that keeps what it is sent, and processes that talk to it.

It answers the HTTP calls that huggingface_hub makes: repositories, commits, branches, large files
in one part or several, downloads with ranges. `faults` has it refuse, or break off, on demand.
"""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = "hf_LoopbackSecretThatNobodyMayWrite"
OWNER = "org"  # whose token that is
RELATIONS = {None, "adapter", "merge", "quantized", "finetune"}
LARGE = (".safetensors", ".bin")


class Fault(NamedTuple):
    """What goes wrong with requests whose "METHOD path" matches."""

    pattern: str
    status: int | None = None  # answered in place of what was asked for; None breaks off halfway
    times: int = 1
    message: str = ""


class Repo:
    """Commits of a repository, each all of its files: path → content, or a large file's SHA-256."""

    def __init__(self, is_private: bool):
        self.is_private = is_private
        self.commits: dict[str, dict[str, bytes | str]] = {"0" * 40: {}}
        self.branches = {"main": "0" * 40}

    def commit(self, branch: str, files: dict[str, bytes | str | None]) -> str:
        """Put files on a branch, None for those that go; the new commit."""
        now = {**self.commits[self.branches[branch]], **files}
        oid = hashlib.sha1(repr((len(self.commits), sorted(now))).encode()).hexdigest()
        self.commits[oid] = {name: now[name] for name in now if now[name] is not None}
        self.branches[branch] = oid
        return oid

    def resolve(self, revision: str) -> str | None:
        oid = self.branches.get(revision, revision)
        return oid if oid in self.commits else None


class LoopbackHub(ThreadingHTTPServer):
    """The Hub's memory; its methods are what tests look at."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, Repo] = {}
        self.large: dict[str, bytes] = {}  # by SHA-256
        self.parts: dict[str, dict[int, bytes]] = {}  # of large files that are not complete
        self.part_size: int | None = None  # large files beyond it come in parts
        self.faults: list[Fault] = []
        self.requests: list[str] = []  # "METHOD path", with the range that was asked for

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """path → content."""
        repo = self.repos[repo_id]
        oid = repo.resolve(revision)
        assert oid is not None, f"{repo_id} has no {revision}"
        return {name: self.content(kept) for name, kept in repo.commits[oid].items()}

    def content(self, kept: bytes | str) -> bytes:
        return self.large[kept] if isinstance(kept, str) else kept

    def put(self, repo_id: str, folder: Path, private: bool = False) -> str:
        """Keep a folder's files as a commit, without a client."""
        files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        return self.put_files(repo_id, files, private)

    def put_files(self, repo_id: str, files: dict[str, bytes], private: bool = False) -> str:
        """The same with path → content."""
        return self.repos.setdefault(repo_id, Repo(private)).commit("main", {**files})

    def asked(self, pattern: str) -> int:
        """How many requests matched."""
        return sum(re.search(pattern, request) is not None for request in self.requests)


@contextmanager
def running_hub():
    """A Hub that answers until the block ends."""
    hub = LoopbackHub()
    thread = threading.Thread(target=hub.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: LoopbackHub

    def log_message(self, *args):
        pass

    def handle_any(self):
        split = urlsplit(self.path)
        self.route, self.query = unquote(split.path), parse_qs(split.query)
        wanted = self.headers.get("Range", "")
        self.server.requests.append(f"{self.command} {self.route} {wanted}".strip())
        self.body = self.read_body()
        self.breaks_off = False
        if (fault := self.take_fault()) is not None:
            if fault.status is not None:
                headers = {"X-Error-Message": fault.message} if fault.message else {}
                return self.answer_json({"error": fault.message}, fault.status, **headers)
            self.breaks_off = True
        for pattern, name in ROUTES:
            if match := re.fullmatch(pattern, f"{self.command} {self.route}"):
                return getattr(self, name)(*match.groups())
        self.answer_json({"error": "unknown to this Hub"}, 404, X_Error_Code="EntryNotFound")

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any

    def take_fault(self) -> Fault | None:
        for index, fault in enumerate(self.server.faults):
            if re.search(fault.pattern, f"{self.command} {self.route}"):
                rest = [fault._replace(times=fault.times - 1)] if fault.times > 1 else []
                self.server.faults[index : index + 1] = rest
                return fault
        return None

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def answer(self, body: bytes = b"", status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if self.breaks_off else body)

    def answer_json(self, content: object, status: int = 200, **headers: str) -> None:
        self.answer(
            json.dumps(content).encode(), status, Content_Type="application/json", **headers
        )

    def is_owner(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def repo_of(self, repo_id: str, to_write: bool = False) -> Repo | None:
        """The repository, or an answer that says why not."""
        repo = self.server.repos.get(repo_id)
        if repo is None or (repo.is_private and not self.is_owner()):
            self.answer_json(
                {"error": "Repository not found"},
                404 if self.is_owner() else 401,
                X_Error_Code="RepoNotFound",
            )
        elif to_write and not self.may_write(repo_id):
            return None
        else:
            return repo
        return None

    def may_write(self, repo_id: str) -> bool:
        if not self.is_owner():
            self.answer_json({"error": "Invalid username or password."}, 401)
        elif repo_id.split("/")[0] != OWNER:
            self.answer_json({"error": f"no rights to write to {repo_id}"}, 403)
        else:
            return True
        return False

    # ---- repositories and commits

    def create(self):
        asked = json.loads(self.body)
        repo_id = f"{asked['organization'] or OWNER}/{asked['name']}"
        kind = "" if asked.get("type", "model") == "model" else f"{asked['type']}s/"
        if not self.may_write(repo_id):
            return
        url = f"{self.server.url}/{kind}{repo_id}"
        is_private = asked.get("private", False) or asked.get("visibility") == "private"
        is_new = f"{kind}{repo_id}" not in self.server.repos
        self.server.repos.setdefault(f"{kind}{repo_id}", Repo(is_private))
        self.answer_json({"url": url, "id": repo_id, "name": repo_id}, 200 if is_new else 409)

    def info(self, repo_id: str, revision: str | None = None):
        repo = self.repo_of(repo_id)
        if repo is None:
            return
        oid = repo.resolve(revision or "main")
        if oid is None:
            return self.answer_json({}, 404, X_Error_Code="RevisionNotFound")
        files = repo.commits[oid]
        found = {"id": repo_id, "sha": oid, "private": repo.is_private}
        found["siblings"] = [{"rfilename": name} for name in files]
        if "config.json" in files:
            config = json.loads(self.server.content(files["config.json"]))
            found["config"] = {"model_type": config.get("model_type")}
        self.answer_json(found)

    def tree(self, repo_id: str, revision: str, folder: str | None = None):
        repo = self.repo_of(repo_id)
        if repo is None:
            return
        files = repo.commits[repo.resolve(revision) or "0" * 40]
        inside = [name for name in files if name.startswith(folder or "")]
        if folder and not inside:
            return self.answer_json({}, 404, X_Error_Code="EntryNotFound")
        self.answer_json(
            [
                {"type": "file", "path": n, "size": len(self.server.content(files[n])), "oid": "0"}
                for n in inside
            ]
        )

    def branch(self, repo_id: str, name: str):
        repo = self.repo_of(repo_id, to_write=True)
        if repo is not None:
            is_new = repo.branches.setdefault(name, repo.branches["main"]) and True
            self.answer_json({}, 200 if is_new else 409)

    def validate(self):
        content = json.loads(self.body)["content"]
        if not content.startswith("---\n"):
            warnings = [{"message": "empty or missing yaml metadata in repo card"}]
            return self.answer_json({"errors": [], "warnings": warnings})
        errors = [{"message": problem} for problem in problems_of_metadata(content)]
        self.answer_json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def preupload(self, repo_id: str, revision: str):
        if self.repo_of(repo_id, to_write=True) is None:
            return
        names = [file["path"] for file in json.loads(self.body)["files"]]
        modes = ["lfs" if name.endswith(LARGE) else "regular" for name in names]
        self.answer_json(
            {
                "files": [
                    {"path": name, "uploadMode": mode, "shouldIgnore": False}
                    for name, mode in zip(names, modes, strict=True)
                ]
            }
        )

    def commit(self, repo_id: str, branch: str):
        repo = self.repo_of(repo_id, to_write=True)
        if repo is None:
            return
        files: dict[str, bytes | str | None] = {}
        for entry in map(json.loads, self.body.splitlines()):
            kind, value = entry["key"], entry["value"]
            if kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                assert value["oid"] in self.server.large, "committed before it was uploaded"
                files[value["path"]] = value["oid"]
            elif kind == "deletedFile":
                files[value["path"]] = None
        oid = repo.commit(branch, files)
        url = f"{self.server.url}/{repo_id}/commit/{oid}"
        self.answer_json({"commitUrl": url, "commitOid": oid})

    # ---- large files

    def batch(self, repo_id: str):
        if self.repo_of(repo_id, to_write=True) is None:
            return
        objects = [self.action(found) for found in json.loads(self.body)["objects"]]
        self.answer_json({"transfer": "basic", "objects": objects})

    def action(self, found: dict) -> dict:
        """Where a large file goes, in one part or several, unless it is there."""
        oid, size, url = found["oid"], found["size"], self.server.url
        if oid in self.server.large:
            return found
        upload = {"href": f"{url}/large/{oid}"}
        if self.server.part_size is not None and size > self.server.part_size:
            numbers = range(1, -(-size // self.server.part_size) + 1)
            parts = {f"{number:05d}": f"{url}/large/{oid}/{number}" for number in numbers}
            header = {"chunk_size": str(self.server.part_size), **parts}
            upload = {"href": f"{url}/complete/{oid}", "header": header}
        return {**found, "actions": {"upload": upload, "verify": {"href": f"{url}/verify"}}}

    def put_large(self, oid: str, number: str | None = None):
        if number is None:
            self.server.large[oid] = self.body
        else:
            self.server.parts.setdefault(oid, {})[int(number)] = self.body
        self.answer(ETag=f'"{hashlib.md5(self.body).hexdigest()}"')

    def complete(self, oid: str):
        parts = self.server.parts.pop(oid)
        whole = b"".join(parts[part["partNumber"]] for part in json.loads(self.body)["parts"])
        assert hashlib.sha256(whole).hexdigest() == oid
        self.server.large[oid] = whole
        self.answer_json({})

    def verify(self):
        found = json.loads(self.body)
        content = self.server.large.get(found["oid"], b"")
        is_whole = hashlib.sha256(content).hexdigest() == found["oid"]
        self.answer_json({}, 200 if is_whole else 400)

    # ---- downloads

    def resolve(self, repo_id: str, revision: str, name: str):
        repo = self.repo_of(repo_id)
        if repo is None:
            return
        oid = repo.resolve(revision)
        if oid is None:
            return self.answer_json({}, 404, X_Error_Code="RevisionNotFound")
        kept = repo.commits[oid].get(name)
        if kept is None:
            return self.answer(status=404, X_Error_Code="EntryNotFound", X_Repo_Commit=oid)
        content = self.server.content(kept)
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        if isinstance(kept, str):  # as from the CDN that large files come from
            headers = {"X_Linked_Etag": etag, "X_Linked_Size": str(len(content))}
            where = f"http://localhost:{self.server.server_port}/large/{kept}"
            return self.answer(status=302, Location=where, X_Repo_Commit=oid, **headers)
        self.send(content, ETag=etag, X_Repo_Commit=oid)

    def get_large(self, oid: str):
        self.send(self.server.large[oid], ETag=f'"{oid}"')

    def send(self, content: bytes, **headers: str):
        """A file, or the part of it that is asked for."""
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if wanted is None:
            return self.answer(content, Accept_Ranges="bytes", **headers)
        start = int(wanted[1])
        span = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self.answer(content[start:], 206, Content_Range=span, **headers)


ID = r"((?:datasets/)?[\w.-]+/[\w.-]+)"
ROUTES = (
    ("POST /api/repos/create", "create"),
    ("POST /api/validate-yaml", "validate"),
    (f"GET /api/models/{ID}", "info"),
    (f"GET /api/models/{ID}/revision/([^/]+)", "info"),
    (f"GET /api/models/{ID}/tree/([^/]+)(?:/(.*))?", "tree"),
    (f"POST /api/models/{ID}/branch/([^/]+)", "branch"),
    (f"POST /api/models/{ID}/preupload/([^/]+)", "preupload"),
    (f"POST /api/models/{ID}/commit/([^/]+)", "commit"),
    (rf"POST /{ID}\.git/info/lfs/objects/batch", "batch"),
    (r"PUT /large/(\w+)(?:/(\d+))?", "put_large"),
    (r"POST /complete/(\w+)", "complete"),
    ("POST /verify", "verify"),
    (r"(?:GET|HEAD) /large/(\w+)", "get_large"),
    (f"(?:GET|HEAD) /{ID}/resolve/([^/]+)/(.+)", "resolve"),
)


def problems_of_metadata(card: str) -> list[str]:
    """What the Hub finds wrong with a card's first lines, of what we write there."""
    data = yaml.safe_load(card.split("---\n")[1])
    problems = []
    bases = data.get("base_model") or []
    for name in [bases] if isinstance(bases, str) else bases:
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
            problems.append(f'"base_model" {name} is no id of a model')
    if data.get("base_model_relation") not in RELATIONS:
        problems.append(f'"base_model_relation" must be one of {RELATIONS}')
    if data.get("pipeline_tag") not in ("text-generation", None):
        problems.append('"pipeline_tag" is unknown')
    for name in ("tags", "datasets"):
        if not all(isinstance(value, str) for value in data.get(name) or []):
            problems.append(f'"{name}" must be strings')
    license = data.get("license", "mit")
    if license not in ("mit", "apache-2.0", "other", "llama3"):
        problems.append(f'"license" {license} is unknown')
    return problems


class Client:
    """A process that has imported the library and runs what it is given, its Hub this one.

    huggingface_hub reads its settings when it is imported, so each set of them is a process.
    """

    def __init__(self, url: str, home: Path, **variables: str):
        home.mkdir(parents=True, exist_ok=True)
        settings = {
            "HF_ENDPOINT": url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_TOKEN": TOKEN,
            "PYTHONPATH": os.pathsep.join(sys.path[:1] + [str(Path(__file__).parents[1])]),
            **variables,
        }
        self.log = home / "log.txt"  # all that the process logs, down to the last detail
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", SERVE, str(Path(__file__).parent)],
                env={**os.environ, **settings},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def run(self, code: str, **values: object) -> str:
        """What `code` prints; raises RuntimeError with its traceback. `values` are its names."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps({"code": code, "values": values}, default=str) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process ended: {self.log.read_text()[-3000:]}")
        answer = json.loads(line)
        if answer["error"] is not None:
            raise RuntimeError(answer["error"])
        return answer["printed"]

    def close(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait(timeout=60)


SERVE = """
import contextlib, io, json, logging, sys, traceback
sys.path.insert(0, sys.argv[1])
logging.basicConfig(level=logging.DEBUG)
answers = sys.stdout
for line in sys.stdin:
    asked, printed, error = json.loads(line), io.StringIO(), None
    with contextlib.redirect_stdout(printed):
        try:
            exec(asked["code"], {"__name__": "__client__", **asked["values"]})
        except BaseException:
            error = traceback.format_exc()
    print(json.dumps({"printed": printed.getvalue(), "error": error}), file=answers, flush=True)
"""
