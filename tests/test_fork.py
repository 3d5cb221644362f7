"""A fork shares what its settings leave unchanged, and never changes the run it came from."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

import sparring
from helpers import player_shas, recipe, tree_hash
from rundirs import records
from sparring.errors import InputError
from sparring.rundir.view import RunView

SHARED = [
    "data",
    "start/eval",
    *(f"prep_000/{name}" for name in ("groups", "frozen", "player", "eval")),
    *(f"round_000/{name}" for name in ("samples", "groups", "frozen", "held")),
]


def files(folder: Path) -> list[Path]:
    return [p for p in folder.rglob("*") if p.is_file()]


def test_data_that_cannot_be_told_move_nothing(tmp_path: Path, tiny_model: Path, tiny_data: Path) -> None:
    """Neither a name that is not there nor a split that lies twice, which a run that has read its data may go on with."""
    clone = tmp_path / "clone"
    (clone / "main").mkdir(parents=True)
    (clone / "main" / "train.jsonl").write_bytes(tiny_data.read_bytes())
    path = sparring.run(recipe(tmp_path / "run", tiny_model, clone, rounds=[{"method": "sft"}])).path
    before = tree_hash(path)
    for settings, says in ((["data.name=mian"], r"has no folder `mian`"), (["seed=7"], r"lies in main and socratic")):
        with pytest.raises(InputError, match=says):
            sparring.run(path, settings, redo=True)
        with pytest.raises(InputError, match=says):
            sparring.fork(path, tmp_path / "new", settings)
        assert tree_hash(path) == before and {p.name for p in tmp_path.iterdir()} == {"clone", "run"}
        (clone / "socratic").mkdir(exist_ok=True)
        (clone / "socratic" / "train.jsonl").write_bytes((clone / "main" / "train.jsonl").read_bytes())


def test_another_beta_shares_all_up_to_the_first_training(
    finished_run: Path, tmp_path: Path, tiny_model: Path, tiny_data: Path
) -> None:
    before = tree_hash(finished_run)
    new = tmp_path / "deep" / "new"
    assert sparring.fork(finished_run, new, ["spin.beta=0.5"]) == SHARED
    for folder in [*SHARED, "prep_000/train"]:
        for file in files(finished_run / folder):
            assert os.path.samefile(file, new / file.relative_to(finished_run))
    assert sorted(records(new)) == sorted(SHARED)
    shared = records(new)
    view = sparring.run(new)
    assert {f: i for f, i in records(new).items() if f in shared} == shared
    assert tree_hash(finished_run) == before
    assert [r.hyper.get("beta") for r in view.rounds] == [None, 0.5, 0.5]
    # A shared round says where its roles lie in the fork.
    assert view.rounds[0].roles["start"].sha == RunView(finished_run).rounds[0].roles["start"].sha
    assert view.rounds[1].roles["opponent"].path == str(new / "prep_000" / "player")
    rounds = [{"method": "sft"}, {"method": "spin", "repeat": 2, "beta": 0.5}]
    sparring.run(recipe(tmp_path / "scratch", tiny_model, tiny_data, rounds=rounds))
    assert player_shas(new) == player_shas(tmp_path / "scratch")
    assert player_shas(new)[1] != player_shas(finished_run)[1]


def test_fork_from_a_round_on(finished_run: Path, tmp_path: Path) -> None:
    before = tree_hash(finished_run)
    shared = sparring.fork(finished_run, tmp_path / "new", t=1)
    assert shared[-1] == "round_000/eval" and not any(f.startswith("round_001") for f in shared)
    assert not (tmp_path / "new" / "round_001").exists()
    sparring.run(tmp_path / "new")
    assert player_shas(tmp_path / "new") == player_shas(finished_run)
    assert tree_hash(finished_run) == before


def test_what_happens_to_a_fork_stays_in_it(finished_run: Path, tmp_path: Path) -> None:
    """Redo, other settings, and a training done over a shared `train/` folder: the source's files stay as they are."""
    source = shutil.copytree(finished_run, tmp_path / "source", symlinks=True)
    before, times = tree_hash(source), {p: p.stat().st_mtime_ns for p in files(source)}
    new = tmp_path / "new"
    shared = sparring.fork(source, new)
    assert len(shared) == 18
    assert sparring.run(new, ["train.save_every=1", "keep_states=true"]).best == 2
    # The player is lost, its shared log and key are still there: training writes them anew.
    shutil.rmtree(new / "round_001" / "player")
    sparring.run(new)
    assert not os.path.samefile(new / "round_001/train/log.jsonl", source / "round_001/train/log.jsonl")
    sparring.run(new, ["train.lr=0.002"], redo=True)
    sparring.run(new, ["rounds.1.repeat=3"])
    assert tree_hash(source) == before
    assert {p: p.stat().st_mtime_ns for p in files(source)} == times
    shutil.rmtree(new)
    assert tree_hash(source) == before
    assert sparring.run(source).best == 2


def test_a_fork_cut_short_is_made_again(finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = os.link
    made: list[Any] = []

    def killed(source: Any, target: Any, **options: Any) -> None:
        made.append(target)
        if len(made) == 20:
            raise KeyboardInterrupt
        link(source, target, **options)

    before = tree_hash(finished_run)
    with monkeypatch.context() as patch:
        patch.setattr(os, "link", killed)
        with pytest.raises(KeyboardInterrupt):
            sparring.fork(finished_run, tmp_path / "new", ["spin.beta=0.5"])
    assert not (tmp_path / "new").exists()
    assert sparring.fork(finished_run, tmp_path / "new", ["spin.beta=0.5"]) == SHARED
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new"]
    assert tree_hash(finished_run) == before
    with pytest.raises(InputError, match=r"new: exists already; a fork makes a new run$"):
        sparring.fork(finished_run, tmp_path / "new")


def test_without_hard_links_a_fork_copies(finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def elsewhere(*arguments: Any, **options: Any) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", elsewhere)
    assert len(sparring.fork(finished_run, tmp_path / "new")) == 18
    assert player_shas(tmp_path / "new") == player_shas(finished_run)


def test_identity_is_settings_and_inputs_not_paths(finished_run: Path, tmp_path: Path) -> None:
    sparring.fork(finished_run, tmp_path / "one", ["spin.beta=0.5"])
    assert sparring.fork(tmp_path / "one", tmp_path / "two", ["spin.beta=0.1"]) == SHARED
    assert len(sparring.fork(finished_run, tmp_path / "three", ["train.micro_batch=1"])) == 18
