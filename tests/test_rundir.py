"""A run directory loses nothing: locks, changed settings, redo, faults in the middle of a stage."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import sparring
from helpers import cli, player_shas, recipe, rows, tree_hash, write_jsonl, write_model
from sparring.errors import BusyError, InputError, NonFiniteError
from sparring.rundir import RunDir
from sparring.runview import RunView
from sparring.store import read_json, write_json

LATER = [f"round_001/{name}" for name in ("samples", "groups", "frozen", "player", "eval")]
NAN = """
import torch
from sparring.methods import spin

def method(*, beta: float = 0.1):
    import dataclasses
    made = spin.method(beta=beta)
    steps = []
    def loss(policy, batch):
        steps.append(0)
        value = made.loss(policy, batch)
        # Two micro-batches make a step, so the fourth call belongs to step 2.
        return value * torch.nan if beta > 1 and len(steps) == 4 else value
    return dataclasses.replace(made, loss=loss)
"""


@pytest.fixture
def copied(finished_run: Path, tmp_path: Path) -> Path:
    """A finished run that the test may change."""
    return shutil.copytree(finished_run, tmp_path / "copied", symlinks=True)


def records(run: Path) -> dict[str, int]:
    """Stage folder to the inode of its record: a stage done again has another."""
    return {
        str(p.parent.relative_to(run)): p.stat().st_ino for p in run.glob("**/stage.json") if "superseded" not in str(p)
    }


def refused(run: Any, *overrides: str) -> list[str]:
    """The lines about stages of the error that a changed setting gives; the run is untouched."""
    path = Path(run["run"] if isinstance(run, dict) else run)
    before = tree_hash(path)
    with pytest.raises(InputError) as caught:
        sparring.run(run, overrides)
    assert tree_hash(path) == before
    first, *lines = str(caught.value).splitlines()
    assert first.endswith("the settings changed; these stages would have to be done again (nothing was changed):")
    assert f"sparring fork {path} NEW" in lines[-2] and "--redo" in lines[-1]
    return [line.strip() for line in lines[:-2]]


def test_a_second_process_fails_at_once(copied: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from sparring.rundir import RunDir\n"
        f"with RunDir(Path({str(copied)!r})).lock():\n print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        line = f"{copied}: in use by process {holder.pid} on {socket.gethostname()}"
        before = tree_hash(copied)
        with pytest.raises(BusyError) as caught:
            sparring.run(copied, ["train.lr=1"])
        assert str(caught.value) == line
        assert cli("run", copied) == cli("run", copied)
        assert (cli("run", copied).code, cli("run", copied).err) == (2, f"sparring: {line}\n")
        assert tree_hash(copied) == before
        holder.kill()
    # The system frees the lock of a killed process.
    assert sparring.run(copied).best == 2
    assert (copied / "lock").read_text() == ""


def test_a_changed_setting_names_what_it_touches(copied: Path) -> None:
    assert refused(copied, "spin.beta=0.5") == [
        "round_000/player: spin.beta: 0.1 → 0.5",
        "round_000/eval: its input round_000/player changes",
        "round_001/samples: its input player 1 (opponent) changes",
        "round_001/groups: its input round_001/samples changes",
        "round_001/frozen: its input player 1 (reference) changes; its input round_001/groups changes",
        "round_001/player: spin.beta: 0.1 → 0.5; its input player 1 (start) changes; "
        "its input round_001/frozen changes; its input round_001/groups changes",
        "round_001/eval: its input round_001/player changes",
    ]
    touched = refused(copied, "spin.beta=[0.1, 0.5]")
    assert touched == ["round_001/player: spin.beta: 0.1 → 0.5", "round_001/eval: its input round_001/player changes"]
    touched = refused(copied, "evaluate.samples=2")
    assert touched == [f"{f}/eval: evaluate.samples: 1 → 2" for f in ("start", "prep_000", "round_000", "round_001")]
    assert len(refused(copied, "seed=1")) == 16


def test_execution_settings_and_more_rounds_touch_nothing(copied: Path) -> None:
    before = records(copied)
    settings = [
        "train.micro_batch=1",
        "play.batch_size=2",
        "train.save_every=7",
        "evaluate.best=gold_nll",
        "model.threads=1",
    ]
    view = sparring.run(copied, settings)
    assert records(copied) == before
    assert (view.config.train.micro_batch, view.config.evaluate.best) == (1, "gold_nll")
    view = sparring.run(copied, ["rounds.1.repeat=3"])
    after = records(copied)
    assert {f: after[f] for f in before} == before
    assert sorted({*after} - {*before}) == sorted(f.replace("001", "002") for f in LATER)
    assert sorted(view.players) == [-1, 0, 1, 2, 3]
    assert len(view.rounds) == 4


def test_redo_keeps_the_old_stages(copied: Path, tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    before, files = records(copied), tree_hash(copied)
    sparring.run(copied, ["spin.beta=[0.1, 0.5]"], redo=True)
    after = records(copied)
    assert {f for f in before if after[f] != before[f]} == {"round_001/player", "round_001/eval"}
    kept = tree_hash(copied / "superseded" / "1")
    moved = {n: h for n, h in files.items() if re.match(r"round_001/(player|eval|train)(/|$)", n)}
    assert {n: h for n, h in kept.items() if n != "round_001"} == moved
    assert sparring.run(copied).best == 2
    scratch = recipe(
        tmp_path / "scratch",
        tiny_model,
        tiny_data,
        rounds=[{"method": "sft"}, {"method": "spin", "repeat": 2, "beta": [0.1, 0.5]}],
    )
    sparring.run(scratch)
    assert player_shas(copied) == player_shas(tmp_path / "scratch")
    sparring.run(copied, ["spin.beta=0.1"], redo=True)
    assert (copied / "superseded" / "2" / "round_001" / "player" / "model.safetensors").exists()


def test_changed_inputs_are_noticed(tmp_path: Path) -> None:
    model, data = write_model(tmp_path / "model"), write_jsonl(tmp_path / "rows.jsonl", rows(12))
    tree = recipe(tmp_path / "run", model, data, rounds=[{"method": "spin"}])
    sparring.run(tree)
    write_jsonl(data, rows(13))
    assert refused(tree)[:2] == ["data: its input file rows.jsonl changes", "start/eval: its input data changes"]
    write_jsonl(data, rows(12))
    write_model(model, seed=1)
    assert refused(tree)[:2] == [
        "start/eval: its input player 0 changes",
        "round_000/samples: its input player 0 (opponent) changes",
    ]
    write_model(model)
    assert sparring.run(tree).best == 1


def test_a_tampered_player_is_refused(copied: Path) -> None:
    weights = copied / "round_000" / "player" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    shutil.rmtree(copied / "round_001")
    with pytest.raises(sparring.SparringError, match=r"round_000/player: its files changed since it was made"):
        sparring.run(copied)
    content[-1] ^= 1
    weights.write_bytes(content)
    assert sparring.run(copied).best == 2


def test_a_newer_format_is_refused(copied: Path) -> None:
    write_json(copied / "env.json", read_json(copied / "env.json") | {"format": 99})
    before = tree_hash(copied)
    tree = read_json(copied / "start" / "player.json")
    message = r"run format 99 is newer than this version of sparring knows \(1\); upgrade sparring"
    for call in (lambda: sparring.run(copied), lambda: RunView(copied), lambda: sparring.fork(copied, f"{copied}-2")):
        with pytest.raises(InputError, match=message):
            call()
    with pytest.raises(InputError, match=message):
        sparring.run(
            {"run": str(copied), "model": {"path": tree["path"]}, "data": {"path": __file__.replace(".py", ".py")}}
        )
    assert tree_hash(copied) == before


def test_foreign_folders_are_left_alone(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("mine")
    with pytest.raises(InputError, match="is no run but holds a `config.yaml`"):
        sparring.run(tiny_recipe)
    assert (tmp_path / "run" / "config.yaml").read_text() == "mine"
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(InputError, match="is a file, not a folder"):
            sparring.run(tiny_recipe, out=path)


def test_a_loss_that_is_not_finite(tmp_path: Path, tiny_model: Path, tiny_data: Path) -> None:
    (tmp_path / "odd.py").write_text(NAN)
    entry = {"method": f"{tmp_path}/odd.py:method", "beta": 2.0}
    tree = recipe(tmp_path / "run", tiny_model, tiny_data, rounds=[entry])
    with pytest.raises(NonFiniteError) as caught:
        sparring.run(tree)
    train = tmp_path / "run" / "round_000" / "train"
    batch = train / "nonfinite_step_000002.json"
    assert str(caught.value).startswith("step 2: the loss is nan") and str(batch) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(json.loads(batch.read_text())) == 4
    assert [row["step"] for row in RunView(tmp_path / "run").rounds[0].log] == [1]
    assert (train / "state" / "last.safetensors").exists()
    assert refused(tree | {"rounds": [entry | {"beta": 0.5}]}) == ["round_000/player: spin.beta: 2.0 → 0.5"]
    view = sparring.run(tree | {"rounds": [entry | {"beta": 0.5}]}, redo=True)
    assert [row["step"] for row in view.rounds[0].log] == [1, 2, 3]
    assert (tmp_path / "run" / "superseded" / "1" / "round_000" / "train" / batch.name).exists()
    before = records(tmp_path / "run")
    assert sparring.run(tmp_path / "run").best == 1
    assert records(tmp_path / "run") == before


def test_a_failure_before_any_result_asks_for_no_redo(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    """Mending a bad row is not a changed setting of something done."""
    data = write_jsonl(tmp_path / "bad.jsonl", [*rows(12), {"question": "?"}])
    tree = tiny_recipe | {"data": {"path": str(data), "heldout_size": 4}, "rounds": [{"method": "sft"}]}
    with pytest.raises(InputError, match=r"bad\.jsonl:13"):
        sparring.run(tree)
    write_jsonl(data, rows(12))
    assert sparring.run(tree).rounds[0].counts["groups"]["groups"] == 8


def interrupt(patch: pytest.MonkeyPatch, where: str, name: str, error: BaseException) -> None:
    """`error` at the first fsync of a file `name` below a folder `where`, once."""
    fsync, seen = os.fsync, []

    def failing(handle: int) -> None:
        path = os.readlink(f"/proc/self/fd/{handle}")
        if not seen and where in path and path.endswith(name):
            seen.append(path)
            raise error
        fsync(handle)

    patch.setattr(os, "fsync", failing)


needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="names open files by /proc")


@needs_proc
def test_a_stage_begun_with_other_settings_is_not_mixed(
    tiny_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = tiny_recipe | {"rounds": [{"method": "spin"}]}
    with monkeypatch.context() as patch:
        interrupt(patch, "samples", ".00001.parquet.tmp", KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            sparring.run(tree)
    partial = tmp_path / "run" / "round_000" / "samples.partial"
    assert sorted(p.name for p in partial.iterdir()) == ["00000.parquet", "stage.json"]
    assert refused(tree, "play.temperature=0.5") == ["round_000/samples: play.temperature: 1.0 → 0.5"]
    # Even where nobody asked: a folder made with another key is never gone on with.
    run = RunDir(tmp_path / "run")
    stage = sparring.api.prepare(tree, ["play.temperature=0.5"]).plan.rounds[0].stage("samples")
    assert [p.name for p in run.once(stage, lambda folder: {"n": len(list(folder.glob("*.parquet")))}).iterdir()] == [
        "stage.json"
    ]
    assert read_json(run.path / stage.folder / "stage.json")["counts"] == {"n": 0}


@needs_proc
def test_a_full_disk_in_every_stage(
    finished_run: Path, tiny_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, full = tmp_path / "run", OSError(errno.ENOSPC, "No space left on device")
    places = [f"{f}.partial" for f in records(finished_run)] + [
        f"{r}/train" for r in ("prep_000", "round_000", "round_001")
    ]
    for place in places:
        with monkeypatch.context() as patch:
            interrupt(patch, f"{run}/{place}", "", full)
            with pytest.raises(OSError, match="No space left"):
                sparring.run(tiny_recipe)
        assert not list(run.rglob("*.tmp")), place
        if place.endswith("train"):
            continue
        before = records(run)
    assert sparring.run(tiny_recipe).best == 2
    after = records(run)
    assert {f: after[f] for f in before} == before
    assert player_shas(run) == player_shas(finished_run)


@needs_proc
def test_seconds_of_a_resumed_stage_are_summed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparring.plan import Stage

    run, stage = RunDir(tmp_path), Stage("r/samples", "samples", {"a": 1}, {"data": "d"})

    def fails(folder: Path) -> dict[str, int]:
        (folder / "0.parquet").write_text("")
        os.utime(folder / "0.parquet", (read_json(folder / "stage.json")["begun"] + 90,) * 2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.once(stage, fails)
    run.once(stage, lambda folder: {"kept": len(list(folder.glob("*.parquet")))})
    record = read_json(tmp_path / "r" / "samples" / "stage.json")
    assert 90 <= record.pop("seconds") < 92
    assert record == {
        "folder": "r/samples", "name": "samples", "settings": {"a": 1}, "inputs": {"data": "d"}, "key": stage.key, "counts": {"kept": 1}
    }  # fmt: skip


def test_another_working_directory(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(tiny_model, tmp_path / "model")
    write_jsonl(tmp_path / "rows.jsonl", rows(8))
    tree = recipe(Path("run"), Path("model"), Path("rows.jsonl"), rounds=[{"method": "sft"}])
    monkeypatch.chdir(tmp_path)
    sparring.run(tree)
    before = records(tmp_path / "run")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    sparring.run("../run")
    assert records(tmp_path / "run") == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["elsewhere", "model", "rows.jsonl", "run"]
    # `best` is relative: a run can be moved.
    (tmp_path / "run").rename(tmp_path / "moved")
    assert RunView(tmp_path / "moved").best is not None
    assert (tmp_path / "moved" / "best" / "config.json").exists()
