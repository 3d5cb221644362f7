"""`sparring compare`: gains are paired by prompt, and cost is counted from what was done."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from statistics import fmean, stdev

import pytest

import sparring
from helpers import cli, recipe
from sparring.compare import compare, differences, labels, pairs
from sparring.report import comparison
from sparring.report.curves import overlay
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


def test_how_a_figure_is_not_measured_does_not_matter(runs: tuple[RunView, RunView], tmp_path: Path) -> None:
    """log p(gold) is the same whatever is sampled beside it; its prompts are looked at where they are paired."""
    for name, given, same in (
        ("colder", ["evaluate.temperature=0.5", "evaluate.samples=2", "evaluate.limit=1000"], True),
        ("fewer", ["evaluate.limit=3"], False),
        ("shorter", ["evaluate.max_new_tokens=3"], False),
    ):
        sparring.fork(runs[0].path, tmp_path / name, given)
        (row,) = compare([runs[0], sparring.run(tmp_path / name)])[1][1:]
        assert (row.over_first is not None and row.over_first.mean == 0.0) == same, given


def test_a_run_that_is_under_way_is_compared_as_far_as_it_is(tmp_path: Path, tiny_model: Path, tiny_data: Path) -> None:
    """Without a verifier the newest player is the best, measured or not."""
    last = {"rounds": [{"method": "spin"}], "evaluate": {"verifier": None, "best": "last", "limit": 4}}
    made = [sparring.run(recipe(tmp_path / name, tiny_model, tiny_data, **last)) for name in "ab"]
    shutil.rmtree(tmp_path / "b" / "round_000" / "eval")
    _, (first, second) = compare([made[0], RunView(tmp_path / "b")])
    assert (first.best, second.best) == (1, 1) and second.over_first is None
    assert cli("compare", tmp_path / "a", tmp_path / "b").code == 0


def test_on_the_command_line(runs: tuple[RunView, RunView]) -> None:
    code, out, _ = cli("compare", runs[0].path, runs[1].path)
    assert code == 0
    assert "one" in out and "2 × spin" in out and "lower is better" in out
    page = runs[0].path / "compare.html"
    assert out.endswith(f"page: {page}\n") and page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert cli("compare", runs[0].path, runs[1].path, "--out", page.with_name("other.html")).code == 0
    assert page.with_name("other.html").read_text() == page.read_text()
    assert cli("compare", runs[0].path, "--out", page.with_name("no") / "page.html").code == 2
    assert cli("compare", runs[0].path.with_name("nowhere")).code == 2


def test_a_player_is_exported(runs: tuple[RunView, RunView], tmp_path: Path) -> None:
    out = tmp_path / "stronger"
    assert cli("export", runs[0].path, "--player", 1, "--out", out).code == 0
    assert sparring.players.identify(str(out)) == runs[0].players[1].sha
    assert cli("export", runs[0].path, "--out", out).code == 2  # exists already


def test_every_two_runs_are_paired(runs: tuple[RunView, RunView]) -> None:
    one, two = runs
    key, rows = compare([one, two, one])
    found = {(pair.one, pair.other): pair.gain for pair in pairs(key, rows)}
    assert list(found) == [(0, 1), (0, 2), (1, 2)]
    forth, back, same = found[0, 1], found[1, 2], found[0, 2]
    assert forth is not None and back is not None and same is not None
    assert (
        forth == rows[1].over_first and forth.mean == pytest.approx(-back.mean) and forth.se == pytest.approx(back.se)
    )
    assert (same.mean, same.se) == (0.0, 0.0)


def test_settings_that_differ_are_listed(runs: tuple[RunView, RunView]) -> None:
    assert differences(runs) == [("rounds.0.hyper.beta", ["0.1", "2.0"]), ("rounds", ["1", "2"])]
    assert differences([runs[0], runs[0]]) == []


def test_runs_of_one_name_are_told_apart(runs: tuple[RunView, RunView]) -> None:
    assert labels(runs) == ["one", "two"]
    assert labels([runs[0], runs[0]]) == [f"{runs[0].path.parent.name}/one"] * 2


def test_lines_keep_their_run_s_colour_where_a_run_is_missing(runs: tuple[RunView, RunView]) -> None:
    one, two = runs
    charts = {chart.title: chart for chart in overlay([one, two], ["a", "b"])}
    assert [(line.label, line.slot) for line in charts["Margin"].lines] == [("a", 0), ("b", 1)]
    assert {"Log-probabilities: log p(gold)", "Log-probabilities: log p(sample)"} <= charts.keys()
    assert all(chart.legend for chart in charts.values())
    steps = [max(x for x, _, _ in line.points if x == x) for line in charts["Loss"].lines]
    assert steps == [sum(r.counts["player"]["steps"] for r in run.rounds) for run in runs]


def test_the_page_says_who_is_ahead_and_by_how_much(runs: tuple[RunView, RunView]) -> None:
    key, rows = compare(runs)
    gain = rows[1].over_first
    assert gain is not None
    text = comparison(key, rows)
    ahead, behind = ("one", "two") if gain.mean >= 0 else ("two", "one")
    low, high = sorted(end if gain.mean < 0 else -end for end in gain.interval)
    shown = f"95\u00a0% interval {low:+.2f} to {high:+.2f}".replace("-", "\u2212")
    assert f"{ahead} is ahead of {behind} by {abs(gain.mean):.2f} nats" in text and shown in text
    assert "<script" not in text and "default-src 'none'" in text


def test_equal_runs_are_level(runs: tuple[RunView, RunView]) -> None:
    assert f"{runs[0].path.parent.name}/one come out level." in comparison(*compare([runs[0], runs[0]]))
