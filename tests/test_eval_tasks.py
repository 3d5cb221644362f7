"""Tasks: reading files, choices against a teacher-forced oracle, every player in the loop, the command line, pairing."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

import sparring
from helpers import cli, recipe, rows, write_jsonl, write_model, write_recipe
from rundirs import records, refused
from sparring import api, sinks
from sparring.compare import compare, pairs
from sparring.config import TrackConfig
from sparring.errors import InputError
from sparring.evaluate import harness, versus, versus_players, win_rate
from sparring.evaluate.core import Item
from sparring.evaluate.stats import paired
from sparring.evaluate.suites import Figure
from sparring.evaluate.tasks import read, suite_values
from sparring.formatting import figure as figure_text
from sparring.judge.score import identity, load_scorer
from sparring.report import comparison, table
from sparring.report.verdict import by_example
from sparring.rundir.store import read_json, write_json
from sparring.rundir.view import RunView
from sparring.types import Example, Message

SUMS = [{"prompt": f"what is {i} + 1?", "answer": f"#### {i + 1}", "level": i} for i in range(5)]
COLOURS = [{"prompt": f"{i} is", "choices": ["red", "a very dark blue", "go"], "label": i % 3} for i in range(6)]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    write_jsonl(folder / "sums.jsonl", SUMS)
    write_jsonl(folder / "colours.jsonl", COLOURS)
    return folder


@pytest.fixture(scope="module")
def run(files: Path, tiny_model: Path, tiny_data: Path) -> RunView:
    """SFT and two rounds of SPIN, each player on two tasks and against player 0."""
    (files / "judge.py").write_text(
        "def longer(example, answers):\n"
        "    def beats(a, b):\n"
        "        return 0.5 if len(a) == len(b) else float(len(a) > len(b))\n"
        "    return [[beats(a, b) for b in answers] for a in answers]\n"
    )
    tasks = [str(files / "colours.jsonl"), {"path": str(files / "sums.jsonl"), "samples": 4, "limit": 4}]
    evaluate = {"tasks": tasks, "scorer": f"{files / 'judge.py'}:longer", "best": "task:colours:acc_norm"}
    return sparring.run(recipe(files / "run", tiny_model, tiny_data, evaluate=evaluate))


@pytest.fixture
def own(run: RunView, tmp_path: Path) -> RunView:
    """A copy of that run, for tests that add to it: `run` is every test's, in whatever order they come."""
    return copied(run, tmp_path / "run")


# Files -----------------------------------------------------------------------------------------------------------


def test_rows_become_examples(files: Path) -> None:
    exact, choice = read(files / "sums.jsonl"), read(files / "colours.jsonl")
    assert (exact.kind, choice.kind) == ("exact", "choice")
    first = exact.examples[0]
    assert (first.messages, first.gold, first.meta) == ((Message("user", "what is 0 + 1?"),), "#### 1", {"level": 0})
    assert first.source.endswith("sums.jsonl:1")
    assert choice.examples[1].gold == "a very dark blue"


def test_turns_and_numbers_are_taken(tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "2 + 2?"}]
    got = read(write_jsonl(tmp_path / "t.jsonl", [{"prompt": turns, "answer": 4}])).examples[0]
    assert got.messages == (Message("system", "be brief"), Message("user", "2 + 2?")) and got.gold == "4"


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        ([{"prompt": "a"}], "t.jsonl:1: `answer` must be text or a number"),
        ([{"prompt": "a", "answer": " "}], "t.jsonl:1: `answer` must be"),
        ([{"prompt": "a", "answer": True}], "t.jsonl:1: `answer` must be"),
        ([{"answer": "a"}], "t.jsonl:1: `prompt` must be text, or a list of turns"),
        ([{"prompt": [{"role": "user"}], "answer": "a"}], "t.jsonl:1: `prompt` must be"),
        ([{"prompt": [], "answer": "a"}], "t.jsonl:1: `prompt` must be"),
        ([{"prompt": "a", "choices": ["b"], "label": 0}], "t.jsonl:1: `choices` must be a list of two texts or more"),
        ([{"prompt": "a", "choices": ["b", ""], "label": 0}], "`choices` must be"),
        (
            [{"prompt": "a", "choices": ["b", "c"], "label": 2}],
            "`label` must be the right choice's place, 0 … 1, not 2",
        ),
        ([{"prompt": "a", "choices": ["b", "c"], "label": "0"}], "`label` must be"),
        ([{"prompt": "a", "choices": ["b", "c"], "label": True}], "`label` must be"),
        ([SUMS[0], COLOURS[0]], "t.jsonl:2: a row of kind choice in a task of kind exact"),
        ([SUMS[0], SUMS[0]], "t.jsonl:2: the same item as"),
        (["text"], "t.jsonl:1: the row is text"),
        ([], "the file is empty"),
    ],
)
def test_bad_files(tmp_path: Path, lines: list[Any], problem: str) -> None:
    with pytest.raises(InputError) as told:
        read(write_jsonl(tmp_path / "t.jsonl", lines))
    assert problem in str(told.value) and "\n" not in str(told.value)


def test_an_unknown_ending_is_told(tmp_path: Path) -> None:
    file = tmp_path / "t.txt"
    file.write_text("{}\n")
    with pytest.raises(InputError, match=r"t\.txt: files that end in `\.txt` are not read; known are \.jsonl"):
        read(file)


def test_a_bad_row_is_told_before_what_was_done_is_superseded(own: RunView, tmp_path: Path) -> None:
    extra = write_jsonl(tmp_path / "later.jsonl", [{"prompt": "1 + 1?", "answer": 2}])
    assert cli("eval", own.path, "--player", 1, "--tasks", extra).code == 0
    before = RunView(own.path).tasks(1)["later"]
    write_jsonl(extra, [{"prompt": "1 + 1?", "answer": 2}, {"prompt": "2 + 2?"}])
    code, _, err = cli("eval", own.path, "--player", 1, "--tasks", extra, "--redo")
    assert code == 2 and "later.jsonl:2: `answer`" in err
    assert RunView(own.path).tasks(1)["later"] == before


