"""What is settled before a run is made: names and paths, precision, roles, provenance, and who counts as best."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

import sparring
from helpers import cli, recipe, write_jsonl, write_recipe
from rundirs import records, refused
from sparring import api, provenance, stages
from sparring.controls import best_of
from sparring.errors import InputError
from sparring.plan import Stage, first_round
from sparring.report import _machine
from sparring.rundir import RunDir
from sparring.rundir.store import read_json, write_json
from sparring.rundir.view import RunView
from sparring.types import Player

# Names and paths ------------------------------------------------------------------------------------------------------


def test_a_name_stays_a_name_where_a_folder_is_called_so(
    tiny_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("gsm8k", "spin", "sft", "plain"):
        (tmp_path / name).mkdir()
    tree = tiny_recipe | {"model": tiny_recipe["model"] | {"chat_template": "plain"}}
    made = api.prepare(tree)
    assert made.config.evaluate.verifier == "gsm8k"
    assert [r.method for r in made.config.rounds] == ["sft", "spin", "spin"]
    assert made.config.model.chat_template == "plain"
    keys = [stage.key for stage in made.plan.stages]
    (tmp_path / "plain").rmdir()
    (tmp_path / "plain").write_text("{{ messages }}")
    assert [stage.key for stage in api.prepare(tree).plan.stages] == keys


def test_paths_and_file_references_become_absolute(
    tiny_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(
        "from sparring.methods.spin import method\ndef check(example, answer):\n    return True\n"
    )
    (tmp_path / "t.jinja").write_text("{{ messages[0]['content'] }}")
    settings = ["evaluate.verifier=./own.py:check", "rounds.1.method=own.py:method", "model.chat_template=t.jinja"]
    config = api.prepare(tiny_recipe, settings).config
    assert config.evaluate.verifier == f"{tmp_path}/own.py:check"
    assert config.rounds[1].method == f"{tmp_path}/own.py:method"
    assert config.model.chat_template == f"{tmp_path}/t.jinja"


def test_a_link_keeps_its_name_and_a_model_does_not(
    tiny_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Hub's cache and DVC hold files under their hashes; a run's `best` is to be what it was when it was named."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "store").mkdir()
    data = {"train.jsonl": tiny_recipe["data"]["path"], "sums.jsonl": None}
    for number, (name, source) in enumerate(data.items()):
        blob = tmp_path / "store" / f"{number}f3a"
        blob.write_text(Path(source).read_text() if source else '{"prompt": "1 + 1?", "answer": "#### 2"}\n')
        (tmp_path / name).symlink_to(blob)
    (tmp_path / "best").symlink_to(tiny_recipe["model"]["path"])
    overrides = ["data.path=train.jsonl", "evaluate.tasks=[sums.jsonl]", "model.path=best"]
    prepared = api.prepare(tiny_recipe, overrides)
    config = prepared.config
    assert (config.data.path, config.model.path) == (f"{tmp_path}/train.jsonl", tiny_recipe["model"]["path"])
    assert [(task.path, task.label) for task in config.evaluate.tasks] == [(f"{tmp_path}/sums.jsonl", "sums")]
    assert list(prepared.plan.data.inputs) == ["train train.jsonl"]
    # Another name for a file that has its suffix is that file, also when the link moves on
    (tmp_path / "v2.jsonl").write_bytes((tmp_path / "train.jsonl").read_bytes())
    (tmp_path / "now.jsonl").symlink_to(tmp_path / "v2.jsonl")
    assert api.prepare(tiny_recipe, ["data.path=now.jsonl"]).config.data.path == f"{tmp_path}/v2.jsonl"


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["model.lora_alpha=8"], "model.lora_alpha: does nothing while model.lora_rank is 0; raise that, or set model.lora_alpha=null"),
        (["model.lora_targets=[q_proj]"], "raise that, or set model.lora_targets=all-linear"),
    ],
)  # fmt: skip
def test_adapters_settings_need_a_rank(settings: list[str], says: str, tiny_recipe: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=re.escape(says)):
        api.prepare(tiny_recipe, settings)
    api.prepare(tiny_recipe, [*settings, "model.lora_rank=2"])


# Precision ------------------------------------------------------------------------------------------------------------


def test_auto_precision_is_settled_once(tiny_recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    tree = tiny_recipe | {"model": tiny_recipe["model"] | {"device": "auto"}}
    keys = [stage.key for stage in api.prepare(tree).plan.stages]
    run = sparring.run(tree)
    assert run.config.model.compute == "float32"
    assert run.recipe["model"]["compute"] == "float32"
    before = records(run.path)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "device_count", lambda: 1)
        # Another kind of device: a new run would be bfloat16, this one stays what it was.
        new = api.prepare(tree, out=run.path.with_name("new"))
        assert new.config.model.compute == "bfloat16"
        assert [stage.key for stage in new.plan.stages][1:] != keys[1:]
        for source in (tree, run.path):
            assert [stage.key for stage in api.prepare(source).plan.stages] == keys
        assert len(api.fork(run.path, run.path.with_name("fork"))) == len(before)
    assert records(sparring.run(tree).path) == before
    touched = refused(tree, "model.compute=bfloat16")
    assert touched[0] == 'start/eval: model.compute: "float32" → "bfloat16"'


# Roles ----------------------------------------------------------------------------------------------------------------

OWN = """
import dataclasses
from sparring.methods import spin
from sparring.types import Turn

