"""`sparring compare`: gains are paired by prompt, and cost is counted from what was done."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import fmean, stdev

import pytest

import sparring
from helpers import cli, recipe
from sparring.compare import compare
from sparring.rundir.view import RunView


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_data: Path) -> tuple[RunView, RunView]:
    """Two runs without a verifier, whose figure is gold_nll; the second has one round more and other prompts to play."""
    folder = tmp_path_factory.mktemp("runs")
    common = {"evaluate": {"verifier": None, "best": "gold_nll", "limit": 4}, "controls": {"patience": None}}
    one = recipe(folder / "one", tiny_model, tiny_data, rounds=[{"method": "spin"}], **common)
    two = recipe(folder / "two", tiny_model, tiny_data, rounds=[{"method": "spin", "repeat": 2, "beta": 2.0}], **common)
    return sparring.run(one), sparring.run(two)


def nll(run: RunView, number: int) -> dict[str, float]:
    return {item.example_id: -math.fsum(item.logps) for item in run.items(number) if item.kind == "gold"}


def test_gains_are_paired_by_prompt(runs: tuple[RunView, RunView]) -> None:
    one, two = runs
    key, (first, second) = compare([one, two])
    assert key == "gold_nll"
    assert first.over_first is None and second.over_first is not None
    assert first.best is not None and second.best is not None
    mine, other = nll(two, second.best), nll(one, first.best)
    gaps = [mine[name] - other[name] for name in other]
    assert second.over_first.mean == pytest.approx(fmean(gaps), abs=1e-6)
    assert second.over_first.se == pytest.approx(stdev(gaps) / math.sqrt(len(gaps)), abs=1e-6)
    if second.best > 0:
        start = nll(two, 0)
        assert second.over_start is not None
        assert second.over_start.mean == pytest.approx(fmean(mine[n] - start[n] for n in start), abs=1e-6)


def test_costs_are_what_was_done(runs: tuple[RunView, RunView]) -> None:
    _, (first, second) = compare(runs)
    assert (first.methods, second.methods) == ("spin", "2 × spin")
    assert (first.steps, second.steps) == tuple(sum(r.counts["player"]["steps"] for r in run.rounds) for run in runs)
    for row, run in zip((first, second), runs, strict=True):
        assert row.tokens == sum(len(s.tokens) for r in run.rounds for s in r.rows("samples", sparring.Sample))
        assert row.seconds == pytest.approx(run.seconds)


def test_other_prompts_are_not_compared(runs: tuple[RunView, RunView], tiny_model: Path, tiny_data: Path) -> None:
    tree = recipe(runs[0].path.with_name("three"), tiny_model, tiny_data, rounds=[{"method": "spin"}])
    other = sparring.run(tree | {"seed": 7, "evaluate": {"verifier": None, "best": "gold_nll", "limit": 3}})
    assert compare([runs[0], other])[1][1].over_first is None


def test_on_the_command_line(runs: tuple[RunView, RunView]) -> None:
    code, out, _ = cli("compare", runs[0].path, runs[1].path)
    assert code == 0
    assert "one" in out and "2 × spin" in out and "lower is better" in out
    assert cli("compare", runs[0].path.with_name("nowhere")).code == 2


def test_a_player_is_exported(runs: tuple[RunView, RunView], tmp_path: Path) -> None:
    out = tmp_path / "stronger"
    assert cli("export", runs[0].path, "--player", 1, "--out", out).code == 0
    assert sparring.players.identify(str(out)) == runs[0].players[1].sha
    assert cli("export", runs[0].path, "--out", out).code == 2  # exists already