def test_a_file_of_blank_lines_has_no_rows(tmp_path: Path, tiny_model: Path, tiny_data: Path) -> None:
    (tmp_path / "blank.jsonl").write_text("\n\n")
    with pytest.raises(InputError, match=r"blank\.jsonl: no rows in it; it needs at least one"):
        sparring.run(recipe(tmp_path / "run", tiny_model, tiny_data, evaluate={"tasks": [f"{tmp_path}/blank.jsonl"]}))


@pytest.mark.parametrize(
    ("setting", "problem"),
    [
        ("evaluate.tasks=[none.jsonl]", "evaluate.tasks: none.jsonl: no such file"),
        (
            "evaluate.tasks=[{path: x, limt: 3}]",
            "evaluate.tasks.0.limt: unknown key; the nearest is `evaluate.tasks.0.limit`",
        ),
        ("evaluate.tasks=[{path: x, limit: 0}]", "evaluate.tasks.0.limit: must be greater than 0"),
        ("evaluate.tasks=[a/t.jsonl, b/t.jsonl]", "two tasks are called `t`"),
        ("evaluate.tasks=[{path: a.jsonl, name: win_rate}]", "two tasks are called `win_rate`"),
        ("evaluate.best=task:sums", "a task must stand in evaluate.tasks"),
        ("evaluate.best=task:win_rate", "must be one of"),
        ("evaluate.scorer=verifier:gsm9k", "verifier `gsm9k`: unknown"),
    ],
)
def test_bad_settings(tmp_path: Path, tiny_model: Path, tiny_data: Path, setting: str, problem: str) -> None:
    file = write_recipe(tmp_path / "r.yaml", recipe(tmp_path / "run", tiny_model, tiny_data))
    code, _, err = cli("run", file, setting)
    assert code == 2 and problem in err and err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_figure_that_a_task_lacks(files: Path, tmp_path: Path, tiny_model: Path, tiny_data: Path) -> None:
    given = {"tasks": [str(files / "colours.jsonl")], "best": "task:colours:acc_nrm"}
    with pytest.raises(InputError, match="task `colours` has no figure `acc_nrm`; the nearest is `acc_norm`"):
        sparring.run(recipe(tmp_path / "run", tiny_model, tiny_data, evaluate=given))


@pytest.mark.parametrize(
    ("there", "task", "figure", "problem"),
    [
        (False, {"path": "openllm-v1"}, "mean", "openllm-v1: lm-evaluation-harness is not installed"),
        (True, {"path": "openllm-v1", "data_dir": "/nowhere"}, "mean", "data_dir: /nowhere: no such folder"),
        (
            True,
            {"path": "leaderboard-v2", "data_dir": "/nowhere"},
            "mean",
            "leaderboard-v2: data_dir: /nowhere: no such folder",
        ),
        (True, {"path": "openllm-v1"}, "gsm8", "has no figure `gsm8`; the nearest is `gsm8k`"),
        (True, {"path": "openllm-v1"}, "maen", "has no figure `maen`; the nearest is `mean`"),
        (True, {"path": "openllm-v1"}, "mean", None),
        (True, {"path": "openllm-v1"}, "mmlu", None),
    ],
)
def test_suites_are_checked_before_anything_is_spent(
    tmp_path: Path, tiny_model: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch,
    there: bool, task: dict[str, Any], figure: str, problem: str | None,
) -> None:  # fmt: skip
    monkeypatch.setattr(harness, "available", lambda: there)
    tree = recipe(
        tmp_path / "run", tiny_model, tiny_data, evaluate={"tasks": [task], "best": f"task:{task['path']}:{figure}"}
    )
    if problem is None:
        api.prepare(tree)
        return
    with pytest.raises(InputError) as told:
        api.prepare(tree)
    assert problem in str(told.value) and "\n" not in str(told.value)


def test_a_win_rate_has_one_figure(run: RunView) -> None:
    with pytest.raises(InputError, match="task `win_rate` has no figure `rate`; the nearest is `win_rate`"):
        api.prepare(run.path, ["evaluate.best=task:win_rate:rate"])


# In the loop -------------------------------------------------------------------------------------------------------


def test_every_player_does_every_task(run: RunView) -> None:
    assert sorted(run.players) == [-1, 0, 1, 2]
    for number in run.players:
        wins = {"win_rate"} if number >= 0 else set()
        assert set(run.tasks(number)) == {"colours", "sums"} | wins
        sums, colours = run.tasks(number)["sums"], run.tasks(number)["colours"]
        assert (sums["n"], sums["kind"], sums["verifier"]) == (4, "exact", "gsm8k")
        assert {"greedy", "sampled", "pass@2", "maj@2", "pass@4", "maj@4"} <= set(sums)
        assert len([i for i in run.items(number, "sums") if i.kind == "sampled"]) == 16
        assert (colours["n"], colours["kind"]) == (6, "choice")
        evaluation = run.evaluation(number)
        assert evaluation is not None
        assert evaluation["task:colours"] == colours["acc"] == evaluation["task:colours:acc"]
        assert evaluation["task:sums"] == sums["sampled"]
    assert run.evaluation(0)["task:win_rate"]["mean"] == 0.5  # type: ignore[index]


def test_choices_are_scored_as_by_unpadded_forward_passes(run: RunView) -> None:
    from sparring.players import load_model
    from sparring.preview import make_renderer

    model, renderer = load_model(run.players[1].path, run.config.model), make_renderer(run)
    items = {(i.example_id, i.index): i for i in run.items(1, "colours")}
    assert len(items) == 18
    for example in read(Path(run.tasks(1)["colours"]["file"])).examples:
        prompt = renderer.prompt(example.messages)
        for c, choice in enumerate(example.meta["choices"]):
            ids = renderer.completion(example.messages, choice)
            with torch.no_grad():
                table = model(input_ids=torch.tensor([[*prompt, *ids]])).logits[0].double().log_softmax(-1)
            wanted = [table[len(prompt) - 1 + i, token].item() for i, token in enumerate(ids)]
            item = items[example.id, c]
            assert item.logps == pytest.approx(wanted, abs=1e-5)
            assert (item.text, item.right, item.tokens) == (choice, c == example.meta["label"], tuple(ids))


