"""`metrics.jsonl` through kills, backoffs, redone stages and forks; trackers are told every line once and cannot do harm."""

from __future__ import annotations

import glob
import json
import logging
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

import sparring
from helpers import cli, player_shas, recipe
from sparring import sinks
from sparring.rundir import metrics
from sparring.rundir.states import TrainStates
from sparring.rundir.view import RunView

Row = dict[str, Any]


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not refused here: W&B talks to a process of its own. Its offline mode needs no other."""
    monkeypatch.setenv("WANDB_MODE", "offline")


def lines(run: Path) -> list[Row]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def timeless(rows: list[Row]) -> list[Row]:
    """What a repeated step repeats."""
    return [{k: v for k, v in row.items() if k not in ("time", "seconds")} for row in rows]


# metrics.jsonl --------------------------------------------------------------------------------------------------------


def test_every_step_and_evaluation_has_a_line(finished_run: Path) -> None:
    view, found = RunView(finished_run), lines(finished_run)
    places = [(r["round"], r["player"], r["stage"], r["step"], r["global_step"]) for r in found]
    # 12 prompts in batches of 4: three steps a round
    assert places == [
        (None, -1, "eval", 0, 0),
        *((-1, 0, "player", s, s) for s in (1, 2, 3)),
        (-1, 0, "eval", 3, 3),
        *((0, 1, "player", s, s + 3) for s in (1, 2, 3)),
        (0, 1, "eval", 3, 6),
        *((1, 2, "player", s, s + 6) for s in (1, 2, 3)),
        (1, 2, "eval", 3, 9),
    ]
    assert [r["time"] for r in found] == sorted(r["time"] for r in found)
    logged = view.rounds[1].log[1]
    assert {k: found[6][k] for k in logged} == logged and found[6]["margin"] == logged["margin"]
    summary = view.evaluation(2)
    assert summary is not None
    assert (found[-1]["gold_nll"], found[-1]["gold_nll_se"]) == (summary["gold_nll"]["mean"], summary["gold_nll"]["se"])
    assert (found[-1]["truncated"], found[-1]["n"]) == (summary["truncated"], 4)


def test_figures_of_any_summary() -> None:
    summary = {
        "n": 4, "greedy": None, "flagged": True, "name": "x", "sampled": {"mean": 0.5, "se": None, "n": 4},
        "tasks": {"arc": {"acc": {"mean": 0.25, "se": 0.125}, "shots": 25}},
    }  # fmt: skip
    assert metrics.figures(summary) == {
        "n": 4, "sampled": 0.5, "tasks/arc/acc": 0.25, "tasks/arc/acc_se": 0.125, "tasks/arc/shots": 25,
    }  # fmt: skip


def test_what_is_no_number_is_null(tmp_path: Path, finished_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def derived(run: RunView) -> Iterator[Row]:
        yield {"time": 1.0, "round": 0, "stage": "player", "backoffs": 0, "global_step": 1, "margin": float("nan")}

    monkeypatch.setattr(metrics, "derived", derived)
    monkeypatch.setattr("sparring.rundir.view.RunView", lambda path: None)
    metrics.Metrics(tmp_path).sync()
    assert lines(tmp_path)[0]["margin"] is None


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_data: Path) -> dict[str, Any]:
    """A recipe whose guard goes back, and states at every second step; its run, never interrupted, is in `whole`."""
    folder = tmp_path_factory.mktemp("guarded")
    train = {"epochs": 2, "save_every": 2}
    controls = {"checks": 3, "trust_region": 1e-3, "backoffs": 2}
    play = {"chunk": 4, "max_new_tokens": 6}
    tree = recipe(folder / "whole", tiny_model, tiny_data, train=train, controls=controls, play=play)
    tree["rounds"] = [{"method": "sft"}, {"method": "spin"}]
    sparring.run(tree)
    return tree


def test_steps_that_a_guard_took_back_have_no_line(guarded: dict[str, Any]) -> None:
    found = lines(Path(guarded["run"]))
    steps = [r["step"] for r in found if r["round"] == 0 and r["stage"] == "player" and "backoff" not in r]
    alarms = [(r["step"], r["backoff"], r["backoffs"]) for r in found if "backoff" in r]
    assert steps == [1, 2, 3, 4, 5, 6] and alarms == [(0, 1, 1), (2, 2, 2)]
    by_step = {r["step"]: r["backoffs"] for r in found if r["round"] == 0 and "backoff" not in r}
    assert by_step == {1: 1, 2: 1, 3: 2, 4: 2, 5: 2, 6: 0}  # 6 is the evaluation's


class Stop(BaseException):
    """As sudden as a kill, for what follows in this process."""


def interrupted(tree: dict[str, Any], patch: pytest.MonkeyPatch, folder: str, number: int, before: bool) -> None:
    """Run until log line `number` of a round's training, and stop before or after it is in the metrics."""
    add, log, seen = metrics.Metrics.add, TrainStates.log, []

    def logged(self: TrainStates, row: dict[str, float]) -> None:
        log(self, row)
        if self.folder.parent.name == folder:
            seen.append(row)
            if before and len(seen) == number:
                raise Stop

    def added(self: metrics.Metrics, t: int, row: Mapping[str, float]) -> None:
        add(self, t, row)
        if not before and len(seen) == number:
            raise Stop

    with patch.context() as here:
        here.setattr(TrainStates, "log", logged)
        here.setattr(metrics.Metrics, "add", added)
        with pytest.raises(Stop):
            sparring.run(tree)


