"""SQL by its result: gold and answer are run on the row's SQLite database, where neither can change anything."""

from __future__ import annotations

import atexit
import contextlib
import json
import math
import os
import re
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from sparring.errors import InputError, SparringError
from sparring.types import Example

COLUMNS = ("db", "db_path", "database")
"""Columns that may name a row's database."""
SUFFIXES = (".sqlite", ".sqlite3", ".db")
_PLACE = re.compile(r"(?::\d+|\[\d+\])\Z")
_PREFIX = re.compile(r"\A\s*(?:(?:sqlite|sql)\b\s*:?\s*)*", re.IGNORECASE)
_QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"|`[^`]*`|\[[^\]]*\]|--[^\n]*|/\*.*?(?:\*/|\Z)", re.DOTALL)
_ORDER = re.compile(r"[()]|\bORDER\s+BY\b", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Limits:
    """How far one statement may go."""

    steps: int = 200_000_000
    """Steps of SQLite's virtual machine: some seconds, and the same verdict on every machine."""
    seconds: float = 20.0
    """Wall-clock time, for what takes long in few steps."""
    rows: int = 10_000
    """Rows of the result."""
    size: int = 10_000_000
    """Bytes of the result, 16 counted for each cell."""


LIMITS = Limits()


@dataclass(frozen=True, slots=True)
class Table:
    """A statement's result."""

    columns: int
    rows: tuple[tuple[Any, ...], ...]
    """Cells are int, float, str, None, or bytes."""


class QueryError(Exception):
    """A statement that fails, is refused, or goes beyond a limit."""


def sql(example: Example, answer: str) -> bool | None:
    """Whether the answer's result on the row's database has the rows of the gold answer's, in any order.

    Rows count as often as they occur, cells are compared by position, numbers by value (a float to nine digits) and
    text letter by letter. The database is the file in column `db`, `db_path` or `database`, absolute or relative to
    the data file's folder, else the only `.sqlite`, `.sqlite3` or `.db` file there. An answer that fails, is not one
    SELECT, or goes beyond `LIMITS` is wrong; None where that is so of the gold answer. Raises InputError: no database.
    """
    return _judge(example, answer, ordered=False)


def sql_ordered(example: Example, answer: str) -> bool | None:
    """Like `sql`, but where the gold answer has a top-level ORDER BY, the rows must come in the same order, ties too."""
    return _judge(example, answer, ordered=True)


def _judge(example: Example, answer: str, *, ordered: bool) -> bool | None:
    database = database_of(example)
    statement = statement_in(example.gold or "")
    status = database.stat()
    gold = _gold(database, statement, (status.st_mtime_ns, status.st_size))
    if gold is None:
        return None
    try:
        found = execute(database, statement_in(answer))
    except QueryError:
        return False
    return same_table(gold, found, ordered=ordered and has_order(statement))


@lru_cache(maxsize=64)  # the answers to one prompt come one after another
def _gold(database: Path, statement: str, version: tuple[int, int]) -> Table | None:
    try:
        return execute(database, statement)
    except QueryError:
        return None


def database_of(example: Example) -> Path:
    """The row's database file. Raises InputError: none named, no such file, not SQLite, or with a write-ahead log."""
    where = example.source or f"example {example.id}"
    folder = Path(_PLACE.sub("", example.source)).parent
    column = next((name for name in COLUMNS if example.meta.get(name)), None)
    if column is None:
        beside = sorted(path for path in folder.glob("*") if path.suffix.lower() in SUFFIXES) if example.source else []
        if len(beside) != 1:
            raise InputError(
                f"{where}: no column `db`: name the row's SQLite file there, or put just one beside the data"
            )
        path = beside[0]
    else:
        path = folder / Path(str(example.meta[column])).expanduser()
        if not path.is_file():
            raise InputError(f"{where}: no database {path}; mend column `{column}`: a path relative to the data file")
    with path.open("rb") as file:
        if file.read(16) != b"SQLite format 3\0":
            raise InputError(f"{where}: {path} is not an SQLite database; name one in column `db`")
    log = path.with_name(f"{path.name}-wal")
    if log.exists() and log.stat().st_size:
        raise InputError(
            f"{where}: {log} holds changes that a read-only look misses; run PRAGMA wal_checkpoint(TRUNCATE)"
        )
    return path.resolve()


def statement_in(text: str) -> str:
    """The statement of an answer: what the first ``` fence holds, else all, without `SQL:` before or `;` behind."""
    parts = text.split("```", 2)
    return _PREFIX.sub("", parts[1] if len(parts) > 1 else text).rstrip(" \t\r\n;")


def has_order(statement: str) -> bool:
    """Whether a statement orders its result: ORDER BY outside of brackets, quotes and comments."""
    depth = 0
    for found in _ORDER.findall(_QUOTED.sub(" ", statement)):
        depth += {"(": 1, ")": -1}.get(found, 0)
        if depth == 0 and found not in "()":
            return True
    return False


def same_table(one: Table, other: Table, *, ordered: bool = False) -> bool:
    """Whether two results hold the same rows, as often; with `ordered`, in the same order."""
    if one.columns != other.columns or len(one.rows) != len(other.rows):
        return False
    cells = [
        _classes([*a, *b]) for a, b in zip(zip(*one.rows, strict=True), zip(*other.rows, strict=True), strict=True)
    ]
    rows = list(zip(*cells, strict=True))
    ours, theirs = rows[: len(one.rows)], rows[len(one.rows) :]
    return ours == theirs if ordered else Counter(ours) == Counter(theirs)


def _classes(column: Sequence[Any]) -> list[Any]:
    """Each cell's class: itself, or for a number the first in a chain of neighbours that are equal to nine digits.

    Rounding instead would part two floats at the border between two digits.
    """
    numbers = sorted({cell for cell in column if isinstance(cell, (int, float))})
    leader: dict[float, float] = {}
    for last, number in zip([None, *numbers], numbers, strict=False):
        near = last is not None and _near(last, number)
        leader[number] = leader[last] if near and last is not None else number
    return [(True, leader[cell]) if isinstance(cell, (int, float)) else (False, cell) for cell in column]


def _near(one: float, other: float) -> bool:
    # Integers are exact: two counts of ten digits that differ by one are not the same count.
    return not (isinstance(one, int) and isinstance(other, int)) and math.isclose(one, other, abs_tol=1e-9)


def execute(database: Path, statement: str, limits: Limits = LIMITS) -> Table:
    """Run one SELECT in the process for it, where it can neither write nor go beyond `limits`. Raises QueryError."""
    request = {"database": database.resolve().as_uri(), "statement": statement, **asdict(limits)}
    result = _WORKER.ask(json.dumps(request).encode() + b"\n", limits.seconds + 2)
    if "error" in result:
        raise QueryError(result["error"])
    return Table(result["columns"], tuple(tuple(map(_cell, row)) for row in result["rows"]))


def _cell(value: Any) -> Any:
    return bytes.fromhex(value["blob"]) if isinstance(value, dict) else value


class _Worker:
    """The child process of `sqlworker.py`: started at the first statement, stopped when one does not end."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def ask(self, request: bytes, seconds: float) -> dict[str, Any]:
        """The reply to one request line; a request whose process has to be killed, or dies twice, is an error."""
        with self._lock:
            for _ in range(2):  # something else may have ended the process between two requests
                reply, late = self._exchange(request, seconds)
                if reply.endswith(b"\n"):
                    return dict(json.loads(reply))
                if late:
                    return {"error": "it took too long"}
            return {"error": "it ended its process: too much memory or time"}

    def _exchange(self, request: bytes, seconds: float) -> tuple[bytes, bool]:
        """What the process answers, nothing or a part where it died, and whether that was for the time it took."""
        process = self._started()
        assert process.stdin is not None and process.stdout is not None
        late = threading.Event()

        def kill() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(seconds, kill)
        timer.start()
        reply = b""
        try:
            process.stdin.write(request)
            process.stdin.flush()
            reply = process.stdout.readline()
        except BrokenPipeError:
            pass
        finally:
            # Joined, or the kill could meet the next request. A reply left unread by Ctrl-C would answer that one.
            timer.cancel()
            timer.join()
            if late.is_set() or not reply.endswith(b"\n"):
                self.stop()
        return reply, late.is_set()

    def _started(self) -> subprocess.Popen[bytes]:
        # A forked process would share its parent's conversation
        if self._process is not None and self._owner == os.getpid():
            return self._process
        command = [sys.executable, "-I", "-S", str(Path(__file__).with_name("sqlworker.py"))]
        pipe = subprocess.PIPE
        # A session of its own: Ctrl-C is for the parent, which finishes what it is at
        process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, cwd="/", start_new_session=True
        )
        self._process, self._owner = process, os.getpid()
        assert process.stdout is not None
        if process.stdout.readline() != b"ready\n":
            self.stop()
            raise SparringError("sql: its process does not start; `python -c 'import sqlite3'` may tell why")
        return process

    def stop(self) -> None:
        """End the process, if there is one."""
        process, self._process = self._process, None
        if process is None or self._owner != os.getpid():
            return
        process.kill()
        with contextlib.suppress(BrokenPipeError):
            process.communicate()


_WORKER = _Worker()
atexit.register(_WORKER.stop)
