"""What the tests of data share: rows, a writer, a reader, and the one-line error that a data set gives."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from sparring import data
from sparring.config import DataConfig
from sparring.errors import InputError
from sparring.types import Example, Message

SHARED = Path(__file__).parents[1].parent / "shared" / "data"

Q, A, G = "What is 2 + 3?", "5", "6"
TURNS = [{"role": "user", "content": Q}, {"role": "assistant", "content": A}]
WRONG = [{"role": "user", "content": Q}, {"role": "assistant", "content": G}]
USER = (Message("user", Q),)
SYSTEM = Message("system", "Be brief.")


def jsonl(path: Path, *rows: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def qa(count: int, start: int = 0) -> list[dict[str, str]]:
    return [{"question": f"q{i}", "answer": f"a{i}"} for i in range(start, start + count)]


def read(path: Path, **settings: Any) -> list[Example]:
    """The examples in file order."""
    loaded = data.load(DataConfig(path=str(path), **{"heldout_size": 0, **settings}), seed=0)
    return sorted(loaded.train, key=lambda e: [int(n) for n in re.findall(r"\d+", e.source.rsplit("/", 1)[-1])])


def failure(path: Path | str, **settings: Any) -> str:
    with pytest.raises(InputError) as caught:
        data.load(DataConfig(path=str(path), **{"heldout_size": 0, **settings}), seed=0)
    message = str(caught.value)
    assert "\n" not in message
    message.encode()  # it must reach a terminal
    return message
