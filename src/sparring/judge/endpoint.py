"""A judge behind any OpenAI-compatible endpoint: vLLM, llama.cpp, Ollama, OpenAI and others speak the same protocol."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sparring.errors import InputError
from sparring.judge.replies import Conversation
from sparring.remote import Remote


@dataclass(frozen=True)
class Endpoint:
    """Replies of `POST base_url/chat/completions`, tried again where the failure may pass (`remote.Remote` says which).

    A conversation that leaves no room for `max_tokens` is asked without them; one that is too long for the model gets
    None. Raises InputError for fields out of range, and what `Remote.post` raises.
    """

    base_url: str
    """Up to and without `/chat/completions`, as http://localhost:8000/v1."""
    model: str
    """The model's name at the endpoint."""
    api_key_env: str | None = None
    """Environment variable that holds the key; None: none is sent. The key itself is kept nowhere else."""
    temperature: float | None = 0.0
    """Sampling temperature; None leaves it out of the request, for models that refuse it."""
    max_tokens: int | None = 2048
    """Longest reply in tokens, or what the context leaves; None leaves it out."""
    timeout: float = 120.0
    """Seconds without a byte before a try counts as failed."""
    retries: int = 5
    """Tries after the first."""
    backoff: float = 1.0
    """Seconds before the second try; doubled each time, times a random 0.5 … 1, and four times that after a 429 without
    Retry-After. A server's Retry-After is heeded where it is longer; at most 60 s either way."""
    concurrency: int = 4
    """Requests at a time."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of the request, as {"seed": 1} or {"max_completion_tokens": 2048}."""

    def __post_init__(self) -> None:
        checks = {
            "model": bool(self.model),
            "temperature": self.temperature is None or self.temperature >= 0,
            "max_tokens": self.max_tokens is None or self.max_tokens > 0,
        }
        remote = self._remote
        for name, fine in checks.items():
            if not fine:
                raise InputError(f"endpoint {remote.base_url}: {name}={getattr(self, name)!r} is out of range")
        taken = {"model", "messages"} & set(self.extra)
        if taken:
            raise InputError(f"endpoint {self.base_url}: extra sets {sorted(taken)[0]}, which has a place of its own")

    @property
    def identity(self) -> str:
        """Address, model and sampling settings: whatever may change a reply, and no key."""
        return json.dumps({"base_url": self.base_url, "model": self.model, **self._settings}, sort_keys=True)

    def __call__(self, messages: Conversation) -> str | None:
        # To the end of it, where an interrupt is told
        ((_, reply),) = self.many([messages])
        return reply

    def many(self, conversations: Sequence[Conversation]) -> Iterator[tuple[int, str | None]]:
        """(index, reply) as they come, `concurrency` at a time; after a failure those under way are still given."""
        bodies = [self._body(messages) for messages in conversations]
        long = []
        for index, reply in self._post(bodies):
            if reply is None and "max_tokens" in bodies[index]:
                long.append(index)
            else:
                yield index, reply
        # Most servers count a reply's longest length as taken, and give what room is left where none is named
        for at, reply in self._post([{k: v for k, v in bodies[i].items() if k != "max_tokens"} for i in long]):
            yield long[at], reply

    def _post(self, bodies: Sequence[Mapping[str, Any]]) -> Iterator[tuple[int, str | None]]:
        return self._remote.post("chat/completions", bodies, _content, "a chat completion")

    def _body(self, messages: Conversation) -> dict[str, Any]:
        # A lone surrogate, which JSON files can hold, is no text that can be sent
        turns = [{"role": m.role, "content": m.content.encode("utf-8", "replace").decode()} for m in messages]
        return {"model": self.model, "messages": turns, **self._settings}

    @property
    def _settings(self) -> dict[str, Any]:
        own = {"temperature": self.temperature, "max_tokens": self.max_tokens}
        return {name: value for name, value in own.items() if value is not None} | dict(self.extra)

    @property
    def _remote(self) -> Remote:
        return Remote(
            self.base_url,
            api_key_env=self.api_key_env,
            timeout=self.timeout,
            retries=self.retries,
            backoff=self.backoff,
            concurrency=self.concurrency,
        )


def _content(answer: Any) -> str:
    content = answer["choices"][0]["message"]["content"]
    if not isinstance(content, str | None):
        raise TypeError
    return content or ""
