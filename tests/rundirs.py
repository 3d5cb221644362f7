"""What tests of the run directory share: which stages were done again, refusals, and faults while writing."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

import sparring
from helpers import tree_hash
from sparring.errors import InputError

needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="names open files by /proc")


def records(run: Path) -> dict[str, int]:
    """Folder of each finished stage to the inode of its record: a stage done again has another."""
    found = [p for p in run.glob("**/stage.json") if "superseded" not in p.parts and p.parent.suffix != ".partial"]
    return {str(p.parent.relative_to(run)): p.stat().st_ino for p in found}


def refused(run: Any, *overrides: str) -> list[str]:
    """The lines about stages of the error that a changed setting gives; the run is untouched."""
    path = Path(run["run"] if isinstance(run, dict) else run)
    before = tree_hash(path)
    with pytest.raises(InputError) as caught:
        sparring.run(run, overrides)
    assert tree_hash(path) == before
    first, *lines = str(caught.value).splitlines()
    assert first.endswith("the settings changed; these stages would have to be done again (nothing was changed):")
    assert f"sparring fork {path} NEW" in lines[-2] and "--redo" in lines[-1]
    return [line.strip() for line in lines[:-2]]


def interrupt(patch: pytest.MonkeyPatch, where: str, name: str, error: BaseException) -> None:
    """`error` at the first fsync of a file `name` below a folder `where`, once."""
    fsync, seen = os.fsync, []

    def failing(handle: int) -> None:
        path = os.readlink(f"/proc/self/fd/{handle}")
        if not seen and where in path and path.endswith(name):
            seen.append(path)
            raise error
        fsync(handle)

    patch.setattr(os, "fsync", failing)