def test_the_best_player_is_chosen_by_the_task(run: RunView) -> None:
    found = {n: run.evaluation(n)["task:colours:acc_norm"] for n in (0, 1, 2)}  # type: ignore[index]
    top = max(found.values(), key=lambda figure: figure["mean"])
    assert run.best == max(n for n, figure in found.items() if figure["mean"] >= top["mean"] - top["se"])
    # By another figure, where less is better
    config = run.config.evaluate.model_copy(update={"best": "task:sums:gold_nll"})
    nlls = {n: e["task:sums:gold_nll"] for n, e in run.evaluations().items() if e is not None}
    best = min(nlls.values(), key=lambda figure: figure["mean"])
    assert sparring.controls.best_player(run.evaluations(), config, {}) == max(
        n for n, figure in nlls.items() if figure["mean"] <= best["mean"] + best["se"]
    )


def test_wins_against_player_0_are_those_of_the_scorer(run: RunView) -> None:
    mine, theirs = ({i.example_id: len(i.text) for i in run.items(n) if i.kind == "greedy"} for n in (2, 0))
    wanted = [0.5 + (mine[n] > theirs[n]) / 2 - (mine[n] < theirs[n]) / 2 for n in mine]
    assert run.tasks(2)["win_rate"]["win_rate"]["mean"] == pytest.approx(sum(wanted) / len(wanted))


def test_a_changed_file_is_another_task(files: Path, tmp_path: Path, tiny_model: Path, tiny_data: Path) -> None:
    own = write_jsonl(tmp_path / "own.jsonl", SUMS[:3])
    tree = recipe(tmp_path / "run", tiny_model, tiny_data, rounds=[{"method": "spin"}])
    sparring.run(tree)
    before = records(tmp_path / "run")
    # A task that is added later is done for every player, and nothing else is
    tree["evaluate"] |= {"tasks": [str(own)]}
    sparring.run(tree)
    after = records(tmp_path / "run")
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {"start/tasks/own", "round_000/tasks/own"}
    # The same contents elsewhere are the same task; other contents are not
    moved = (
        write_jsonl(tmp_path / "elsewhere" / "own.jsonl", SUMS[:3]) if (tmp_path / "elsewhere").mkdir() is None else own
    )
    sparring.run(tree | {"evaluate": tree["evaluate"] | {"tasks": [str(moved)]}})
    assert records(tmp_path / "run") == after
    write_jsonl(own, SUMS[:2])
    lines = refused(tree)
    assert [line.split(":")[0] for line in lines] == ["start/tasks/own", "round_000/tasks/own"]
    assert all("task.sha" in line for line in lines)


def test_a_task_goes_with_the_player_that_did_it(tmp_path: Path, tiny_model: Path, tiny_data: Path) -> None:
    sums, held = write_jsonl(tmp_path / "sums.jsonl", SUMS), write_jsonl(tmp_path / "held.jsonl", SUMS[:2])
    tree = recipe(tmp_path / "run", tiny_model, tiny_data, rounds=[{"method": "spin"}], evaluate={"tasks": [str(held)]})
    view = sparring.run(tree)
    for player in (0, 1):
        api.evaluate_tasks(view.path, [str(sums)], player)
    before = {n: view.tasks(n)["sums"]["gold_nll"]["mean"] for n in (0, 1)}
    # Player 0 stays what it is, and so does what it has done
    sparring.run(view.path, ["train.lr=0.02"], redo=True)
    assert (set(view.tasks(0)), set(view.tasks(1))) == ({"held", "sums"}, {"held"})
    assert (view.path / "superseded/1/round_000/tasks/sums/summary.json").exists()
    *_, row = re.findall(r"^\| \*{0,2}1\*{0,2} \|.*", (view.path / "round_000/player/README.md").read_text(), re.M)
    assert row.endswith("| – | – | – |")
    api.evaluate_tasks(view.path, [str(sums)], 1)
    after = {n: view.tasks(n)["sums"]["gold_nll"]["mean"] for n in (0, 1)}
    assert after[0] == before[0] and abs(after[1] - before[1]) > 1e-3


def test_a_task_goes_with_the_start_that_did_it(tmp_path: Path, tiny_model: Path, tiny_data: Path) -> None:
    sums = write_jsonl(tmp_path / "sums.jsonl", SUMS)
    view = sparring.run(recipe(tmp_path / "run", tiny_model, tiny_data, rounds=[{"method": "spin"}]))
    api.evaluate_tasks(view.path, [str(sums)], 0)
    sparring.run(view.path, ["evaluate.samples=0"], redo=True)
    assert set(view.tasks(0)) == {"sums"}
    other = f"model.path={write_model(tmp_path / 'other', seed=1)}"
    assert "start/tasks/sums: its input player 0 changes" in refused(view.path, other)
    sparring.run(view.path, [other], redo=True)
    assert not view.tasks(0)
    assert (view.path / "superseded/2/start/tasks/sums/summary.json").exists()


@pytest.mark.parametrize("data", [{"long_prompt": "drop"}, {"long_prompt": "keep_end"}, {"long_answer": "drop"}])
def test_items_that_do_not_fit_are_told(tmp_path: Path, tiny_model: Path, tiny_data: Path, data: Any) -> None:
    long = "what is " + "1 + " * 20 + "1?"
    task = write_jsonl(
        tmp_path / "own.jsonl",
        [*SUMS[:2], {"prompt": long, "answer": "#### 21"}, {"prompt": "long?", "answer": "#### " + "7" * 60}],
    )
    limits = {"max_answer_tokens": 50} | ({"max_prompt_tokens": 60} if "long_prompt" in data else {})
    sections = {"data": limits | data, "evaluate": {"tasks": [str(task)]}, "rounds": [{"method": "sft"}]}
    view = sparring.run(recipe(tmp_path / "run", tiny_model, tiny_data, **sections))
    summary = view.tasks(0)["own"]
    counts = {key: summary["fitting"][key] for key in ("prompts", "prompts_dropped", "prompts_cut", "golds_dropped")}
    dropped, cut = ("drop" in data.get("long_prompt", "")), "keep_end" in data.values()
    assert counts == {"prompts": 4, "prompts_dropped": int(dropped), "prompts_cut": int(cut), "golds_dropped": 0}
    assert (summary["n"], summary["greedy"]["n"], summary["gold_cut"]) == (4 - dropped, 4 - dropped, 1)
    told = ["1 of 4 items were left out: their prompts are too long"] * dropped
    told += ["1 of 4 items lost the beginning of their prompts, which are too long"] * cut
    told += ["1 of 4 items have a gold answer that is too long for log p(gold)"]
    assert [flag for flag in summary["flags"] if "of 4" in flag] == told
    assert f"player 0 on own: {told[0]}" in view.control_lines()


