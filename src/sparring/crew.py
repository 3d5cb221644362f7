"""Several processes for one run: a supervisor starts them, hands them stages, and reads their files.

It computes nothing itself, so it holds neither a model nor a device. What can be cut into shards is shared by stealing:
whoever is free takes the next shard that nobody holds, and as a shard's rows do not depend on who makes it, neither do
the stage's. A process that is lost ends the run; its claims go with it, and all that was written stays.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NoReturn

from sparring import errors, progress, threads
from sparring.errors import InputError, SparringError

if TYPE_CHECKING:
    from sparring.progress import Progress

log = logging.getLogger("sparring")

FOLDER = "crew"
"""Where in a run its processes keep claims, logs and what they tell while they are there."""
SAID = "said"
_TELL = 10.0
"""Seconds between two times that a stage's figures are told while it is made, or ten times what telling takes."""
_SETTLE, _GRACE = 2.0, 5.0
"""Seconds that the others have to end after one was lost, and after they were told to."""


@dataclass(frozen=True)
class Rank:
    """Which of several processes this is."""

    number: int
    """0 … size − 1."""
    size: int
    local: int
    """Its number on its machine."""


def of_environment(environment: Mapping[str, str]) -> Rank:
    """The rank that torchrun's variables name, or else Slurm's. Raises InputError where there are none."""
    for names in (("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")):
        if all(name in environment for name in names):
            return Rank(*(int(environment[name]) for name in names))
    raise InputError("cluster.launcher: gives its processes neither torchrun's variables (RANK …) nor Slurm's")


def pace(waited: float) -> float:
    """Seconds until the next look, after so many without: short waits are noticed at once, long ones spare the disk."""
    return min(1.0, 0.02 + 0.05 * waited)


class Claims:
    """Who makes which shard of a folder: whoever makes shard n holds byte n of a file.

    The system frees what a killed process held. On a network file system it must pass locks on to the server (NFS: not
    mounted with `nolock`).
    """

    def __init__(self, run: Path, folder: Path) -> None:
        place = run / FOLDER / "claims"
        place.mkdir(parents=True, exist_ok=True)
        self._file = place / str(folder.relative_to(run)).replace("/", "+")

    @contextmanager
    def __call__(self, number: int) -> Iterator[bool]:
        """Yields whether the shard is this process's to make, which then holds it within the block."""
        with self._file.open("ab") as stream:
            try:
                fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
            except (BlockingIOError, PermissionError):
                yield False
            else:
                yield True

    def hold(self, number: int) -> IO[bytes]:
        """Wait for a shard, which is this process's as long as the file that this returns is open."""
        stream = self._file.open("ab")
        fcntl.lockf(stream, fcntl.LOCK_EX, 1, number)
        return stream


def present(run: Path) -> Claims:
    """Who is there: process n holds number n as long as it lives."""
    return Claims(run, run / "present")


def progress_file(run: Path, number: int) -> Path:
    """Where a process tells how far it is."""
    return run / FOLDER / f"{number}.progress.json"


