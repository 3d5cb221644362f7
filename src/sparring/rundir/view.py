"""Reading a run: what status, show, report and try look at; nothing here writes."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from sparring import controls, methods, progress
from sparring.config import Config
from sparring.config.recipe import load, read_recipe
from sparring.errors import InputError
from sparring.plan import FORMAT, candidates, first_round, round_folder
from sparring.progress import Live
from sparring.rundir import began, best_target
from sparring.rundir.states import read_log
from sparring.rundir.store import Rows, read_json
from sparring.types import Example, Player

if TYPE_CHECKING:
    from sparring.evaluate import Item

T = TypeVar("T")
STAGES = ("samples", "scores", "groups", "frozen", "held", "player", "eval")


class RoundView:
    """One round of a run on disk."""

    def __init__(self, path: Path, t: int, method: str, hyper: dict[str, Any], plays: bool = True) -> None:
        self.path, self.t, self.method, self.hyper = path, t, method, hyper
        self.plays = plays
        """Whether anybody plays in it."""

    @property
    def stages(self) -> dict[str, str]:
        """Stage name to `done`, `partial` or `-`."""
        return {name: _state(self.path / name) for name in STAGES}

    @property
    def roles(self) -> dict[str, Player]:
        """Role to player, as recorded before the round began."""
        file = self.path / "roles.json"
        return {role: Player(**fields) for role, fields in read_json(file).items()} if file.exists() else {}

    @property
    def log(self) -> list[dict[str, float]]:
        """Training log: one row per step."""
        return [row for row in self._log if "backoff" not in row]

    @property
    def alarms(self) -> list[dict[str, float]]:
        """Where a guard went back: the step it went back to, the one it came from, and what it had measured."""
        return [row for row in self._log if "backoff" in row]

    @property
    def _log(self) -> list[dict[str, float]]:
        file = self.path / "train" / "log.jsonl"
        return read_log(file) if file.exists() else []

    @property
    def counts(self) -> dict[str, dict[str, Any]]:
        """Stage name to what it counted."""
        return {name: record["counts"] for name, record in self._records()}

    @property
    def seconds(self) -> dict[str, float]:
        """Stage name to the seconds it took."""
        return {name: record["seconds"] for name, record in self._records()}

    def rows(self, stage: str, row_type: type[T]) -> Rows[T]:
        """The rows of a finished stage. Raises InputError where it is not done."""
        if _state(self.path / stage) != "done":
            raise InputError(f"{self.path / stage}: this stage is not done yet; `sparring status` shows what is")
        return Rows(self.path / stage, row_type)

    def _records(self) -> Iterator[tuple[str, Any]]:
        for name in STAGES:
            file = self.path / name / "stage.json"
            if file.exists():
                yield name, read_json(file)


class RunView:
    """A run on disk. Raises InputError where the folder is none, or was made by a newer version."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.recipe = read_run_recipe(self.path)
        self.env: dict[str, Any] = read_json(self.path / "env.json")
        self.config: Config = load(self.recipe, methods.signature)

    @property
    def name(self) -> str:
        """The name of the run's folder."""
        return Path(os.path.abspath(self.path)).name

    @cached_property
    def rounds(self) -> list[RoundView]:
        """All rounds of the recipe in order, done or not."""
        made = [methods.make(r.method, r.hyper) for r in self.config.rounds]
        first = first_round(made)
        return [
            RoundView(self.path / round_folder(first + i, first), first + i, made[i].name, r.hyper, bool(made[i].plays))
            for i, r in enumerate(self.config.rounds)
        ]

    @property
    def players(self) -> dict[int, Player]:
        """Number to player, those that exist."""
        found = {}
        start = self.path / "start" / "player.json"
        if start.exists():
            found[self.rounds[0].t] = Player(**read_json(start))
        for r in self.rounds:
            file = r.path / "player" / "stage.json"
            if file.exists():
                sha = read_json(file)["counts"]["sha"]
                found[r.t + 1] = Player(str(r.path / "player"), r.t + 1, sha)
        return found

    def made_by(self, number: int) -> str:
        """The method that made a player; `given` for the one the run was given."""
        return next((r.method for r in self.rounds if r.t + 1 == number), "given")

    def evaluations(self, upto: int | None = None) -> dict[int, dict[str, Any] | None]:
        """The summaries of self-play's players, among which the best is chosen; those up to `upto` only, if given."""
        return {n: self.evaluation(n) for n in candidates(self.players) if upto is None or n <= upto}

    @property
    def ended(self) -> dict[int, bool]:
        """Whether a guard ended the training of a player early."""
        records = {r.t + 1: r.counts.get("player", {}) for r in self.rounds}
        return {n: bool(counts.get("ended_early")) for n, counts in records.items()}

    @property
    def unmoved(self) -> set[int]:
        """The players that are an earlier one of self-play's again, as a guard left no step that moved them."""
        found, known = set(), candidates(self.players)
        for r in self.rounds:
            counts, start = r.counts.get("player", {}), r.roles.get("start")
            if start is None or start.round not in known:
                continue
            # A given start has another sha than the player that is saved of it
            if counts.get("steps") == 0 or counts.get("sha") == start.sha:
                found.add(r.t + 1)
        return found

    def stop_reason(self, t: int) -> str | None:
        """Why self-play does not go on with round t; None where it does, or where not all players are measured."""
        if (
            t < 1
            or not all(self._measured(n) for n in range(t + 1))
            or not any(r.plays for r in self.rounds if r.t < t)
        ):
            return None
        return controls.stop_reason(
            self.evaluations(t), self.config.evaluate, self.ended, self.config.controls.patience, self.unmoved
        )

    def control_lines(self) -> list[str]:
        """What the controls did, a line each: where a guard went back or ended a round, and why self-play stopped.

        And where an engine's log-probs were far from ours.
        """
        lines = []
        limit = self.config.engine.max_gap
        for r in self.rounds:
            gap = r.counts.get("samples", {}).get("engine_gap", 0.0)
            if limit is not None and not gap <= limit:
                lines.append(
                    f"round {r.t}: the engine's log-probs differ from ours by {gap:.3g} nats per token, beyond "
                    f"{limit:g}"
                )
            for alarm in r.alarms:
                lines.append(
                    f"round {r.t}: at step {alarm['crossed_at']:.0f} held-out log p(gold) had moved by "
                    f"{alarm['held_displacement']:+.3f} and KL was {alarm['held_kl']:.3f} nats per token: back to step "
                    f"{alarm['step']:.0f} (backoff {alarm['backoff']:.0f})"
                )
            if ended := r.counts.get("player", {}).get("ended_early"):
                lines.append(f"round {r.t}: ended early, after {ended}")
            if r.stages["player"] == "-" and (reason := self.stop_reason(r.t)):
                lines.append(f"round {r.t} was not begun: {reason}")
                break
        return [*lines, *self._flag_lines()]

    def _flag_lines(self) -> list[str]:
        """What is wrong with players' answers, or with what they were asked (`evaluate.guards.flags`), a line each."""
        return [
            f"player {n}{where}: {flag}"
            for n in self.players
            for where, summary in (("", self.heldout_summary(n)), *((f" on {t}", s) for t, s in self.tasks(n).items()))
            for flag in (summary or {}).get("flags", ())
        ]

    def best_player(self, upto: int | None = None) -> int | None:
        """The best player by `evaluate.best` (docs/controls.md), of those up to `upto`; None while there is none."""
        found = self.evaluations(upto)
        return controls.best_player(found, self.config.evaluate, self.ended, self.unmoved) if found else None

    def evaluation(self, number: int) -> dict[str, Any] | None:
        """A player's evaluation summary, or None where there is none.

        The figures of its tasks are in it as `task:NAME:FIGURE`, the one by which a task is told also as `task:NAME`.
        """
        from sparring.evaluate.tasks import headline

        summary = self.heldout_summary(number)
        if summary is None:
            return None
        for name, task in self.tasks(number).items():
            told = {key: value for key, value in task.items() if isinstance(value, dict) and "mean" in value}
            summary |= {f"task:{name}:{key}": value for key, value in told.items()}
            if key := headline(task):
                summary[f"task:{name}"] = told[key]
        return summary

    def heldout_summary(self, number: int) -> dict[str, Any] | None:
        """A player's figures on the held-out prompts, without those of its tasks; None where there are none."""
        file = self.folder(number) / "eval" / "summary.json"
        return read_json(file) if file.exists() else None

    def tasks(self, number: int) -> dict[str, dict[str, Any]]:
        """Name to summary of the tasks that a player has done."""
        files = sorted(self.folder(number).glob("tasks/*/stage.json"))
        done = [file.parent for file in files if file.parent.suffix != ".partial"]
        return {folder.name: read_json(folder / "summary.json") for folder in done}

    def items(self, number: int, task: str | None = None) -> Iterator[Item]:
        """A player's answers to the held-out prompts, or to those of a task."""
        from sparring.evaluate import Item

        return iter(self.rows(number, task, Item))

    def rows(self, number: int, task: str | None, row_type: type[T]) -> Sequence[T]:
        """The rows of a player's evaluation or of a task; none where it was not done."""
        folder = self.folder(number) / (f"tasks/{task}" if task else "eval")
        return Rows(folder, row_type) if folder.exists() else ()

    @property
    def best(self) -> int | None:
        """The number of the player that `best` points to."""
        link = self.path / "best"
        target = os.readlink(link) if link.is_symlink() else None
        return next((n for n, p in self.players.items() if best_target(self.path, p) == target), None)

    @cached_property
    def examples(self) -> dict[str, Example]:
        """Training examples by id."""
        return self._examples("train")

    @cached_property
    def heldout(self) -> dict[str, Example]:
        """Held-out examples by id."""
        return self._examples("heldout")

    @property
    def holder(self) -> str | None:
        """`process N on HOST` that holds the run; None where nobody does, or where that process of this host has ended."""
        file = self.path / "lock"
        text = file.read_text(encoding="utf-8").strip() if file.exists() else ""
        found = re.fullmatch(r"(process (\d+) on (.+))(?:\n(\d+))?", text)
        if found is None or (found[3] == socket.gethostname() and not _alive(int(found[2]), found[4])):
            return None
        return found[1]

    @property
    def live(self) -> Live | None:
        """What the holder told last; None where it told nothing, as at the beginning of a stage."""
        return progress.read(self.path / progress.FILE) if self.holder else None

    @property
    def finished(self) -> bool:
        """Whether every round is done, its tasks included, or self-play stopped because rounds no longer helped."""
        left = next((r for r in self.rounds if not self._measured(r.t + 1)), None)
        return left is None or (left.stages["player"] == "-" and self.stop_reason(left.t) is not None)

    def _measured(self, number: int) -> bool:
        settings = self.config.evaluate
        wanted = {task.label for task in settings.tasks} | ({"win_rate"} if settings.scorer and number >= 0 else set())
        return _state(self.folder(number) / "eval") == "done" and wanted <= self.tasks(number).keys()

    def _examples(self, part: str) -> dict[str, Example]:
        folder = self.path / "data" / part
        return {e.id: e for e in Rows(folder, Example)} if folder.exists() else {}

    @property
    def seconds(self) -> float:
        """Seconds of all finished stages together, in whatever process each was done."""
        tasks = (f for f in self.path.glob("*/tasks/*/stage.json") if f.parent.suffix != ".partial")
        files = [*(self.path / folder / "stage.json" for folder in ("data", "start/eval")), *tasks]
        before = sum(float(read_json(file)["seconds"]) for file in files if file.exists())
        return before + sum(sum(r.seconds.values()) for r in self.rounds)

    def folder(self, number: int) -> Path:
        """Where a player's evaluations lie: its round's folder, or `start`."""
        first = self.rounds[0].t
        return self.path / ("start" if number == first else round_folder(number - 1, first))


def read_run_recipe(path: Path) -> dict[str, Any]:
    """The recipe that a run recorded. Raises InputError unless the folder is a run this version can read."""
    if not (path / "config.yaml").exists() or not (path / "env.json").exists():
        what = "no such folder" if not path.exists() else "not a run directory (no config.yaml and env.json in it)"
        raise InputError(f"{path}: {what}; `sparring run` makes one")
    check_format(path)
    recipe: dict[str, Any] = read_recipe(path / "config.yaml")
    return recipe


def check_format(path: Path) -> None:
    """Raises InputError where a newer version made the run."""
    file = path / "env.json"
    version = read_json(file).get("format", 0) if file.exists() else FORMAT
    if version > FORMAT:
        raise InputError(
            f"{path}: run format {version} is newer than this version of sparring knows ({FORMAT}); upgrade sparring"
        )


def _alive(process: int, then: str | None) -> bool:
    """Whether it runs; `then`: when it had begun, if that is known."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        pass
    # Its number may be another's by now
    return not then or began(process) in ("", then)


def _state(folder: Path) -> str:
    if (folder / "stage.json").exists():
        return "done"
    return "partial" if folder.with_name(folder.name + ".partial").exists() else "-"
