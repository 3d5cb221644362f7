"""A player that continues conversations: weights load when the first reply is wanted, and not before."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sparring import players
from sparring.errors import InputError
from sparring.types import Message

if TYPE_CHECKING:
    import torch

    from sparring.config import ModelConfig
    from sparring.prompts import Renderer

_DATE = datetime(2026, 1, 1)
"""What templates that write the date are told: a reply must not depend on the day of asking."""


@dataclass(frozen=True)
class Loaded:
    """What replying takes."""

    model: Any
    renderer: Renderer
    context: int
    """Longest sequence in tokens."""
    compute: torch.dtype | None = None


@dataclass(frozen=True, slots=True)
class Reply:
    """What a player said."""

    text: str
    """Without special tokens, and without space at both ends."""
    tokens: int
    """Sampled ones, the end token included."""
    finish: Literal["stop", "length", "no room"]
    """`length`: cut at the limit. `no room`: the conversation fills the player's context, so it says nothing."""


class Chat:
    """One player, identified, and loaded by `load` when first needed.

    identity: a text that changes with whatever changes its replies; batch_size: conversations decoded together.
    """

    def __init__(self, identity: str, load: Callable[[], Loaded], batch_size: int = 16) -> None:
        self.identity, self.batch_size = identity, batch_size
        self._load = load

    @cached_property
    def _loaded(self) -> Loaded:
        return self._load()

    def accepts(self, conversation: Sequence[Message]) -> bool:
        """Whether the player's chat template takes a conversation; some take no system turn."""
        try:
            self._loaded.renderer.text(conversation)
        except InputError:
            return False
        return True

    def replies(
        self, conversations: Sequence[Sequence[Message]], keys: Sequence[int], *, temperature: float,
        max_new_tokens: int, top_p: float = 1.0,
    ) -> Iterator[tuple[int, Reply]]:  # fmt: skip
        """(index, reply) of every conversation, a batch at a time, in any order.

        A reply depends on the player, its conversation, its key (`play.hf.key`) and the settings alone. Its limit in
        tokens is `max_new_tokens`, or what the context leaves. Raises InputError where the chat template refuses.
        """
        from sparring.play.hf import sample

        if not conversations:
            return
        held = self._loaded
        prompts = held.renderer.encode_prompts([held.renderer.text(c) for c in conversations])
        limits = [min(max_new_tokens, held.context - len(prompt)) for prompt in prompts]
        for index, limit in enumerate(limits):
            if limit < 1:
                yield index, Reply("", 0, "no room")
        for limit in sorted({limit for limit in limits if limit > 0}, reverse=True):
            rows = [i for i, own in enumerate(limits) if own == limit]
            for start in range(0, len(rows), self.batch_size):
                batch = rows[start : start + self.batch_size]
                answers = sample(
                    held.model,
                    [prompts[i] for i in batch],
                    [keys[i] for i in batch],
                    temperature=temperature,
                    top_p=top_p,
                    max_new_tokens=limit,
                    stop_ids=held.renderer.stop_ids,
                    batch_size=self.batch_size,
                    compute=held.compute,
                )
                for i, answer in zip(batch, answers, strict=True):
                    text = held.renderer.decode(answer.tokens).strip()
                    yield i, Reply(text, len(answer.tokens), answer.finish)


def chat(config: ModelConfig, batch_size: int = 16) -> Chat:
    """A player from its folder or Hub id. Raises InputError where there is none."""
    from sparring.prompts import Renderer, load_tokenizer

    def load() -> Loaded:
        tokenizer = load_tokenizer(config.path, revision=config.revision, trust_remote_code=config.trust_remote_code)
        renderer = Renderer(tokenizer, config.chat_template, players.stop_ids(config.path, config), _DATE)
        context = players.context_length(players.model_config(config.path, config), tokenizer)
        return Loaded(players.load_model(config.path, config), renderer, context, players.compute_dtype(config))

    sha, template = players.identify(config.path, config.revision), config.chat_template
    if template is not None and template != "plain":
        file = Path(template).expanduser()
        # A file that is missing is told when the renderer wants it
        template = hashlib.sha256(file.read_bytes()).hexdigest()[:16] if file.is_file() else template
    return Chat(sha if template is None else f"{sha} with template {template}", load, batch_size)
