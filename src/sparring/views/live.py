"""What `sparring status` tells of a run that may be running: in words, as JSON, and again and again."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparring.formatting import seconds
from sparring.progress import words

if TYPE_CHECKING:
    from rich.console import Console

    from sparring.rundir.view import RunView

_SILENT = 10.0
"""Seconds after which it is said how long ago the run told anything."""


def state(run: RunView, now: float | None = None) -> str:
    """One line: who works on the run, at what, and how far it is; empty for a run that is finished."""
    if run.holder is None:
        return "" if run.finished else f"not running; continue with: sparring run {run.path}"
    live = run.live
    stage = live.stage if live else next((r.path.name + f"/{s}" for r in run.rounds for s in _begun(r)), "")
    told = words(live) if live else ""
    age = (time.time() if now is None else now) - live.updated if live else 0.0
    silence = f"told {seconds(age)} ago" if age > _SILENT else ""
    return f"{run.holder}: " + (", ".join(part for part in (stage, told, silence) if part) or "begins")


def report(run: RunView) -> dict[str, Any]:
    """What `status` shows, for programs: seconds, shares and nats as numbers."""
    live = run.live if run.holder is not None else None
    return {
        "run": str(run.path),
        "finished": run.finished,
        "holder": run.holder,
        "now": None if live is None else vars(live),
        "rounds": [
            {
                "round": r.t,
                "method": r.method,
                "stages": r.stages,
                "seconds": r.seconds,
                "step": r.log[-1]["step"] if r.log else None,
                "margin": r.log[-1].get("margin") if r.log else None,
                "alarms": len(r.alarms),
            }
            for r in run.rounds
        ],
        "players": [
            {"player": n, "made_by": run.made_by(n), "sha": p.sha, "evaluation": run.evaluation(n)}
            for n, p in sorted(run.players.items())
        ],
        "best": run.best,
        "controls": run.control_lines(),
    }


def looks(path: Path, every: float, sleep: Callable[[float], object] = time.sleep) -> Iterator[RunView]:
    """The run as it is, each `every` seconds, until it is finished. Raises InputError where it is none."""
    from sparring.rundir.view import RunView

    while True:
        run = RunView(path)
        # Asked first: a run that ends while it is shown is shown once more
        finished = run.finished
        yield run
        if finished:
            return
        sleep(every)


def watch(path: Path, console: Console | None, *, every: float = 1.0) -> None:
    """Show a run until it is finished: in place on a terminal, its last state elsewhere; without a console as JSON, a line
    per change."""
    if console is None:
        before = ""
        for run in looks(path, every):
            with contextlib.suppress(FileNotFoundError):  # a stage was renamed while it was read
                line = json.dumps(report(run), ensure_ascii=False)
                if line != before:
                    print(line, flush=True)
                before = line
        return
    from rich.live import Live

    from sparring.views import status

    with Live(console=console, auto_refresh=False) as screen:
        for run in looks(path, every):
            with contextlib.suppress(FileNotFoundError):
                screen.update(status(run), refresh=True)


def _begun(r: Any) -> Iterator[str]:
    return (name for name, state in r.stages.items() if state == "partial")
