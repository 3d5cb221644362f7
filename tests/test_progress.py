"""Progress: rates by hand, no promise before it is known, totals that stages reach, and what status reads of it."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import socket
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import sparring
from fakerun import round_view, run_view
from helpers import cli, recipe, rows, tree_hash, write_jsonl
from rundirs import needs_proc
from sparring import progress
from sparring.progress import Live, Progress, Rates, words
from sparring.rundir import RunDir
from sparring.rundir.view import RunView
from sparring.views import live as views_live


class Clock:
    """Seconds that pass when told to."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


# Rates and time left --------------------------------------------------------------------------------------------------


def test_rates_by_hand() -> None:
    rates = Rates()
    assert rates.read(0.0) == (None, None)
    rates.add(0.0, 5, 500)  # where rates begin: its work began before
    assert rates.read(0.0) == (None, None)
    rates.add(0.5, 1, 30)
    assert rates.read(0.5) == (None, None)  # half a second says nothing
    rates.add(2.0, 3, 70)
    assert rates.read(2.0) == (4 / 2, 100 / 2)


def test_rates_are_of_the_last_half_minute() -> None:
    """A slow first minute (a model that is compiled) is forgotten."""
    rates = Rates()
    rates.add(0.0, 0, 0)
    rates.add(60.0, 1, 10)
    for second in range(61, 101):
        rates.add(float(second), 2, 100)
    rows_per_second, tokens_per_second = rates.read(100.0)
    assert rows_per_second == pytest.approx(2) and tokens_per_second == pytest.approx(100)


def test_rates_of_steps_that_are_far_apart_span_several() -> None:
    rates = Rates()
    for step in range(20):
        rates.add(60.0 * step, 1, 600)
    assert rates.read(60.0 * 19) == (pytest.approx(1 / 60), pytest.approx(10))


def test_no_rate_where_nothing_came_for_too_long() -> None:
    rates = Rates()
    rates.add(0.0, 0, 0)
    rates.add(10.0, 1, 100)
    assert rates.read(39.0) == (0.1, 10.0)
    assert rates.read(41.0) == (None, None)


def test_tokens_without_a_finished_row_promise_nothing() -> None:
    clock = Clock()
    told = Progress(terminal=False, clock=clock)
    told.begin(100, "answers")
    for _ in range(5):
        clock.now += 1
        told.did(0, 50)
    assert told.live.tokens_per_second == 50 and told.live.left is None
    assert words(told.live) == "0/100 answers, 0 %, 50 tokens/s, – left"


def test_time_left_is_what_is_left_at_that_rate() -> None:
    clock = Clock()
    told = Progress(terminal=False, clock=clock)
    with told.stage("round_000/samples"):
        told.begin(100, "answers")
        told.reached(60)  # an earlier process's: no rate is taken from them
        assert told.live.left is None
        for _ in range(11):
            told.did(1, 7)
            clock.now += 0.5
        assert (told.live.done, told.live.total, told.live.stage) == (71, 100, "round_000/samples")
        assert told.live.tokens_per_second == 14 and told.live.left == (100 - 71) / 2
        told.note(margin=0.125, alarms=2)
        told.note(margin=None)
        assert words(told.live) == "71/100 answers, 71 %, 14 tokens/s, 14 s left, margin +0.125, 2 alarms"
    with told.stage("round_000/groups"):
        assert (told.live.margin, told.live.total, words(told.live)) == (None, None, "")


def test_the_file_is_written_once_a_second_and_goes(tmp_path: Path) -> None:
    clock, file = Clock(), tmp_path / "progress.json"
    told = Progress(file, terminal=False, clock=clock)
    told.begin(10, "steps")
    told.did(1, 10)
    assert not file.exists()
    clock.now += 1.5
    told.did(1, 10)
    seen = progress.read(file)
    assert seen is not None and (seen.done, seen.total, seen.unit) == (2, 10, "steps")
    clock.now += 0.5
    told.did(1, 10)
    assert progress.read(file) == seen
    told.close()
    assert list(tmp_path.iterdir()) == []
    file.write_text('{"half')
    assert progress.read(file) is None


def test_a_file_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    clock = Clock()
    told = Progress(tmp_path / "nowhere" / "progress.json", terminal=False, clock=clock)
    told.begin(10, "steps")
    clock.now += 2
    told.did(1, 10)
    told.close()
    assert told.live.done == 1


