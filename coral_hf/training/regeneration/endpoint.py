"""A server with OpenAI's API: where it is, and a request to it.

In: an address; a path and plain values. Out: what the server answers, after retries, or an error of
one sentence. The server's key is read from the environment and gets into no file and no message.
"""

import os
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from anyio import sleep

try:  # huggingface_hub brings its HTTP client: httpx2, before its version 2 httpx
    import httpx2 as httpx
except ImportError:
    import httpx  # type: ignore

KEY = "CORAL_HF_API_KEY"
ADDRESS = r"(https?://(?:[\w.-]+|\[[\da-fA-F:]+\])(?::\d{1,5})?)((?:/[\w.~-]*)*)"
RETRIED = (200, 408, 409, 425, 429, 500, 502, 503, 504)  # 200 with what is no JSON object
FIRST_WAIT, LONGEST_WAIT = 0.5, 60.0  # seconds before a request is sent again
CONNECT_SECONDS = 30


@dataclass(frozen=True)
class Endpoint:
    """A server that answers for a target, such as `vllm serve`.

    A key of the server is read from the environment variable CORAL_HF_API_KEY.

    Args:
        url: such as `http://localhost:8000/v1`.
        target: the target's folder or Hub id, of which the configs are read and no weights.
        model: the target's name on the server; that of `target` by default.
        retries: how often a request that failed is sent again, after 0.5 s, 1 s, 2 s, ... 60 s.
        timeout: seconds that an answer may take.

    Raises:
        ValueError: for a `url` that is no plain address.
    """

    url: str
    target: str
    model: str | None = None
    retries: int = 8
    timeout: float = 3600.0

    def __post_init__(self) -> None:
        found = re.fullmatch(ADDRESS, self.url)
        if found is None:
            # a password is for nobody to see
            shown = "holds more than an address" if {*"@?"} & {*self.url} else f"is {self.url!r}"
            remedy = f"use one such as http://localhost:8000/v1, and put a key into {KEY}"
            raise ValueError(f"`endpoint` {shown}; {remedy}.")
        object.__setattr__(self, "url", f"{found[1]}{found[2].rstrip('/') or '/v1'}")


class TooLong(ValueError):
    """A prompt that leaves no room in the positions of the server."""


class Failure(Exception):
    """What may be over when a request is sent again."""


class Connection(httpx.AsyncClient):
    """Requests to a server while the `async with` block runs.

    Args:
        endpoint: the server.
        size: requests at a time.
    """

    def __init__(self, endpoint: Endpoint, size: int):
        self._endpoint = endpoint
        self._key = os.environ.get(KEY, "").strip()
        if not re.fullmatch("[!-~]*", self._key):
            raise ValueError(f"{KEY} holds characters that no key has.")
        super().__init__(
            base_url=endpoint.url,
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            timeout=httpx.Timeout(endpoint.timeout, connect=CONNECT_SECONDS),
            limits=httpx.Limits(max_connections=size, max_keepalive_connections=size),
        )

    async def once(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """Ask once for what is at a path, or send an object there.

        Raises:
            Failure: if it may succeed later.
            TooLong: if the server refuses a prompt for its length.
            ValueError: if it refuses for another reason.
        """
        try:
            response = await self.request("POST" if body else "GET", path, json=body)
        except httpx.RequestError as error:
            raise Failure(f"no answer ({type(error).__name__} {error})") from error
        with suppress(ValueError):
            if response.status_code == 200 and isinstance(found := response.json(), dict):
                return found
        # the key is for nobody to see
        text = response.text.replace(self._key, "(key)") if self._key else response.text
        said = f"{response.status_code} {' '.join(text.split())[:300]}"
        if response.status_code in RETRIED:
            raise Failure(said)
        if response.status_code in (401, 403):
            remedy = "refuses the key in" if self._key else "asks for a key; put it into"
            raise ValueError(f"The server at {self._endpoint.url} {remedy} {KEY} ({said}).")
        if re.match("413|400 .*context.(length|window)", said):
            raise TooLong(f"the server refused a prompt for its length ({said})")
        where = f"The server at {self._endpoint.url} refused a request to {response.url}"
        raise ValueError(f"{where} ({said}).")

    async def ask(
        self, path: str, body: dict[str, Any], read: Callable[[dict[str, Any]], list[int]]
    ) -> list[int]:
        """Send an object to a path until the server answers.

        Args:
            path: such as "completions".
            body: plain values.
            read: makes of the server's object what is returned, or raises Failure.

        Raises:
            ConnectionError: if it fails too often in a row.
            ValueError: as `once`.
        """
        failures = list[Failure]()
        while len(failures) <= self._endpoint.retries:
            if failures:
                await sleep(min(FIRST_WAIT * 2 ** (len(failures) - 1), LONGEST_WAIT))
            try:
                return read(await self.once(path, body))
            except Failure as failure:
                failures.append(failure)
        what = f"The server at {self._endpoint.url} failed {len(failures)} times in a row"
        remedy = "Repeat the run when it is up again; it resumes."
        raise ConnectionError(f"{what}, last with: {failures[-1]}. {remedy}")
