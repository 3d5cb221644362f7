"""The process in which model-written SQL runs: a request per line on stdin, its result per line on stdout, as JSON.

Run as a file, with the standard library alone. A request holds `database` (a file URI), `statement` and the limits
`steps`, `seconds`, `rows`, `size`; the result is `{"columns": n, "rows": [...]}` or `{"error": why}`. Nothing that a
statement says can write: the file is opened read-only, the authorizer lets pass what SELECT needs and nothing else,
and the process may not make a file grow.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import sys
import time
from collections.abc import Callable
from typing import Any

ALLOWED = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}
FORBIDDEN = {"load_extension", "fts3_tokenizer", "readfile", "writefile", "edit"}
"""Functions that reach beyond the database, where a build of SQLite has them."""
LIMITS = {
    sqlite3.SQLITE_LIMIT_LENGTH: 10_000_000,  # bytes of one value or row: randomblob(1e9) is refused
    sqlite3.SQLITE_LIMIT_SQL_LENGTH: 100_000,
    sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH: 1000,
    sqlite3.SQLITE_LIMIT_ATTACHED: 0,
}
HEAP = 256 * 2**20
"""Bytes that SQLite may hold; the process may map four times that."""
CALLBACK = 1000
"""Virtual-machine steps between two looks at the clock."""


def confine(limit: str, value: int) -> None:
    """Set one of the process's own limits. Where the platform lacks it, SQLite's and the parent's clock remain."""
    with contextlib.suppress(ImportError, AttributeError, ValueError, OSError):
        import resource

        which = getattr(resource, limit)
        resource.setrlimit(which, (value, resource.getrlimit(which)[1]))


def authorize(action: int, first: str | None, second: str | None, *_: str | None) -> int:
    """SQLite's question, at every part of a statement, whether it may be."""
    if action not in ALLOWED or (action == sqlite3.SQLITE_FUNCTION and second in FORBIDDEN):
        return sqlite3.SQLITE_DENY
    return sqlite3.SQLITE_OK


def watch(steps: int, seconds: float) -> Callable[[], bool]:
    """A progress handler that says when a statement has gone on for too long."""
    end = time.monotonic() + seconds
    calls = 0

    def over() -> bool:
        nonlocal calls
        calls += 1
        return calls * CALLBACK > steps or time.monotonic() > end

    return over


def connect(uri: str) -> sqlite3.Connection:
    """A connection to the database file `uri` on which a statement can only read, within SQLite's own limits."""
    connection = sqlite3.connect(f"{uri}?mode=ro&immutable=1", uri=True, isolation_level=None)
    # Sorting must not need a file. Both come before the authorizer, which lets no PRAGMA pass.
    connection.execute("PRAGMA temp_store = MEMORY")
    connection.execute(f"PRAGMA hard_heap_limit = {HEAP}")
    for limit, value in LIMITS.items():
        connection.setlimit(limit, value)
    connection.text_factory = lambda raw: raw.decode("utf-8", "surrogateescape")
    connection.set_authorizer(authorize)
    return connection


def run(database: str, statement: str, *, steps: int, seconds: float, rows: int, size: int) -> dict[str, Any]:
    """Run one statement. Blobs come out as `{"blob": hex}`, other values as JSON has them."""
    found: list[list[Any]] = []
    held = 0
    with contextlib.closing(connect(database)) as connection:
        connection.set_progress_handler(watch(steps, seconds), CALLBACK)
        cursor = connection.execute(statement)
        if cursor.description is None:
            return {"error": "it gives no rows: not a SELECT"}
        for row in cursor:
            held += sum(16 + (len(cell) if isinstance(cell, (str, bytes)) else 0) for cell in row)
            if len(found) == rows or held > size:
                return {"error": f"the result has over {rows} rows or {size} bytes"}
            found.append([{"blob": cell.hex()} if isinstance(cell, bytes) else cell for cell in row])
        return {"columns": len(cursor.description), "rows": found}


def reply(request: dict[str, Any]) -> dict[str, Any]:
    """The result of a request, errors included."""
    # Should the parent die, a statement that SQLite cannot interrupt still ends.
    confine("RLIMIT_CPU", int(time.process_time() + request["seconds"]) + 2)
    try:
        return run(**request)
    except (sqlite3.Error, sqlite3.Warning, ValueError) as error:
        return {"error": str(error)}
    except MemoryError:
        return {"error": "out of memory"}


def main() -> None:
    """Say that it is ready, then answer until stdin ends."""
    for limit, value in (("RLIMIT_FSIZE", 0), ("RLIMIT_CORE", 0), ("RLIMIT_AS", 4 * HEAP)):
        confine(limit, value)
    os.write(1, b"ready\n")
    for line in sys.stdin.buffer:
        sys.stdout.buffer.write(json.dumps(reply(json.loads(line))).encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