def test_on_a_terminal_a_bar_says_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    told = Progress(terminal=True, clock=clock)
    with told.stage("round_000/samples"):
        told.begin(4, "answers")
        for _ in range(3):
            clock.now += 2
            told.did(1, 30)
        assert told._bar is not None
        task = told._bar.tasks[0]
        assert (task.completed, task.total, task.fields["told"]) == (3, 4, words(told.live))
        assert words(told.live) == "3/4 answers, 75 %, 15 tokens/s, 2.0 s left"
    assert told._bar is None and capsys.readouterr().out == ""


def test_other_units_begin_anew(capsys: pytest.CaptureFixture[str]) -> None:
    """A suite scores choices, then plays answers: neither's rate says anything of the other."""
    clock = Clock()
    told = Progress(terminal=True, clock=clock)
    with told.stage("round_000/tasks/suite"):
        told.begin(100, "choices")
        for _ in range(3):
            clock.now += 2
            told.did(10, 300)
        told.begin(100, "choices")
        assert (told.live.done, told.live.left) == (30, 14.0)
        told.begin(4, "answers")
        assert (told.live.done, told.live.left, told.live.tokens_per_second) == (0, None, None)
        assert told._bar is not None and told._bar.tasks[0].total == 4


def test_work_outside_a_run_is_shown_on_the_terminal_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[progress.Live] = []
    stop = Progress._stop
    monkeypatch.setattr(Progress, "_stop", lambda self: (ended.append(self.live), stop(self)))
    with progress.shown("judgements", 3, "judgements") as did:
        did(1, 0)
        did(1, 20)
    assert [(live.stage, live.done, live.total) for live in ended] == [("judgements", 2, 3)]
    assert capsys.readouterr() == ("", "")


# What stages tell -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def heard(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_data: Path) -> dict[str, Any]:
    """Stage to what was told at its end, and how much of it as work, of a run with a tight guard."""
    found: dict[str, Any] = {}
    folder = tmp_path_factory.mktemp("heard")
    stop, did = Progress._stop, Progress.did

    def noted_did(self: Progress, rows: float = 0, tokens: float = 0) -> None:
        stage = self._live.stage
        before = found.setdefault(f"work {stage}", (0.0, 0))
        found[f"work {stage}"] = (before[0] + rows, before[1] + tokens)
        did(self, rows, tokens)

    def noted_stop(self: Progress) -> None:
        found[self._live.stage] = self.live
        stop(self)

    controls = {"checks": 3, "trust_region": 1e-3, "backoffs": 2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Progress, "did", noted_did)
        patch.setattr(Progress, "_stop", noted_stop)
        found["run"] = sparring.run(recipe(folder / "run", tiny_model, tiny_data, controls=controls))
    return found


def test_every_stage_reaches_its_total(heard: dict[str, Any]) -> None:
    run = heard["run"]
    counts = run.rounds[1].counts
    samples, groups = counts["samples"], counts["groups"]["groups"]
    expected = {
        "start/eval": (4 * 3, "answers"),
        "round_000/samples": (samples["samples"], "answers"),
        "round_000/frozen": (groups, "groups"),
        "round_000/held": (4 * 3, "answers"),
        "round_000/eval": (4 * 3, "answers"),
    }
    for stage, (total, unit) in expected.items():
        told = heard[stage]
        assert (told.done, told.total, told.unit) == (pytest.approx(total), total, unit), stage
        assert heard[f"work {stage}"][0] == pytest.approx(total)
    assert heard["work round_000/samples"][1] == samples["tokens"]
    trained = heard["round_000/player"]
    assert (trained.done, trained.unit) == (counts["player"]["steps"], "steps")
    assert trained.alarms == counts["player"]["backoffs"] > 0
    assert trained.margin == pytest.approx(run.rounds[1].log[-1]["margin"]) if run.rounds[1].log else True


def test_nothing_of_it_is_left_and_nothing_changed(heard: dict[str, Any], finished_run: Path) -> None:
    assert not (heard["run"].path / progress.FILE).exists()
    # The preparation round is not guarded, so it is that of any other run
    assert heard["run"].players[0].sha == RunView(finished_run).players[0].sha


