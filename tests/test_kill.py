"""`kill -9` at many moments of every stage: the same call goes on, loses nothing done and ends in the same weights."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from helpers import recipe
from killing import WARM, Event, run_noting
from sparring.rundir.store import Rows
from sparring.rundir.view import RunView
from sparring.types import Frozen, Group, Sample

TESTS = Path(__file__).parent
ALARMS = {-1: [], 0: [(0, 1), (2, 2)], 1: [(0, 1), (4, 2)]}
"""The step that the guard goes back to in each round, and how often it has by then."""
pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="names open files by /proc")


@pytest.fixture(autouse=True)
def no_network() -> None:
    """Not refused here: the warm process is reached through a Unix socket."""


def tiny(run: Path, model: Path, data: Path) -> dict[str, Any]:
    """Limits so tight that the guard goes back twice in either round of self-play, and measurements at every 2nd step."""
    train = {"epochs": 2, "save_every": 2}
    controls = {"checks": 3, "trust_region": 1e-3, "backoffs": 2}
    return recipe(run, model, data, train=train, play={"chunk": 4, "max_new_tokens": 6}, controls=controls)


@pytest.fixture(scope="module")
def start() -> Iterator[Any]:
    """Starts processes from one that has imported everything: a fork of this process, which used threads, may hang."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(WARM)
    before = os.environ.get("PYTHONPATH")
    # The warm process starts without this one's sys.path.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(TESTS), before]))

    def begin(tree: dict[str, Any], notes: Path, target: Event | None = None) -> Any:
        process = context.Process(target=run_noting, args=(tree, notes, target), daemon=True)
        process.start()
        return process

    yield begin
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


@pytest.fixture(scope="module")
def unkilled(
    start: Any, tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_data: Path
) -> tuple[Path, list[Event]]:
    """The run without a kill, and everything it did on disk, in order."""
    folder = tmp_path_factory.mktemp("unkilled")
    process = start(tiny(folder / "run", tiny_model, tiny_data), folder / "notes")
    process.join()
    assert process.exitcode == 0
    lines = [line.split("|") for line in (folder / "notes").read_text().splitlines()]
    return folder / "run", [(a, b, c, d) for kind, a, b, c, d in (x for x in lines if x[0] == "event")]


def finished(run: Path) -> dict[str, tuple[int, int]]:
    """Stage folder to inode and time of its record: equal means that the stage was not done again."""
    records = [p for p in run.rglob("stage.json") if not p.parent.name.endswith(".partial")]
    return {str(p.parent.relative_to(run)): (p.stat().st_ino, p.stat().st_mtime_ns) for p in records}


def saved_step(run: Path, folder: str) -> int:
    file = run / folder / "train" / "state" / "last.safetensors"
    if not file.exists():
        return 0
    with safe_open(str(file), "pt") as tensors:
        return int(tensors.get_tensor("step").item())


def check_resumed(run: Path, notes: Path, saved: dict[str, int]) -> int:
    """Training went on behind its last saved step, also where its guard went back; returns how many trainings were
    resumed past their start."""
    resumed, expected, begun = 0, 0, set()
    for kind, folder, *rest in (line.split("|") for line in notes.read_text().splitlines()):
        if kind == "load":
            expected = int(rest[0])
            assert expected == saved.get(folder, 0), f"{folder} resumed at step {expected}"
            resumed += expected > 0 and folder not in begun
            begun.add(folder)
        elif kind == "save":
            saved[folder] = int(rest[0])
        elif kind == "log":
            expected += 1
            assert int(rest[0]) == expected
    return resumed


def assert_same(run: Path, other: Path) -> None:
    """Weights bit for bit, rows, evaluations, and the training log but for its seconds."""
    one, two = RunView(run), RunView(other)
    assert {n: p.sha for n, p in one.players.items()} == {n: p.sha for n, p in two.players.items()}
    assert one.best == two.best == 2
    for a, b in zip(one.rounds, two.rounds, strict=True):
        assert a.stages == b.stages
        for name, row_type in (("samples", Sample), ("groups", Group), ("frozen", Frozen), ("held/groups", Group)):
            if (a.path / name).exists():
                assert list(Rows(a.path / name, row_type)) == list(Rows(b.path / name, row_type)), (a.path, name)  # type: ignore[var-annotated]
        weights = [(x.path / "player" / "model.safetensors").read_bytes() for x in (a, b)]
        assert weights[0] == weights[1], a.path
        logs = [[{k: v for k, v in row.items() if k != "seconds"} for row in x.log] for x in (a, b)]
        assert logs[0] == logs[1]
        assert [row["step"] for row in logs[0]] == [1, 2, 3, 4, 5, 6]
        assert a.alarms == b.alarms
        assert [(row["step"], row["backoff"]) for row in a.alarms] == ALARMS[a.t]
        assert a.counts == b.counts
        assert one.evaluation(a.t + 1) == two.evaluation(a.t + 1) is not None
        assert (
            json.loads((a.path / "roles.json").read_text()).keys()
            == json.loads((b.path / "roles.json").read_text()).keys()
        )
    leftovers = [p for p in run.rglob("*") if p.name.endswith((".tmp", ".partial")) or p.name == "state"]
    assert not leftovers


