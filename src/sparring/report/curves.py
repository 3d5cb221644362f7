"""The report's curves: what each chart shows (pure), and its drawing as inline SVG that takes the page's colours."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from sparring.evaluate.core import is_share

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from sparring.rundir.view import RunView

_MOST_POINTS = 120
_INK, _GRID, _ALARM = "#010203", "#010204", "#010205"
_LINES = ("#010211", "#010212", "#010213", "#010214", "#010215", "#010216")
_PAGE_COLOURS = {_INK: "var(--soft)", _GRID: "var(--rule)", _ALARM: "var(--alarm)"} | {
    colour: f"var(--line-{i})" for i, colour in enumerate(_LINES, 1)
}
DASHES = ("", "4 2", "1 1.5", "6 1.5 1 1.5", "2 2", "8 2")
"""Lines differ by dash as well as by colour; lengths in units of the line's width."""
_MARKERS = ("o", "s", "^", "D", "v", "P")


@dataclass(frozen=True)
class Line:
    """One curve of a chart."""

    label: str
    points: tuple[tuple[float, float, float], ...]
    """x, y and the half-width of y's 95 % interval (0: none); a NaN breaks the line."""
    slot: int = 0
    """Which of the colours, dashes and markers it takes."""


@dataclass(frozen=True)
class Chart:
    """What one chart shows, before it is drawn."""

    title: str
    unit: str
    x: str
    """`player`, `round` or `step`."""
    lines: tuple[Line, ...]
    breaks: tuple[float, ...] = ()
    """Steps at which a new round begins."""
    from_zero: bool = False
    alarms: tuple[float, ...] = ()
    """Where a control stepped in: steps at which a guard went back, players whose round it ended early."""
    legend: bool = False
    """Whether lines are named even where there is one alone."""

    @property
    def words(self) -> str:
        """The chart in words, for those who cannot see it: every point by player or round, the ends by step."""
        told = []
        for line in self.lines:
            known = [(x, y) for x, y, _ in line.points if math.isfinite(y)]
            shown = known if self.x != "step" else [known[0], known[-1]]
            told.append(f"{line.label}: " + ", ".join(f"{self.x} {x:g} {tick(y)}" for x, y in shown))
        if self.alarms:
            told.append(f"alarms at {self.x} " + ", ".join(f"{x:g}" for x in self.alarms))
        return f"{self.title}, {self.unit}. " + "; ".join(told)


def by_round(run: RunView) -> list[Chart]:
    """Held-out figures by player of self-play; charts without a point are left out."""
    found = {n: run.evaluation(n) for n in sorted(run.players)}
    summaries = {n: summary for n, summary in found.items() if summary}
    # What came before self-play moved so far that nothing after it could be seen on one scale
    summaries = {n: summary for n, summary in summaries.items() if n >= 0} or summaries
    shares = [name for name in figures(list(summaries.values())) if in_percent(name, list(summaries.values()))]
    early = tuple(float(n) for n, ended in sorted(run.ended.items()) if ended and n in summaries)
    charts = [
        Chart("Accuracy", "% of held-out prompts", "player", _figures(summaries, 100, *shares[: len(_LINES)])),
        Chart("Cost of the gold answer", "gold_nll, nats per answer", "player", _figures(summaries, 1, "gold_nll")),
        Chart(
            "Answer length", "tokens, held-out", "player", _plain(summaries, 1, answer_tokens="answer"), from_zero=True
        ),
        Chart(
            "Truncated",
            "% of held-out answers",
            "player",
            _plain(summaries, 100, truncated="truncated"),
            from_zero=True,
        ),
    ]
    return [replace(chart, alarms=early) for chart in charts if chart.lines]


_BY_STEP = (
    ("Margin", "of gold over sample, against the reference", {"margin": "margin"}),
    ("Log-probabilities", "nats per answer", {"logp_gold": "log p(gold)", "logp_sample": "log p(sample)"}),
    ("Held-out log p(gold)", "nats per token, against the round\u2019s start", {"held_displacement": "log p(gold)"}),
    ("Held-out KL", "KL(start \u2016 learner), nats per token", {"held_kl": "KL"}),
    ("Loss", "the method\u2019s own", {"loss": "loss"}),
    ("Gradient norm", "before clipping", {"grad_norm": "norm"}),
    ("Learning rate", "", {"lr": "rate"}),
    ("Misaligned", "share of groups whose sample is likelier than gold", {"misaligned": "misaligned"}),
)
"""Title, unit, and the log's columns with their labels."""