def test_a_model_that_is_decoded_in_whole_batches_tells_the_same(tiny_model: Path) -> None:
    from sparring import players
    from sparring.config import ModelConfig
    from sparring.play import hf, slots

    model = players.load_model(str(tiny_model), ModelConfig(path=str(tiny_model), device="cpu"))
    prompts = [[5, 6, 7], [8, 9], [10] * 9, [11, 12], [13]]
    options: dict[str, Any] = {
        "temperature": 1.0, "max_new_tokens": 12, "stop_ids": [1, 4, 9, 14, 20, 30, 40], "batch_size": 2,
    }  # fmt: skip
    for decodes in (True, False):
        told: list[tuple[int, int]] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(slots, "decodes", lambda _: decodes)  # noqa: B023
            answers = hf.sample(model, prompts, range(5), on_rows=lambda *both: told.append(both), **options)  # noqa: B023
        assert len({len(a.tokens) for a in answers}) > 1  # ragged
        assert sum(rows for rows, _ in told) == 5
        assert sum(tokens for _, tokens in told) == sum(len(a.tokens) for a in answers)


# status ---------------------------------------------------------------------------------------------------------------


def test_a_state_in_words() -> None:
    live = Live("round_001/player", 50.0, 1000.0, "steps", 3, 12, 1234.5, 70.0, -0.03, 1)
    run = run_view(Path("runs/x"), finished=False, holder="process 7 on here", live=live)
    told = "3/12 steps, 25 %, 1,234 tokens/s, 1 min 10 s left, margin -0.03, 1 alarm"
    assert views_live.state(run, now=1005.0) == f"process 7 on here: round_001/player, {told}"
    assert views_live.state(run, now=1042.0) == f"process 7 on here: round_001/player, {told}, told 42 s ago"
    run = run_view(Path("runs/x"), finished=False, holder=None)
    assert views_live.state(run) == "not running; continue with: sparring run runs/x"
    partial = [round_view(0, "spin", stages={"samples": "partial"})]
    run = run_view(Path("runs/x"), finished=False, holder="process 7 on here", live=None, rounds=partial)
    assert views_live.state(run) == "process 7 on here: round_000/samples"
    assert views_live.state(run_view(Path("runs/x"))) == ""


def test_status_reads_a_run_that_another_process_holds(
    tmp_path: Path, tiny_model: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped amid round 0's play: status in another process sees stage, progress and holder; the lock stays theirs."""
    from sparring.play import hf

    path, seen = tmp_path / "run", []
    monkeypatch.setattr(progress, "_EVERY", 0.0)
    sample = hf.sample

    def looked(*arguments: Any, **options: Any) -> Any:
        found = sample(*arguments, **options)
        folder = path / "round_000" / "samples.partial"
        if folder.exists() and not seen:
            before = tree_hash(path)
            seen.append((cli("status", path), cli("status", path, "--json"), tree_hash(path) == before))
        return found

    monkeypatch.setattr(hf, "sample", looked)
    sparring.run(recipe(path, tiny_model, tiny_data))
    shown, as_json, untouched = seen[0]
    holder = f"process {os.getpid()} on {socket.gethostname()}"
    assert untouched and (shown.code, shown.err) == (0, "")
    assert f"{holder}: round_000/samples, 4/12 answers, 33 %, " in shown.out
    told = json.loads(as_json.out)
    assert (told["holder"], told["finished"], told["now"]["stage"]) == (holder, False, "round_000/samples")
    assert told["rounds"][1]["stages"]["samples"] == "partial"


def test_status_of_a_finished_run(finished_run: Path) -> None:
    told = json.loads(cli("status", finished_run, "--json").out)
    view = RunView(finished_run)
    assert (told["finished"], told["holder"], told["now"], told["best"]) == (True, None, None, view.best)
    assert [p["sha"] for p in told["players"]] == [view.players[n].sha for n in sorted(view.players)]
    assert told["rounds"][2]["margin"] == view.rounds[2].log[-1]["margin"]
    assert told["players"][2]["evaluation"]["gold_nll"] == view.evaluation(1)["gold_nll"]  # type: ignore[index]


def test_a_holder_that_was_killed_is_none(tmp_path: Path, finished_run: Path) -> None:
    import subprocess
    import sys

    run = Path(shutil.copytree(finished_run, tmp_path / "run", symlinks=True))
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for text, holder in (
        (f"process {dead.pid} on {socket.gethostname()}", None),
        (f"process {os.getpid()} on {socket.gethostname()}", f"process {os.getpid()} on {socket.gethostname()}"),
        ("process 1 on elsewhere", "process 1 on elsewhere"),
        ("", None),
    ):
        (run / "lock").write_text(text)
        assert RunView(run).holder == holder
    (run / progress.FILE).write_text(json.dumps(asdict(Live("data", 0.0, 0.0))))
    assert RunView(run).live is None


@needs_proc
def test_a_process_that_only_has_the_number_of_the_holder_is_none(tmp_path: Path, finished_run: Path) -> None:
    run = Path(shutil.copytree(finished_run, tmp_path / "run", symlinks=True))
    holder = f"process {os.getpid()} on {socket.gethostname()}"
    with RunDir(run).lock():
        told, began = (run / "lock").read_text().splitlines()
        assert told == RunView(run).holder == holder
    for text, found in ((f"{holder}\n{int(began) - 1}", None), (f"{holder}\n{began}", holder), (f"{holder}\n", holder)):
        (run / "lock").write_text(text)
        assert RunView(run).holder == found


def test_a_run_is_finished_when_every_round_is_or_self_play_stopped(finished_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished_run, tmp_path / "run", symlinks=True))
    assert RunView(run).finished
    shutil.rmtree(run / "round_001" / "eval")
    assert not RunView(run).finished
    shutil.rmtree(run / "round_001" / "player")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunView, "stop_reason", lambda self, t: "no better" if t == 1 else None)
        assert RunView(run).finished
    assert not RunView(run).finished


