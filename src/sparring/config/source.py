"""Where a recipe's values came from: every complaint about one names its line or the override that set it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import yaml

from sparring.config import SECTIONS
from sparring.errors import InputError
from sparring.nearest import nearest

Keys = tuple[str | int, ...]


@dataclass(frozen=True)
class Source:
    """Where a recipe's values came from, for error messages."""

    file: Path | None = None
    overrides: Sequence[str] = ()

    def at(self, keys: Keys) -> str:
        """The override that set a key, else `recipe.yaml:12: `, else the file's name, else nothing."""
        for assignment in reversed(self.overrides):
            if _sets(assignment.partition("=")[0].split("."), [str(key) for key in keys]):
                return f"`{assignment}`: "
        if self.file is None or not self.file.exists():
            return ""
        line = _line(yaml.compose(self.file.read_text(encoding="utf-8")), keys)
        return f"{self.file}:{line}: " if line else f"{self.file}: "

    def fail(self, keys: Keys, problem: str) -> NoReturn:
        """Raises InputError: what is wrong with a key's value, and where it was set."""
        raise InputError(f"{self.at(keys)}{_dotted(keys)}: {problem}")

    def unknown(self, keys: Keys, known: Iterable[str]) -> NoReturn:
        """Raises InputError for a key that does not exist, naming the nearest known one."""
        self.fail(keys, f"unknown key; the nearest is `{_dotted((*keys[:-1], nearest(str(keys[-1]), known)))}`")


def _sets(assigned: Sequence[str], keys: Sequence[str]) -> bool:
    """Whether an override's keys set the value at `keys`, lie in it, or name a hyper-parameter of its rounds."""
    shared = min(len(assigned), len(keys))
    by_method = keys[0] == "rounds" and len(assigned) == 2 and len(keys) == 3 and assigned[1] == keys[2]
    return list(assigned[:shared]) == list(keys[:shared]) or (by_method and assigned[0] not in SECTIONS)


def _dotted(keys: Keys) -> str:
    return ".".join(map(str, keys))


def _line(node: yaml.Node | None, keys: Keys) -> int | None:
    """The line that holds a key, or as much of its path as is there."""
    line: int | None = None
    for key in keys:
        if isinstance(node, yaml.MappingNode):
            match = [(k, v) for k, v in node.value if k.value == str(key)]
            if not match:
                break
            line, node = match[0][0].start_mark.line + 1, match[0][1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(key, int) and key < len(node.value):
            node, line = node.value[key], node.value[key].start_mark.line + 1
    return line