def by_step(run: RunView) -> list[Chart]:
    """What training logged over the steps of self-play, as means of equal stretches, with the guard's alarms."""
    rounds = [turn for turn in run.rounds if turn.t >= 0 and turn.log] or run.rounds
    logs = [turn.log for turn in rounds]
    last = [max((row["step"] for row in log), default=0) for log in logs]
    first = [sum(last[:i]) for i in range(len(last))]
    ran = [start for start, steps in zip(first, last, strict=True) if steps]
    alarms = tuple(start + row["crossed_at"] for start, turn in zip(first, rounds, strict=True) for row in turn.alarms)
    charts = []
    for title, unit, columns in _BY_STEP:
        lines = []
        for slot, (name, label) in enumerate(columns.items()):
            points: list[tuple[float, float, float]] = []
            for start, log in zip(first, logs, strict=True):
                points += [(start + step, value, 0.0) for step, value in _thinned(log, name)]
                points.append((math.nan, math.nan, 0.0))
            if any(math.isfinite(y) for _, y, _ in points):
                lines.append(Line(label, tuple(points), slot))
        if lines:
            charts.append(Chart(title, unit, "step", tuple(lines), tuple(ran[1:]), alarms=alarms))
    return charts


def overlay(runs: Sequence[RunView], labels: Sequence[str]) -> list[Chart]:
    """The charts of several runs on top of each other: a line per run, labelled, in the order given.

    A chart with several lines of its own becomes one chart per line.
    """
    several = {"Accuracy", *(title for title, _, columns in _BY_STEP if len(columns) > 1)}
    told: dict[str, tuple[Chart, list[Line]]] = {}
    for slot, (run, name) in enumerate(zip(runs, labels, strict=True)):
        for chart in (*by_round(run), *by_step(run)):
            for line in chart.lines:
                title = f"{chart.title}: {line.label}" if chart.title in several else chart.title
                told.setdefault(title, (chart, []))[1].append(Line(name, line.points, slot))
    return [
        replace(chart, title=title, lines=tuple(lines), breaks=(), alarms=(), legend=True)
        for title, (chart, lines) in told.items()
    ]


def figures(summaries: Sequence[Mapping[str, Any]]) -> list[str]:
    """The figures of evaluation summaries that are told: accuracies, tasks by their headline, the cost of gold.

    Left out: what says the same again in another unit, or in more detail (`task:NAME:FIGURE`, `pass@1`).
    """
    found = {name for summary in summaries for name, value in summary.items() if has_mean(value)}
    again = {"sampled", "greedy", "gold_nll", "gold_nll_token", "pass@1", "maj@1"}
    others = sorted(name for name in found - again if name.count(":") < 2)
    return [name for name in ("sampled", "greedy", *others, "gold_nll") if name in found]


