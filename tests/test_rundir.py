"""A run directory loses nothing: locks, changed settings, redo, faults in the middle of a stage."""

from __future__ import annotations

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
from helpers import cli, player_shas, recipe, rows, tree_hash, write_jsonl, write_model, write_recipe
from rundirs import records, refused
from sparring import api
from sparring.errors import BusyError, InputError
from sparring.rundir import RunDir
from sparring.rundir.store import read_json, write_json
from sparring.rundir.view import RunView

LATER = [f"round_001/{name}" for name in ("samples", "groups", "frozen", "held", "player", "eval")]


@pytest.fixture
def copied(finished_run: Path, tmp_path: Path) -> Path:
    """A finished run that the test may change."""
    return shutil.copytree(finished_run, tmp_path / "copied", symlinks=True)


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
    with RunDir(copied).lock():
        assert (copied / "lock").read_text().splitlines()[0] == f"process {os.getpid()} on {socket.gethostname()}"
    assert sparring.run(copied).best == 2
    assert (copied / "lock").read_text() == ""


def test_a_changed_setting_names_what_it_touches(copied: Path) -> None:
    assert refused(copied, "spin.beta=0.5") == [
        "round_000/player: spin.beta: 0.1 → 0.5",
        "round_000/eval: its input round_000/player changes",
        "round_001/samples: its input player 1 (opponent) changes",
        "round_001/groups: its input round_001/samples changes",
        "round_001/frozen: its input player 1 (reference) changes; its input round_001/groups changes",
        "round_001/held: its input player 1 (start) changes",
        "round_001/player: spin.beta: 0.1 → 0.5; its input player 1 (start) changes; "
        "its input round_001/frozen changes; its input round_001/groups changes; its input round_001/held changes",
        "round_001/eval: its input round_001/player changes",
    ]
    touched = refused(copied, "spin.beta=[0.1, 0.5]")
    assert touched == ["round_001/player: spin.beta: 0.1 → 0.5", "round_001/eval: its input round_001/player changes"]
    touched = refused(copied, "evaluate.samples=2")
    assert touched == [f"{f}/eval: evaluate.samples: 1 → 2" for f in ("start", "prep_000", "round_000", "round_001")]
    assert len(refused(copied, "seed=1")) == 18


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
    (copied / "colours").mkdir()  # log-probs of answers that will be others
    sparring.run(copied, ["spin.beta=[0.1, 0.5]"], redo=True)
    assert (copied / "superseded" / "1" / "colours").exists() and not (copied / "colours").exists()
    after = records(copied)
    assert {f for f in before if after[f] != before[f]} == {"round_001/player", "round_001/eval"}
    kept = tree_hash(copied / "superseded" / "1")
    moved = {n: h for n, h in files.items() if re.match(r"round_001/(player|eval|train)(/|$)", n)}
    assert {n: h for n, h in kept.items() if n not in ("round_001", "colours")} == moved
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
    assert refused(tree)[:2] == ["data: its input train rows.jsonl changes", "start/eval: its input data changes"]
    write_jsonl(data, rows(12))
    write_model(model, seed=1)
    assert refused(tree)[:2] == [
        "start/eval: its input player 0 changes",
        "round_000/samples: its input player 0 (opponent) changes",
    ]
    write_model(model)
    assert sparring.run(tree).best == 1


def test_rounds_in_which_nobody_plays_depend_on_the_starts_tokens(tmp_path: Path) -> None:
    """Their groups are token ids; another model in the start's place may have other ones, or another template."""
    model, data = write_model(tmp_path / "model"), write_jsonl(tmp_path / "rows.jsonl", rows(12))
    tree = recipe(tmp_path / "run", model, data, rounds=[{"method": "sft"}, {"method": "spin"}])
    sparring.run(tree)
    write_model(model, seed=1)
    assert "prep_000/groups: its input player -1 (tokens) changes" in refused(tree)


