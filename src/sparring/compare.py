"""Runs side by side: what each one's best player came to, over its own start and against the first run's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from sparring.controls import figure
from sparring.evaluate.core import is_share
from sparring.evaluate.stats import Gain, paired
from sparring.evaluate.tasks import headline
from sparring.evaluate.versus import asked
from sparring.formatting import NONE
from sparring.report.verdict import by_example
from sparring.rundir.view import RunView

_IDLE = {"gold_nll": ("verifier", "engine", "temperature"), "greedy": ("temperature",)}
"""What a figure does not depend on of how players are asked; that the prompts are the same shows where they are paired."""


@dataclass(frozen=True)
class Compared:
    """One run in a comparison."""

    run: RunView
    methods: str
    """Its rounds' methods, in order, with how often each was done."""
    best: int | None
    summary: dict[str, Any]
    """Evaluation of its best player."""
    over_start: Gain | None
    """Its best player's figure less its player 0's, paired by prompt."""
    over_first: Gain | None
    """Its best player's figure less that of the first run's best player; None where they were evaluated otherwise."""
    tokens: int
    """Tokens that were played for training."""
    steps: int
    """Gradient steps of self-play's rounds that stayed."""
    backoffs: int
    """How often a guard went back."""
    seconds: float


def compare(runs: Sequence[RunView]) -> tuple[str, list[Compared]]:
    """The figure that is compared (`sampled`, `greedy`, `gold_nll` or a task's, of the first run's choice) and a row per run."""
    named = figure(runs[0].config.evaluate)
    key = named if named != "last" else "gold_nll"
    first = _values(runs[0], key)
    return key, [_row(run, key, first if run is not runs[0] and _alike(runs[0], run, key) else {}) for run in runs]


def _alike(one: RunView, other: RunView, key: str) -> bool:
    """Whether two runs' best players were measured in the same way.

    Figures of other verifiers, scorers, temperatures or lengths do not compare, nor does a task that is told by another
    figure.
    """
    how = _measured(one, key)
    return how is not None and how == _measured(other, key)


def _measured(run: RunView, key: str) -> tuple[Any, ...] | None:
    """How a run's best player was measured by a figure; None where it was not."""
    best = run.best_player()
    if best is None or run.evaluation(best) is None:
        return None
    if not key.startswith("task:"):
        how = asked(run, best, None)
        return tuple(how[name] for name in how if name not in _IDLE.get(key, ()))
    _, name, *named = key.split(":")
    summary = run.tasks(best).get(name)
    return None if summary is None else (summary["kind"], named or headline(summary), asked(run, best, name))


def _row(run: RunView, key: str, first: dict[str, float]) -> Compared:
    best, own = run.best_player(), _values(run, key)
    start = min((n for n in run.players if n >= 0), default=0)
    rounds = [r for r in run.rounds if r.stages.get("player") == "done"]
    counts = [r.counts.get("player", {}) for r in rounds if r.t >= 0]
    done: dict[str, int] = {}
    for r in rounds:
        done[r.method] = done.get(r.method, 0) + 1
    return Compared(
        run,
        ", ".join(f"{n} × {name}" if n > 1 else name for name, n in done.items()),
        best,
        dict((run.evaluation(best) if best is not None else None) or {}),
        paired(by_example(run, start, key), own, shares=is_share(key)) if best != start else None,
        paired(first, own, shares=is_share(key)),
        sum(r.counts.get("samples", {}).get("tokens", 0) for r in rounds),
        sum(c.get("steps", 0) for c in counts),
        sum(c.get("backoffs", 0) for c in counts),
        run.seconds,
    )


def _values(run: RunView, key: str) -> dict[str, float]:
    best = run.best_player()
    return by_example(run, best, key) if best is not None else {}


@dataclass(frozen=True)
class Pair:
    """Two runs' best players against each other."""

    one: int
    other: int
    """Indices of the runs; the difference is the other's figure less the one's."""
    gain: Gain | None
    why: str
    """Why there is no gain, in words; empty where there is one."""


def pairs(key: str, rows: Sequence[Compared]) -> list[Pair]:
    """Every two runs, in the order given: the later one's best player less the earlier one's, paired by prompt."""
    values = [_values(row.run, key) for row in rows]
    found = []
    for i, j in combinations(range(len(rows)), 2):
        gain, why = None, "they were evaluated otherwise, so the difference says nothing"
        if _alike(rows[i].run, rows[j].run, key):
            gain = paired(values[i], values[j], shares=is_share(key))
            others = "they were evaluated on other prompts, or some answers could not be judged, so the difference says nothing"
            none = "this figure has no values by prompt that could be paired"
            why = "" if gain else others if values[i] and values[j] else none
        found.append(Pair(i, j, gain, why))
    return found


def labels(runs: Sequence[RunView]) -> list[str]:
    """A name for each run: its folder's, with its parent's where two are called the same."""
    names = [run.name for run in runs]
    return [
        name if names.count(name) == 1 else "/".join(run.path.resolve().parts[-2:])
        for name, run in zip(names, runs, strict=True)
    ]


def differences(runs: Sequence[RunView]) -> list[tuple[str, list[str]]]:
    """The settings in which runs differ, by dotted name, with each run's value; of rounds, those that all runs have."""
    configs = [run.config.model_dump(mode="json") for run in runs]
    shortest = min(len(config["rounds"]) for config in configs)
    trees = [
        dict(_leaves({**config, "run": None, "rounds": dict(enumerate(config["rounds"][:shortest]))}))
        | {"rounds": len(config["rounds"])}
        for config in configs
    ]
    keys = dict.fromkeys(key for tree in trees for key in tree)
    told = [(key, [str(tree.get(key, NONE)) for tree in trees]) for key in keys]
    return [(key, values) for key, values in told if len(set(values)) > 1]


def _leaves(tree: Mapping[Any, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value