# The command line ----------------------------------------------------------------------------------------------------


def test_tasks_on_the_command_line_are_done_once(own: RunView, tmp_path: Path) -> None:
    extra = write_jsonl(
        tmp_path / "extra.jsonl", [{"prompt": "say a", "answer": "a"}, {"prompt": "say b", "answer": "b"}]
    )
    code, out, err = cli("eval", own.path, "--round", 1, "--tasks", f"{extra},colours", "--verifier", "text")
    assert code == 0 and "extra" in out and "acc_norm" in out, err
    first = records(own.path)
    assert "round_001/tasks/extra" in first
    assert own.tasks(2)["extra"]["verifier"] == "text"
    assert cli("eval", own.path, "--player", 2, "--tasks", extra, "--verifier", "text").code == 0
    assert records(own.path) == first
    code, _, err = cli("eval", own.path, "--player", 2, "--tasks", extra, "--verifier", "text", "--limit", 1)
    assert code == 2 and "task.limit: null → 1" in err and "--redo" in err and err.count("\n") == 1
    assert cli("eval", own.path, "--player", 2, "--tasks", extra, "--limit", 1, "--redo").code == 0
    assert own.tasks(2)["extra"]["n"] == 1
    assert cli("run", own.path).code == 0  # what the recipe does not name is no concern of the run


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ((), "give one of --round t"),
        (("--round", "0", "--player", "1"), "give one of --round t"),
        (("--player", "1"), "--player goes with --tasks or --against"),
        (("--player", "9", "--tasks", "sums"), "player `9`: not in"),
        (("--player", "1", "--tasks", "gone.jsonl"), "gone.jsonl: no such file"),
        (("--player", "1", "--against", "x"), "player `x`: not in"),
        (("--round", "9", "--against", "0"), "player `10`: not in"),
        (("--player", "1", "--against", "0", "--tasks", "gone"), "player 1 has not been evaluated on gone"),
        (("--player", "1", "--against", "nowhere:0"), "nowhere: no such folder"),
        (("--round", "1", "--limit", "3"), "eval: --limit says nothing without --tasks; leave it out"),
        (("--round", "1", "--samples", "0"), "eval: --samples says nothing without --tasks"),
        (("--round", "1", "--verifier", "text"), "eval: --verifier says nothing without --tasks"),
        (("--round", "1", "--data-dir", "x"), "eval: --data-dir says nothing without --tasks"),
        (("--round", "1", "--redo"), "eval: --redo says nothing without --tasks"),
        (("--round", "1", "--scorer", "verifier:text"), "eval: --scorer says nothing without --tasks"),
        (("--player", "1", "--tasks", "sums", "--scorer", "verifier:text"), "--scorer says nothing with --tasks"),
        (("--player", "1", "--against", "0", "--tasks", "sums", "--redo"), "--redo says nothing with --against"),
        (("--player", "1", "--against", "0", "--limit", "3"), "--limit says nothing with --against"),
        (("--player", "1", "--against", "0", "--scorer", "gone"), "scorer `gone`: unknown"),
    ],
)
def test_bad_arguments(run: RunView, arguments: tuple[str, ...], problem: str) -> None:
    code, _, err = cli("eval", run.path, *arguments)
    assert code == 2 and problem in err and err.count("\n") == 1


def test_a_player_that_is_not_there_has_no_figures(run: RunView) -> None:
    assert sorted(run.players) == [-1, 0, 1, 2]
    for number in (-2, 3):
        assert run.evaluation(number) is None and run.tasks(number) == {} and list(run.items(number)) == []


def test_two_files_of_one_name_are_refused(run: RunView, tmp_path: Path) -> None:
    before = records(run.path)
    files = []
    for name in "ab":
        (tmp_path / name).mkdir()
        files.append(str(write_jsonl(tmp_path / name / "twin.jsonl", SUMS[:3])))
    code, _, err = cli("eval", run.path, "--player", 1, "--tasks", ",".join(files))
    assert code == 2 and "two tasks are called `twin`; rename a file" in err and err.count("\n") == 1
    assert records(run.path) == before


@pytest.mark.parametrize("redo", [[], ["--redo"]])
def test_the_recipe_says_how_its_tasks_are_done(run: RunView, tmp_path: Path, redo: list[str]) -> None:
    """Done in another way in the plan's own folder, a task would make every later command refuse the run."""
    before = records(run.path)
    other = write_jsonl(tmp_path / "sums.jsonl", SUMS[:2])
    for arguments in (["sums", "--limit", 2], ["sums", "--samples", 1], ["sums", "--verifier", "text"], [other]):
        code, _, err = cli("eval", run.path, "--player", 1, "--tasks", *arguments, *redo)
        assert code == 2 and "the recipe says how `sums` is done" in err and err.count("\n") == 1
    # As the recipe has it, it is done already
    assert cli("eval", run.path, "--player", 1, "--tasks", "sums", "--limit", 4, *redo).code == 0
    assert records(run.path) == before
    assert cli("run", run.path).code == 0


