"""The embedded default, shrunk: the same calls on 300 documents, so that every line of it runs in seconds."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from helpers import cli
from sparring import demo
from sparring.demo import task
from sparring.rundir.view import RunView

whole_recipe = demo.recipe


def small_recipe(out: Path, seed: int) -> dict[str, Any]:
    tree = whole_recipe(out, seed)
    tree["evaluate"] |= {"limit": 20, "samples": 1}
    tree["rounds"][0]["train"] |= {"epochs": 1, "warmup": 1}
    tree["rounds"][1] |= {"limit": 12}
    tree["rounds"][1]["train"] |= {"epochs": 1}
    tree["train"] |= {"batch_size": 8, "log_every": 2}
    # A step with a measurement is always logged: one, or no step would go without
    tree["controls"] = {"checks": 1}
    return tree


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A finished small demo and what it printed."""
    out = tmp_path_factory.mktemp("demo") / "demo"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(task, "problems", partial(task.problems, train=300, heldout=30))
        patch.setattr(demo, "recipe", small_recipe)
        result = cli("demo", "--seed", 3, "--out", out)
        assert result.code == 0, result.err
        again = demo_shas(out), (out / "summary.json").read_text()
        repeated = cli("demo", "--seed", 3, "--out", out)
        assert repeated.code == 0
        assert demo_shas(out) == again[0]
        first, second = json.loads(again[1]), json.loads((out / "summary.json").read_text())
        assert {k: v for k, v in first.items() if k != "seconds"} == {k: v for k, v in second.items() if k != "seconds"}
    return out, result.out


def demo_shas(out: Path) -> dict[int, str]:
    return {n: player.sha for n, player in RunView(out).players.items()}


def test_summary_has_the_documented_shape(made: tuple[Path, str]) -> None:
    summary = json.loads((made[0] / "summary.json").read_text())
    assert list(summary) == ["seed", "best", "players", "control", "colder", "data", "seconds"]
    assert summary["seed"] == 3
    assert summary["best"] in (0, 1, 2, 3)
    assert [(p["player"], p["made_by"]) for p in summary["players"]] == [
        (0, "sft"),
        (1, "spin"),
        (2, "spin"),
        (3, "spin"),
    ]
    for row in (*summary["players"], summary["control"]):
        assert 0 <= row["greedy"] <= 1 and 0 <= row["sampled"] <= 1
        assert row["gold_nll"] > 0 and row["gold_nll_se"] > 0
    assert set(summary["colder"]) == {"0.7", "0.5"}
    assert set(summary["seconds"]) == {"total", "sft", "play", "frozen", "train", "eval"}


def test_total_seconds_are_not_those_of_the_last_process_alone(made: tuple[Path, str]) -> None:
    """The summary is the repeated command's, which found every stage done."""
    runs = (made[0], made[0] / f"control_{demo.CONTROL_LR:g}")
    stages = [json.loads(file.read_text())["seconds"] for run in runs for file in stage_records(run)]
    assert len(stages) == 2 + 4 + 3 * 6 + 2 + 4
    assert sum(RunView(run).seconds for run in runs) == pytest.approx(sum(stages))
    total = json.loads((made[0] / "summary.json").read_text())["seconds"]["total"]
    assert sum(stages) - 0.1 < total


def stage_records(run: Path) -> list[Path]:
    return [
        run / "data" / "stage.json",
        *(p for part in ("start", "prep", "round") for p in run.glob(f"{part}*/*/stage.json")),
    ]


def test_a_folder_of_another_seed_is_refused(made: tuple[Path, str]) -> None:
    result = cli("demo", "--seed", 4, "--out", made[0])
    message = f"sparring: {made[0]}: holds the demo of seed 3, not of seed 4; give another folder (--out)\n"
    assert tuple(result) == (2, "", message)


def test_a_figure_of_one_prompt_has_no_error() -> None:
    one = {"mean": 0.5, "se": None, "n": 1}
    assert demo._flat({"greedy": one, "sampled": one, "gold_nll": one | {"se": 0.123456}}) == {
        "greedy": 0.5,
        "sampled": 0.5,
        "gold_nll": 0.5,
        "greedy_se": None,
        "sampled_se": None,
        "gold_nll_se": 0.12346,
    }


def test_the_data_row_is_the_share_of_right_training_answers(made: tuple[Path, str]) -> None:
    rows = [json.loads(line) for line in (made[0] / "task" / "train.jsonl").read_text().splitlines()]
    right = 0
    for row in rows:
        a, b = row["prompt"][:-1], row["completion"].rsplit("#### ")[-1]
        right += eval(a) == int(b)
    summary = json.loads((made[0] / "summary.json").read_text())
    assert summary["data"] == pytest.approx(right / len(rows), abs=1e-4)
    assert 0.55 < summary["data"] < 0.8


def test_the_control_takes_as_many_steps_as_self_play(made: tuple[Path, str]) -> None:
    view = RunView(made[0])
    control = RunView(made[0] / f"control_{demo.CONTROL_LR:g}")
    steps = [r.log[-1]["step"] for r in view.rounds if r.t >= 0]
    assert control.rounds[0].log[-1]["step"] == sum(steps)
    assert sum(steps) > sum(len(r.log) for r in view.rounds if r.t >= 0) > 0
    assert control.players[0].sha == view.players[0].sha


def test_every_control_stands_in_the_table_and_in_the_report(made: tuple[Path, str]) -> None:
    page = (made[0] / "report.html").read_text()
    for name in (
        "continued SFT, lr 0.001",
        "player 0 sampled at T = 0.7",
        "player 0 sampled at T = 0.5",
        "training answers",
    ):
        assert name in made[1]
        assert name in page
    assert "test split" in page
    assert made[1].strip().endswith("report.html")


def test_the_same_seed_gives_the_same_players(
    made: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(task, "problems", partial(task.problems, train=300, heldout=30))
    from sparring import api

    demo.make_task(tmp_path / "demo", 3)
    view = api.run(small_recipe(tmp_path / "demo", 3))
    assert {n: p.sha for n, p in view.players.items()} == demo_shas(made[0])
