"""The run directory: the only writer of run files.

A stage's folder is whole or absent: it is made as `NAME.partial` and renamed when its last file is on disk. Beside its
rows it holds `stage.json`: its key (`plan.py`), settings, inputs, and once it is finished its counts and seconds.
No file is ever changed in place, because forks share files by hard link: every writer makes a new one and renames it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from sparring.config import Tree
from sparring.errors import BusyError, InputError
from sparring.plan import FORMAT, Stage
from sparring.players import looks_local
from sparring.rundir.states import TrainStates
from sparring.rundir.store import read_json, sync, write_json, write_text
from sparring.types import Player

Counts = Mapping[str, Any]
TRACK = "track"
"""Where trackers keep what is theirs (`sinks.py`)."""
COLOURS = "colours"
"""Log-probs that `sparring report --tokens` computed, a row per answer and player (`report/rescore.py`)."""
_OURS = ("config.yaml", "data", "start", "best", "superseded")


@dataclass(frozen=True)
class Touched:
    """A stage on disk that the present settings would make differently."""

    folder: str
    reasons: tuple[str, ...]


class RunDir:
    """One self-play run on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lock_handle: int | None = None
        """The descriptor by which this process holds the run, while it does."""

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run, whose folder is made where there is none: a second process fails at once.

        The system frees the lock of a killed process. Raises BusyError; InputError where the folder cannot be written
        or holds something else.
        """
        self._make_folder()
        with open(self.path / "lock", "a+", encoding="utf-8") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                stream.seek(0)
                holder = stream.readline().strip() or "another process"
                raise BusyError(f"{self.path}: in use by {holder}") from None
            stream.truncate(0)
            stream.write(f"process {os.getpid()} on {socket.gethostname()}\n{began(os.getpid())}")
            stream.flush()
            self.lock_handle = stream.fileno()
            try:
                yield
            finally:
                self.lock_handle = None
                stream.truncate(0)

    def record(self, recipe: Tree, env: Mapping[str, Any], start: Player) -> None:
        """Write down what the run is made from; the environment is that of its first process."""
        if not (self.path / "env.json").exists():
            write_json(self.path / "env.json", {"format": FORMAT, **env})
        write_text(self.path / "config.yaml", yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True))
        (self.path / "start").mkdir(exist_ok=True)
        write_json(self.path / "start" / "player.json", asdict(start))

    def done(self, stage: Stage) -> bool:
        """Whether a stage is finished, whatever its settings were."""
        return (self.path / stage.folder / "stage.json").exists()

    def once(self, stage: Stage, make: Callable[[Path], Counts]) -> Path:
        """The stage's folder; if it is absent, `make(partial folder)` fills it and it is renamed into place."""
        folder = self.path / stage.folder
        if self.done(stage):
            return folder
        partial = _partial(folder)
        record = self._begin(stage)
        if "counts" not in record:
            started = time.perf_counter()
            counts = dict(make(partial))
            seconds = round(record["seconds"] + time.perf_counter() - started, 3)
            # Whatever wrote them: a finished stage must not lose files to a power cut.
            for path in self._written(stage):
                sync(path)
            write_json(partial / "stage.json", {**_record(stage), "counts": counts, "seconds": seconds})
        sync(partial)
        partial.rename(folder)
        sync(folder.parent)
        return folder

    def partial(self, folder: str) -> Path:
        """Where a stage's folder is being made."""
        return _partial(self.path / folder)

    def _begin(self, stage: Stage) -> dict[str, Any]:
        """The record of a stage being made; it goes on where an earlier process left it, if that had the same key."""
        partial = _partial(self.path / stage.folder)
        file = partial / "stage.json"
        record: dict[str, Any] = read_json(file) if file.exists() else {}
        if record.get("key") != stage.key:
            # Shards made with other settings must not be taken for this stage's.
            if partial.exists():
                shutil.rmtree(partial)
            partial.mkdir(parents=True)
            record = {**_record(stage), "seconds": 0.0}
        elif "counts" not in record:
            record["seconds"] += max([0.0, *(p.stat().st_mtime - record["begun"] for p in self._work(stage))])
        if "counts" not in record:
            record["begun"] = time.time()
            write_json(file, record)
        return record

    def _work(self, stage: Stage) -> list[Path]:
        """The results that earlier processes left of an unfinished stage."""
        own = ("stage.json", "key")  # and vllm's logs: one that could not start has made nothing
        return [
            p
            for p in self._written(stage)
            if p.is_file() and p.name not in own and p.name[0] != "." and p.suffix != ".log"
        ]

    def _written(self, stage: Stage) -> list[Path]:
        """Files and folders of an unfinished stage, the log of its training among them."""
        folder = self.path / stage.folder
        places = [_partial(folder), *([folder.with_name("train")] if stage.name == "player" else [])]
        return [path for place in places if place.exists() for path in (*place.rglob("*"), place)]

    def record_roles(self, folder: str, roles: Mapping[str, Player]) -> None:
        """Write down who is frozen as what, before anything of the round runs."""
        path = self.path / folder / "roles.json"
        path.parent.mkdir(exist_ok=True)
        write_json(path, {role: asdict(player) for role, player in roles.items()})

    def states(self, stage: Stage) -> TrainStates:
        """Log and resumable state of a `player` stage's training."""
        return TrainStates((self.path / stage.folder).with_name("train"), stage.key)

    def touched(self, stages: Sequence[Stage]) -> list[Touched]:
        """Stages on disk, whole or partial, whose key differs from the plan's, and why."""
        found = []
        for stage in (*stages, *self._beside(stages)):
            record = self.path / stage.folder / "stage.json"
            begun = _partial(record.parent) / "stage.json"
            if not record.exists() and self._work(stage):
                # One that failed before its first result (a bad row, say) is simply begun again.
                record = begun
            if record.exists() and (old := read_json(record))["key"] != stage.key:
                found.append(Touched(stage.folder, _differences(old, stage)))
        return found

    def _beside(self, stages: Sequence[Stage]) -> list[Stage]:
        """The tasks on disk that are none of these stages and whose inputs change, with those as they are now.

        They would be taken for those of the player that is made anew.
        """
        keys = {name: key for stage in stages for name, key in {stage.folder: stage.key, **stage.inputs}.items()}
        planned = {stage.folder for stage in stages}
        found = []
        for file in sorted(self.path.glob("*/tasks/*/stage.json")):
            old = read_json(file)
            inputs = {name: keys.get(name, key) for name, key in old["inputs"].items()}
            if file.parent.suffix != ".partial" and old["folder"] not in planned and inputs != old["inputs"]:
                found.append(Stage(old["folder"], old["name"], old["settings"], inputs))
        return found

    def supersede(self, touched: Sequence[Touched]) -> Path:
        """Move stages out of the way into `superseded/N/`; nothing is deleted."""
        base = self.path / "superseded"
        target = base / str(1 + max((int(p.name) for p in base.glob("[0-9]*")), default=0))
        folders = {item.folder: self.path / item.folder for item in touched}
        # Last first: a kill in between leaves no stage whose input is gone.
        for folder in reversed(folders.values()):
            leftovers = [folder, _partial(folder)]
            if folder.name == "player":
                leftovers.append(folder.with_name("train"))
            for path in leftovers:
                if path.exists():
                    to = target / path.relative_to(self.path)
                    to.parent.mkdir(parents=True, exist_ok=True)
                    path.rename(to)
        # Trackers begin anew too: what they were told is no longer so; nor are log-probs of answers of which other ones are given
        for name in (TRACK, COLOURS):
            if (self.path / name).exists():
                target.mkdir(parents=True, exist_ok=True)
                (self.path / name).rename(target / name)
        return target

    def adopt(self, other: RunDir, stage: Stage) -> bool:
        """Hard-link another run's stage if it was made the same way; the files are shared, not copied."""
        source = other.path / stage.folder
        if not other.done(stage) or read_json(source / "stage.json")["key"] != stage.key:
            return False
        log = source.with_name("train")
        for folder in [source, *([log] if stage.name == "player" and log.exists() else [])]:
            to = self.path / folder.relative_to(other.path)
            shutil.copytree(folder, to, copy_function=_link, ignore=shutil.ignore_patterns("state"))
        return True

    def mark_best(self, player: Player) -> None:
        """Point `best` at a player's folder."""
        temporary = self.path / ".best.tmp"
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(best_target(self.path, player))
        temporary.replace(self.path / "best")

    def _make_folder(self) -> None:
        found = [name for name in _OURS if os.path.lexists(self.path / name)]
        if found and not (self.path / "env.json").exists():
            raise InputError(f"{self.path}: is no run but holds a `{found[0]}`; give another run directory (--out)")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / "lock").touch()
        except (FileExistsError, NotADirectoryError):
            raise InputError(f"{self.path}: is a file, not a folder; give another run directory (--out)") from None
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
            raise InputError(f"{error.filename}: cannot write there; give another run directory (--out)") from None