def test_watching_ends_with_the_run(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread runs; the watch sees it in between and ends when it is done."""
    path = tmp_path / "run"
    tree = recipe(path, tiny_model, write_jsonl(tmp_path / "rows.jsonl", rows(16)), rounds=[{"method": "spin"}])
    sparring.run(tree | {"rounds": [{"method": "spin", "train": {"max_steps": 1}}]})  # so that the folder is there
    tree = tree | {"rounds": [{"method": "spin", "repeat": 2, "train": {"max_steps": 1}}]}
    prepared = sparring.api.prepare(tree)
    with RunDir(path).lock():
        RunDir(path).record(prepared.recipe, {}, prepared.start)
    assert not RunView(path).finished
    worker = threading.Thread(target=lambda: sparring.run(tree))
    monkeypatch.setattr(views_live.watch, "__kwdefaults__", {"every": 0.05})
    worker.start()
    result = cli("status", path, "--watch", "--json")
    worker.join()
    lines = [json.loads(line) for line in result.out.splitlines()]
    assert result.code == 0 and len(lines) > 2
    assert [line["finished"] for line in lines] == [False] * (len(lines) - 1) + [True]
    assert cli("status", path, "-w").out.strip() == cli("status", path).out.strip()


def test_a_watch_fits_the_terminal(finished_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not fit is left out until the last state, which is whole: taller frames would pile up."""
    monkeypatch.setattr(views_live, "looks", lambda path, every: iter([RunView(path)] * 5))
    console = Console(file=io.StringIO(), force_terminal=True, width=120, height=6)
    views_live.watch(finished_run, console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert shown.count("on disk") == 6 and shown.count("gold_nll in nats, lower is better") == 1


def test_ctrl_c_leaves_a_watch_quietly(tmp_path: Path, finished_run: Path, request: pytest.FixtureRequest) -> None:
    ours = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, ours))
    run = Path(shutil.copytree(finished_run, tmp_path / "run", symlinks=True))
    shutil.rmtree(run / "round_001" / "eval")
    timer = threading.Timer(0.7, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    began = time.monotonic()
    result = cli("status", run, "--watch")
    timer.join()
    assert (result.code, result.err) == (0, "") and time.monotonic() - began < 30
    assert "not running; continue with: sparring run" in result.out


def test_bad_input() -> None:
    for arguments in (["status", "nowhere"], ["status", "nowhere", "--watch"], ["status", "nowhere", "--json"]):
        assert tuple(cli(*arguments)) == (2, "", "sparring: nowhere: no such folder; `sparring run` makes one\n")


def test_a_run_that_ends_while_it_is_shown_is_shown_once_more(
    finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = [False]
    monkeypatch.setattr(RunView, "finished", property(lambda run: ended[0]))
    seen = 0
    for _ in views_live.looks(finished_run, 0.0, sleep=lambda seconds: None):
        seen += 1
        ended[0] = True
    assert seen == 2
