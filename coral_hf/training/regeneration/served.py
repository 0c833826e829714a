"""Answers of a target that a server holds, many at a time.

In: rows of a dataset as dialogues. Out: the same, answered, each as soon as it is done. Prompts are
sent as token ids, and answers are read as token ids: text, encoded again, may be other tokens.

    in flight   row 0, turn 1   row 1, turn 2   row 2, turn 1   ...   `batch_size` rows
    sent        the prompt's tokens, once its earlier answers are there
"""

import math
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from functools import partial
from itertools import chain, islice
from types import SimpleNamespace
from typing import Any

from anyio.from_thread import start_blocking_portal
from transformers import AutoConfig, GenerationConfig
from transformers import PreTrainedTokenizerBase as Tokenizer

from ...identity import seed_of
from ...target import max_positions, text_config
from . import RegenerationSettings
from .dialogue import Dialogue, asked_for, end_tokens, longest_prompt
from .endpoint import Connection, Endpoint, Failure, TooLong

# a text is sent without special tokens; else, what a server would take from the target's
# generation config
SENT = {"return_token_ids": True, "add_special_tokens": False, "top_k": -1, "min_p": 0.0}
SENT |= {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
# a text that tokenizers split in different ways
PROBE = "  Naïve:\n\n3.14159 == 日本語?"


def configs_of(name: str) -> SimpleNamespace:
    """Read the configs of a folder or a Hub id, by the names that a model has for them."""
    config = AutoConfig.from_pretrained(name)
    try:
        own = GenerationConfig.from_pretrained(name)
    except OSError:  # there is no such file
        own = GenerationConfig.from_model_config(config)
    return SimpleNamespace(config=config, generation_config=own)


class ServedTarget:
    """A target that a server holds, found to be there and to return tokens.

    Raises:
        ConnectionError: if no server answers.
        ValueError: if it holds no such target, returns no token ids, or has another tokenizer, and
            if answers of `max_new_tokens` leave prompts no room in its positions.
    """

    batch_size = 1  # rows come one by one, and those of the settings' size are under way at once

    def __init__(self, endpoint: Endpoint, tokenizer: Tokenizer, settings: RegenerationSettings):
        self.endpoint, self.tokenizer, self.settings = endpoint, tokenizer, settings
        self.target: Any = configs_of(endpoint.target)
        self._vocab_size = text_config(self.target).vocab_size
        self._ends = end_tokens(self.target.generation_config, tokenizer)
        with start_blocking_portal() as portal:
            portal.call(self._meet)

    def identity(self) -> dict[str, Any]:
        """Collect what the answers depend on beside their prompts, as plain values by name."""
        return {
            "answered_by": f"{self._model} on a server",
            **asked_for(self.settings, self.tokenizer),
            "ends": self._ends,
            "positions": None if math.isinf(self._positions) else self._positions,
        }

    def answered(self, batches: Iterator[list[Dialogue]]) -> Iterator[list[Dialogue]]:
        """Answer all turns of rows, `batch_size` of them at a time, and yield those that are done.

        Raises:
            ConnectionError: if the server fails too often in a row.
            ValueError: for an answer that cannot be the target's, with the row.
        """
        size, rows = self.settings.batch_size, chain.from_iterable(batches)
        with (
            start_blocking_portal() as portal,
            portal.wrap_async_context_manager(Connection(self.endpoint, size)) as server,
        ):
            waiting: set[Future[Dialogue]] = set()
            while True:
                for row in islice(rows, size - len(waiting)):
                    waiting.add(portal.start_task_soon(self._answer, server, row))
                if not waiting:
                    return
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                yield [one.result() for one in done if one.exception() is None]
                for one in done:
                    one.result()  # raises its error

    async def _answer(self, server: Connection, row: Dialogue) -> Dialogue:
        """Answer all turns of a row."""
        while prompt := row.next_prompt(self.max_prompt_length):
            seed = seed_of(self.settings.seed, row.number, row.num_kept)
            try:
                body = self._body(prompt, self.settings.max_new_tokens, seed)
                read = partial(self._read, prompt=prompt)
                row.take(await server.ask("completions", body, read), self._ends)
            except TooLong as error:
                row.stopped = str(error)
            except ValueError as error:
                raise ValueError(f"Row {row.number}: {error}") from error
        return row

    def _body(self, prompt: list[int] | str, max_tokens: int, seed: int = 0) -> dict[str, Any]:
        """Return a request to continue a prompt, (length,), or a text."""
        others = {"seed": seed} if self.settings.temperature > 0 else {}
        return {
            "model": self._model,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": self.settings.temperature,
            "top_p": self.settings.top_p,
            "stop_token_ids": self._ends,
            **SENT,
            **others,
        }

    def _read(self, reply: dict[str, Any], prompt: list[int]) -> list[int]:
        """Return the answer to a prompt, (length,) each, once all that is known of it fits.

        Raises:
            ValueError: if it does not.
            Failure: if the server broke it off.
        """
        choice, most = continuation(reply, prompt), self.settings.max_new_tokens
        tokens, size = choice.get("token_ids") or [], self._vocab_size
        if len(tokens) > most or not all(0 <= token < size for token in tokens):
            found = f"{len(tokens)} tokens up to {max(tokens)}"
            raise ValueError(f"the server returned {found}, not at most {most} below {size}.")
        if len(tokens) < most and {*tokens}.isdisjoint(self._ends):
            reason = choice.get("finish_reason")
            if reason not in ("stop", "length"):
                raise Failure(f"an answer that ended with {reason!r}")
            raise ValueError(
                f"the server ended an answer after {len(tokens)} of {most} tokens, with {reason!r}"
                f" and token {tokens[-1:]}; the target's ends are {self._ends}. Serve it without"
                " limits of its own (vLLM: `--generation-config vllm`)."
            )
        return tokens

    async def _meet(self) -> None:
        """Find the target's name and positions on the server, and that it returns tokens."""
        url, target = self.endpoint.url, self.endpoint.target
        ids = self.tokenizer(PROBE, add_special_tokens=False, verbose=False)["input_ids"]
        async with Connection(self.endpoint, 1) as server:
            try:
                entry = self._entry((await server.once("models")).get("data") or [])
                self._model: str = entry["id"]
                own = max_positions(text_config(self.target)) or math.inf
                self._positions = min(own, entry.get("max_model_len") or math.inf)
                self.max_prompt_length = longest_prompt(self._positions, self.settings)
                reply = await server.once("completions", self._body(ids, 1))
                if not continuation(reply, ids).get("token_ids"):
                    what = f"The server at {url} returns no token ids, of which a row is made"
                    raise ValueError(f"{what}; use vLLM from 0.10.2 on, or one alike.")
            except Failure as failure:
                what = f"{url} does not answer as a server with OpenAI's API does: {failure}"
                remedy = f"Start one, such as with `vllm serve {target}`, or correct `endpoint`."
                raise ConnectionError(f"{what}. {remedy}") from failure
            try:
                read = continuation(await server.once("completions", self._body(PROBE, 1)))
            except (Failure, ValueError):  # not every server of tokens reads text
                return
        if read.get("prompt_token_ids") not in (None, ids):
            what = f"The server at {url} encodes a text to other tokens than {target}'s tokenizer"
            raise ValueError(f"{what}, so it holds another target; name the one that it holds.")

    def _entry(self, entries: list[dict[str, Any]]) -> dict[str, Any]:
        """Return what a server says of the target, among all models that it holds."""
        name = self.endpoint.model or self.endpoint.target
        for entry in entries:
            if name in (entry["id"], entry.get("root")):
                return entry
        held = ", ".join(entry["id"] for entry in entries) or "no model"
        raise ValueError(
            f"The server at {self.endpoint.url} holds {held}, and none called {name}; give the"
            " target's name there as `model`, --endpoint-model."
        )


def continuation(reply: dict[str, Any], prompt: list[int] | None = None) -> dict[str, Any]:
    """Return the one continuation of a reply to a prompt, (length,), if tokens were sent.

    Raises:
        ValueError: if there is none, or if the server says that it read another prompt.
    """
    choices = reply.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise ValueError(f"the server returned no `choices`, but {sorted(reply)}.")
    if prompt is not None:
        read = choices[0].get("prompt_token_ids")
        length = (reply.get("usage") or {}).get("prompt_tokens", len(prompt))
        if length != len(prompt) or read not in (None, prompt):
            raise ValueError(f"the server read other tokens than the {len(prompt)} it was sent.")
    return choices[0]
