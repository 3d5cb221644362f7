"""A player's answers and a judge's replies through a ledger: what is in it is not asked for again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sparring import progress
from sparring.evaluate.core import ROUND
from sparring.evaluate.ledger import Ledger, key_of
from sparring.evaluate.stats import Figure
from sparring.judge import replies as judges
from sparring.judge.replies import Judge
from sparring.play.chat import Chat, Reply
from sparring.types import Message


@dataclass(frozen=True)
class Asked:
    """One conversation and what the rows about it say besides."""

    messages: tuple[Message, ...]
    about: dict[str, Any]
    """Further columns of its row; they seed an answer, so no two of one evaluation are equal."""


def answers(
    chat: Chat, asked: Sequence[Asked], ledger: Ledger, *, seed: int, temperature: float, max_new_tokens: int,
    top_p: float = 1.0,
) -> list[Reply]:  # fmt: skip
    """The player's answer to every conversation, in order; new ones are written as their batch is done."""
    from sparring.play.hf import key as row_key

    settings = {"seed": seed, "temperature": temperature, "top_p": top_p, "max_new_tokens": max_new_tokens}
    keys = [key_of("answer", chat.identity, settings, one.about, _plain(one.messages)) for one in asked]
    missing = [i for i, key in enumerate(keys) if key not in ledger]
    with progress.shown("answers", len(missing), "answers") as did:
        new = chat.replies(
            [asked[i].messages for i in missing],
            [row_key(seed, ROUND, key_of(asked[i].about), 0) for i in missing],
            temperature=temperature,
            top_p=top_p,
            max_new_tokens=max_new_tokens,
        )
        for at, reply in new:
            i = missing[at]
            ledger.add(keys[i], player=chat.identity, **settings, **asked[i].about, **asdict(reply))
            did(1, reply.tokens)
    return [Reply(*(ledger[key][name] for name in ("text", "tokens", "finish"))) for key in keys]


def judgements(judge: Judge, asked: Sequence[Asked], ledger: Ledger) -> list[str | None]:
    """The judge's reply to every conversation, in order, None where it cannot reply; new ones are written as they come.

    Equal conversations are asked once; those without a reply are asked again by the next command.
    """
    who = judges.identity(judge)
    keys = [key_of("judgement", who, _plain(one.messages)) for one in asked]
    # What a server had no room for, it may have when it is started with a longer context
    missing = list({k: i for i, k in enumerate(keys) if k not in ledger or ledger[k]["reply"] is None}.values())
    with progress.shown("judgements", len(missing), "judgements") as did:
        new = judges.replies(judge, [asked[i].messages for i in missing])
        for at, reply in new:
            i = missing[at]
            if reply is not None or keys[i] not in ledger:
                ledger.add(keys[i], judge=who, **asked[i].about, messages=_plain(asked[i].messages), reply=reply)
            did(1, 0)
    return [ledger[key]["reply"] for key in keys]


def described(replies: Sequence[Reply]) -> Figure:
    """How many answers, how many of them empty, cut at the limit or without room; their mean length in tokens."""
    finish = Counter(reply.finish for reply in replies)
    return {
        "n": len(replies),
        "empty": sum(not reply.text for reply in replies),
        "cut": finish["length"],
        "no_room": finish["no room"],
        "tokens": sum(reply.tokens for reply in replies) / max(1, len(replies)),
    }


def shown(figure: Figure | None, scale: float = 1.0) -> str:
    """A mean with its standard error and n."""
    if figure is None or figure["mean"] is None:
        return "–"
    error = "" if figure["se"] is None else f" ± {figure['se'] * scale:.2f}"
    return f"{figure['mean'] * scale:.2f}{error} (n = {figure['n']})"


def judgements_line(result: Figure) -> str:
    """How many of the judge's replies there are, and how many are none."""
    unread, unanswered = result["unread"], result["unanswered"]
    return f"judgements: {result['judgements']}, of which {unread} could not be read and {unanswered} not given"


def _plain(messages: Sequence[Message]) -> list[list[str]]:
    return [[message.role, message.content] for message in messages]