def in_percent(name: str, summaries: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a figure is told in percent: a share, not one that names a `unit`, and within [0, 1]."""
    values: list[Any] = [value for summary in summaries if has_mean(value := summary.get(name))]
    return is_share(name) and all("unit" not in v and 0 <= v["mean"] <= 1 for v in values)


def has_mean(value: object) -> bool:
    """Whether a summary's entry is a figure: a mapping with a mean."""
    return isinstance(value, Mapping) and value.get("mean") is not None


def _figures(summaries: Mapping[int, Mapping[str, Any]], scale: float, *names: str) -> tuple[Line, ...]:
    lines = []
    for slot, name in enumerate(names):
        known = {n: summary[name] for n, summary in summaries.items() if has_mean(summary.get(name))}
        points = [(n, scale * v["mean"], 1.96 * scale * _finite(v.get("se"))) for n, v in known.items()]
        lines.append(Line(name, tuple((x, y, e) for x, y, e in points if math.isfinite(y)), slot))
    return tuple(line for line in lines if line.points)


def _plain(rows: Mapping[int, Mapping[str, Any]], scale: float, **labels: str) -> tuple[Line, ...]:
    lines = []
    for slot, (name, label) in enumerate(labels.items()):
        known = [(n, scale * row[name], 0.0) for n, row in rows.items() if row.get(name) is not None]
        lines.append(Line(label, tuple(point for point in known if math.isfinite(point[1])), slot))
    return tuple(line for line in lines if line.points)


def _finite(value: float | None) -> float:
    return value if value is not None and math.isfinite(value) else 0.0


def _thinned(log: Sequence[Mapping[str, float]], name: str) -> list[tuple[float, float]]:
    known = [(row["step"], row[name]) for row in log if name in row and math.isfinite(row[name])]
    size = -(-len(known) // _MOST_POINTS) or 1
    parts = [known[i : i + size] for i in range(0, len(known), size)]
    return [(sum(s for s, _ in part) / len(part), sum(v for _, v in part) / len(part)) for part in parts]


def tick(value: float) -> str:
    """A number as an axis says it: `1,200`, `41.2`, `5e-7`; short enough for the chart's margin."""
    text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    if 0 < abs(value) < 1e-3:
        text = f"{value:.2g}" if abs(value) < 1e-4 else f"{value * 1e4:.2g}e-4"
    return text.replace("e-0", "e-").replace("-", "\u2212")


def draw(chart: Chart, name: str) -> str:
    """The chart as an `<svg>` element in the page's own colours and font; `name` keeps ids apart within the page."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    style = {"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 9, "axes.linewidth": 0.8}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(3.5, 1.9), facecolor="none")
        _plot(figure.add_axes((0.155, 0.24, 0.825, 0.73), facecolor="none"), chart)
        file = io.StringIO()
        FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None, "Creator": None})
    return _inline(file.getvalue(), name)


def _plot(axes: Axes, chart: Chart) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    for end in chart.breaks:
        axes.axvline(end, color=_GRID, linewidth=0.8, linestyle=(0, (2, 2)))
    for x in chart.alarms:
        axes.axvline(x, color=_ALARM, linewidth=0.8)
        axes.plot([x], [1], marker="v", markersize=5, color=_ALARM, transform=axes.get_xaxis_transform(), clip_on=False)
    steps = chart.x == "step"
    for i, line in enumerate(chart.lines):
        colour, dash, marker = (some[line.slot % len(_LINES)] for some in (_LINES, DASHES, _MARKERS))
        style = (0, tuple(map(float, dash.split()))) if dash else "-"
        xs, ys, errors = zip(*line.points, strict=True)
        if any(errors):  # side by side, or one interval hides the other
            xs = tuple(x + 0.08 * (i - (len(chart.lines) - 1) / 2) for x in xs)
        # A round of one step is a line of one point
        few = sum(map(math.isfinite, ys)) <= 12
        width, shape = (1, "." if few else "") if steps else (1.4, marker)
        axes.plot(xs, ys, color=colour, linestyle=style, linewidth=width, marker=shape, markersize=4)
        if any(errors):
            axes.errorbar(xs, ys, errors, fmt="none", ecolor=colour, elinewidth=1, capsize=2.5)
    axes.grid(axis="y", color=_GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_GRID)
    axes.tick_params(colors=_INK, length=0, pad=5)
    axes.set_xlabel(chart.x, color=_INK)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))
    if chart.x != "step":
        axes.margins(x=0.08)
    if chart.from_zero:
        axes.set_ylim(0, 1.15 * max(y for line in chart.lines for _, y, _ in line.points) or 1)


def _inline(svg: str, name: str) -> str:
    """Without prolog, size and metadata; ids prefixed; colours by the page's variables, so that dark mode applies."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.S)
    svg = re.sub(r'<svg [^>]*viewBox="([^"]+)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', svg, count=1)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", svg).replace("xlink:href", "href")
    svg = re.sub(r"font-family: [^;]+; ", "", svg)
    for ours, page in _PAGE_COLOURS.items():
        svg = svg.replace(ours, page)
    return svg
