"""One row to one `Example`: every format becomes a list of turns, and an assistant turn, mostly the last, is the answer."""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

from sparring.data.files import BadRow, kind, show
from sparring.errors import InputError
from sparring.nearest import nearest
from sparring.types import Example, Message

if TYPE_CHECKING:
    from sparring.config import DataConfig

Which = Literal["last", "first"]
"""Of a conversation's answers."""

FORMATS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "messages": {"messages": ("messages",)},
    "prompt_completion": {"prompt": ("prompt",), "completion": ("completion", "response")},
    "question_answer": {"prompt": ("question",), "completion": ("answer",)},
    "alpaca": {"prompt": ("instruction",), "completion": ("output", "response")},
    "sharegpt": {"messages": ("conversations",)},
    "spin": {"messages": ("real",)},
    "preference": {
        "prompt": ("prompt", "question", "instruction"),
        "completion": ("chosen",),
        "generated": ("rejected",),
    },
}
"""Format to the columns it needs, ours to the names people use; `system` and `generated` may stand beside any."""

_OPTIONAL = {("preference", "prompt")}

_KEYS = ("prompt", "completion", "system", "messages", "generated")
_ROLES = {"human": "user", "gpt": "assistant"}
_ROLE = re.compile(r"[A-Za-z][\w-]{0,31}")
"""Templates write roles out, so one with `|>` in it could close the turn it names."""
_BESIDE = ("tool_calls", "function_call", "reasoning_content", "thinking")
"""What some turns say beside their content; templates write it in their own ways."""
_SPEAKERS = ("human", "gpt", "system", "user", "assistant")
_WAY_OUT = "name yours with data.columns.prompt=… and data.columns.completion=… (or data.columns.messages=…)"


@dataclass(frozen=True)
class Layout:
    """Which column of a row is which: either `messages`, or `prompt` and `completion`; a preference may lack `prompt`."""

    messages: str | None
    prompt: str | None
    completion: str | None
    input: str | None
    """Alpaca's second half of the prompt."""
    system: str
    generated: str
    preference: bool
    """Whether the row is a pair: `completion` was chosen, `generated` rejected."""


def check_columns(config: DataConfig) -> None:
    """Refuse a column map that no format can use. Raises InputError."""
    for key in config.columns:
        if key not in _KEYS:
            near, known = nearest(key, _KEYS), ", ".join(_KEYS)
            raise InputError(f"data.columns.{key}: unknown column; the nearest is `{near}`; known are {known}")
    candidates = _candidates(config.format, config.columns)
    for key in ("prompt", "completion", "messages"):
        if key in config.columns and not any(key in FORMATS[name] for name in candidates):
            raise InputError(
                f"data.columns.{key}: format {candidates[0]} has no such column; leave it out or set data.format"
            )


def parse(row: Mapping[str, Any] | BadRow, where: str, config: DataConfig) -> Example:
    """Turn a row into an example; columns that are not used go to `meta`. Raises BadRow: what is wrong with it."""
    if isinstance(row, BadRow):
        raise row
    columns = layout(frozenset(row), config.format, tuple(sorted(config.columns.items())))
    if columns.preference and config.turns == "first":
        raise InputError("data.turns: first: a preference's answers are its last turns; leave it out")
    turns = _chosen(row, columns) if columns.preference else _turns(row, columns, config.turns)
    gold = turns.pop()
    if config.gold_only:
        answer = None
    elif columns.preference:
        answer = _rejected(row, columns, turns)
    else:
        answer = _generated(row, columns, turns, config.turns)
    turns = _with_system(row.get(columns.system), columns.system, turns)
    used = {*vars(columns).values()}
    try:
        meta = {_text(key, "a column's name"): _plain(value, key) for key, value in row.items() if key not in used}
    except RecursionError:
        raise BadRow("a column is nested too deeply") from None
    # Two pairs may differ in what was rejected alone, and are no duplicates
    pair = [gold.content, answer] if columns.preference and answer is not None else [gold.content]
    return Example(content_id([prompt_identity(turns), *pair]), tuple(turns), gold.content, answer, meta, where)


def prompt_identity(messages: Sequence[Message]) -> list[tuple[str, str]]:
    """What makes two prompts the same: roles and texts."""
    return [(message.role, message.content) for message in messages]


def content_id(value: Any) -> str:
    """24 hex digits of the sha256 of a value's compact ASCII JSON: the same on every machine."""
    return hashlib.sha256(json.dumps(value, separators=(",", ":")).encode()).hexdigest()[:24]


def _candidates(form: str, names: Mapping[str, str]) -> tuple[str, ...]:
    if form != "auto":
        return (form,)
    if "messages" in names:
        return ("messages",)
    if {"prompt", "completion"} <= names.keys():
        return ("prompt_completion",)
    # With a `completion` or `generated` of its own, a row may have `chosen` and `rejected` for another reason
    return tuple(name for name in FORMATS if name != "preference" or not {"completion", "generated"} & names.keys())


