"""Runs whose players are cut over processes: rows are those of whole players, and what needs whole ones is refused."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import sparring
from completions_server import Server
from helpers import cli, recipe, write_jsonl, write_recipe
from rundirs import records
from sparring import api
from sparring.errors import InputError
from sparring.evaluate import Item
from sparring.progress import Live, Progress
from sparring.rundir.store import Rows, read_json
from sparring.sharing import Step, steps
from sparring.types import Frozen, Group, Sample
from test_crew import Program, check_same
from test_engines import no_network, own_server, serve  # noqa: F401 -- fixtures: loopback is allowed

SUMS = [{"prompt": f"what is {n} + 1?", "answer": f"{n + 1}"} for n in (40, 41)]
COLOURS = [{"prompt": f"{i} is", "choices": ["red", "a very dark blue", "go"], "label": i % 3} for i in range(4)]


@pytest.fixture
def tree(
    tmp_path: Path,
    tiny_model: Path,
    tiny_data: Path,
    serve: Callable[..., Server],  # noqa: F811
) -> Callable[..., dict[str, Any]]:
    """A round of SPIN in float64 that is sampled at a server, also for the guard, the evaluation and a task."""
    tasks = [write_jsonl(tmp_path / "sums.jsonl", SUMS), write_jsonl(tmp_path / "colours.jsonl", COLOURS)]

    def made(name: str, **cluster: Any) -> dict[str, Any]:
        run = tmp_path / name / "run"

        def served() -> dict[str, Path]:
            found = {0: tiny_model} | {t + 1: run / f"round_00{t}" / "player" for t in (0, 1)}
            return {f"player {n}": folder for n, folder in found.items() if folder.exists()}

        url = serve(served).url
        given = recipe(
            run, tiny_model, tiny_data, rounds=[{"method": "spin"}],
            play={"engine": url, "temperature": 1.5}, engine={"model": "player {player}", "parallel": 4},
            evaluate={"engine": url, "tasks": list(map(str, tasks))}, cluster=cluster,
        )  # fmt: skip
        given["model"] |= {"compute": "float64"}
        (tmp_path / name).mkdir()
        return given

    return made


def check_rows(run: Path, other: Path) -> None:
    """All that was measured and scored, bit for bit where nothing was trained before."""
    check_same(run, other)
    for name, row_type in (("groups", Group), ("frozen", Frozen), ("answers", Sample)):
        one, two = (list(Rows(path / "round_000" / "held" / name, row_type)) for path in (run, other))  # type: ignore[var-annotated]
        assert one == two and len(one) == 4
    for folder, n in (("eval", 12), ("tasks/sums", 4), ("tasks/colours", 12)):
        one, two = (list(Rows(path / "start" / folder, Item)) for path in (run, other))
        assert one == two and len(one) == n, folder
        for place in ("start", "round_000"):
            one, two = (read_json(path / place / folder / "summary.json") for path in (run, other))
            assert one == two if place == "start" else one.keys() == two.keys()
    for stage in ("samples", "held", "frozen", "eval"):
        one, two = (read_json(path / "round_000" / stage / "stage.json")["counts"] for path in (run, other))
        assert one == pytest.approx(two, rel=1e-6), stage


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> dict[str, Live]:
    """Stage to what its progress said at its end."""
    found: dict[str, Live] = {}
    stop = Progress._stop

    def noted(self: Progress) -> None:
        found[self.live.stage] = self.live
        stop(self)

    monkeypatch.setattr(Progress, "_stop", noted)
    return found


@pytest.fixture
def alone(told: dict[str, Live], tree: Callable[..., dict[str, Any]]) -> Path:
    """The run by one process."""
    run = sparring.run(tree("alone")).path
    # Answers, gold ones with them; the guard's, and the scores of two completions each at two temperatures
    done = {"start/eval": 4 * 3, "start/tasks/sums": 2 * 2, "round_000/held": 4 * 5, "round_000/samples": 12}
    assert {stage: (told[stage].done, told[stage].total) for stage in done} == {s: (n, n) for s, n in done.items()}
    return run


def test_an_engine_measures_players_too(alone: Path, tree: Callable[..., dict[str, Any]]) -> None:
    """What the server answers greedily is what the built-in engine does; gold log-probs are ours, to the bit."""
    given = tree("built-in")
    given["play"] |= {"engine": "hf"}
    given["evaluate"] |= {"engine": "hf"}
    own = sparring.run(given).path
    for folder, n in (("eval", 12), ("tasks/sums", 4)):
        served, ours = ({(i.kind, i.example_id): i for i in Rows(run / "start" / folder, Item)} for run in (alone, own))
        assert served.keys() == ours.keys() and len(served) == n
        for kind, name in served:
            one, two = served[kind, name], ours[kind, name]
            assert kind == "sampled" or (one.tokens, one.text, one.right) == (two.tokens, two.text, two.right)
            assert kind != "gold" or one == two
            assert one.logps != () and len(one.logps) == len(one.tokens)
        summary, other = (read_json(run / "start" / folder / "summary.json") for run in (alone, own))
        assert summary.keys() == other.keys()
        assert all(summary[key] == other[key] for key in ("n", "gold_nll", "gold_nll_token", "greedy", "gold_cut"))
    assert Rows(alone / "start" / "tasks" / "colours", Item)[:] == Rows(own / "start" / "tasks" / "colours", Item)[:]
    # Answers that the guard reads are the server's, and scored by us
    held, built = (Rows(run / "round_000" / "held" / "groups", Group)[:] for run in (alone, own))
    assert [g.completions[0] for g in held] == [g.completions[0] for g in built]
    assert {s.settings_id[-7:] for s in Rows(alone / "round_000" / "held" / "answers", Sample)} == {"-server"}


def test_who_measures_is_part_of_what_was_measured(tree: Callable[..., dict[str, Any]]) -> None:
    given = tree("run")

    def keys(*overrides: str) -> dict[str, str]:
        return {stage.folder: stage.key for stage in api.prepare(given, overrides).plan.stages}

    before, other = keys(), keys("evaluate.engine=hf")
    differ = {folder for folder in before if before[folder] != other[folder]}
    # The player depends on the guard's answers, and colours are only scored; of player 1 it depends on the player
    assert {"start/eval", "start/tasks/sums", "round_000/held", "round_000/player"} < differ
    assert not {"start/tasks/colours", "round_000/samples", "round_000/frozen"} & differ
    assert keys("evaluate.engine=http://elsewhere/v1") == before
    assert keys("cluster.players=sharded", "cluster.processes=3") == before
    vllm = keys("evaluate.engine=vllm")
    assert vllm["start/eval"] not in (before["start/eval"], other["start/eval"])
    assert keys("evaluate.engine=vllm", "engine.arguments=[x]")["start/eval"] != vllm["start/eval"]


@pytest.mark.slow
def test_two_processes_with_half_a_player_each_are_one(
    alone: Path, tree: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    given = tree("two", processes=2, players="sharded")
    program = Program(given, tmp_path)
    assert program.end() == 0, program.said()
    check_rows(Path(given["run"]), alone)


@pytest.mark.cluster
def test_a_lost_process_ends_it_and_whole_players_go_on(
    alone: Path, tree: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    given = tree("lost", processes=2, players="sharded")
    run = Path(given["run"])
    program = Program(given, tmp_path)
    program.wait_for(lambda: list((run / "round_000" / "frozen.partial").rglob("*.parquet")))
    os.kill(program.members[1], signal.SIGKILL)
    assert program.end() == 1
    (line,) = program.said().splitlines()
    assert "process 1 of 2 was killed (SIGKILL); nothing written is lost" in line
    done = records(run)
    sparring.run(given, ["cluster.processes=1", "cluster.players=whole"])
    assert {folder: records(run)[folder] for folder in done} == done
    check_rows(run, alone)


@pytest.mark.slow
def test_four_processes_share_adapters_too(tree: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    both = [tree("one"), tree("four", processes=4, players="sharded")]
    for given in both:
        given["model"] |= {"lora_rank": 2}
        given["rounds"] = [{"method": "spin", "repeat": 2}]
        given["evaluate"] |= {"tasks": []}
    one = sparring.run(both[0]).path
    program = Program(both[1], tmp_path)
    assert program.end() == 0, program.said()
    check_same(Path(both[1]["run"]), one)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["play.engine=hf"], "and round_000 is to be played by hf; set play.engine: vllm with engine.tensor_parallel, or"),
        (["evaluate.engine=hf"], "and in start/eval hf is to answer; set evaluate.engine: vllm with"),
        (["rounds=[{method: dnpo}]"], "and dnpo keeps a whole one beside the learner (round_000); set cluster.players=whole"),
    ],
)  # fmt: skip
def test_what_needs_whole_players_is_refused_at_once(
    given: list[str], told: str, tree: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    sharded = tree("run", processes=2, players="sharded")
    code, out, err = cli("run", write_recipe(tmp_path / "r.yaml", sharded), *given)
    assert code == 2 and not out and err.count("\n") == 1
    assert err.startswith("sparring: cluster.players: sharded players only score, ") and told in err
    assert not Path(sharded["run"]).exists()


def test_a_suite_needs_whole_players(tree: Callable[..., dict[str, Any]]) -> None:
    from sparring.config import TaskConfig
    from sparring.play.engines import check

    prepared = api.prepare(tree("run", processes=2, players="sharded"))
    suite = prepared.config.evaluate.model_copy(update={"tasks": (TaskConfig(path="arc", name="sums"),)})
    with pytest.raises(InputError, match=r"and the suite `sums` needs a whole one; leave it out of evaluate.tasks"):
        check(prepared.config.model_copy(update={"evaluate": suite}), prepared.plan, lambda stage: False)


def test_one_process_has_nothing_to_cut(tree: Callable[..., dict[str, Any]]) -> None:
    given = tree("run", processes=1, players="sharded")
    config = api.prepare(given, ["play.engine=hf", "evaluate.engine=hf"]).config
    assert not config.cluster.sharded
    code, _, err = cli("run", "--model", "m", "--data", "d", "cluster.players=half")
    assert code == 2 and "cluster.players: must be" in err


def test_the_steps_of_a_stage(tree: Callable[..., dict[str, Any]]) -> None:
    """Who takes part in what: an engine is one process's, scoring all's where players are cut."""
    prepared = api.prepare(tree("run", processes=2, players="sharded"))
    whole = prepared.config.cluster.model_copy(update={"players": "whole"})
    r = prepared.plan.rounds[0]

    def told(config: Any) -> dict[str, Any]:
        return {stage.name: steps(config, stage, r) for stage in r.stages if stage.name != "groups"}

    alone, all_cut = Step("play", False), Step("score", True, True)
    engines = dict.fromkeys(("samples", "held", "eval", "task"), (alone, all_cut))
    assert told(prepared.config) == engines | {"frozen": (Step("", True, True),), "player": (Step("", True),)}
    by_one = dict.fromkeys(("samples", "held", "task"), (alone, Step("score", False)))
    by_all = {"eval": (alone, Step("score", True)), "frozen": (Step("", True),), "player": (Step("", True),)}
    assert told(prepared.config.model_copy(update={"cluster": whole})) == by_one | by_all


@pytest.mark.slow
def test_vllm_is_there_for_as_long_as_it_samples(
    tree: Callable[..., dict[str, Any]],
    tmp_path: Path,
    own_server: str,  # noqa: F811
) -> None:
    """The tests' server stands where vLLM's does; it is started for each stage that samples, in float32."""
    given = tree("vllm", processes=2, players="sharded")
    given["play"] |= {"engine": "vllm"}
    given["evaluate"] |= {"engine": "vllm", "tasks": []}
    given["engine"] = {"python": own_server}
    given["model"] |= {"compute": "float32"}
    program = Program(given, tmp_path)
    assert program.end() == 0, program.said()
    run = Path(given["run"])
    logs = {str(path.parent.relative_to(run)) for path in run.rglob("vllm_0.log")}
    assert logs == {"start/eval", "round_000/samples", "round_000/held", "round_000/eval"}
    assert read_json(run / "round_000" / "samples" / "engine_gap.json")["engine_gap_max"] < 1e-5
    assert len(Rows(run / "round_000" / "eval", Item)) == 4 * 3
