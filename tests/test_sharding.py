"""Training over several processes is that of one: figures, weights, states and the player's files."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import teams
from sparring import adapters
from sparring.cost import Shape, memory
from sparring.cost.memory import Pass, Where
from sparring.gradient import dealt
from teams import CASES, WARM

TESTS = Path(__file__).parent
SHAPE = Shape("llama", 16, 2, 4, 2, 24, teams.VOCAB, 64)
STOP = 3
"""A step amid the second epoch's six."""
Job = tuple[str, str, dict[str, Any]]


@pytest.fixture(autouse=True)
def no_network() -> None:
    """Not refused here: processes talk to each other on this machine."""


@pytest.fixture(scope="module")
def start() -> Iterator[Any]:
    """Starts processes from one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(WARM)
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(TESTS), before]))

    def run(size: int, place: Path, jobs: Sequence[Job], kind: str = "cpu") -> Path:
        place.mkdir(exist_ok=True)
        given = [(n, size, place, jobs, kind) for n in range(size)]
        crew = [context.Process(target=teams.work, args=own, daemon=True) for own in given]
        for process in crew:
            process.start()
        for process in crew:
            process.join()
        told = [file.read_text() for file in sorted(place.glob("*.failed"))]
        assert not told and all(process.exitcode == 0 for process in crew), "\n".join(told)
        return place

    yield run
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case trained by one process. Read only."""
    place = tmp_path_factory.mktemp("alone")
    for name, case in CASES.items():
        folder = place / name
        folder.mkdir()
        with teams.own_layers():
            torch.save(teams.weights(teams.trained(case, folder)), folder / "weights.pt")
    return place