def test_suites_need_their_extra(run: RunView, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "available", lambda: False)
    code, _, err = cli("eval", run.path, "--player", 1, "--tasks", "openllm-v1")
    assert code == 2 and "pip install 'sparring[eval]'" in err and err.count("\n") == 1
    code, _, err = cli("eval", run.path, "--player", 1, "--tasks", "openllm")
    assert code == 2 and "openllm: no such file, and no suite; suites are openllm-v1, leaderboard-v2" in err


def suite_item(task: str, place: int, right: float) -> harness.SuiteItem:
    return harness.SuiteItem(task, place, f"h{place}", "", "", (), (), "", {"acc,none": right})


def suite_row(task: str, value: float, se: float | None, n: int) -> harness.SuiteRow:
    return harness.SuiteRow(task, "acc,none", value, se, n, 5, "train", "1", "")


def copied(
    run: RunView, path: Path, told: Mapping[tuple[int, str], Mapping[str, Any]] = MappingProxyType({}),
    evaluate: Mapping[str, Any] = MappingProxyType({}),
) -> RunView:  # fmt: skip
    """A copy of a run with other words in its tasks' summaries, (player, task) to what changes, and in its recipe."""
    shutil.copytree(run.path, path, symlinks=True)
    for (number, task), changes in told.items():
        file = RunView(path).folder(number) / "tasks" / task / "summary.json"
        write_json(file, read_json(file) | changes)
    config = yaml.safe_load((path / "config.yaml").read_text())
    config["evaluate"] |= evaluate
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    return RunView(path)


