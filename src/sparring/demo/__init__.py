"""The embedded default: SFT, three rounds of SPIN and the honest controls on a task made here, on this CPU."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparring import threads
from sparring.config import Tree
from sparring.errors import InputError
from sparring.rundir.store import read_json, write_json

if TYPE_CHECKING:
    from rich.console import Group as Renderables

    from sparring.rundir.view import RunView

log = logging.getLogger("sparring")

ROUNDS = 3
CONTROL_LR = 1e-3
"""Peak rate of continued SFT in `sparring demo`; benchmarks/demo_seeds.py tries three."""
COLDER = (0.7, 0.5)
TEST_SAMPLES = 2


@dataclass(frozen=True)
class Figures:
    """Evaluation summaries on the test split."""

    players: dict[int, dict[str, Any]]
    controls: dict[str, dict[str, Any]]
    """Continued SFT first, then the SFT player sampled colder, last the data themselves."""


def recipe(out: Path, seed: int) -> Tree:
    """The recipe of the demo: an ordinary one, which `sparring run` would take as well."""
    return {
        "run": str(out),
        "seed": seed,
        # More than two threads slow a model of 47k parameters down; whoever set OMP_NUM_THREADS knows better.
        "model": {
            "path": str(out / "task" / "model"),
            "threads": None if "OMP_NUM_THREADS" in os.environ else min(2, threads.allowed()),
        },
        "data": {"path": str(out / "task" / "train.jsonl"), "heldout": str(out / "task" / "validation.jsonl")},
        "play": {"max_new_tokens": 24, "batch_size": 1000, "chunk": 1000},
        "train": {"optimizer": "adamw", "micro_batch": 64, "batch_size": 64, "save_every": 400},
        "evaluate": {"verifier": "gsm8k", "limit": 1000, "samples": 2},
        "rounds": [
            {
                "method": "sft",
                "train": {
                    "lr": 4e-3,
                    "betas": [0.9, 0.99],
                    "weight_decay": 0.01,
                    "epochs": 10,
                    "warmup": 50,
                    "schedule": "cosine",
                    "floor": 0.05,
                },
            },
            {
                "method": "spin",
                "repeat": ROUNDS,
                "limit": 4000,
                "beta": 2.0,
                "duplicates": "drop",
                "play": {"temperature": 2.0, "samples": 2},
                "train": {"lr": 5e-4, "epochs": 2},
            },
        ],
    }


def demo(out: Path, seed: int) -> Renderables:
    """Run it, or continue it; writes `summary.json` and `report.html` and returns the table."""
    from sparring import api, views
    from sparring.formatting import player_rows
    from sparring.report import write_report

    started = time.perf_counter()
    make_task(out, seed)
    begun = time.perf_counter()
    view = api.run(recipe(out, seed))
    control = continue_sft(view, CONTROL_LR)
    ended = time.perf_counter()
    figures = test_split(view, {f"continued SFT, lr {CONTROL_LR:g}": control})
    rest = begun - started + time.perf_counter() - ended
    seconds = {"total": round(view.seconds + control.seconds + rest, 1), **_seconds(view)}
    write_json(out / "summary.json", summarise(view, figures, seconds))
    write_report(view, out / "report.html", figures.players, extra=figures.controls, split="test split")
    return views.results(player_rows(view, figures.players), figures.controls)


def make_task(out: Path, seed: int) -> None:
    """The data files and the untrained model, in `out/task`. Raises InputError where they were made with another seed."""
    from sparring.demo import build, task

    folder, partial = out / "task", out / "task.partial"
    if not folder.exists():
        task.write(partial, seed)
        build.build(partial / "model", seed)
        write_json(partial / "seed.json", seed)
        partial.rename(folder)
    file = folder / "seed.json"
    made = read_json(file) if file.exists() else seed
    if made != seed:
        raise InputError(f"{out}: holds the demo of seed {made}, not of seed {seed}; give another folder (--out)")


def continue_sft(view: RunView, lr: float) -> RunView:
    """The control "same compute, more SFT": as many gradient steps as all rounds of self-play took, from player 0."""
    from sparring import api

    steps = max(1, sum(int(r.counts.get("player", {}).get("steps", 0)) for r in view.rounds if r.t >= 0))
    tree = recipe(view.path, view.config.seed)
    tree["run"] = str(view.path / f"control_{lr:g}")
    tree["model"] = tree["model"] | {"path": view.players[0].path}
    sft = {"lr": lr, "betas": [0.9, 0.99], "weight_decay": 0.01, "epochs": 1000, "max_steps": steps}
    tree["rounds"] = [{"method": "sft", "train": sft}]
    return api.run(tree)


def test_split(view: RunView, controls: Mapping[str, RunView]) -> Figures:
    """Every player, control and colder decoding on the test split, which nothing was chosen by."""
    rows = {name: test_figures(run, max(run.players)) for name, run in controls.items()}
    colder = {t: test_figures(view, 0, temperature=t) for t in COLDER}
    rows |= {f"player 0 sampled at T = {t}": figures for t, figures in colder.items()}
    rows["the training answers themselves"] = {"sampled": data_accuracy(view)}
    return Figures({n: test_figures(view, n) for n in sorted(view.players) if n >= 0}, rows)


def data_accuracy(view: RunView) -> float:
    """Share of right training answers: what a perfect copy of the data would score at temperature 1."""
    from statistics import fmean

    from sparring.demo.task import verify

    return round(fmean(bool(verify(e, e.gold or "")) for e in view.examples.values()), 4)


def summarise(view: RunView, figures: Figures, seconds: Mapping[str, float]) -> dict[str, Any]:
    """`summary.json`: accuracies as shares and gold_nll in nats per answer, each with its standard error.

    `seconds["total"]` is that of every stage of run and control, whichever process did it, and of all else that the
    process did which wrote the file: making the task and the test split's evaluations, unless they were there.
    """
    control, *others = figures.controls.values()
    return {
        "seed": view.config.seed,
        "best": view.best,
        "players": [{"player": n, "made_by": view.made_by(n), **_flat(f)} for n, f in figures.players.items()],
        "control": _flat(control),
        "colder": {str(t): f["sampled"]["mean"] for t, f in zip(COLDER, others, strict=False)},
        "data": others[-1]["sampled"],
        "seconds": dict(seconds),
    }


def _flat(figures: Mapping[str, Any]) -> dict[str, float | None]:
    names = ("greedy", "sampled", "gold_nll")
    means = {name: round(figures[name]["mean"], 5) for name in names}
    errors = {f"{name}_se": figures[name]["se"] for name in names}
    return means | {name: None if error is None else round(error, 5) for name, error in errors.items()}


def test_figures(view: RunView, number: int, temperature: float = 1.0) -> dict[str, Any]:
    """A player's evaluation on the test split, kept beside the run so that it is made once."""
    from sparring import players, preview
    from sparring.config import DataConfig, EvaluateConfig
    from sparring.data import load
    from sparring.evaluate import evaluate
    from sparring.judge.verify import load_verifier
    from sparring.prompts import render

    player = view.players[number]
    file = view.path / "test" / f"player_{number}_at_{temperature:g}.json"
    if file.exists() and read_json(file)["sha"] == player.sha:
        return dict(read_json(file)["figures"])
    log.info("test split: player %s at temperature %s", number, temperature)
    data = DataConfig(path=str(_task_folder(view) / "test.jsonl"), heldout_size=0)
    examples = load(data, view.config.seed).train
    renderer = preview.make_renderer(view)
    play = view.config.evaluation_play
    rows = render(examples, renderer, data, context=64, max_new_tokens=play.max_new_tokens).rows
    settings = EvaluateConfig(verifier="gsm8k", limit=len(rows), samples=TEST_SAMPLES, temperature=temperature)
    model = players.load_model(player.path, view.config.model)
    got = evaluate(
        model, player, examples, rows, settings, play, renderer, load_verifier("gsm8k"), seed=view.config.seed
    )
    file.parent.mkdir(exist_ok=True)
    write_json(file, {"sha": player.sha, "figures": got.summary})
    return got.summary


def _task_folder(view: RunView) -> Path:
    return Path(view.config.data.path).parent


def _seconds(view: RunView) -> dict[str, float]:
    """Seconds by kind of stage; `train` is self-play's, `sft` the preparation's."""
    spent = {"sft": 0.0, "play": 0.0, "frozen": 0.0, "train": 0.0, "eval": 0.0}
    names = {"samples": "play", "frozen": "frozen", "eval": "eval"}
    for r in view.rounds:
        for stage, seconds in r.seconds.items():
            kind = names.get(stage) or (("sft" if r.t < 0 else "train") if stage == "player" else None)
            if kind:
                spent[kind] = round(spent[kind] + seconds, 1)
    return spent