@lru_cache(maxsize=256)
def layout(columns: frozenset[str], form: str, mapped: tuple[tuple[str, str], ...]) -> Layout:
    """Tell from a row's column names which is which. Raises BadRow where none or several formats fit."""
    names = dict(mapped)
    formats = {
        name: {key: (names[key],) if key in names else usual for key, usual in FORMATS[name].items()}
        for name in _candidates(form, names)
    }
    found: dict[Layout, str] = {}
    for name, wanted in formats.items():
        present: dict[str, list[str | None]] = {
            key: [c for c in usual if c in columns] for key, usual in wanted.items()
        }
        missing = {key: [None] for key, there in present.items() if not there and (name, key) in _OPTIONAL}
        for choice in itertools.product(*(present | missing).values()):
            part = dict(zip(wanted, choice, strict=True))
            fit = Layout(
                messages=part.get("messages"),
                prompt=part.get("prompt"),
                completion=part.get("completion"),
                input="input" if name == "alpaca" and "input" in columns else None,
                system=names.get("system", "system"),
                generated=part.get("generated") or names.get("generated", "generated"),
                preference=name == "preference",
            )
            found[fit] = f"{name}: {' + '.join(show(column) for column in choice if column is not None)}"
    if any(fit.preference for fit in found):  # UltraFeedback repeats the chosen conversation in `messages`
        found = {fit: what for fit, what in found.items() if fit.messages is None}
    if len(found) > 1:
        raise BadRow(f"several formats or columns fit ({'; '.join(found.values())}): set data.format, or {_WAY_OUT}")
    if not found:
        raise BadRow(_no_format(columns, formats))
    return next(iter(found))


def _no_format(columns: frozenset[str], formats: Mapping[str, Mapping[str, tuple[str, ...]]]) -> str:
    if not columns:
        return "the row has no columns"
    known = sorted({name for wanted in formats.values() for usual in wanted.values() for name in usual})
    prompts = sorted({name for wanted in formats.values() for name in wanted.get("prompt", ()) if name in columns})
    near_ones = [
        f"{show(near[0])} for {show(theirs)}"
        for theirs in sorted(columns - set(known))
        if (near := difflib.get_close_matches(theirs.lower(), known, 1))
    ]
    shown = ", ".join(map(show, sorted(columns)[:12])) + (", …" if len(columns) > 12 else "")
    needs = (
        f"{name} ({' + '.join('|'.join(usual) for key, usual in wanted.items() if (name, key) not in _OPTIONAL)})"
        for name, wanted in formats.items()
    )
    parts = [
        f"no answer column beside {show(prompts[0])}: found {shown}" if prompts else f"no known format: found {shown}",
        *([f"the nearest known are {', '.join(near_ones)}"] if near_ones else []),
        f"formats are {', '.join(needs)}",
        _WAY_OUT,
    ]
    return "; ".join(parts)


def _turns(row: Mapping[str, Any], columns: Layout, which: Which) -> list[Message]:
    """The conversation up to and including its last or first assistant turn, which holds text, as does the prompt."""
    if columns.messages is not None:
        column = columns.messages
        turns = _conversation(row[column], column)
    else:
        assert columns.prompt is not None and columns.completion is not None
        column = columns.completion
        turns = _side(_prompt(row, columns), columns.prompt, "user") + _side(row[column], column, "assistant")
    return _full(turns[: _assistant(turns, column, which) + 1], columns.prompt or column, column, which)


def _full(turns: list[Message], prompt: str, column: str, which: Which = "last") -> list[Message]:
    """The turns, if there is text in the last of them and in some of those before."""
    if not turns[-1].content.strip():
        raise BadRow(f"no answer: the {which} assistant turn of {show(column)} is empty")
    if not any(turn.content.strip() for turn in turns[:-1] if turn.role != "system"):
        raise BadRow(f"empty prompt: nothing is said in {show(prompt)} before the answer")
    return turns


def _chosen(row: Mapping[str, Any], columns: Layout) -> list[Message]:
    """The prompt of a preference and, last, its chosen answer."""
    assert columns.completion is not None
    column = columns.completion
    turns = _answered(row[column], column)
    given = None if columns.prompt is None else row[columns.prompt]
    if _absent(given):
        if len(turns) == 1:
            raise BadRow(
                f"empty prompt: {show(columns.prompt or 'prompt')} is empty, and {show(column)} is an answer alone"
            )
        return _full(turns, column, column)
    assert columns.prompt is not None
    prompt = _side(given, columns.prompt, "user")
    if len(turns) > 1 and not _told_in(prompt, turns[:-1]):
        raise BadRow(f"{show(column)} answers another prompt than {show(columns.prompt)}; keep one of them")
    return _full(turns if len(turns) > 1 else [*prompt, *turns], columns.prompt, column)


def _rejected(row: Mapping[str, Any], columns: Layout, prompt: Sequence[Message]) -> str:
    """A preference's rejected answer, which may come with its prompt as the chosen one may."""
    column = columns.generated
    turns = _answered(row[column], column)
    if len(turns) > 1 and turns[:-1] != list(prompt):
        raise BadRow(f"{show(column)} answers another prompt than {show(columns.completion or '')}; drop the row")
    if not turns[-1].content.strip():
        raise BadRow(f"no answer: the last assistant turn of {show(column)} is empty")
    return turns[-1].content


