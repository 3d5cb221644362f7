"""TensorBoard, Weights & Biases and Trackio: each is told the lines of `metrics.jsonl` as they are written.

A tracker that is new to a run is told all that went before; how far each was told is kept in the run's `track/` folder,
so a run that goes on tells nothing twice. A tracker that fails is dropped for the rest of the process with one warning:
it can neither stop a run nor change it, and is told what it missed when the run goes on. Their packages are optional.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from sparring.config import TrackConfig, Tree
from sparring.errors import InputError
from sparring.rundir import TRACK, metrics
from sparring.rundir.metrics import Row

log = logging.getLogger("sparring")

_PLACE = ("time", "stage", "player", "step", "global_step", "backoffs")
_SECONDS = 30
"""How long a tracker may take to begin or to end."""


class Sink(Protocol):
    """A tracker."""

    def log(self, figures: Mapping[str, float], step: int, when: float) -> None:
        """Figures at a step, counted over all rounds, at a time in seconds since 1970."""
        ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in the run's `track/tensorboard`."""

    def __init__(self, run: Path, name: str, project: str, recipe: Tree) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(run / TRACK / "tensorboard"), flush_secs=10)  # type: ignore[no-untyped-call]

    def log(self, figures: Mapping[str, float], step: int, when: float) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step, walltime=when)

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A run of Weights & Biases; `WANDB_MODE=offline` keeps it in the run's `track/wandb`."""

    def __init__(self, run: Path, name: str, project: str, recipe: Tree) -> None:
        import wandb

        settings = wandb.Settings(
            silent=True, console="off", init_timeout=_SECONDS, login_timeout=_SECONDS, finish_timeout=_SECONDS
        )
        # A run of the calling program's own stays what it is
        self._run: Any = wandb.init(
            project=project, name=run.resolve().name, id=name, resume="allow", dir=run / TRACK, config=recipe,
            reinit="create_new", settings=settings,
        )  # fmt: skip
        self._run.define_metric("global_step")
        self._run.define_metric("*", step_metric="global_step")

    def log(self, figures: Mapping[str, float], step: int, when: float) -> None:
        self._run.log({**figures, "global_step": step, "time": when})

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """A run of Trackio, in its local data base or where its environment variables say."""

    def __init__(self, run: Path, name: str, project: str, recipe: Tree) -> None:
        import trackio

        with _hushed():
            self._run: Any = trackio.init(
                project, name, config=recipe, resume="allow", embed=False, auto_log_gpu=False, auto_log_cpu=False
            )
        self._finish = trackio.finish

    def log(self, figures: Mapping[str, float], step: int, when: float) -> None:
        self._run.log({**figures, "time": when}, step=step)

    def close(self) -> None:
        with _hushed():
            self._finish()


SINKS: Mapping[str, Callable[[Path, str, str, Tree], Sink]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "trackio": Trackio,
}


def check(config: TrackConfig) -> None:
    """Raises InputError where a tracker's package is not installed."""
    for name in config.to:
        if find_spec(name) is None:
            raise InputError(f"track.to: {name} is not installed; pip install {name}, or leave it out of track.to")


class Trackers:
    """The trackers of one run; nothing is loaded, and no folder made, before there is something to tell."""

    def __init__(self, run: Path, config: TrackConfig, recipe: Callable[[], Tree]) -> None:
        self._path, self._project, self._recipe = run, config.project, recipe
        self._waiting: list[str] = list(dict.fromkeys(config.to))
        self._open: dict[str, Sink] = {}
        self._state = run / TRACK / "state.json"
        found = _read(self._state) if self._waiting else {}
        self._name: str = found.get("name", "")
        self._marks: dict[str, list[int]] = found.get("marks", {})
        self._told: dict[str, list[str]] = found.get("told") or _told(found, run)
        """Tracker to the evaluations and tasks it was told of: they may be done for any player at any time."""

    def tell(self, row: Row) -> None:
        """Hand a line of the metrics to every tracker that has not had it."""
        place, measured = _place(row), _measured(row)
        for name in (*self._waiting, *self._open):
            told = self._told.setdefault(name, [])
            if (place > self._marks.get(name, [])) if measured is None else (measured not in told):
                with self._guarded(name):
                    self._sink(name).log(_tagged(row), row["global_step"], row["time"])
                    if measured is None:
                        self._marks[name] = place
                    else:
                        told.append(measured)
                    self._keep()

    def close(self) -> None:
        """End them; what they have yet to send they send now."""
        for name in list(self._open):
            with self._guarded(name):
                self._open[name].close()
        self._open.clear()
        self._waiting.clear()

    def _sink(self, name: str) -> Sink:
        if name not in self._open:
            if not self._name:
                self._name = f"{self._path.resolve().name}-{secrets.token_hex(4)}"
            self._state.parent.mkdir(exist_ok=True)
            self._open[name] = SINKS[name](self._path, self._name, self._project, self._recipe())
            self._waiting.remove(name)
        return self._open[name]

    def _keep(self) -> None:
        # Once a line, so without waiting for the disk: what a power cut takes is told twice
        temporary = self._state.with_name(f".{self._state.name}.tmp")
        temporary.write_text(
            json.dumps({"name": self._name, "marks": self._marks, "told": self._told}), encoding="utf-8"
        )
        os.replace(temporary, self._state)

    @contextlib.contextmanager
    def _guarded(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # a tracker's are of any kind
            self._open.pop(name, None)
            self._waiting = [other for other in self._waiting if other != name]
            problem = (str(error).strip() or type(error).__name__).splitlines()[0]
            log.warning("track: %s failed and is told no more until this run is continued: %s", name, problem)


def _place(row: Row) -> list[int]:
    """Where a line stands: later lines are greater, and one that is written again after a kill is equal."""
    return [row["player"], int(row["stage"] == "eval"), row["backoffs"], int(row["step"])]


def _measured(row: Row) -> str | None:
    """Which evaluation or task a line is of."""
    return {"eval": f"{row['player']}", "task": f"{row['player']}/{row.get('task')}"}.get(row["stage"])


def _told(found: Mapping[str, Any], run: Path) -> dict[str, list[str]]:
    """The evaluations and tasks told by an older version, whose marks were of evaluations as well."""
    told: dict[str, list[str]] = dict(found.get("tasks", {}))
    for name, mark in found.get("marks", {}).items():
        evals = [row for row in metrics.read(run / metrics.FILE) if row["stage"] == "eval"]
        told[name] = [*told.get(name, []), *(f"{row['player']}" for row in evals if _place(row) <= mark)]
    return told


def _read(file: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found


def _tagged(row: Row) -> dict[str, float]:
    prefixes = {"player": "train", "eval": "eval", "task": f"task/{row.get('task')}"}
    prefix = "guard" if "backoff" in row else prefixes[row["stage"]]
    return {
        f"{prefix}/{name}": value
        for name, value in row.items()
        if name not in _PLACE and isinstance(value, (int, float))
    }


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """Trackio greets on stdout, which is for results."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield
