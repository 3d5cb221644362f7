"""A judge by text: any function from a conversation to the text of its reply.

    def judge(messages: Sequence[Message]) -> str | None

is all there is to it; None says that it cannot reply to this conversation (too long for it), which is counted and never
taken for a number. A judge may have two attributes besides: `identity`, a text that changes with whatever changes its
replies, and `many(conversations)`, which yields (index, reply) as replies come, in any order.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

from sparring import plugins
from sparring.errors import InputError, SparringError
from sparring.types import Message

GROUP = "sparring.judges"
Judge = Callable[[Sequence[Message]], str | None]
Conversation = Sequence[Message]

_RATING = re.compile(r"\[\[(\d+\.?\d*)\]\]")
_RATING_BACKUP = re.compile(r"\[(\d+\.?\d*)\]")
_VERDICT = re.compile(r"\[\[([ABC])\]\]")
_THINKING = re.compile(r"</?think>")


def load_judge(name: str, *, model: str | None = None, **settings: Any) -> Judge:
    """`http://…` (an OpenAI-compatible endpoint), `./file.py:name`, an entry point of `sparring.judges`, or a player.

    A player is a model's folder or Hub id. model, settings: fields of `Endpoint`, for an endpoint alone.
    Raises InputError: an endpoint without a model, anything else with one, a file that fails, something not callable.
    """
    if name.startswith(("http://", "https://")):
        from sparring.judge.endpoint import Endpoint

        if model is None:
            raise InputError(f"judge {name}: which model of the endpoint? name it as its list of models does")
        return Endpoint(name, model, **settings)
    given = [key for key, value in {"model": model, **settings}.items() if value is not None]
    if given:
        raise InputError(
            f"judge `{name}`: {', '.join(given)} is a setting of an endpoint; write http://… or leave it out"
        )
    found = plugins.load_object(name) if plugins.is_file_reference(name) else plugins.entry_point(GROUP, name)
    if found is None:
        from sparring.config import ModelConfig
        from sparring.judge.local import LocalJudge
        from sparring.play.chat import chat

        return LocalJudge(chat(ModelConfig(path=name)))
    if not callable(found):
        raise InputError(f"judge `{name}`: not a function; it must take a list of messages and give the reply's text")
    if plugins.is_file_reference(name) and not hasattr(found, "identity"):
        return _Named(cast(Judge, found), plugins.identity(name))
    return cast(Judge, found)


class _Named:
    """A user's judge with the hash of its file for an identity."""

    def __init__(self, judge: Judge, identity: str) -> None:
        self._judge, self.identity = judge, identity
        self.many = getattr(judge, "many", None)

    def __call__(self, messages: Conversation) -> str | None:
        return self._judge(messages)


def identity(judge: Judge) -> str:
    """Who judges: the judge's own `identity`, else the function's name."""
    own = getattr(judge, "identity", None)
    kind = judge if hasattr(judge, "__qualname__") else type(judge)
    return str(own) if own else f"{kind.__module__}.{kind.__qualname__}"


def replies(judge: Judge, conversations: Sequence[Conversation]) -> Iterator[tuple[int, str | None]]:
    """(index, reply) of every conversation as they come, in any order.

    Raises InputError where a function fails, or a judge gives something other than text or None.
    """
    many = getattr(judge, "many", None)
    try:
        for index, reply in many(conversations) if many else ((i, judge(c)) for i, c in enumerate(conversations)):
            if not (reply is None or isinstance(reply, str)):
                raise InputError(f"judge {identity(judge)}: gave {type(reply).__name__}; it must give text or None")
            yield index, reply
    except SparringError:
        raise
    except Exception as error:
        what = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"judge {identity(judge)}: {what}; it must reply to any list of messages") from error


def rating(reply: str | None, lowest: float = 1, highest: float = 10) -> float | None:
    """The number in the first `[[x]]` of a judge's reply, else in the first `[x]`; None where there is none in range.

    Its thinking is left out. Source: FastChat's llm_judge (both patterns, first match), which however takes numbers
    outside of its scale and gives −1 where there is none.
    """
    said = _said(reply)
    found = _RATING.search(said) or _RATING_BACKUP.search(said)
    value = float(found[1]) if found else None
    return value if value is not None and lowest <= value <= highest else None


def verdict(reply: str | None) -> float | None:
    """What the first answer gets by `[[A]]`, `[[B]]` or `[[C]]`: 1, 0 or ½; None unless just one of them is there.

    Its thinking is left out.
    """
    found = set(_VERDICT.findall(_said(reply)))
    return {"A": 1.0, "B": 0.0, "C": 0.5}[found.pop()] if len(found) == 1 else None


def _said(reply: str | None) -> str:
    """A reply behind the thinking that it begins with, which may quote another's; nothing where that never ends."""
    said = (reply or "").lstrip()
    while True:
        begun = said.count("</think>") > said.count("<think>")  # some templates write the first one for it
        if not begun and not said.startswith("<think>"):
            return said
        depth = int(begun)
        for tag in _THINKING.finditer(said):
            depth += 1 if tag[0] == "<think>" else -1
            if depth == 0:
                break
        else:
            return said.rpartition("</think>")[2] if "</think>" in said else ""
        said = said[tag.end() :].lstrip()


def agreed(first: float | None, second: float | None) -> float | None:
    """What an answer gets from both orders: their word where they agree, else ½, a tie; None where either is None.

    first, second: what the first answer gets, in the order in which this one stood first and in the other.
    """
    if first is None or second is None:
        return None
    return first if first == 1 - second else 0.5
