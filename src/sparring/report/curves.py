"""The report's curves: what each chart shows (pure), and its drawing as inline SVG that takes the page's colours."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from sparring.rundir.view import RunView

_MOST_POINTS = 120
_INK, _GRID = "#010203", "#010204"
_LINES = ("#010205", "#010206")
_PAGE_COLOURS = {_INK: "var(--soft)", _GRID: "var(--rule)", _LINES[0]: "var(--line-1)", _LINES[1]: "var(--line-2)"}


@dataclass(frozen=True)
class Line:
    """One curve of a chart."""

    label: str
    points: tuple[tuple[float, float, float], ...]
    """x, y and the half-width of y's 95 % interval (0: none); a NaN breaks the line."""


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

    @property
    def words(self) -> str:
        """The chart in words, for those who cannot see it: every point by player or round, the ends by step."""
        told = []
        for line in self.lines:
            known = [(x, y) for x, y, _ in line.points if math.isfinite(y)]
            shown = known if self.x != "step" else [known[0], known[-1]]
            told.append(f"{line.label}: " + ", ".join(f"{self.x} {x:g} {tick(y)}" for x, y in shown))
        return f"{self.title}, {self.unit}. " + "; ".join(told)


def by_round(run: RunView) -> list[Chart]:
    """Held-out figures by player and training figures at the end of each round; charts without a point are left out."""
    found = {n: run.evaluation(n) for n in sorted(run.players)}
    summaries = {n: summary for n, summary in found.items() if summary}
    ends = {turn.t: _end(turn.log) for turn in run.rounds}
    charts = [
        Chart("Accuracy", "% of held-out prompts", "player", _figures(summaries, 100, "sampled", "greedy")),
        Chart("Cost of the gold answer", "gold_nll, nats per answer", "player", _figures(summaries, 1, "gold_nll")),
        Chart("Margin", "last tenth of each round", "round", _plain(ends, 1, margin="margin")),
        Chart(
            "Log-probabilities in training",
            "nats per answer, last tenth of each round",
            "round",
            _plain(ends, 1, logp_gold="log p(gold)", logp_sample="log p(sample)"),
        ),
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
    return [chart for chart in charts if chart.lines]


def by_step(run: RunView) -> list[Chart]:
    """Loss, gradient norm, rate and what the guard saw over the steps of all rounds, as means of equal stretches."""
    breaks, first = [], 0.0
    titles = {
        "loss": ("Loss", "the method's own"),
        "grad_norm": ("Gradient norm", "before clipping"),
        "lr": ("Learning rate", ""),
        "misaligned": ("Misaligned", "share of groups whose sample is likelier than gold"),
        "held_displacement": ("Held-out log p(gold)", "nats per token, against the round's start"),
        "held_kl": ("Held-out KL", "KL(start ‖ learner), nats per token"),
    }
    columns: dict[str, list[tuple[float, float, float]]] = {name: [] for name in titles}
    for turn in run.rounds:
        for name, points in columns.items():
            points += [(first + step, value, 0.0) for step, value in _thinned(turn.log, name)]
            points.append((math.nan, math.nan, 0.0))
        first += max((row["step"] for row in turn.log), default=0)
        breaks.append(first)
    return [
        Chart(*titles[name], "step", (Line(titles[name][0].lower(), tuple(points)),), tuple(breaks[:-1]))
        for name, points in columns.items()
        if any(math.isfinite(y) for _, y, _ in points)
    ]


def _figures(summaries: Mapping[int, Mapping[str, Any]], scale: float, *names: str) -> tuple[Line, ...]:
    lines = []
    for name in names:
        known = {n: summary[name] for n, summary in summaries.items() if summary.get(name)}
        points = [(n, scale * v["mean"], 1.96 * scale * _finite(v.get("se"))) for n, v in known.items()]
        lines.append(Line(name, tuple((x, y, e) for x, y, e in points if math.isfinite(y))))
    return tuple(line for line in lines if line.points)


def _plain(rows: Mapping[int, Mapping[str, Any]], scale: float, **labels: str) -> tuple[Line, ...]:
    lines = []
    for name, label in labels.items():
        known = [(n, scale * row[name], 0.0) for n, row in rows.items() if row.get(name) is not None]
        lines.append(Line(label, tuple(point for point in known if math.isfinite(point[1]))))
    return tuple(line for line in lines if line.points)


def _finite(value: float | None) -> float:
    return value if value is not None and math.isfinite(value) else 0.0


def _end(log: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Means over the last tenth of a round's log (at least one row): a single batch is too noisy to compare rounds."""
    rows = log[-max(1, len(log) // 10) :] if log else []
    names = ("margin", "logp_gold", "logp_sample")
    return {name: sum(row[name] for row in rows) / len(rows) for name in names if rows and all(name in r for r in rows)}


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
    markers = ("", "") if chart.x == "step" else ("o", "s")
    for line, colour, marker, dash in zip(chart.lines, _LINES, markers, ("-", (0, (4, 2))), strict=False):
        xs, ys, errors = zip(*line.points, strict=True)
        if any(errors) and len(chart.lines) > 1:  # side by side, or one interval hides the other
            xs = tuple(x + (0.04 if colour == _LINES[1] else -0.04) for x in xs)
        axes.plot(xs, ys, color=colour, linestyle=dash, linewidth=1.4 if marker else 1, marker=marker, markersize=4)
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
