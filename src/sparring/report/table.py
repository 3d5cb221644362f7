"""The report's first table: a row per player, a column per figure, each with its interval and its gain over player 0."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparring.evaluate.core import is_share
from sparring.formatting import NONE, figure, player_rows
from sparring.report.curves import figures, has_mean, in_percent
from sparring.report.verdict import Z95, Gain, by_example, paired

if TYPE_CHECKING:
    from sparring.rundir.view import RunView

_TITLES = {"sampled": "Sampled, %", "greedy": "Greedy, %", "gold_nll": "gold_nll"}


@dataclass(frozen=True)
class Column:
    """One figure of the evaluation summaries."""

    key: str
    title: str
    percent: bool
    """Shares are written in percent, anything else as it is."""


@dataclass(frozen=True)
class Cell:
    """One figure of one player."""

    text: str
    """Mean with its 95 % interval."""
    gain: str = ""
    """The same of the difference from player 0, as `told` writes it."""
    better: bool | None = None
    """Whether the difference is for the better; None where it may be noise."""
    leads: bool = False
    """The best mean of its column."""


@dataclass(frozen=True)
class Row:
    """One player, or a control."""

    name: str
    made_by: str
    best: bool
    cells: tuple[Cell, ...]


def columns(summaries: Sequence[Mapping[str, Any]]) -> list[Column]:
    """Every figure that a summary tells (`curves.figures`)."""
    kinds = [(key, in_percent(key, summaries)) for key in figures(summaries) or _TITLES]
    return [
        Column(key, _TITLES.get(key, key.removeprefix("task:") + (", %" if percent else "")), percent)
        for key, percent in kinds
    ]


def rows(
    run: RunView,
    replaced: Mapping[int, Mapping[str, Any]] | None,
    extra: Mapping[str, Mapping[str, Any]],
) -> tuple[list[Column], list[Row]]:
    """The table of a run: its players, then the controls of `extra`; `replaced` are the players' summaries where not the run's own."""
    players = player_rows(run, replaced)
    found = columns([*players, *extra.values()])
    start = next((row for row in players if row["player"] == 0), None)
    # Figures from elsewhere are of other prompts than the run's items
    own = {row["player"]: {} if replaced else _own(run, row["player"], found) for row in players}
    leads = {column.key: _best(column, players) for column in found}

    def cell(column: Column, summary: Mapping[str, Any], player: int | None) -> Cell:
        value: Any = summary.get(column.key)
        text = measured(value, column.percent)
        if player is None or start is None or player <= 0 or not has_mean(value) or not has_mean(start.get(column.key)):
            return Cell(text, leads=player is not None and leads[column.key] == player)
        before, after = (own[n].get(column.key, {}) for n in (0, player))
        got = gain(start[column.key], value, before, after, shares=column.percent)
        return _judged(column, text, got, leads[column.key] == player)

    table = [
        Row(str(p["player"]), p["made_by"], bool(p["best"]), tuple(cell(c, p, p["player"]) for c in found))
        for p in players
    ]
    table += [Row("control", name, False, tuple(cell(c, s, None) for c in found)) for name, s in extra.items()]
    return found, table


def gain(
    start: Mapping[str, Any],
    end: Mapping[str, Any],
    before: Mapping[str, float],
    after: Mapping[str, float],
    *,
    shares: bool,
) -> Gain | None:
    """A figure less that of player 0: paired by prompt where `before` and `after` hold every item of both, else unpaired.

    `shares`: see `paired`. None where an error is unknown.
    """
    difference = end["mean"] - start["mean"]
    matched = paired(before, after, shares=shares)
    if matched and math.isclose(matched.mean, difference, abs_tol=1e-6):
        return matched
    if start.get("se") is None or end.get("se") is None:
        return None
    return Gain(difference, math.hypot(start["se"], end["se"]), "unpaired")


def signed(value: float, digits: int) -> str:
    """A number with its sign, a true minus: `+1.5`, `−0.3`."""
    return f"{value:+.{digits}f}".replace("-", "\u2212")


def measured(value: Any, percent: bool) -> str:
    """A figure with its 95 % interval: `77.4 [75.5, 79.2]` where its evaluation gave one, else `77.4 ± 1.9`."""
    if not has_mean(value) or value.get("low") is None or value.get("high") is None:
        return figure(value, percent=percent, errors=Z95)
    scale, digits = (100.0, 1) if percent else (1.0, 2)
    low, mean, high = (f"{scale * value[key]:.{digits}f}" for key in ("low", "mean", "high"))
    return f"{mean} [{low}, {high}]"


def told(got: Gain | None, percent: bool) -> str:
    """A difference as the page writes it: ▲ or ▼ where its 95 % interval excludes 0, else ≈, then its mean and that."""
    if got is None:
        return NONE
    scale, digits = (100.0, 1) if percent else (1.0, 2)
    mark = "\u2248" if got.noise else "\u25b2" if got.mean > 0 else "\u25bc"
    low, high = (signed(scale * end, digits) for end in got.interval)
    return f"{mark}\u00a0{signed(scale * got.mean, digits)} [{low},\u00a0{high}]"


def interval(got: Gain, percent: bool, *, turned: bool = False) -> str:
    """A difference's 95 % interval, `+10.4 to +29.6`; `turned`: that of the first less the second."""
    scale, digits = (100.0, 1) if percent else (1.0, 2)
    low, high = sorted(-end if turned else end for end in got.interval)
    return f"{signed(scale * low, digits)} to {signed(scale * high, digits)}"


def _judged(column: Column, text: str, got: Gain | None, leads: bool) -> Cell:
    if got is None:
        return Cell(text, leads=leads)
    better = None if got.noise else (got.mean > 0) == is_share(column.key)
    return Cell(text, told(got, column.percent), better, leads)


def _own(run: RunView, player: int, found: Sequence[Column]) -> dict[str, dict[str, float]]:
    return {c.key: by_example(run, player, c.key) for c in found}


def _best(column: Column, players: Sequence[Mapping[str, Any]]) -> int | None:
    known = {p["player"]: p[column.key]["mean"] for p in players if has_mean(p.get(column.key))}
    pick = max if is_share(column.key) else min
    return pick(known, key=known.__getitem__) if len(set(known.values())) > 1 else None
