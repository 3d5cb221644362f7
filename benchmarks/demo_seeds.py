"""The demo over several seeds, with every control: the figures of docs/demo.md.

    python benchmarks/demo_seeds.py                 # seeds 200 … 204, on which no setting was chosen
    python benchmarks/demo_seeds.py --seeds 0 1 --out runs/tuning

Per seed: SFT, three rounds of SPIN, continued SFT at three learning rates with the same number of gradient steps,
plain SPIN with the opponent at temperature 1, and the SFT player decoded colder. The best round is chosen on the
validation split; every figure is on the test split. A killed script continues with the same command.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

from sparring import api, demo
from sparring.rundir.store import write_json
from sparring.rundir.view import RunView

RATES = (3e-4, 1e-3, 2e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(200, 205)))
    parser.add_argument("--out", type=Path, default=Path("runs/demo_seeds"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    results = [one_seed(options.out / str(seed), seed) for seed in options.seeds]
    write_json(options.out / "results.json", {"seeds": results, "summary": summary(results)})
    print(table(results))
    print(json.dumps(summary(results), indent=1))


def one_seed(out: Path, seed: int) -> dict[str, Any]:
    """All figures of one seed."""
    demo.demo(out, seed)
    view = RunView(out)
    rates = {f"continued SFT, lr {lr:g}": demo.continue_sft(view, lr) for lr in RATES}
    hot = len(view.config.rounds) - demo.ROUNDS
    plain = out / "plain"
    if not plain.exists():
        api.fork(out, plain, [f"rounds.{hot}.play.temperature=1.0"])
    plain_view = api.run(plain)
    rows = {f"player {n} ({view.made_by(n)})": demo.test_figures(view, n) for n in sorted(view.players) if n >= 0}
    rows |= {name: demo.test_figures(run, max(run.players)) for name, run in rates.items()}
    rows |= {
        f"plain SPIN (T = 1), player {n}": demo.test_figures(plain_view, n) for n in sorted(plain_view.players) if n > 0
    }
    rows |= {f"player 0 sampled at T = {t}": demo.test_figures(view, 0, temperature=t) for t in demo.COLDER}
    seconds = json.loads((out / "summary.json").read_text())["seconds"]
    return {"seed": seed, "best": view.best, "rows": rows, "seconds": seconds}


def summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    """The demo's bar: gains of the best round in points of accuracy, over seeds."""
    best = [r["rows"][f"player {r['best']} ({'spin' if r['best'] else 'sft'})"] for r in results]
    start = [r["rows"]["player 0 (sft)"] for r in results]
    control = [
        max((v for k, v in r["rows"].items() if k.startswith("continued")), key=lambda f: f["sampled"]["mean"])
        for r in results
    ]

    def gain(key: str, other: list[dict[str, Any]]) -> dict[str, Any]:
        points = [100 * (b[key]["mean"] - o[key]["mean"]) for b, o in zip(best, other, strict=True)]
        return {"mean": round(statistics.fmean(points), 2), "se": _se(points), "each": [round(p, 2) for p in points]}

    return {
        "sampled: best round − SFT": gain("sampled", start),
        "sampled: best round − best continued SFT": gain("sampled", control),
        "greedy: best round − SFT": gain("greedy", start),
        "greedy: best round − best continued SFT": gain("greedy", control),
    }


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: mean ± standard error over seeds, accuracies in percent."""
    lines = ["| | sampled, T = 1 | greedy | gold_nll (nats) |", "|---|---|---|---|"]
    for name in results[0]["rows"]:
        cells = []
        for key, scale, digits in (("sampled", 100, 1), ("greedy", 100, 1), ("gold_nll", 1, 3)):
            values = [scale * r["rows"][name][key]["mean"] for r in results]
            error = _se(values)
            cells.append(f"{statistics.fmean(values):.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}"))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _se(values: list[float]) -> float | None:
    return round(statistics.stdev(values) / math.sqrt(len(values)), 3) if len(values) > 1 else None


if __name__ == "__main__":
    main()