class Orders:
    """The stages that a crew is told to do, one after the other: a file that grows, which its members read."""

    def __init__(self, run: Path) -> None:
        self._place = run / FOLDER
        self._at = 0

    def add(self, number: int, members: int, stage: str, step: str) -> None:
        """Have the first `members` processes do a step of a stage; orders are numbered from 0."""
        with (self._place / "orders").open("a", encoding="utf-8") as stream:
            stream.write(json.dumps([number, members, stage, step]) + "\n")

    def new(self) -> list[tuple[int, int, str, str]]:
        """Number, members, stage and step of every order since the last call."""
        # Opened anew each time: a network file system looks for what is new only then
        with (self._place / "orders").open("rb") as stream:
            stream.seek(self._at)
            lines = [line for line in stream.read().splitlines(keepends=True) if line.endswith(b"\n")]
        self._at += sum(map(len, lines))
        return [tuple(json.loads(line)) for line in lines]

    def answer(self, number: int, rank: int, reply: Mapping[str, Any]) -> None:
        """Say how an order ended: `counts`, or `error` with its kind and message where one line explains it."""
        file = self._reply(number, rank)
        file.with_suffix(".tmp").write_text(json.dumps(reply), encoding="utf-8")
        file.with_suffix(".tmp").rename(file)

    def answered(self, number: int, rank: int) -> dict[str, Any] | None:
        """What was answered, if anything yet."""
        file = self._reply(number, rank)
        return dict(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else None

    def _reply(self, number: int, rank: int) -> Path:
        return self._place / f"{number}.{rank}.reply"


class Crew:
    """The processes of one run (`member.py`), started when the first stage is handed to them."""

    def __init__(self, run: Path, size: int, launcher: str | None, lock: int | None) -> None:
        """launcher: the command that starts them, on other machines too. lock: the descriptor that holds the run; they
        hold it as well, so that none outlives this process unseen."""
        self._run, self.size, self._launcher, self._lock = run, size, launcher, lock
        self._started: list[subprocess.Popen[bytes]] = []
        """The processes, or their launcher alone."""
        self._orders, self._given = Orders(run), 0
        self._met: set[int] = set()
        """Those of a launcher's processes that have been there."""
        self._failed = False

    def do(
        self, stage: str, step: str, members: int, shown: Progress, tell: Callable[[], None] = lambda: None
    ) -> dict[str, Any]:
        """Have the first `members` processes do a step of a stage; returns what the first one counted, if it did.

        tell: called now and then meanwhile. Raises the error of one that failed, and SparringError where one is lost.
        """
        if not self._started:
            self._start()
        number, self._given = self._given, self._given + 1
        self._orders.add(number, members, stage, step)
        replies = self._replies(number, members, shown, tell)
        if len(replies) < members or any("counts" not in reply for reply in replies.values()):
            self._fail(stage, replies)
        return dict(replies[0]["counts"] or {})

    def close(self) -> None:
        """End the processes; what they left goes, but where one failed its log stays until a run ends well."""
        failed = self._failed or any(process.poll() is not None for process in self._started)
        for process in self._started:
            if process.poll() is None:
                process.terminate()
        until = time.monotonic() + _GRACE
        for process in self._started:
            try:
                process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            assert process.stdin is not None
            process.stdin.close()
        self._started = []
        if not failed:
            shutil.rmtree(self._run / FOLDER, ignore_errors=True)

    def _start(self) -> None:
        self._said, self._met = 0, set()
        place = self._run / FOLDER
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        (place / "orders").touch()
        member = [sys.executable, "-P", "-m", "sparring.member", str(self._run.resolve())]
        if self._launcher is not None:
            self._started.append(self._begun([*shlex.split(self._launcher), *member], "launcher", {}))
            return
        each = {"OMP_NUM_THREADS": str(max(1, threads.allowed() // self.size))}
        for n in range(self.size):
            rank = {"RANK": n, "WORLD_SIZE": self.size, "LOCAL_RANK": n, "LOCAL_WORLD_SIZE": self.size}
            own = each | dict(os.environ) | {name: str(value) for name, value in rank.items()}
            self._started.append(self._begun(member, str(n), own))

    def _begun(self, command: Sequence[str], name: str, variables: Mapping[str, str]) -> subprocess.Popen[bytes]:
        package = str(Path(__file__).parents[1])
        path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
        with (self._run / FOLDER / f"{name}.log").open("wb") as stream:
            try:
                return subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,  # nothing is written: that it ends tells them that this process has
                    stdout=stream,
                    stderr=stream,
                    env={**os.environ, **variables, "PYTHONPATH": path},
                    pass_fds=[self._lock] if self._lock is not None else [],
                    start_new_session=True,  # Ctrl-C is this process's to answer
                )
            except OSError as error:
                raise InputError(f"cluster.launcher: cannot start `{command[0]}`: {error.strerror}") from None

    def _replies(
        self, number: int, members: int, shown: Progress, tell: Callable[[], None]
    ) -> dict[int, dict[str, Any]]:
        """Rank to reply; after the first failure the others have a moment to tell theirs."""
        replies: dict[int, dict[str, Any]] = {}
        files = [progress_file(self._run, n) for n in range(members)]
        begun = time.monotonic()
        told, until = begun + _TELL, float("inf")
        while (now := time.monotonic()) < until:
            for n in range(members):
                if n not in replies and (reply := self._orders.answered(number, n)) is not None:
                    replies[n] = reply
            self._said = _tell(self._run / FOLDER / SAID, self._said)
            if len(replies) == members:
                break
            shown.follow([live for file in files if (live := progress.read(file)) is not None])
            failed = any("counts" not in reply for reply in replies.values())
            if failed or any(process.poll() is not None for process in self._started) or self._lost(replies):
                until = min(until, now + _SETTLE)
            if now >= told:
                tell()
                # A log of a million steps takes its time
                told = time.monotonic() + max(_TELL, 10 * (time.monotonic() - now))
            time.sleep(pace(now - begun))
        for file in files:
            file.unlink(missing_ok=True)
        return replies

    def _lost(self, known: Collection[int]) -> list[int]:
        """Those of a launcher's processes, but for the known ones, that have ended: a launcher need not tell."""
        if self._launcher is None:
            return []
        lost, there = [], present(self._run)
        for n in range(self.size):
            with there(n) as free:
                if not free:
                    self._met.add(n)
                # Where locks do not reach this machine nobody is ever met
                elif n in self._met and n not in known:
                    lost.append(n)
        return lost

    def _fail(self, stage: str, replies: Mapping[int, Mapping[str, Any]]) -> NoReturn:
        """A process that was killed is the cause of the others' errors."""
        self._failed = True
        codes = {n: code for n, process in enumerate(self._started) if (code := process.poll()) is not None}
        killed = [n for n, code in codes.items() if code < 0]
        for reply in replies.values() if not killed else ():
            if reply.get("error"):
                kind, message = reply["error"]
                raise getattr(errors, kind, SparringError)(message)
        bad = [n for n, reply in replies.items() if "counts" not in reply]
        # A launcher may have started it again meanwhile
        silent = [n for n in range(self.size) if n not in replies]
        lost = [] if codes else self._lost(bad) or ([] if bad else silent)
        n = (killed or sorted(codes) or lost or bad)[0]
        who = f"process {n} of {self.size}" if self._launcher is None or lost else f"`{self._launcher}`"
        how = f"was killed ({signal.Signals(-codes[n]).name})" if killed else "was lost" if lost else "failed"
        file = self._run / FOLDER / f"{'launcher' if self._launcher is not None else n}.log"
        raise SparringError(
            f"{stage}: {who} {how}; nothing written is lost: the same command goes on, also with another "
            f"cluster.processes; its log is {file}"
        )


def _tell(file: Path, at: int) -> int:
    """Log the lines that the first process said since; returns how far they were read."""
    with suppress(FileNotFoundError), file.open("rb") as stream:
        stream.seek(at)
        for line in stream:
            if not line.endswith(b"\n"):
                break
            at += len(line)
            level, message = json.loads(line)
            log.log(level, "%s", message)
    return at
