"""Methods and verifiers of the user's own: `./file.py:name` or an entry point."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
import traceback
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from sparring.errors import InputError
from sparring.nearest import nearest


def is_file_reference(reference: str) -> bool:
    """Whether a name is `path.py:name`."""
    return ".py:" in reference


def load_object(reference: str) -> Any:
    """Import `name` from `./file.py:name`. Raises InputError: no such file, no such name, or the file's own error."""
    path, name = _split(reference)
    own = f"sparring_plugin_{path.stem}_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(own, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # A dataclass looks its own module up by name
    sys.modules[own] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[own]
        raise InputError(f"{located(error, path)}: fails when imported; mend the file") from error
    if not hasattr(module, name):
        known = [found for found in vars(module) if not found.startswith("__")]
        near = f"; the nearest is `{nearest(name, known)}`" if known else ""
        raise InputError(f"{reference}: {path} defines no `{name}`{near}")
    return getattr(module, name)


def located(error: Exception, path: Path) -> str:
    """`file.py:12: ValueError: message`: an error with the last line of `path` that led to it."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == path]
    line = error.lineno if isinstance(error, SyntaxError) and not lines else (lines or [None])[-1]
    what = error.msg if isinstance(error, SyntaxError) else " ".join(str(error).split())
    return f"{path}{f':{line}' if line else ''}: {type(error).__name__}: {what}"


def source_hash(reference: str) -> str:
    """sha256 of the file behind `./file.py:name`, for provenance and a stage's identity."""
    return hashlib.sha256(_split(reference)[0].read_bytes()).hexdigest()


def identity(reference: str) -> str:
    """A reference without its folder but with its source's hash: what goes into a stage's identity."""
    return (
        f"{reference.rpartition('/')[2]}@{source_hash(reference)[:16]}" if is_file_reference(reference) else reference
    )


def entry_point(group: str, name: str) -> Any | None:
    """The object an installed package offers under `name`, or None. Raises InputError where it does not load."""
    found = [point for point in entry_points(group=group) if point.name == name]
    try:
        return found[0].load() if found else None
    except Exception as error:
        raise InputError(f"{name} ({found[0].value}): {type(error).__name__}: {error}; mend or reinstall it") from error


def entry_point_names(group: str) -> list[str]:
    """Names that installed packages offer."""
    return sorted(point.name for point in entry_points(group=group))


def _split(reference: str) -> tuple[Path, str]:
    file, _, name = reference.rpartition(":")
    path = Path(file).expanduser()
    if not path.is_file():
        raise InputError(f"{reference}: no such file: {path}; write ./file.py:name")
    return path, name