@pytest.mark.parametrize("before", [True, False])
def test_after_a_kill_no_line_is_there_twice_and_none_is_missing(
    guarded: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: bool
) -> None:
    tree = guarded | {"run": str(tmp_path / "whole")}
    for folder, number in (("prep_000", 3), ("round_000", 2), ("round_000", 5)):
        interrupted(tree, monkeypatch, folder, number, before)
        with (tmp_path / "whole" / "metrics.jsonl").open("a") as stream:
            stream.write('{"time": 1.0, "rou')  # a line that the kill cut
    left = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()[:-1]]
    kept = {(r["stage"], r["player"], r["step"]): r["time"] for r in left if r["player"] < 1}
    assert len(kept) >= 7
    sparring.run(tree)
    found = lines(tmp_path / "whole")
    assert timeless(found) == timeless(lines(Path(guarded["run"])))
    assert {k: t for r in found if (k := (r["stage"], r["player"], r["step"])) in kept for t in [r["time"]]} == kept


def test_nothing_is_written_where_nothing_changed(guarded: dict[str, Any]) -> None:
    file = Path(guarded["run"]) / "metrics.jsonl"
    before = file.stat()
    sparring.run(guarded)
    assert (file.stat().st_ino, file.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_superseded_stages_take_their_lines_along_and_a_fork_has_those_it_shares(
    tmp_path: Path, tiny_model: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = fakes(monkeypatch)
    tree = recipe(tmp_path / "run", tiny_model, tiny_data, track={"to": ["tensorboard"]})
    sparring.run(tree)
    before = lines(tmp_path / "run")
    sparring.api.fork(tmp_path / "run", tmp_path / "fork", ["rounds.1.beta=[0.1, 2.0]"])
    sparring.run(tmp_path / "run", ["rounds.1.beta=[0.1, 2.0]"], redo=True)
    after = lines(tmp_path / "run")
    assert after[:9] == before[:9]  # up to player 1's evaluation, times and all
    # Round 1's other β: as many lines, with other figures
    assert len(after) == len(before) == 13 and timeless(after[9:]) != timeless(before[9:])
    # Trackers begin anew, with the whole of the present story
    assert (tmp_path / "run" / "superseded" / "1" / "track" / "state.json").exists()
    (first, one), (second, two) = list(heard["tensorboard"].items())
    assert first != second and [len(one), len(two)] == [13, 13]
    sparring.run(tmp_path / "fork", ["track.to=[]"])
    assert timeless(lines(tmp_path / "fork")) == timeless(after)


# Trackers -------------------------------------------------------------------------------------------------------------


def fakes(monkeypatch: pytest.MonkeyPatch, fails: Mapping[str, str] | None = None) -> dict[str, dict[str, list[Any]]]:
    """Trackers that remember: name to run name to (figures, step, time); `fails`: name to where it raises."""
    heard: dict[str, dict[str, list[Any]]] = {}
    faults = fails if fails is not None else {}

    def make(tracker: str) -> Any:
        class Fake:
            def __init__(self, run: Path, name: str, project: str, tree: Any) -> None:
                if faults.get(tracker) == "open":
                    raise ConnectionError("no route to host\nsecond line")
                self.rows = heard.setdefault(tracker, {}).setdefault(name, [])

            def log(self, figures: Mapping[str, float], step: int, when: float) -> None:
                if faults.get(tracker) == "log" and len(self.rows) == 4:
                    raise ConnectionError("no route to host\nsecond line")
                self.rows.append((dict(figures), step, when))

            def close(self) -> None:
                if faults.get(tracker) == "close":
                    raise ConnectionError("no route to host\nsecond line")

        return Fake

    monkeypatch.setattr(sinks, "SINKS", {name: make(name) for name in sinks.SINKS})
    monkeypatch.setattr(sinks, "find_spec", lambda name: name)
    return heard


def test_a_tracker_is_told_every_line_once_through_kills(
    guarded: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = fakes(monkeypatch)
    tree = guarded | {"run": str(tmp_path / "whole"), "track": {"to": ["wandb"]}}
    for folder, number in (("prep_000", 3), ("round_000", 2), ("round_000", 5)):
        interrupted(tree, monkeypatch, folder, number, False)
    sparring.run(tree)
    sparring.run(tree)
    (told,) = heard["wandb"].values()
    # As lived through without a kill: step 1, back to 0, 1, 2, 3, back to 2, 3 … 6
    steps = [("guard" if "guard/backoff" in f else "train", s - 6) for f, s, _ in told if "train/margin" in f or "guard/backoff" in f]  # fmt: skip
    train = [("train", s) for s in (1, 2, 3, 4, 5, 6)]
    assert steps == [train[0], ("guard", 0), *train[:3], ("guard", 2), *train[2:]]
    kept = lines(tmp_path / "whole")
    assert len(told) == len(kept) + 2  # the two that the guard took back
    assert told[0][0]["eval/gold_nll"] == kept[0]["gold_nll"] and told[0][2] == kept[0]["time"]
    assert told[-1][0]["eval/gold_nll"] == kept[-1]["gold_nll"] and told[-1][1] == 12


def test_a_tracker_that_comes_later_is_told_what_went_before(
    guarded: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = fakes(monkeypatch)
    for to in (["trackio"], ["trackio", "tensorboard"], ["tensorboard"]):
        sparring.run(guarded | {"track": {"to": to}})
    rows = lines(Path(guarded["run"]))
    for name in ("trackio", "tensorboard"):
        ((run, told),) = heard[name].items()
        assert run.startswith("whole-") and [t[1:] for t in told] == [(r["global_step"], r["time"]) for r in rows]


@pytest.mark.parametrize("where", ["open", "log", "close"])
def test_a_tracker_that_fails_costs_one_line(
    where: str, tmp_path: Path, tiny_model: Path, tiny_data: Path, finished_run: Path,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    faults = {"wandb": where}
    heard = fakes(monkeypatch, faults)
    tree = recipe(tmp_path / "run", tiny_model, tiny_data, track={"to": ["wandb", "tensorboard"]})
    with caplog.at_level(logging.WARNING, "sparring"):
        sparring.run(tree)
    assert [r.getMessage() for r in caplog.records if "track" in r.getMessage()] == [
        "track: wandb failed and is told no more until this run is continued: no route to host"
    ]
    assert player_shas(tmp_path / "run") == player_shas(finished_run)
    assert timeless(lines(tmp_path / "run")) == timeless(lines(finished_run))
    (others,) = heard["tensorboard"].values()
    assert len(others) == 13
    faults.clear()
    sparring.run(tree)  # goes on: what was missed is told
    (told,) = heard["wandb"].values()
    assert told == others


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_package_that_is_missing_is_told_before_anything_runs(
    name: str, tmp_path: Path, tiny_model: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sinks, "find_spec", lambda module: None)
    code, out, err = cli(
        "run", "--model", tiny_model, "--data", tiny_data, "--out", tmp_path / "run", f"track.to=[{name}]"
    )
    line = f"sparring: track.to: {name} is not installed; pip install {name}, or leave it out of track.to\n"
    assert (code, out, err) == (2, "", line)
    assert not (tmp_path / "run").exists()


def test_an_unknown_tracker_is_refused(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    given = ["run", "--model", tiny_model, "--data", tiny_data, "--out", tmp_path / "run"]
    assert cli(*given, "track.to=[mlflow]").err.startswith("sparring: `track.to=[mlflow]`: track.to.0: must be")
    assert "track.too" in cli(*given, "track.too=[wandb]").err


def test_evaluations_are_told_in_whatever_order_they_are_done(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Player 2 is trained before player 1 is evaluated: `sparring train RUN --round 1`, then `eval RUN --round 0`."""
    heard = fakes(monkeypatch)
    rows = lines(finished_run)
    late = next(row for row in rows if row["stage"] == "eval" and row["player"] == 1)
    order = [row for row in rows if row is not late] + [late]
    config = sparring.config.TrackConfig(to=("wandb",))
    for end in (len(order) - 1, len(order), len(order)):  # in three processes
        trackers = sinks.Trackers(tmp_path, config, dict)
        for row in sorted(order[:end], key=rows.index):
            trackers.tell(row)
    (told,) = heard["wandb"].values()
    assert [(t[1], t[2]) for t in told] == [(row["global_step"], row["time"]) for row in order]


def test_what_an_older_version_told_is_not_told_again(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its one mark was of evaluations as well: here it had come to player 0's."""
    heard = fakes(monkeypatch)
    rows = lines(finished_run)
    (tmp_path / "metrics.jsonl").write_bytes((finished_run / "metrics.jsonl").read_bytes())
    (tmp_path / "track").mkdir()
    state = {"name": "run-1", "marks": {"wandb": [0, 1, 0, 3]}, "tasks": {"wandb": ["0/sums"]}}
    (tmp_path / "track" / "state.json").write_text(json.dumps(state))
    trackers = sinks.Trackers(tmp_path, sparring.config.TrackConfig(to=("wandb",)), dict)
    for row in (*rows, rows[4] | {"stage": "task", "task": "sums"}):
        trackers.tell(row)
    assert (
        [t[1] for t in heard["wandb"]["run-1"]] == [row["global_step"] for row in rows[5:]] == [4, 5, 6, 6, 7, 8, 9, 9]
    )


def test_a_damaged_state_is_begun_anew(tmp_path: Path) -> None:
    (tmp_path / "track").mkdir()
    (tmp_path / "track" / "state.json").write_text('{"na')
    config = sparring.config.TrackConfig(to=("wandb",))
    assert sinks.Trackers(tmp_path, config, dict)._marks == {}


# The real ones --------------------------------------------------------------------------------------------------------


@pytest.fixture
def tracked(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> Any:
    """Runs the tiny recipe in two processes' worth, with one tracker; returns the run's folder and its lines."""

    def run(name: str) -> tuple[Path, list[Row]]:
        tree = recipe(tmp_path / "tiny run", tiny_model, tiny_data, track={"to": [name], "project": "sparring-tests"})
        sparring.run(tree | {"rounds": [{"method": "sft"}, {"method": "spin"}]})
        sparring.run(tree)
        return tmp_path / "tiny run", lines(tmp_path / "tiny run")

    return run


pytest_ignore = pytest.mark.filterwarnings("ignore")


@pytest_ignore
def test_tensorboard_reads_it_back(tracked: Any, finished_run: Path) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run, rows = tracked("tensorboard")
    found = reader.EventAccumulator(str(run / "track" / "tensorboard"), size_guidance={"scalars": 0})
    found.Reload()
    losses = [(e.step, pytest.approx(e.value, rel=1e-6)) for e in found.Scalars("train/loss")]
    assert [(r["global_step"], r["loss"]) for r in rows if r["stage"] == "player"] == losses
    nlls = [(e.step, e.wall_time, pytest.approx(e.value, rel=1e-6)) for e in found.Scalars("eval/gold_nll")]
    assert [(r["global_step"], r["time"], r["gold_nll"]) for r in rows if r["stage"] == "eval"] == nlls
    assert player_shas(run) == player_shas(finished_run)


def _wandb_history(file: str) -> Iterator[dict[str, float]]:
    """The rows of an offline W&B file: records in LevelDB's log format behind a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    data, at, part = Path(file).read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        part, at = part + data[at + 7 : at + 7 + size], at + 7 + size
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(part)
            part = b""
            if record.WhichOneof("record_type") == "history":
                yield {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}


@pytest_ignore
def test_wandb_keeps_it_offline(tracked: Any, finished_run: Path) -> None:
    pytest.importorskip("wandb")
    run, rows = tracked("wandb")
    files = sorted(glob.glob(f"{glob.escape(str(run))}/track/wandb/offline-run-*/*.wandb"))
    assert len(files) == 2 and len({Path(f).name for f in files}) == 1  # two processes, one run
    told = [row for file in files for row in _wandb_history(file)]
    for name, stage, figure in (("train/loss", "player", "loss"), ("eval/gold_nll", "eval", "gold_nll")):
        expected = [(r["global_step"], pytest.approx(r[figure])) for r in rows if r["stage"] == stage]
        assert [(row["global_step"], row[name]) for row in told if name in row] == expected
    assert player_shas(run) == player_shas(finished_run)


@pytest_ignore
def test_trackio_keeps_it_locally(tracked: Any, finished_run: Path, tmp_path: Path) -> None:
    trackio = pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    if "sparring-tests" not in str(trackio.utils.TRACKIO_DIR):
        pytest.skip("set TRACKIO_DIR=…/sparring-tests: this would write to your own data base")
    run, rows = tracked("trackio")
    name = json.loads((run / "track" / "state.json").read_text())["name"]
    told = SQLiteStorage.get_logs("sparring-tests", name)
    for tag, stage, figure in (("train/loss", "player", "loss"), ("eval/gold_nll", "eval", "gold_nll")):
        expected = [(r["global_step"], pytest.approx(r[figure])) for r in rows if r["stage"] == stage]
        assert [(row["step"], row[tag]) for row in told if tag in row] == expected
    assert player_shas(run) == player_shas(finished_run)