def _answered(value: Any, column: str) -> list[Message]:
    """One side of a preference: an answer, or a conversation that ends in one."""
    turns = _side(value, column, "assistant")
    if turns[-1].role != "assistant":
        raise BadRow(f"no answer: the last turn of {show(column)} is by {show(turns[-1].role)}, not the assistant")
    return turns


def _told_in(prompt: Sequence[Message], turns: Sequence[Message]) -> bool:
    """Whether a prompt is part of a conversation, which may add a system turn or later ones."""
    wanted, told = ([(turn.role, turn.content.strip()) for turn in side] for side in (prompt, turns))
    return any(told[i : i + len(wanted)] == wanted for i in range(len(told)))


def _assistant(turns: Sequence[Message], column: str, which: Which = "last") -> int:
    places = [index for index, turn in enumerate(turns) if turn.role == "assistant"]
    if not places:
        raise BadRow(f"no answer: {show(column)} has no assistant turn")
    return places[0 if which == "first" else -1]


def _prompt(row: Mapping[str, Any], columns: Layout) -> Any:
    value = row[columns.prompt or ""]
    extra = row[columns.input] if columns.input else None
    if _absent(extra):
        return value
    second = _text(extra, show(columns.input or ""))
    return second if _absent(value) else _text(value, show(columns.prompt or "")) + "\n\n" + second


def _side(value: Any, column: str, role: str) -> list[Message]:
    """A prompt or completion: a text is one turn, a list is its turns."""
    if _absent(value):
        raise BadRow(f"{'empty prompt' if role == 'user' else 'no answer'}: {show(column)} is empty")
    if not isinstance(value, list):
        return [Message(role, _text(value, show(column)))]
    turns = _conversation(value, column)
    if role == "assistant":
        _assistant(turns, column)
    return turns


def _conversation(value: Any, column: str) -> list[Message]:
    if _absent(value):
        raise BadRow(f"no answer: {show(column)} is empty")
    if not isinstance(value, list):
        raise BadRow(f"{show(column)} is {kind(value)}, not a list of turns")
    return [_turn(turn, f"turn {number} of {show(column)}") for number, turn in enumerate(value, 1)]


def _turn(turn: Any, what: str) -> Message:
    if not isinstance(turn, dict):
        raise BadRow(f"{what} is {kind(turn)}, not an object with `role` and `content`")
    if beside := next((key for key in _BESIDE if turn.get(key) and not _absent(turn[key])), None):
        raise BadRow(f"{what} has {show(beside)}, of which nothing is read; write it into the content")
    sharegpt = "from" in turn and "role" not in turn
    role_key, text_key = ("from", "value") if sharegpt else ("role", "content")
    if role_key not in turn or text_key not in turn:
        keys = ", ".join(map(show, turn)) or "nothing"
        raise BadRow(f"{what} needs `role` and `content` (or `from` and `value`); it has {keys}")
    role = _text(turn[role_key], f"`{role_key}` in {what}")
    if sharegpt and role not in _SPEAKERS:
        raise BadRow(f"{what} is from {show(role)}; known are {', '.join(_SPEAKERS)}")
    if not _ROLE.fullmatch(role):
        raise BadRow(f"{what} has the role {show(role)}; a role is one plain word")
    return Message(_ROLES.get(role, role), _text(turn[text_key], f"`{text_key}` in {what}"))


def _generated(row: Mapping[str, Any], columns: Layout, prompt: Sequence[Message], which: Which) -> str | None:
    """The answer that came with the row; SPIN writes it as a conversation with the same prompt."""
    column = columns.generated
    value = row.get(column)
    if _absent(value):
        return None
    if not isinstance(value, list):
        return _text(value, show(column))
    turns = _conversation(value, column)
    at = _assistant(turns, column, which)
    if at and turns[:at] != list(prompt):
        raise BadRow(f"{show(column)} answers another prompt than the gold answer; data.gold_only=true ignores it")
    return turns[at].content if turns[at].content.strip() else None


def _with_system(value: Any, column: str, turns: list[Message]) -> list[Message]:
    if _absent(value):
        return turns
    system = Message("system", _text(value, show(column)))
    if turns[0].role != "system":
        return [system, *turns]
    if turns[0] != system:
        raise BadRow(f"two system prompts: {show(column)} and the first turn differ; keep one of them")
    return turns


def _absent(value: Any) -> bool:
    """None, blank text, an empty list, or the NaN that stands for none in many a Parquet file."""
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, float) and math.isnan(value)) or value == []


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise BadRow(f"{what} is {kind(value)}, not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadRow(f"{what} holds a lone surrogate at character {error.start + 1}, which UTF-8 cannot hold") from None
    return value


def _plain(value: Any, column: str) -> Any:
    """A value that JSON can hold: NaN becomes None, dates and the like become text."""
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, (list, tuple)):
        return [_plain(item, column) for item in value]
    if isinstance(value, dict):
        return {_text(key, show(column)): _plain(item, column) for key, item in value.items()}
    return _text(value if isinstance(value, str) else str(value), show(column))