def anchored():
    return dataclasses.replace(spin.method(), name="anchored", frozen=("anchor",))

def judged():
    return dataclasses.replace(spin.method(), name="judged", plays=(Turn("judge"),))

def mixed():
    return dataclasses.replace(spin.method(), name="mixed", plays=(Turn(mixed_with="anchor", share=0.5),))

def startless():
    return dataclasses.replace(spin.method(), name="startless", roles=lambda t: {"opponent": t, "reference": t})

def roleless():
    return dataclasses.replace(spin.method(), name="roleless", roles=lambda t: {})
"""


@pytest.mark.parametrize(
    ("name", "missing", "found"),
    [
        ("anchored", "anchor", "opponent, reference, start"),
        ("judged", "judge", "opponent, reference, start"),
        ("mixed", "anchor", "opponent, reference, start"),
        ("startless", "start", "opponent, reference"),
        ("roleless", "opponent", "none"),
    ],
)
def test_a_method_that_lacks_a_role_is_refused(
    name: str, missing: str, found: str, tiny_recipe: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "own.py").write_text(OWN)
    tree = tiny_recipe | {"rounds": [{"method": f"{tmp_path}/own.py:{name}"}]}
    with pytest.raises(InputError) as caught:
        api.prepare(tree)
    assert set(str(caught.value).split("its roles are ")[1].split(", ")) == set(found.split(", "))
    assert str(caught.value).startswith(f"method `{name}`: round 0 needs the role `{missing}`; its roles are ")


def test_the_first_round_is_numbered_from_the_preparation() -> None:
    from sparring import methods

    sft, spin = methods.make("sft", {}), methods.make("spin", {})
    assert [first_round(made) for made in ([spin], [sft, spin], [sft, sft, spin, sft], [sft, sft])] == [0, -1, -2, 0]


# Provenance -----------------------------------------------------------------------------------------------------------


def test_the_git_state_is_the_packages_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        seen.append({"command": command} | options)
        return subprocess.CompletedProcess(command, 0, stdout="abc123-dirty\n", stderr="")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(shutil, "which", lambda name: f"/opt/{name}")
    assert provenance.environment()["git"] == "abc123-dirty"
    assert seen[0]["cwd"] == Path(provenance.__file__).parent
    assert seen[0]["command"][0] == "/opt/git"
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert provenance.environment()["git"] is None
    assert len(seen) == 1


def test_the_machine_is_told_by_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A report puts runs on different GPUs side by side."""
    monkeypatch.setattr(provenance, "_GPUS", tmp_path / "gpus")
    monkeypatch.setattr(provenance, "_CPUS", tmp_path / "cpuinfo")
    found = provenance.environment()
    assert (found["cpu"], found["gpus"]) == (None, None) and found["memory"].endswith(" GiB")
    (tmp_path / "cpuinfo").mkdir()  # a file that cannot be read
    assert provenance.environment()["cpu"] is None
    (tmp_path / "cpuinfo").rmdir()
    for n, name in enumerate(("NVIDIA H200", "NVIDIA H200", "NVIDIA L40S")):
        (tmp_path / "gpus" / f"0000:{n}").mkdir(parents=True)
        (tmp_path / "gpus" / f"0000:{n}" / "information").write_text(f"Model: \t\t {name}\nIRQ: 7\n")
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: AMD EPYC\nmodel name\t: other\n")
    found = provenance.environment()
    assert (found["cpu"], found["gpus"]) == ("AMD EPYC", "2 × NVIDIA H200, 1 × NVIDIA L40S")
    told = _machine(found)
    assert "gpus 2 × NVIDIA H200, 1 × NVIDIA L40S" in told and "cpu AMD EPYC" in told


# The best player ------------------------------------------------------------------------------------------------------


def test_one_held_out_prompt_has_no_error_and_still_a_best(tiny_recipe: dict[str, Any]) -> None:
    assert best_of({0: (0.5, None), 1: (0.4, None)}) == 0
    assert best_of({0: (0.5, None), 1: (0.5, 0.1)}) == 1
    assert best_of({0: (2.0, None), 1: (2.5, 0.1)}, lower_wins=True) == 0
    view = sparring.run(tiny_recipe, ["data.heldout_size=1", "evaluate.best=gold_nll"])
    means = {n: (view.evaluation(n) or {})["gold_nll"] for n in (0, 1, 2)}
    assert {figure["se"] for figure in means.values()} == {None}
    assert view.best == min(means, key=lambda n: means[n]["mean"])


