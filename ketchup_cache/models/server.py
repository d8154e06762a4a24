"""A language model behind a server that speaks the completions API, as vLLM does: requests, tries, many in flight."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any, Literal, TypeVar

import httpx2

from ketchup_cache.config.servers import ServerOptions
from ketchup_cache.console import one_line, printable, say
from ketchup_cache.errors import ModelError, ServerError

KEY = "KETCHUP_CACHE_API_KEY"
FIRST_PAUSE_S, LONGEST_PAUSE_S, SAY_EVERY_S = 0.5, 30.0, 60.0
"""Between two tries, and between two lines about them."""
ROUNDING = 1e-3
"""How far rounding may bring a log-probability above 0, or a sum of probabilities above 1."""
MALFORMED = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)
"""What reading an answer of another form raises."""
ENTRY_BYTES = 1024
"""Of one log-probability in an answer, at most: a number, a rank, and a token's text."""

Item = TypeVar("Item")
Result = TypeVar("Result")


class Server:
    """url: of its API. name: that it has for the model."""

    def __init__(self, whose: Literal["teacher", "student"], options: ServerOptions) -> None:
        """whose: the options `…_url` and `…_name` that it is given by. Raises ModelError for a key that no header may
        have."""
        self._whose, self._options, self._said = whose, options, 0.0
        self.url, self.name = str(getattr(options, f"{whose}_url")).rstrip("/"), str(getattr(options, f"{whose}_name"))
        self._key, at_once = os.environ.get(KEY, ""), options.in_flight
        if not (self._key.isascii() and self._key.isprintable()):
            raise ModelError(f"{KEY}: holds characters that no header may have; set it again")
        limits = httpx2.Limits(max_connections=at_once, max_keepalive_connections=at_once)
        head = {"accept-encoding": "identity"} | ({"authorization": f"Bearer {self._key}"} if self._key else {})
        self._client = httpx2.Client(
            headers=head, limits=limits, timeout=httpx2.Timeout(options.idle_timeout, pool=None)
        )

    def meet(self) -> int:
        """The longest row that the server takes; 0 where it does not say. Raises ModelError where it does not have the
        model, ServerError where it can't be reached."""
        where = f"{self.url}/models"
        try:
            models = {model["id"]: model for model in self.send(where)["data"]}
            longest = int(models.get(self.name, {}).get("max_model_len") or 0)
        except MALFORMED as error:
            raise ModelError(f"{where}: lists no models ({self.clean(error)}); check --{self._whose}-url") from None
        if self.name not in models:
            has = self.clean(", ".join(map(str, models)))
            raise ModelError(f"{self.url}: has no model {self.name}; it has {has}: set --{self._whose}-name")
        return longest

    def complete(
        self, body: dict[str, Any], most_bytes: int, read: Callable[[dict[str, Any]], Result], stop: Any
    ) -> Result:
        """What `read` makes of the only choice of an answer, with its `usage`. body: of a request, with the token ids
        of its `prompt`. Raises ServerError, also where other ids were read, or where `read` raises one of MALFORMED."""
        ids = body["prompt"]
        answer = self.send(f"{self.url}/completions", {"model": self.name, **body}, most_bytes, stop)
        try:
            (choice,) = answer["choices"]
            seen = (answer.get("usage") or {}).get("prompt_tokens", len(ids))
            if seen != len(ids) or choice.get("prompt_token_ids") not in (None, ids):
                raise ValueError(f"it was sent {len(ids)} token ids, and read {seen} or others")
            return read(choice)
        except MALFORMED as error:
            raise Refused(f"{self.url}: an answer is not as asked ({self.clean(error)})") from None

    def send(
        self,
        url: str,
        body: dict[str, Any] | None = None,
        most_bytes: int = 2**22,
        stop: Any = None,
        *,
        once: bool = False,
    ) -> Any:
        """The JSON of an answer. An outage is retried with growing pauses; not `once`, nor where nothing is posted.
        Redirects are not followed.

        Raises ServerError once `retry_for` seconds are over or `stop` is set, and at once for what won't change.
        """
        until, pause = time.monotonic() + self._options.retry_for, FIRST_PAUSE_S
        while True:
            text, after = bytearray(), ""
            try:
                with self._client.stream("GET" if body is None else "POST", url, json=body) as answer:
                    for chunk in answer.iter_raw():  # a few packed bytes could become many
                        text += chunk
                        if len(text) > most_bytes:
                            raise Refused(f"{url}: an answer has more than {most_bytes:,} bytes")
                        if time.monotonic() > until:
                            raise httpx2.ReadTimeout("the answer takes too long")
                status, after = answer.status_code, answer.headers.get("retry-after", "")
                if status == 200:
                    return json.loads(text)
                said = answer.headers.get("location") or text.decode(errors="replace") or "no text"
                problem = f"status {status} ({self.clean(said)})" + f"; set {KEY}" * (status in (401, 403))
                if status != 429 and status < 500:
                    raise Refused(f"{url}: {problem}")
            except httpx2.RequestError as error:
                problem = f"{type(error).__name__}: {self.clean(error)}"
            except (ValueError, RecursionError) as error:
                raise Refused(f"{url}: an answer is no JSON ({self.clean(error)})") from None
            wait = max(float(after) if after.isdecimal() else 0.0, pause)
            if body is None or once or (stop and stop.is_set()) or time.monotonic() + wait > until:
                raise ServerError(f"{url}: {problem}; see whether it runs, then run this again to go on")
            if time.monotonic() - self._said > SAY_EVERY_S:
                self._said = time.monotonic()
                say(f"{url}: {problem}; trying again for {until - self._said:.0f} s")
            (stop.wait if stop else time.sleep)(wait)
            pause = min(2 * pause, LONGEST_PAUSE_S)

    def each(
        self, items: Iterable[Item], ask: Callable[[Item, threading.Event], Result], on_done: Callable[[Result], Any]
    ) -> tuple[dict[int, Result], ServerError | None]:
        """What `ask` gives of each item, by its place, with `in_flight` of them at once; and the error after which no
        more was asked. ask: also given what is set then. on_done: called in the order of the items."""
        failed, stop = list[ServerError](), threading.Event()

        def one(item: Item) -> Result | None:
            try:
                return None if stop.is_set() else ask(item, stop)
            except ServerError as error:
                failed.append(error)
                stop.set()
                return None

        done: dict[int, Result] = {}
        with ThreadPoolExecutor(self._options.in_flight) as pool, ExitStack() as stopping:
            stopping.callback(stop.set)
            for place, result in enumerate(pool.map(one, items)):
                if result is not None:
                    done[place] = result
                    on_done(result)
        return done, failed[0] if failed else None

    def clean(self, text: object) -> str:
        """What a server says: one short line without control characters, and without the key."""
        return printable(one_line(str(text).replace(self._key or "\0", "…") or text))


class Refused(ServerError):
    """What the same request would get again."""