class Survivor:
    """A run that is killed again and again; every restart is checked against what lay on disk before it."""

    def __init__(self, start: Any, tree: dict[str, Any], notes: Path) -> None:
        self.start, self.tree, self.notes, self.run = start, tree, notes, Path(tree["run"])
        self.resumed = 0

    def go(self, target: Event | None = None, seconds: float | None = None) -> bool:
        """One start of the same call; whether it was killed."""
        done = finished(self.run)
        saved = {p.parent.name: saved_step(self.run, p.parent.name) for p in self.run.glob("*/train")}
        self.notes.write_text("")
        process = self.start(self.tree, self.notes, target)
        if seconds is not None:
            process.join(seconds)
            process.kill()
        process.join()
        assert process.exitcode in (0, -9), self.notes.read_text()[-400:]
        after = finished(self.run)
        again = [folder for folder, record in done.items() if after.get(folder) != record]
        assert not again, f"done again after {target}: {again}"
        self.resumed += check_resumed(self.run, self.notes, saved)
        return bool(process.exitcode == -9)


def chosen(events: list[Event], each: int, seed: int) -> list[Event]:
    """Seeded random events, `each` of every stage and of the time between stages, in the order in which they happen."""
    order = random.Random(seed)
    places: dict[str, list[int]] = {}
    for i, event in enumerate(events):
        places.setdefault(event[0], []).append(i)
    picked = sorted(i for where in places.values() for i in order.sample(where, each))
    return [events[i] for i in picked]


def test_kills_at_events_of_every_stage(
    start: Any, unkilled: tuple[Path, list[Event]], tmp_path: Path, tiny_model: Path, tiny_data: Path
) -> None:
    reference, events = unkilled
    targets = chosen(events, each=2, seed=20)
    assert {target[0] for target in targets} == {*finished(reference), ""}
    survivor = Survivor(start, tiny(tmp_path / "run", tiny_model, tiny_data), tmp_path / "notes")
    killed = [target for target in targets if survivor.go(target)]
    while survivor.go():
        pass
    assert len(killed) >= 20
    assert {target[0] for target in killed} == {*finished(reference), ""}
    assert survivor.resumed >= 2
    assert_same(tmp_path / "run", reference)


def test_kills_while_training(
    start: Any, unkilled: tuple[Path, list[Event]], tmp_path: Path, tiny_model: Path, tiny_data: Path
) -> None:
    """Only the steps since the last state are repeated, and none once the weights are written; a measurement, and going
    back behind it, may be cut at any point."""
    reference, events = unkilled
    state, player = ".last.safetensors.tmp", "player.partial"
    moments = [
        (("save", "step 0, backoff 0", "before"), 0),
        (("fsync", state, "after"), 0),
        (("rename", state, "after"), 0),
        (("log", "step 1", "after"), 0),
        (("read", "behind step 0, backoff 0", "after"), 0),
        (("log", "backoff 1", "before"), 0),
        (("log", "backoff 1", "after"), 0),
        (("save", "step 0, backoff 1", "before"), 0),
        (("save", "step 0, backoff 1", "after"), 0),
        (("log", "step 1", "after"), 0),
        (("read", "behind step 0, backoff 1", "before"), 0),
        (("log", "step 2", "after"), 0),
        (("fsync", state, "after"), 0),
        (("rename", state, "after"), 0),
        (("log", "step 3", "after"), 2),
        (("save", "step 4, backoff 1", "before"), 2),
        (("save", "step 4, backoff 1", "after"), 2),
        (("log", "step 5", "before"), 4),
        (("read", "behind step 4, backoff 1", "after"), 4),
        (("log", "backoff 2", "after"), 4),
        (("save", "step 4, backoff 2", "after"), 4),
        (("read", "behind step 4, backoff 2", "after"), 4),
        (("log", "step 6", "after"), 4),
        (("fsync", "model.safetensors", "before"), 4),
        (("rename", player, "before"), 4),
        (("rename", player, "after"), None),
    ]
    survivor = Survivor(start, tiny(tmp_path / "run", tiny_model, tiny_data), tmp_path / "notes")
    for moment, resumed_at in moments:
        target = ("round_001/player", *moment)
        assert target in events
        assert survivor.go(target), target
        loads = [line for line in survivor.notes.read_text().splitlines() if line.startswith("load|round_001")]
        assert loads[:1] == ([] if resumed_at is None else [f"load|round_001|{resumed_at}"]), moment
    assert not survivor.go()
    assert_same(tmp_path / "run", reference)


def test_kills_at_random_times(
    start: Any, unkilled: tuple[Path, list[Event]], tmp_path: Path, tiny_model: Path, tiny_data: Path
) -> None:
    survivor = Survivor(start, tiny(tmp_path / "run", tiny_model, tiny_data), tmp_path / "notes")
    order = random.Random(7)
    began = time.monotonic()
    kills = sum(survivor.go(seconds=order.uniform(0.1, 0.9)) for _ in range(6))
    assert kills >= 1
    while survivor.go():
        assert time.monotonic() - began < 60
    assert_same(tmp_path / "run", unkilled[0])