def test_a_suite_is_stored_and_paired(
    files: Path, own: RunView, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls = []

    def run_suite(model: Any, tokenizer: Any, suite: str, **options: Any) -> harness.SuiteResult:
        calls.append((suite, options))
        right = [1.0, 1.0, 0.0, 0.0] if len(calls) == 1 else [0.0, 1.0, 0.0, 0.0]
        items = [suite_item("arc", i, v) for i, v in enumerate(right)]
        items += [suite_item("mmlu_law", 0, 1.0), suite_item("mmlu_art", 0, 0.0)]
        columns = [suite_row("arc", sum(right) / 4, 0.2, 4), suite_row("mmlu", 0.5, None, 2)]
        return harness.SuiteResult(suite, Figure(0.5, 0.1), columns, [], items, {})

    monkeypatch.setattr(harness, "available", lambda: True)
    monkeypatch.setattr(harness, "run_suite", run_suite)
    for player in (1, 2, 1):
        code, out, err = cli(
            "eval", own.path, "--player", player, "--tasks", "openllm-v1", "--data-dir", files, "--limit", 7
        )
        assert code == 0 and "arc" in out, err
    assert len(calls) == 2 and calls[0][0] == "openllm-v1"
    assert {key: calls[0][1][key] for key in ("data_dir", "limit")} == {"data_dir": str(files), "limit": 7}
    assert own.evaluation(1)["task:openllm-v1"] == {"mean": 0.5, "se": 0.1, "n": 6}  # type: ignore[index]
    arc, mmlu = versus_players(own, 2, own, 1, task="openllm-v1")
    assert arc.gain is not None and mmlu.gain is not None
    assert (arc.key, arc.gain.mean, arc.gain.p, arc.one["n"]) == ("arc", -0.25, 1.0, 4)
    assert (mmlu.key, mmlu.one["mean"], mmlu.gain.mean, mmlu.one["n"]) == ("mmlu", 0.5, 0.0, 2)
    assert by_example(own, 2, "task:openllm-v1:arc") == {f"arc/h{i}": float(i == 1) for i in range(4)}
    assert by_example(own, 2, "task:openllm-v1") == {}
    suite = {"tasks": ["openllm-v1"], "best": "task:openllm-v1"}
    copies = [copied(own, tmp_path / name, evaluate=suite) for name in ("one", "two")]
    told = comparison(*compare(copies))
    assert "but this figure has no values by prompt that could be paired." in told and "otherwise" not in told
    columns = [copied(own, tmp_path / n, evaluate=suite | {"best": "task:openllm-v1:arc"}) for n in ("three", "four")]
    (pair,) = pairs(*compare(columns))
    assert pair.gain is not None and (pair.gain.mean, pair.why) == (0.0, "")
    rescaled = read_json(own.folder(2) / "tasks/openllm-v1/summary.json") | {"arc": {"mean": 0.0, "se": None, "n": 4}}
    other = copied(own, tmp_path / "five", {(2, "openllm-v1"): rescaled})
    assert by_example(other, 2, "task:openllm-v1:arc") == {}  # its items' mean is 0.25, the figure is not


def test_a_column_has_the_items_of_its_tasks_whatever_they_are_called() -> None:
    names = ["leaderboard_math_algebra_hard", "leaderboard_math_geometry_hard"]
    items = [suite_item(name, i, float(i)) for name in names for i in range(3)] + [
        suite_item("leaderboard_mathematics", 0, 9)
    ]
    math = replace(suite_row("leaderboard_math_hard", 1.0, None, 6), leaves=tuple(names))
    stored = json.loads(json.dumps(harness.SuiteResult("leaderboard-v2", None, [math], [], items, {}).summary()))
    found = suite_values(items, stored["columns"])["leaderboard_math_hard"]
    assert found == {f"{name}/h{i}": float(i) for name in names for i in range(3)}


def test_tasks_are_told(run: RunView, tmp_path: Path) -> None:
    """A line each in the metrics, once to every tracker whenever they were done, a column in card and report."""
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    measured = [(row["player"], row.get("task", "")) for row in lines if row["stage"] != "player"]
    assert measured[:7] == [
        (-1, ""),
        (-1, "colours"),
        (-1, "sums"),
        (0, ""),
        (0, "colours"),
        (0, "sums"),
        (0, "win_rate"),
    ]
    row = next(row for row in lines if (row["player"], row.get("task")) == (2, "sums"))
    figure = run.tasks(2)["sums"]["maj@4"]
    assert (row["maj@4"], row["maj@4_se"], row["n"], row["step"]) == (figure["mean"], figure["se"], 4, 3)
    assert not any(name.startswith("task:") for row in lines for name in row)
    told: list[dict[str, float]] = []
    (tmp_path / "track").mkdir()
    fake = SimpleNamespace(log=lambda figures, step, when: told.append(figures), close=lambda: None)
    for late in (False, True, True):
        trackers = sinks.Trackers(tmp_path, TrackConfig(to=("wandb",)), dict)
        trackers._open["wandb"] = fake
        trackers._waiting.clear()
        for row in lines:
            if late or (row["player"], row.get("task")) != (0, "sums"):
                trackers.tell(row)
    assert len(told) == len(lines) and told[-1].keys() >= {"task/sums/maj@4", "task/sums/n"}
    card = (Path(run.players[2].path) / "README.md").read_text()
    assert f"| {figure_text(figure, percent=True)} |" in card and "| sums maj@4 |" in card
    columns, players = table.rows(run, None, {})
    at = [column.key for column in columns].index("task:colours")
    gain = paired(*(by_example(run, n, "task:colours") for n in (0, 2)), shares=True)
    assert players[-1].cells[at].gain == table.told(gain, True)


def test_a_run_is_not_finished_before_its_tasks(run: RunView, tmp_path: Path) -> None:
    path = Path(shutil.copytree(run.path, tmp_path / "run", symlinks=True))
    assert RunView(path).finished
    shutil.rmtree(path / "round_001" / "tasks" / "win_rate")
    assert not RunView(path).finished


# Two players -------------------------------------------------------------------------------------------------------


def test_votes_are_those_that_the_evaluation_counted() -> None:
    """maj@4 of a 5 and three wrong 7s in other words: one party of three by number, three parties of one by text."""
    said = [("ans 5", True), ("I get 7", False), ("Hence 7", False), ("thus 7", False)]
    items = [
        Item(e, "sampled", i, text, (1,), "stop", right, (0.0,)) for e in "ab" for i, (text, right) in enumerate(said)
    ]
    fake = SimpleNamespace(
        tasks=lambda n: {
            "x": {"kind": "exact", "verifier": "number" if n == 0 else "text" if n == 1 else "./gone.py:own"}
        },
        items=lambda *_: iter(items),
        config=SimpleNamespace(evaluate=SimpleNamespace(verifier="number")),
    )
    run: Any = fake
    assert by_example(run, 0, "task:x:maj@4") == by_example(run, 0, "maj@4") == {"a": 0.0, "b": 0.0}
    assert by_example(run, 1, "task:x:maj@4") == {"a": 0.25, "b": 0.25}
    assert by_example(run, 2, "task:x:maj@4") == {} and by_example(run, 2, "task:x:pass@4") == {"a": 1.0, "b": 1.0}


@pytest.mark.parametrize(
    ("told", "figure"),
    [
        ({"temperature": 0.5}, "sums"),
        ({"max_new_tokens": 3}, "sums"),
        ({"sampled": None}, "sums"),  # told by its greedy answers then
        ({"scorer_identity": "judge.py:shorter@0"}, "win_rate"),
        ({"start": "another"}, "win_rate"),
    ],
)
def test_runs_whose_task_was_judged_otherwise_are_not_paired(
    run: RunView, tmp_path: Path, told: dict[str, Any], figure: str
) -> None:
    best = {"best": f"task:{figure}"}
    changed = {(n, figure): told for n in (0, 1, 2)}
    one, other = copied(run, tmp_path / "one", evaluate=best), copied(run, tmp_path / "two", changed, best)
    key, found = compare([one, other])
    (pair,) = pairs(key, found)
    assert (key, found[1].over_first, pair.gain) == (f"task:{figure}", None, None) and "otherwise" in pair.why
    (alike,) = pairs(*compare([one, one]))
    assert alike.gain is not None and (alike.gain.mean, alike.why) == (0.0, "")


def recorded(run: RunView, path: Path, settings: Mapping[str, Any], evaluate: Mapping[str, Any]) -> RunView:
    """A copy of a run whose evaluations have other settings in their records, and whose recipe has others."""
    copy = copied(run, path, evaluate=evaluate)
    for file in (*path.glob("*/eval/stage.json"), *path.glob("*/tasks/sums/stage.json")):
        record = read_json(file)
        write_json(file, record | {"settings": record["settings"] | settings})
    return copy


def test_judges_of_a_file_are_told_apart_by_its_content_and_engines_by_their_kind(run: RunView, tmp_path: Path) -> None:
    names = []
    for folder in ("here", "there"):
        file = tmp_path / folder / "judge.py"
        file.parent.mkdir()
        file.write_text("def right(example, answer):\n    return True\n")
        names.append({"verifier": f"{file}:right", "best": "greedy"})
    first, second = ({f"{key}.verifier": f"judge.py:right@{n}" for key in ("evaluate", "task")} for n in (1, 2))
    one = recorded(run, tmp_path / "one", first, names[0])
    moved, edited = recorded(run, tmp_path / "moved", first, names[1]), recorded(run, tmp_path / "v2", second, names[0])
    for task in (None, "sums"):
        assert {row.gain.mean for row in versus_players(one, 2, moved, 2, task=task) if row.gain} == {0.0}
        with pytest.raises(InputError, match=r"other ways \(verifier: judge.py:right@1 and judge.py:right@2\)"):
            versus_players(one, 2, edited, 2, task=task)
    same, other, _ = pairs(*compare([one, moved, edited]))
    assert (same.gain is not None, same.why, other.gain) == (True, "", None) and "otherwise" in other.why
    by_nll = [
        recorded(run, tmp_path / f"nll {i}", told, names[i] | {"best": "gold_nll"})
        for i, told in enumerate((first, second))
    ]
    (same,) = pairs(*compare(by_nll))
    assert same.gain is not None and same.gain.mean == 0.0  # which no verifier has a word in
    served = recorded(run, tmp_path / "served", first | {"evaluate.engine": "vllm"}, names[0])
    for task in (None, "sums", "win_rate"):
        with pytest.raises(InputError, match=r"other ways \(engine: hf and vllm\)"):
            versus_players(one, 2, served, 2, task=task)


def test_a_task_whose_file_has_changed_has_no_win_rate(run: RunView, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "sums.jsonl", SUMS[1:])
    copy = copied(run, tmp_path / "run", {(2, "sums"): {"file": str(file)}})
    with pytest.raises(InputError, match=rf"^{file}: has changed since player 2 did this task; evaluate it again$"):
        versus_players(copy, 2, copy, 0, task="sums", scorer=load_scorer("verifier:gsm8k"))


def test_wins_by_another_scorer_or_against_another_start_are_refused(run: RunView, tmp_path: Path) -> None:
    summary = run.tasks(2)["win_rate"]
    name = run.config.evaluate.scorer
    assert name is not None and summary["scorer_identity"] == identity(name) and "@" in identity(name)
    assert summary["start"] == run.players[0].sha and summary["max_new_tokens"] == 8
    for key, told in (("scorer_identity", "scorer"), ("start", "player 0"), ("max_new_tokens", "max_new_tokens")):
        other = copied(run, tmp_path / key, {(2, "win_rate"): {key: "x"}})
        with pytest.raises(InputError, match=rf"were evaluated in other ways \({told}: .* and x\)"):
            versus_players(run, 2, other, 2, task="win_rate")
    rates = by_example(run, 2, "task:win_rate")
    assert sum(rates.values()) / len(rates) == pytest.approx(summary["win_rate"]["mean"]) and len(rates) == summary["n"]


def test_players_are_compared_by_stored_answers(run: RunView, files: Path) -> None:
    before = records(run.path)
    rows = {row.key: row for row in versus_players(run, 2, run, 0)}
    assert {"sampled", "greedy", "gold_nll", "gold_nll_token"} == set(rows)
    nlls = [{i.example_id: -math.fsum(i.logps) for i in run.items(n) if i.kind == "gold"} for n in (2, 0)]
    gains = [nlls[0][name] - nlls[1][name] for name in nlls[0]]
    gain = rows["gold_nll"].gain
    assert gain is not None and gain.mean == pytest.approx(sum(gains) / len(gains))
    per_token = rows["gold_nll_token"].gain
    assert per_token is not None and per_token.p is None
    assert per_token.interval[0] <= per_token.mean <= per_token.interval[1]
    code, out, _ = cli("eval", run.path, "--player", "best", "--against", 0, "--tasks", "sums,colours,win_rate")
    assert code == 0 and all(word in out for word in ("maj@4", "acc_norm", "win_rate", "95 % interval"))
    asked = ["eval", run.path, "--player", 1, "--against", 0, "--tasks"]
    assert cli(*asked, files / "sums.jsonl") == cli(*asked, "sums") and cli(*asked, "sums").code == 0
    code, out, _ = cli("eval", run.path, "--player", 1, "--against", f"{run.path}:0", "--scorer", "verifier:gsm8k")
    assert code == 0 and "win_rate" in out
    assert records(run.path) == before


def test_runs_are_compared_by_the_task_that_chose(run: RunView) -> None:
    key, (row,) = compare([run])
    assert key == "task:colours:acc_norm"
    values = [by_example(run, n, key) for n in (run.best or 0, 0)]
    gains = [values[0][name] - values[1][name] for name in values[0]]
    assert len(gains) == 6
    if run.best:
        assert row.over_start is not None and row.over_start.mean == pytest.approx(sum(gains) / 6)
    assert by_example(run, 0, "task:sums") == by_example(run, 0, "task:sums:sampled") != {}
    assert set(by_example(run, 0, "task:win_rate").values()) == {0.5} and by_example(run, 0, "task:gone") == {}
    code, out, _ = cli("compare", run.path, run.path)
    assert code == 0 and "task:colours:acc_norm" in out


def test_players_of_two_runs(run: RunView, tmp_path: Path, tiny_model: Path, tiny_data: Path) -> None:
    tree = recipe(tmp_path / "other", tiny_model, tiny_data, rounds=[{"method": "spin"}])
    other = sparring.run(tree)
    found = {row.key: row for row in versus_players(run, -1, other, 0)}
    # Both are the same model, asked the same
    for row in found.values():
        assert row.one["mean"] == row.other["mean"] and row.gain is not None and row.gain.mean == 0.0
    code, out, _ = cli("eval", run.path, "--player", -1, "--against", f"{other.path}:0")
    assert code == 0 and "other: player 0" in out
    colder = sparring.run(tree | {"run": str(tmp_path / "colder")}, ["evaluate.temperature=0.5"])
    with pytest.raises(InputError, match=r"evaluated in other ways \(temperature: 1.0 and 0.5\)"):
        versus_players(run, 0, colder, 0)


def answer(name: str, text: str, right: bool | None = None) -> Item:
    return Item(name, "greedy", 0, text, (5,), "stop", right, (-1.0,))


def test_mcnemar_by_hand() -> None:
    """Ten prompts changed, eight for the better: p = 2 · 56 / 2^10."""
    outcomes = [(True, False)] * 8 + [(False, True)] * 2 + [(True, True)] * 5 + [(False, False)] * 5
    one = [answer(f"{i}", "x", mine) for i, (mine, _) in enumerate(outcomes)]
    other = [answer(f"{i}", "x", theirs) for i, (_, theirs) in enumerate(outcomes)]
    (row,) = versus(one, [*other, answer("alone", "x", True)])
    assert row.gain is not None
    assert (row.key, row.one["n"], row.gain.mean, row.gain.p) == ("greedy", 20, pytest.approx(0.3), 112 / 1024)
    assert versus(one, [answer("another", "x", True)]) == []


def test_figures_whose_votes_cannot_be_read_are_left_out() -> None:
    """As those of `math` without math-verify, which counting what is right needs no longer."""

    def unread(text: str) -> str:
        raise InputError("math-verify is not installed")

    one, other = (
        [replace(answer("q", "x", right), kind="sampled", index=i) for i in range(2)] for right in (True, False)
    )
    assert "maj@2" in {row.key for row in versus(one, other)}
    assert {row.key for row in versus(one, other, vote=unread)} == {row.key for row in versus(one, other)} - {"maj@2"}


def test_win_rate_asks_in_both_orders() -> None:
    asked: list[tuple[str, ...]] = []

    def first_wins(example: Example, answers: Any) -> list[list[float]]:
        asked.append(tuple(answers))
        return [[0.5, 0.9], [0.1, 0.5]]

    examples = {name: Example(name, (Message("user", "q"),), None) for name in "ab"}
    one, other = [answer("a", "x"), answer("b", "y")], [answer("a", "z"), answer("b", "y"), answer("c", "w")]
    # A judge that always prefers the first is worth ½; equal answers tie without being asked about
    assert win_rate(first_wins, examples, one, other) == {"a": 0.5, "b": 0.5}
    assert asked == [("x", "z"), ("z", "x")]
    judge = load_scorer("verifier:gsm8k")
    gold = {"a": Example("a", (Message("user", "q"),), "#### 1")}
    assert win_rate(judge, gold, [answer("a", "#### 1")], [answer("a", "#### 2")]) == {"a": 1.0}


# Guards ------------------------------------------------------------------------------------------------------------


def test_rows_that_are_trained_on_are_left_out(tmp_path: Path, tiny_model: Path) -> None:
    data = rows(8)
    long = "one two three four five six seven eight nine ten eleven twelve thirteen"
    trained = write_jsonl(tmp_path / "train.jsonl", [*data, {"question": f"{long} a", "answer": "#### 1"}])
    fresh = [{"question": f"{i} new?", "answer": "#### 2"} for i in range(3)]
    unlike = {"question": data[1]["question"], "answer": "another answer\n#### 5"}
    heldout = write_jsonl(
        tmp_path / "held.jsonl", [data[0], unlike, *fresh, {"question": f"{long} b", "answer": "#### 1"}]
    )
    task = write_jsonl(
        tmp_path / "seen.jsonl", [{"prompt": row["question"], "answer": "1"} for row in [*data[:2], *fresh]]
    )
    sections = {
        "data": {"heldout": str(heldout), "heldout_size": 0.05},
        "evaluate": {"limit": 10, "tasks": [str(task)]},
        "controls": {"displacement": None, "trust_region": None},
    }
    view = sparring.run(recipe(tmp_path / "run", tiny_model, trained, rounds=[{"method": "sft"}], **sections))
    summary = view.evaluation(0)
    assert summary is not None
    assert (summary["n"], summary["trained"], len(summary["trained_ids"])) == (4, 2, 2)
    ids = {item.example_id for item in view.items(0)}
    assert len(ids) == 4 and not ids & set(summary["trained_ids"])
    assert {k: summary["overlap"][k] for k in ("words", "checked", "overlap")} == {
        "words": 13,
        "checked": 1,
        "overlap": 1,
    }
    assert view.heldout[summary["overlap"]["ids"][0]].messages[0].content == f"{long} b"
    assert (view.tasks(0)["seen"]["n"], view.tasks(0)["seen"]["trained"]) == (3, 2)
    told = "\n".join(view.control_lines())
    assert "player 0: 2 items were left out: their prompts are trained on" in told
    assert "player 0: 1 of 4 items share 13 words in a row with a training prompt" in told
    assert "player 0 on seen: 2 items were left out" in told
    assert "were left out" in cli("status", view.path).out


@pytest.mark.parametrize(("trained", "prompts"), [("drop", 3), ("keep", 5)])
def test_the_guard_reads_none_that_is_trained_on_either(
    trained: str, prompts: int, tmp_path: Path, tiny_model: Path
) -> None:
    """log p(gold) of these rises where that of others falls."""
    data, fresh = rows(8), [{"question": f"{i} new?", "answer": "#### 2"} for i in range(3)]
    sections = {
        "data": {"heldout": str(write_jsonl(tmp_path / "held.jsonl", [*data[:2], *fresh])), "heldout_size": 0.05},
        "evaluate": {"trained": trained},
    }
    own = write_jsonl(tmp_path / "train.jsonl", data)
    view = sparring.run(recipe(tmp_path / "run", tiny_model, own, rounds=[{"method": "spin"}], **sections))
    assert view.rounds[0].counts["held"]["prompts"] == prompts
    other = {"drop": "keep", "keep": "drop"}[trained]
    touched = refused(view.path, f"evaluate.trained={other}")
    assert any(line.startswith("round_000/held: evaluate.trained: ") for line in touched)


def test_held_out_prompts_that_are_all_trained_on(tmp_path: Path, tiny_model: Path) -> None:
    """Few prompts with many right answers each: to measure by them or not is the user's word, never silence."""
    data = rows(8)
    trained, heldout = (write_jsonl(tmp_path / f"{name}.jsonl", data) for name in ("train", "held"))
    sections = {"data": {"heldout": str(heldout), "heldout_size": 0.05}, "evaluate": {"verifier": "gsm8k"}}
    tree = recipe(tmp_path / "run", tiny_model, trained, rounds=[{"method": "sft"}], **sections)
    with pytest.raises(InputError, match=r"evaluate\.trained: the prompts of all 4 held-out examples are trained on"):
        sparring.run(tree)
    assert not (tmp_path / "run" / "prep_000").exists() and not (tmp_path / "run" / "round_000").exists()
    view = sparring.run(tree, ["evaluate.trained=keep"])
    summary = view.evaluation(0)
    assert summary is not None and (summary["n"], summary["trained"], summary["sampled"]["n"]) == (4, 4, 4)
    assert "player 0: 4 items were kept, but their prompts are trained on" in view.control_lines()
    seen = write_jsonl(tmp_path / "seen.jsonl", [{"prompt": row["question"], "answer": "1"} for row in data[:3]])
    code, _, err = cli("eval", view.path, "--player", 0, "--tasks", seen)
    assert code == 2 and "seen.jsonl: the prompts of all its 3 items are trained on" in err and err.count("\n") == 1


def test_what_is_stored_is_json_and_told_in_status(run: RunView) -> None:
    for number in run.players:
        for summary in run.tasks(number).values():
            assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    out = cli("status", run.path).out
    assert "colours %" in out and "sums %" in out and "win_rate %" in out
