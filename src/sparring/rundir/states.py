"""A round's `train/` folder: log lines, and the state from which a killed training goes on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from sparring.rundir.store import sync, whole, write_json, write_text
from sparring.types import Group

if TYPE_CHECKING:
    from torch import Tensor


class TrainStates:
    """A round's `train/` folder: log lines and resumable states of one training (`train.States`)."""

    def __init__(self, folder: Path, key: str) -> None:
        self.folder = folder
        self._key = key
        self._log = folder / "log.jsonl"

    def load(self) -> tuple[int, dict[str, Tensor]] | None:
        """The last saved state, or None for a fresh start; log lines past it are dropped."""
        from sparring.rundir.shards import read_state

        self.begin()
        state = read_state(self.folder / "state")
        self.keep(state[0] if state else 0, int(state[1]["backoffs"]) if state else 0)
        return state

    def begin(self) -> None:
        """Make the folder; what is there of a stage made in another way goes."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / "key").exists() or (self.folder / "key").read_text() != self._key:
            shutil.rmtree(self.folder)
            self.folder.mkdir()
            write_text(self.folder / "key", self._key)

    def save(self, step: int, tensors: dict[str, Tensor]) -> None:
        """Keep the state after a step, in place of the one before."""
        import torch
        from safetensors.torch import save_file

        file = self.folder / "state" / "last.safetensors"
        file.parent.mkdir(exist_ok=True)
        self.sync_log()
        with whole(file) as temporary:
            save_file({k: v.contiguous() for k, v in tensors.items()} | {"step": torch.tensor(step)}, str(temporary))
        for shards in file.parent.glob("*-*"):
            shutil.rmtree(shards)

    def log(self, row: dict[str, float]) -> None:
        """Append a line to the training log."""
        with self._log.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")

    def sync_log(self) -> None:
        """Before a state is kept: after a power cut the log must reach as far as that."""
        if self._log.exists():
            sync(self._log)

    def keep_batch(self, step: int, groups: Sequence[Group]) -> str:
        """Write the groups of a step that went wrong; returns where."""
        path = self.folder / f"nonfinite_step_{step + 1:06d}.json"
        write_json(path, [asdict(group) for group in groups])
        return str(path)

    def drop_state(self) -> None:
        """Delete the saved state of a training that is done; the log stays."""
        shutil.rmtree(self.folder / "state", ignore_errors=True)

    def keep(self, step: int, backoffs: int) -> None:
        """Drop the log lines past a state."""
        if self._log.exists():
            rows = [r for r in read_log(self._log) if r["step"] <= step and r.get("backoff", 0) <= backoffs]
            write_text(self._log, "".join(json.dumps(row) + "\n" for row in rows))


def read_log(path: Path) -> list[dict[str, float]]:
    """The rows of a training log, one per step and one (with `backoff`) wherever a guard went back; a last line cut by a
    kill is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
