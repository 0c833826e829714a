"""A server with OpenAI's API on this machine, whose answers a tiny target computes.

It knows what `vllm serve` knows of `/v1/models` and `/v1/completions`, as far as `regenerate` asks.
`faults` has it refuse, or break off, on demand.
"""

import json
import threading
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from typing import Any

import loopback_hub
import torch

MODEL = "org/tiny"


class TargetServer(ThreadingHTTPServer):
    """The server's target and settings; its lists are what tests look at."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, target: Any, tokenizer: Any):
        super().__init__(("127.0.0.1", 0), Handler)
        self.target, self.tokenizer = target, tokenizer
        self.ends = [target.generation_config.eos_token_id]
        self.max_model_len: int | None = 128
        self.says_its_length = True
        self.most_new = 10**6  # a limit of its own
        self.key: str | None = None
        self.gives_ids = True
        self.adds: list[int] = []  # to every prompt, such as a BOS
        self.meeting: threading.Barrier | None = None  # of answers that wait for each other
        self.answers_left: int | None = None  # before it breaks off all connections
        self.faults: list[loopback_hub.Fault] = []
        self.requests: list[str] = []
        self.bodies: list[dict[str, Any]] = []  # of answers, in the order in which they were asked
        self.computing = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, *_: Any) -> None:
        """A client that has gone, or a barrier that was broken, is no news."""

    def asked(self) -> list[list[int]]:
        """The prompts of rows: all that were sent but for the two that get to know the server."""
        return [body["prompt"] for body in self.bodies if body["max_tokens"] > 1]


class Handler(loopback_hub.Handler):
    """One request."""

    server: TargetServer  # type: ignore[assignment]
    protocol_version = "HTTP/1.1"  # connections stay open, as vLLM's do

    def handle_any(self):
        self.route, self.breaks_off = self.path, False
        self.server.requests.append(f"{self.command} {self.route}")
        self.body = self.read_body()
        key = self.server.key
        if key is not None and self.headers.get("Authorization") != f"Bearer {key}":
            said = f"Invalid key {self.headers.get('Authorization')}."
            return self.answer_json({"error": {"message": said}}, 401)
        if (fault := self.take_fault()) is not None:
            if fault.status is not None:
                return self.answer(fault.message.encode(), fault.status)
            self.breaks_off = self.close_connection = True
        known = {"GET /v1/models": self.models, "POST /v1/completions": self.completions}
        found = known.get(f"{self.command} {self.route}")
        self.answer_json({"detail": "Not Found"}, 404) if found is None else found()

    do_GET = do_POST = handle_any

    def models(self):
        entry = {"id": MODEL, "object": "model", "root": "/models/tiny"}
        if self.server.says_its_length:
            entry["max_model_len"] = self.server.max_model_len
        self.answer_json({"object": "list", "data": [entry]})

    def completions(self):
        server, asked = self.server, json.loads(self.body)
        is_row = asked["max_tokens"] > 1
        if is_row and server.answers_left is not None:
            server.answers_left -= 1
            if server.answers_left < 0:
                self.close_connection = True
                return
        server.bodies.append(asked)
        if is_row and server.meeting is not None:
            server.meeting.wait(timeout=20)
        prompt = asked["prompt"]
        if isinstance(prompt, str):
            add = asked["add_special_tokens"]
            prompt = server.tokenizer(prompt, add_special_tokens=add)["input_ids"]
        prompt = [*server.adds, *prompt]
        length = len(prompt) + asked["max_tokens"]
        if server.max_model_len is not None and length > server.max_model_len:
            said = f"This model's maximum context length is {server.max_model_len} tokens."
            return self.answer_json({"error": {"message": said, "code": 400}}, 400)
        tokens = self.continue_(prompt, asked)
        is_ended = tokens[-1] in [*server.ends, *asked["stop_token_ids"]]
        choice: dict[str, Any] = {"index": 0, "finish_reason": "stop" if is_ended else "length"}
        choice["text"] = server.tokenizer.decode(tokens, skip_special_tokens=True)
        if server.gives_ids and asked.get("return_token_ids"):
            choice |= {"token_ids": tokens, "prompt_token_ids": prompt}
        self.answer_json({"choices": [choice], "usage": {"prompt_tokens": len(prompt)}})

    def continue_(self, prompt: list[int], asked: dict[str, Any]) -> list[int]:
        """The target's tokens after a prompt, up to an end."""
        ids = torch.tensor([prompt])
        settings = {"do_sample": asked["temperature"] > 0}
        if settings["do_sample"]:
            settings |= {name: asked[name] for name in ("temperature", "top_p")} | {"top_k": 0}
        with self.server.computing:
            torch.manual_seed(asked.get("seed", 0))
            output = self.server.target.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=min(asked["max_tokens"], self.server.most_new),
                eos_token_id=[*self.server.ends, *asked["stop_token_ids"]],
                pad_token_id=0,
                **settings,
            )
        return output[0, len(prompt) :].tolist()


@contextmanager
def running_server(target: Any, tokenizer: Any):
    """A server that answers until the block ends."""
    server = TargetServer(target, tokenizer)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
