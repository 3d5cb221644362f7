"""JSON over HTTP with servers that may be busy, slow or away: what judges and players behind an endpoint share."""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from threading import Event
from typing import TYPE_CHECKING, Any, TypeVar

from sparring.errors import InputError, SparringError

if TYPE_CHECKING:
    import httpx2

T = TypeVar("T")
Body = Mapping[str, Any]

_LONGEST_PAUSE = 60.0
_RATE_LIMITED = 4
"""Times as long a pause where a server limits the rate, mostly by the minute: the pauses of 5 tries then outlast one."""
_TOO_LONG = ("context_length_exceeded", "context length", "context size", "prompt is too long", "too many tokens")


class RefusedError(InputError):
    """The server refuses a request for what it says, so that trying again is in vain."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class _Transient(Exception):
    """A failure that may pass.

    after: seconds that the server asked to wait, 0 where it did not; slower: factor of the pause where it did not.
    """

    def __init__(self, problem: str, after: float = 0.0, slower: int = 1) -> None:
        super().__init__(problem)
        self.after, self.slower = after, slower


@dataclass(frozen=True)
class Remote:
    """Requests below `base_url`, tried again where the failure may pass.

    May pass: no connection, a timeout, a body that breaks off or is not what was asked for, HTTP 408, 429 and 5xx but 501.
    Raises RefusedError for any other refusal (wrong key, unknown model), InputError for fields out of range,
    SparringError where it still fails after all tries. The environment's proxies are used, but not for this machine.
    """

    base_url: str
    """As http://localhost:8000/v1."""
    api_key_env: str | None = None
    """Environment variable that holds the key; None: none is sent. The key itself is kept nowhere else."""
    timeout: float = 120.0
    """Seconds without a byte before a try counts as failed."""
    retries: int = 5
    """Tries after the first."""
    backoff: float = 1.0
    """Seconds before the second try; doubled each time, times a random 0.5 … 1, and four times that after a 429 without
    Retry-After. A server's Retry-After is heeded where it is longer; at most 60 s either way."""
    concurrency: int = 4
    """Requests at a time, to each address."""
    replicas: tuple[str, ...] = ()
    """Further addresses that answer alike; a request goes to the one with the fewest under way."""

    def __post_init__(self) -> None:
        for url in self._urls:
            _check_url(url)
        checks = {
            "timeout": self.timeout > 0,
            "retries": self.retries >= 0,
            "backoff": self.backoff >= 0,
            "concurrency": self.concurrency > 0,
        }
        for name, fine in checks.items():
            if not fine:
                raise InputError(f"endpoint {self.base_url}: {name}={getattr(self, name)!r} is out of range")
        self._key()

    def post(
        self, path: str, bodies: Iterable[Body], read: Callable[[Any], T], what: str
    ) -> Iterator[tuple[int, T | None]]:
        """(index, what `read` makes of the answer) as they come; after a failure or Ctrl-C those under way are still given.

        None for a request that is too long for the model. `read` raises ValueError, LookupError or TypeError for an
        answer that is not `what` (as in "a chat completion").
        """
        waiting = iter(enumerate(bodies))
        running: dict[Future[T | None], tuple[int, httpx2.Client]] = {}
        failure: BaseException | None = None
        stop = Event()
        with ExitStack() as stack:
            load = {stack.enter_context(self._client(url)): 0 for url in self._urls}
            pool = stack.enter_context(ThreadPoolExecutor(self.concurrency * len(load)))
            try:
                while True:
                    while failure is None and len(running) < self.concurrency * len(load):
                        index, body = next(waiting, (-1, {}))
                        if index < 0:
                            break
                        client = min(load, key=load.__getitem__)
                        load[client] += 1
                        ask = pool.submit(self._tries, client, "POST", path, body, read, what, stop)
                        running[ask] = index, client
                    if not running:
                        break
                    try:
                        finished = wait(running, return_when=FIRST_COMPLETED).done
                    except KeyboardInterrupt as interrupt:
                        if isinstance(failure, KeyboardInterrupt):
                            raise
                        # The pool's end waits for them anyway, and they may be paid for
                        failure = interrupt
                        stop.set()
                        continue
                    for done in finished:
                        (index, client), error = running.pop(done), done.exception()
                        load[client] -= 1
                        if error is None:
                            yield index, done.result()
                        else:
                            failure = failure or error
                            stop.set()
            finally:
                stop.set()
        if failure is not None:
            raise failure

    def get(self, path: str, read: Callable[[Any], T], what: str) -> T:
        """What `read` makes of the answer to a GET at the first address."""
        with self._client(self.base_url) as client:
            found = self._tries(client, "GET", path, None, read, what, Event())
        assert found is not None
        return found

    def _tries(
        self, client: httpx2.Client, verb: str, path: str, body: Body | None, read: Callable[[Any], T], what: str,
        stop: Event,
    ) -> T | None:  # fmt: skip
        for tried in range(1, self.retries + 2):
            try:
                return self._try(client, verb, path, body, read, what)
            except _Transient as failure:
                problem, pause = failure, self.backoff * 2 ** (tried - 1) * random.uniform(0.5, 1) * failure.slower
            if tried > self.retries or stop.wait(min(_LONGEST_PAUSE, max(pause, problem.after))):
                break
        tries = "1 try" if tried == 1 else f"{tried} tries"
        raise SparringError(
            f"endpoint {self.base_url}: {problem} (after {tries}); nothing is lost: give the same command again when it "
            "is back"
        ) from problem

    def _try(
        self, client: httpx2.Client, verb: str, path: str, body: Body | None, read: Callable[[Any], T], what: str
    ) -> T | None:
        import httpx2

        try:
            response = client.request(verb, path, json=body)
        except httpx2.RequestError as error:
            raise _Transient(" ".join(f"{type(error).__name__} {error}".split())) from error
        status = response.status_code
        if status in (408, 429) or (status >= 500 and status != 501):
            after = _seconds(response.headers.get("retry-after"))
            slower = _RATE_LIMITED if status == 429 and not after else 1
            raise _Transient(f"HTTP {status}: {self._words(response)}", after, slower)
        if not 200 <= status < 300:
            words = self._words(response)
            if body is not None and (status == 413 or any(sign in response.text.lower() for sign in _TOO_LONG)):
                return None
            how = "mend the address (…/v1), model or key"
            raise RefusedError(f"endpoint {self.base_url}: HTTP {status}: {words}; {how}", status)
        try:
            return read(json.loads(response.content))
        except (ValueError, LookupError, TypeError) as error:
            raise _Transient(f"not {what}: {self._words(response)}") from error

    @property
    def _urls(self) -> tuple[str, ...]:
        return (self.base_url, *self.replicas)

    def _key(self) -> str | None:
        if self.api_key_env is None:
            return None
        key = os.environ.get(self.api_key_env, "").strip()
        if not key or not key.isascii() or not key.isprintable():
            state = "holds no key that can be sent" if key else "is not set"
            raise InputError(
                f"endpoint {self.base_url}: the environment variable {self.api_key_env} {state}; export it"
            )
        return key

    def _client(self, url: str) -> httpx2.Client:
        import httpx2

        key = self._key()
        try:
            return httpx2.Client(
                base_url=url,
                headers={"Authorization": f"Bearer {key}"} if key else {},
                timeout=self.timeout,
                limits=httpx2.Limits(max_connections=self.concurrency),
                trust_env=not _is_here(url),
            )
        except (ImportError, ValueError, httpx2.InvalidURL) as error:
            raise InputError(
                f"endpoint {url}: the environment's proxy (ALL_PROXY, HTTP_PROXY, HTTPS_PROXY) cannot be used: {error}; "
                "give one with http://, or for a SOCKS proxy pip install socksio"
            ) from None

    def _words(self, response: httpx2.Response) -> str:
        """The server's own message on one line, without the key that some servers repeat."""
        try:
            error = json.loads(response.content)["error"]
            text = str(error["message"] if isinstance(error, dict) else error)
        except (ValueError, LookupError, TypeError):
            text = response.text
        key = self._key()
        text = " ".join((text.replace(key, "…") if key else text).split())
        return "".join(c for c in text if c.isprintable())[:200] or response.reason_phrase or "an empty body"


def _check_url(address: str) -> None:
    import httpx2

    try:
        url = httpx2.URL(address)
    except (httpx2.InvalidURL, TypeError) as error:
        raise InputError(f"endpoint {address!r}: {error}; write http://host:port/v1") from None
    if url.scheme not in ("http", "https") or not url.host:
        raise InputError(f"endpoint {address!r}: no address; write http://host:port/v1")
    for part, given in (("password", url.userinfo), ("query", url.query)):
        if given:
            raise InputError(f"endpoint {url.host}: a {part} in the address would be written to files; use api_key_env")


def _is_here(url: str) -> bool:
    """Whether an address is this machine's own, which no proxy reaches."""
    import httpx2

    return re.fullmatch(r"localhost|127(\.\d+){3}|0\.0\.0\.0|::1", httpx2.URL(url).host) is not None


def _seconds(header: str | None) -> float:
    """A Retry-After header in seconds; 0 for none, and for one that gives a date."""
    try:
        return max(0.0, float(header or 0))
    except ValueError:
        return 0.0