def test_so_do_rounds_whose_players_are_models_from_elsewhere(tmp_path: Path, tiny_model: Path) -> None:
    data, other = write_jsonl(tmp_path / "rows.jsonl", rows(12)), write_model(tmp_path / "other", seed=1)
    given = [{"method": "spin"}, {"method": "spin", "opponent": str(other), "start": str(other)}]
    own, theirs = api.prepare(recipe(tmp_path / "run", tiny_model, data, rounds=given)).plan.rounds
    for stage in ("samples", "held"):
        assert "player 0 (tokens)" in theirs.stage(stage).inputs
        assert "player 0 (tokens)" not in own.stage(stage).inputs


def test_the_shards_of_a_frozen_role_are_cut_by_a_setting_of_its_stage(tmp_path: Path, tiny_model: Path) -> None:
    """Where somebody plays it is one of the samples'; where nothing is frozen it says nothing."""
    data = write_jsonl(tmp_path / "rows.jsonl", rows(12))

    for entry, changes in (({"method": "dpo", "pairs": "data"}, True), ({"method": "sft"}, False)):
        stages = [
            api.prepare(recipe(tmp_path / "run", tiny_model, data, rounds=[entry]), change)
            .plan.rounds[0]
            .stage("frozen")
            for change in ([], ["play.chunk=3"])
        ]
        assert (stages[0].key != stages[1].key) == changes


def test_ignoring_generated_answers_is_another_data_set(tiny_model: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", [row | {"generated": f"is {i}"} for i, row in enumerate(rows(12))])
    tree = recipe(tmp_path / "run", tiny_model, data, rounds=[{"method": "spin"}])
    assert sparring.run(tree).rounds[0].counts["samples"]["off_policy"] == 8
    assert refused(tree, "data.gold_only=true")[:3] == [
        "data: data.gold_only: false → true",
        "start/eval: its input data changes",
        "round_000/samples: its input data changes",
    ]
    view = sparring.run(tree, ["data.gold_only=true"], redo=True)
    assert view.rounds[0].counts["samples"]["off_policy"] == 0


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


def test_a_newer_format_is_refused(copied: Path, tiny_recipe: dict[str, Any]) -> None:
    write_json(copied / "env.json", read_json(copied / "env.json") | {"format": 99})
    before = tree_hash(copied)
    message = r"run format 99 is newer than this version of sparring knows \(2\); upgrade sparring"
    for call in (
        lambda: sparring.run(copied),
        lambda: sparring.run(tiny_recipe, out=copied),
        lambda: RunView(copied),
        lambda: sparring.fork(copied, f"{copied}-2"),
    ):
        with pytest.raises(InputError, match=message):
            call()
    assert tree_hash(copied) == before


def test_foreign_folders_are_left_alone(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("mine")
    with pytest.raises(InputError, match=r"is no run but holds a `config\.yaml`"):
        sparring.run(tiny_recipe)
    assert tree_hash(tmp_path / "run").keys() == {"config.yaml"}
    assert (tmp_path / "run" / "config.yaml").read_text() == "mine"
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(InputError, match="is a file, not a folder"):
            sparring.run(tiny_recipe, out=path)


def test_a_recipe_may_be_called_as_a_runs_own(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "project").mkdir()
    file = write_recipe(tmp_path / "project" / "config.yaml", tiny_recipe | {"rounds": [{"method": "sft"}]})
    before = tree_hash(tmp_path / "project")
    assert sparring.run(file).path == tmp_path / "run"
    assert tree_hash(tmp_path / "project") == before
    # In a run it is the run's, wherever that was moved to
    (tmp_path / "run").rename(tmp_path / "moved")
    assert sparring.run(tmp_path / "moved" / "config.yaml").path == tmp_path / "moved"


def test_a_run_has_its_name_from_within(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = (copied / "round_001" / "player" / "README.md").read_text().replace("finished", "copied")
    monkeypatch.chdir(copied)
    code, _, err = cli("--quiet", "run", ".")
    assert (code, err) == (0, "")
    assert (copied / "round_001" / "player" / "README.md").read_text() == card
    assert "name: copied-player-2\n" in card and "# Player 2 of copied\n" in card
    assert cli("status", ".").out.startswith("copied  ")
    assert "<title>copied" in (copied / "report.html").read_text(encoding="utf-8")
    assert RunView("round_001/..").name == "copied"


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
