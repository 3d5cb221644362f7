"""The tables of docs/comparison.md, from what run.py wrote.

    python benchmarks/methods/table.py benchmarks/methods/results/noisy.jsonl
    python benchmarks/methods/table.py benchmarks/methods/results/noisy.jsonl --map     # SPIN over λ and τ

Every row is a mean over seeds with its standard error. `at equal diversity` is a method's accuracy at T = 1 less that of
the SFT player decoded at the temperature at which its answers have the same entropy (linear between measured
temperatures; beyond the coldest one, the coldest).
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import settings

Row = dict[str, Any]


def load(file: Path) -> dict[int, dict[str, Row]]:
    """Seed to name (of a method, with ` (no controls)` where there were none) to its result."""
    found: dict[int, dict[str, Row]] = {}
    for row in map(json.loads, file.read_text(encoding="utf-8").splitlines()):
        name = row["method"] + ("" if row.get("controls", True) else " (no controls)")
        found.setdefault(row["seed"], {})[name] = row
    return found


def matched(curve: dict[str, Row], entropy: float) -> float:
    """The SFT player's accuracy at the temperature that gives this entropy."""
    points = sorted((v["entropy"], v["accuracy"]) for v in curve.values())
    if entropy <= points[0][0]:
        return float(points[0][1])
    for (low, a), (high, b) in itertools.pairwise(points):
        if entropy <= high:
            return float(a + (b - a) * (entropy - low) / (high - low))
    return float(points[-1][1])


def shown(values: list[float], scale: float = 100.0, digits: int = 1) -> str:
    """Mean ± standard error."""
    if not values:
        return "–"
    mean = f"{scale * fmean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {scale * stdev(values) / math.sqrt(len(values)):.{digits}f}"


def control(rows: dict[str, Row]) -> Row:
    """Continued SFT at its best rate by validation."""
    runs = [row for name, row in rows.items() if name.startswith("sft ") and "figures" in row]
    return max(runs, key=lambda r: r["validation"][str(r["last"])]["mean"])


def table(found: dict[int, dict[str, Row]]) -> str:
    """Markdown: the start, continued SFT, then every method by its accuracy."""
    seeds = sorted(seed for seed, rows in found.items() if any(n.startswith("sft ") for n in rows))
    found = {seed: {name: row for name, row in found[seed].items() if name not in settings.MAP} for seed in seeds}
    start = {seed: found[seed]["start"]["curve"]["1.0"] for seed in seeds}
    sft = {seed: control(found[seed]) for seed in seeds}
    names = {name for seed in seeds for name in found[seed] if name != "start" and not name.startswith("sft ")}
    lines = [
        "| | seeds | accuracy, T = 1 | over SFT | over continued SFT | at equal diversity | greedy | entropy | pass@4 | collapsed | backoffs | s |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
        line("SFT player (start)", seeds, found, {s: {"figures": start[s], "figures_last": start[s], "greedy": found[s]["start"]["greedy"], "backoffs": [], "seconds": 0.0} for s in seeds}, start, sft),
        line("continued SFT, best rate", seeds, found, sft, start, sft),
    ]  # fmt: skip
    made: list[tuple[float, str]] = []
    for name in sorted(names):
        rows = {seed: found[seed][name] for seed in seeds if "figures" in found[seed].get(name, {})}
        if rows:
            mark = " ✓" if name.removesuffix(" (no controls)") in settings.VERIFIED else ""
            order = fmean(r["figures"]["accuracy"] for r in rows.values())
            made.append((-order, line(name + mark, sorted(rows), found, rows, start, sft)))
    return "\n".join([*lines, *(text for _, text in sorted(made))])


def line(
    name: str, seeds: list[int], found: dict[int, dict[str, Row]], rows: dict[int, Row], start: dict[int, Row], sft: dict[int, Row]
) -> str:  # fmt: skip
    """One method's row; it collapsed in a seed if its last player is two standard errors below the start."""
    accuracy = {s: rows[s]["figures"]["accuracy"] for s in seeds}
    last = {s: rows[s]["figures_last"]["accuracy"] for s in seeds}
    error = {s: math.sqrt(2 * start[s]["accuracy"] * (1 - start[s]["accuracy"]) / 500) for s in seeds}
    cells = [
        name,
        str(len(seeds)),
        shown([accuracy[s] for s in seeds]),
        shown([accuracy[s] - start[s]["accuracy"] for s in seeds]),
        shown([accuracy[s] - sft[s]["figures"]["accuracy"] for s in seeds]),
        shown([accuracy[s] - matched(found[s]["start"]["curve"], rows[s]["figures"]["entropy"]) for s in seeds]),
        shown([rows[s]["greedy"] for s in seeds]),
        shown([rows[s]["figures"]["entropy"] for s in seeds], 1, 2),
        shown([rows[s]["figures"]["pass"] for s in seeds]),
        f"{sum(last[s] < start[s]['accuracy'] - 2 * error[s] for s in seeds)} of {len(seeds)}",
        f"{fmean(sum(rows[s]['backoffs']) for s in seeds):.1f}",
        f"{fmean(rows[s]['seconds'] for s in seeds):.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def grid(found: dict[int, dict[str, Row]]) -> str:
    """Markdown: SPIN's gain over its start, at equal diversity and in backoffs, by λ (rows) and τ (columns).

    A seed in which every answer was gold and nothing was left to train on counts as no gain.
    """
    betas, taus = (list(dict.fromkeys(name.split(", ")[i].split()[1] for name in settings.MAP)) for i in (1, 2))

    def cell(beta: str, tau: str) -> str:
        name = f"spin, beta {beta}, T {tau}"
        seeds = [seed for seed, rows in found.items() if name in rows]
        over, apart, backoffs = [], [], []
        for seed in seeds:
            curve, row = found[seed]["start"]["curve"], found[seed][name]
            got = row.get("figures", curve["1.0"])
            over.append(got["accuracy"] - curve["1.0"]["accuracy"])
            apart.append(got["accuracy"] - matched(curve, got["entropy"]))
            backoffs.append(sum(row.get("backoffs", [])))
        return f"{shown(over)} / {shown(apart)} / {fmean(backoffs):.0f}" if seeds else "–"

    lines = ["| λ \\ τ | " + " | ".join(taus) + " |", "|---" * (len(taus) + 1) + "|"]
    return "\n".join([*lines, *(f"| {b} | " + " | ".join(cell(b, t) for t in taus) + " |" for b in betas)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--map", action="store_true", help="SPIN over λ and the opponent's temperature")
    options = parser.parse_args()
    print((grid if options.map else table)(load(options.file)))


if __name__ == "__main__":
    main()