def test_the_eval_stage_chooses_the_best_again(finished_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished_run, tmp_path / "run", symlinks=True)
    shutil.rmtree(run / "round_001" / "eval")
    (run / "best").unlink()
    (run / "best").symlink_to("round_000/player")
    assert RunView(run).best == 1
    assert sparring.run_stage(run, "eval", 1).best == 2


def test_best_may_be_a_model_of_the_hub(tmp_path: Path, finished_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = shutil.copytree(finished_run, tmp_path / "run", symlinks=True)
    hub = Player("owner/name", -1, "0" * 64)
    write_json(run / "start" / "player.json", {"path": hub.path, "round": hub.round, "sha": hub.sha})
    for place, path in ((tmp_path, Path("run")), (run, Path())):
        monkeypatch.chdir(place)
        RunDir(path).mark_best(hub)
        assert (run / "best").resolve() == run / "start"
        assert read_json(run / "best" / "player.json")["path"] == "owner/name"
        assert RunView(path).best == RunView(run).best == -1
        RunDir(path).mark_best(RunView(path).players[1])
        assert str((run / "best").readlink()) == "round_000/player"
        assert RunView(run).best == 1


def test_a_run_that_broke_off_has_a_best_player(
    tmp_path: Path, tiny_recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its players are evaluated, so `export --player best` has one to take."""
    whole = stages.MAKE["player"]

    def fails(shop: Any, folder: Path, *, r: Any) -> Any:
        if r.t == 1:
            raise InputError("nothing to train on")
        return whole(shop, folder, r=r)

    monkeypatch.setitem(stages.MAKE, "player", fails)
    tree = tiny_recipe | {
        "rounds": [{"method": "spin", "repeat": 2}],
        "evaluate": {"verifier": None, "best": "gold_nll", "limit": 4},
    }
    with pytest.raises(InputError, match="nothing to train on"):
        sparring.run(tree, out=tmp_path / "run")
    view = RunView(tmp_path / "run")
    assert sorted(view.players) == [0, 1]
    assert view.best is not None and view.best == view.best_player()


# The command line -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [["--rounds", "2"], ["--method", "sft"]])
def test_flags_do_not_replace_a_recipes_rounds(flags: list[str], tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    file = write_recipe(tmp_path / "recipe.yaml", tiny_recipe)
    how = "write rounds.0.repeat=… or rounds.0.method=… instead of --rounds and --method"
    assert tuple(cli("run", file, *flags)) == (2, "", f"sparring: {file}: has rounds of its own; {how}\n")
    assert not (tmp_path / "run").exists()


def test_try_reads_names_with_spaces_and_loads_a_player_once(
    finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparring import players

    loaded: list[str] = []
    load_model = players.load_model
    monkeypatch.setattr(players, "load_model", lambda path, config: loaded.append(path) or load_model(path, config))
    code, out, err = cli("try", finished_run, "--players", "2, best", "--prompt", "what is 1?", "--seed", 1)
    assert (code, err) == (0, "")
    assert loaded == [str(finished_run / "round_001" / "player")]
    assert out.count("player 2") == 1


# Evaluation's length --------------------------------------------------------------------------------------------------


def test_the_evaluations_length_is_part_of_its_identity_alone(finished_run: Path, tiny_recipe: dict[str, Any]) -> None:
    def evaluation(*settings: str) -> Stage:
        return api.prepare(tiny_recipe, settings).plan.start_eval

    assert evaluation().settings["evaluate.max_new_tokens"] == 8
    assert evaluation("evaluate.max_new_tokens=8").key == evaluation().key
    assert evaluation("rounds.1.play={max_new_tokens: [8, 9]}").settings["evaluate.max_new_tokens"] == 9
    assert refused(finished_run, "evaluate.max_new_tokens=5") == [
        f"{folder}/eval: evaluate.max_new_tokens: 8 → 5" for folder in ("start", "prep_000", "round_000", "round_001")
    ]


def test_evaluations_answers_are_as_long_as_the_rounds_are(tiny_model: Path, tmp_path: Path) -> None:
    rows = [{"question": f"q{i}?", "answer": f"{i}\n#### {i}"} for i in range(8)]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    # 256 tokens, the default of `play`, would leave no room in the model's context of 256.
    tree = recipe(tmp_path / "run", tiny_model, data, rounds=[{"method": "spin", "play": {"max_new_tokens": 6}}])
    del tree["play"]["max_new_tokens"]
    view = sparring.run(tree)
    lengths = {len(item.tokens) for item in view.items(1) if item.kind != "gold"}
    assert max(lengths) == 6
    assert (
        json.loads((view.path / "start" / "eval" / "stage.json").read_text())["settings"]["evaluate.max_new_tokens"]
        == 6
    )
