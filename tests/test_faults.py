"""What goes wrong in the middle of a stage costs nothing that was done, and never ends up in a result."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

import sparring
from helpers import player_shas, recipe, rows, write_jsonl
from rundirs import interrupt, needs_proc, records, refused
from sparring.errors import InputError, NonFiniteError
from sparring.plan import Stage
from sparring.rundir import RunDir
from sparring.rundir.store import read_json
from sparring.rundir.view import RunView

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


def test_a_loss_that_is_not_finite(tmp_path: Path, tiny_model: Path, tiny_data: Path) -> None:
    (tmp_path / "odd.py").write_text(NAN)
    entry = {"method": f"{tmp_path}/odd.py:method", "beta": 2.0}
    # A trial of compiled layers would call the loss as well
    tree = recipe(tmp_path / "run", tiny_model, tiny_data, rounds=[entry], model={"compile": "never"})
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
    inside = {
        "data": ".00000.parquet.tmp",
        "samples": ".00001.parquet.tmp",
        "groups": ".00000.parquet.tmp",
        "frozen": ".00001.parquet.tmp",
        "held": ".00000.parquet.tmp",
        "train": ".last.safetensors.tmp",
        "player": "model.safetensors",
        "eval": ".summary.json.tmp",
    }
    plan = [stage.folder for stage in sparring.api.prepare(tiny_recipe).plan.stages]
    places = [p for f in plan for p in ([f.replace("player", "train")] if f.endswith("player") else []) + [f]]
    before: dict[str, int] = {}
    for place in places:
        name = ".stage.json.tmp" if place == "prep_000/frozen" else inside[place.rpartition("/")[2]]
        with monkeypatch.context() as patch:
            interrupt(patch, f"{run}/{place}", name, full)
            with pytest.raises(OSError, match="No space left"):
                sparring.run(tiny_recipe)
        assert not list(run.rglob("*.tmp")), place
        after = records(run)
        assert {f: after[f] for f in before} == before
        assert place not in after
        before = after
    assert sparring.run(tiny_recipe).best == 2
    after = records(run)
    assert {f: after[f] for f in before} == before
    assert player_shas(run) == player_shas(finished_run)


@needs_proc
def test_seconds_of_a_resumed_stage_are_summed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