def _differences(old: Mapping[str, Any], new: Stage) -> tuple[str, ...]:
    settings = json.loads(json.dumps(dict(new.settings), default=str))
    changed = [
        f"{name}: {_value(old['settings'], name)} → {_value(settings, name)}"
        for name in sorted({*old["settings"], *settings})
        if old["settings"].get(name) != settings.get(name)
    ]
    inputs = [
        f"its input {name} {'changes' if name in old['inputs'] and name in new.inputs else 'is another one'}"
        for name in sorted({*old["inputs"], *new.inputs})
        if old["inputs"].get(name) != new.inputs.get(name)
    ]
    return tuple(changed + inputs) or ("made by another version of sparring",)


def _value(settings: Mapping[str, Any], name: str) -> str:
    return json.dumps(settings[name]) if name in settings else "(not set)"


def _record(stage: Stage) -> dict[str, Any]:
    return {**asdict(stage), "key": stage.key}


def _partial(folder: Path) -> Path:
    return folder.with_name(folder.name + ".partial")


def began(process: int) -> str:
    """When a process of this host began, in clock ticks since the system did; empty where that cannot be told."""
    try:
        told = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    # The fields behind the name, which may hold anything
    return told.rpartition(")")[2].split()[19]


def best_target(run: Path, player: Player) -> str:
    """What `best` points to: a folder of the run by relative path, so that it can be moved, else the given model.

    A model of the Hub has no folder: `start`, whose `player.json` names it, stands for it.
    """
    if not looks_local(player.path):
        return "start"
    path, run = Path(player.path).resolve(), run.resolve()
    return str(path.relative_to(run)) if path.is_relative_to(run) else player.path


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP):
            raise
        # Another file system, or one without hard links.
        shutil.copy2(source, target)