@pytest.fixture(scope="module")
def pair(start: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same by two. Read only."""
    jobs: list[Job] = [("train", name, {}) for name in CASES]
    jobs += [("score", "lora", {}), ("score", "adamw", {}), ("stop", "adamw", {"stop": STOP}), ("casts", "rmsprop", {})]
    jobs += [("spoilt", "rmsprop", {"spoil": 1.01})]
    return Path(start(2, tmp_path_factory.mktemp("pair"), jobs))


def logged(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "train" / "log.jsonl").read_text().splitlines()]


def apart(name: str, one: Path, other: Path) -> float:
    """‖Δθ − Δθ'‖ / ‖Δθ‖ of two trainings of a case."""
    before = teams.weights(teams.learner(CASES[name]))
    first, second = (torch.load(folder / "weights.pt") for folder in (one, other))
    assert first.keys() == second.keys() == before.keys()
    moved = sum(float((first[n] - before[n]).double().square().sum()) for n in before)
    differs = sum(float((first[n] - second[n]).double().square().sum()) for n in before)
    assert moved > 0
    return float((differs / moved) ** 0.5)


def check_equal(name: str, one: Path, other: Path) -> None:
    """Loss and gradient norm of every step to 1e-5, in float64 to 1e-9; in float64 the weights' change to 1e-9."""
    rows, others = logged(one), logged(other)
    assert [row["step"] for row in rows] == [row["step"] for row in others] == list(range(1, 7))
    double = CASES[name].dtype == torch.float64
    for a, b in zip(rows, others, strict=True):
        assert a.keys() == b.keys() and a["tokens"] == b["tokens"]
        for key in a.keys() - {"seconds"}:
            assert a[key] == pytest.approx(b[key], rel=1e-9 if double else 1e-5, abs=1e-9 if double else 2e-6), key
    if double:
        assert apart(name, one, other) <= 1e-9


@pytest.mark.cluster
@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_as_one(name: str, alone: Path, pair: Path) -> None:
    check_equal(name, alone / name, pair / f"train-{name}")


@pytest.mark.cluster
def test_an_error_of_one_percent_in_one_process_would_be_seen(alone: Path, pair: Path) -> None:
    assert apart("rmsprop", alone / "rmsprop", pair / "spoilt-rmsprop") > 1e-5


@pytest.mark.slow
def test_four_processes_train_as_one(start: Any, alone: Path, tmp_path: Path) -> None:
    start(4, tmp_path / "four", [("train", name, {}) for name in CASES])
    for name in CASES:
        check_equal(name, alone / name, tmp_path / "four" / f"train-{name}")


@pytest.mark.gpu
def test_every_gpu_together_trains_as_one_cpu(start: Any, alone: Path, tmp_path: Path) -> None:
    names = [name for name, case in CASES.items() if case.dtype == torch.float64]
    start(torch.cuda.device_count(), tmp_path / "gpus", [("train", name, {}) for name in names], "cuda")
    for name in names:
        check_equal(name, alone / name, tmp_path / "gpus" / f"train-{name}")


@pytest.mark.cluster
def test_a_state_of_two_goes_on_with_one(alone: Path, pair: Path, tmp_path: Path) -> None:
    folder = tmp_path / "on"
    folder.mkdir()
    shutil.copytree(pair / "stop-adamw" / "train", folder / "train")
    names = [p.name for p in (folder / "train" / "state").iterdir()]
    assert names == [f"0000-{STOP:09d}"]
    with teams.own_layers():
        torch.save(teams.weights(teams.trained(CASES["adamw"], folder)), folder / "weights.pt")
    check_equal("adamw", alone / "adamw", folder)


@pytest.mark.cluster
def test_a_state_of_one_goes_on_with_three(start: Any, alone: Path, tmp_path: Path) -> None:
    folder = tmp_path / "three" / "train-adamw"
    folder.mkdir(parents=True)
    with pytest.raises(teams.Stop):
        teams.trained(CASES["adamw"], folder, stop=STOP)
    assert (folder / "train" / "state" / "last.safetensors").exists()
    start(3, tmp_path / "three", [("train", "adamw", {})])
    check_equal("adamw", alone / "adamw", folder)


@pytest.mark.cluster
@pytest.mark.parametrize("name", ["lora", "adamw"])
def test_a_player_is_saved_as_by_one_process(name: str, pair: Path, tmp_path: Path) -> None:
    """Nothing was trained: every file is that of the whole model, byte for byte."""
    whole = teams.learner(CASES[name])
    adapters.save(whole, tmp_path) if CASES[name].lora else whole.save_pretrained(tmp_path)
    files = sorted(path.name for path in tmp_path.iterdir())
    assert [path.name for path in sorted((pair / f"score-{name}").iterdir()) if path.suffix != ".pt"] == files
    for file in files:
        assert (tmp_path / file).read_bytes() == (pair / f"score-{name}" / file).read_bytes(), file


@pytest.mark.cluster
@pytest.mark.parametrize("name", ["lora", "adamw"])
def test_shards_score_by_the_fast_path_as_the_whole_does(name: str, pair: Path) -> None:
    told = [torch.load(pair / f"score-{name}" / f"{n}.pt") for n in (0, 1)]
    assert all(one["fast"] and one["apart"] < 1e-12 for one in told)
    trained = sum(p.numel() for p in teams.weights(teams.learner(CASES[name])).values())
    assert sum(one["parts"] for one in told) == trained
    assert max(one["parts"] for one in told) < 0.6 * trained


@pytest.mark.cluster
@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_player_in_shards_scores_as_a_whole_one(size: int, start: Any, tmp_path: Path) -> None:
    """Bit for bit, for a pass is what it is for a whole player; each process makes every n-th.

    Layers in C, which only whole players have, round elsewhere.
    """
    start(size, tmp_path / "players", [("player", name, {}) for name in teams.PLAYERS])
    for name, case in teams.PLAYERS.items():
        told = [torch.load(tmp_path / "players" / f"player-{name}" / f"{n}.pt") for n in range(size)]
        whole = teams.learner(case)
        weights = sum(p.numel() for p in whole.parameters())
        assert sum(one["parts"] for one in told) == weights and max(one["parts"] for one in told) < 1.2 * weights / size
        assert {one["passes"] for one in told} == {-(-11 // size)}  # a pass of empty ones alone is none
        with teams.own_layers():
            wanted = teams.player_scores(case, whole, None)
        assert all(one["scores"] == wanted for one in told), name
        in_c = teams.player_scores(case, whole, None)
        assert all(got == pytest.approx(line, abs=1e-5) for got, line in zip(in_c, wanted, strict=True))
        if "bfloat16" in told[0]:
            with teams.own_layers():
                wanted = teams.player_scores(case, whole, torch.bfloat16)
            assert all(one["bfloat16"] == wanted for one in told), name
            # Of the largest matrix, while it is used; what a plan says of it
            said = memory.scoring(SHAPE, Where(True, False, devices=max(2, size)), [Pass(1, 1, 1, 1)])["casts"]
            assert all(2 * one["casts"] == said for one in told)


@pytest.mark.gpu
def test_every_gpu_holds_a_part_of_a_player(start: Any, tmp_path: Path) -> None:
    size = torch.cuda.device_count()
    start(size, tmp_path / "players", [("player", name, {}) for name in teams.PLAYERS], "cuda")
    for name, case in teams.PLAYERS.items():
        told = [torch.load(tmp_path / "players" / f"player-{name}" / f"{n}.pt") for n in range(size)]
        wanted = teams.player_scores(case, teams.learner(case).to("cuda"), None)
        for one in told:
            assert all(got == pytest.approx(line, abs=1e-5) for got, line in zip(one["scores"], wanted, strict=True))


@pytest.mark.cluster
def test_casts_are_kept_no_longer_than_their_layer(pair: Path) -> None:
    """Of one process autocast keeps those of all layers until a pass ends; of several one layer's are there at a time."""
    layer, head = 2 * 16 * (16 + 8) + 3 * 16 * 24, teams.VOCAB * 16
    with teams.own_layers():
        assert teams.casts_of_a_step(None, teams.DEEP) == 6 * layer + head
    told = [torch.load(pair / "casts-rmsprop" / f"{n}.pt") for n in (0, 1)]
    assert told == [layer, layer]
    shape, where = replace(SHAPE, layers=6), Where(True, False, devices=2, checkpointing=True)
    said = memory.training(shape, where, "rmsprop", [Pass(1, 1, 1, 1)], [], steps=1, accumulates=True)
    assert said["casts"] == 2 * layer


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 8))
def test_groups_are_dealt_evenly(sizes: list[int], hands: int) -> None:
    """Graham 1969: the largest hand has at most 4/3 of the best possible, so of the mean and the largest group."""
    order = sorted(range(len(sizes)), key=lambda i: (sizes[i] % 7, i))
    found = dealt(order, sizes, hands)
    assert sorted(i for own in found for i in own) == sorted(order)
    assert all(own == [i for i in order if i in own] for own in found)
    held = [sum(sizes[i] for i in own) for own in found]
    assert max(held) - min(held) <= max(sizes, default=0)
