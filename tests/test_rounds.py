"""What a recipe may say of a round, and what it must not silently come to: roles, given answers, limits, judges."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import sparring
from helpers import character_tokenizer, cli, recipe, rows, write_jsonl, write_model, write_recipe
from sparring import api
from sparring.compare import compare
from sparring.rundir.view import RunView


def preferences(path: Path, n: int = 12) -> Path:
    """Sums with a right and a wrong answer."""
    made = [{"prompt": r["question"], "chosen": r["answer"], "rejected": "no idea"} for r in rows(n)]
    return write_jsonl(path, made)


@pytest.mark.parametrize(
    ("entry", "taken"),
    [
        ({"method": "spin"}, True),
        ({"method": "dpo", "pairs": "gold"}, True),
        ({"method": "upft"}, False),
        ({"method": "nash_md", "scorer": "verifier:number"}, False),
        ({"method": "kto", "answers": "verified", "verifier": "number"}, False),
    ],
)
def test_answers_that_came_with_the_data_are_no_ones_own(
    entry: dict[str, Any], taken: bool, tmp_path: Path, tiny_model: Path
) -> None:
    """A rejected answer may stand in for the opponent's, but never be rewarded as the player's own."""
    data = preferences(tmp_path / "data.jsonl")
    path = write_recipe(tmp_path / "r.yaml", recipe(tmp_path / "run", tiny_model, data, rounds=[entry]))
    prepared = api.prepare(path)
    assert prepared.plan.rounds[0].method.takes_given is taken
    cli("run", path)
    samples = RunView(tmp_path / "run").rounds[0].rows("samples", sparring.Sample)
    assert {sample.settings_id == "off-policy" for sample in samples} == {taken}


def test_initial_is_one_player_in_every_preparation_round(tmp_path: Path, tiny_model: Path) -> None:
    data = preferences(tmp_path / "data.jsonl")
    rounds = [{"method": "dpo", "repeat": 2, "reference": "initial"}, {"method": "spin"}]
    plan = api.prepare(recipe(tmp_path / "run", tiny_model, data, rounds=rounds)).plan
    assert [r.roles["reference"] for r in plan.rounds] == [-2, -2, 0]


def test_best_waits_for_evaluations(tmp_path: Path, tiny_model: Path, tiny_data: Path) -> None:
    """Stages one by one: `best` must not be resolved from what happens to be on disk."""
    tree = recipe(
        tmp_path / "run", tiny_model, tiny_data, rounds=[{"method": "spin", "repeat": 2, "reference": "best"}]
    )
    sparring.run(tree | {"rounds": [{"method": "spin", "reference": "best"}]})
    run = tmp_path / "run"
    for file in sorted((run / "round_000" / "eval").iterdir()):
        file.unlink()
    (run / "round_000" / "eval").rmdir()
    (run / "config.yaml").write_text(
        (run / "config.yaml").read_text().replace("method: spin", "method: spin\n  repeat: 2")
    )
    code, _, err = cli("play", run, "--round", 1)
    assert code == 2 and "is `best`, but a player is not evaluated yet" in err


def test_the_start_is_measured_where_the_best_is_asked_for(tmp_path: Path, tiny_model: Path, tiny_data: Path) -> None:
    """Stages one by one: the start's evaluation is none of any round's."""
    task = write_jsonl(tmp_path / "sums.jsonl", [{"prompt": "1 + 1?", "answer": "#### 2"}])
    tree = recipe(tmp_path / "run", tiny_model, tiny_data, rounds=[{"method": "spin", "reference": "best"}])
    tree["evaluate"] |= {"tasks": [str(task)], "best": "task:sums"}
    sparring.run(tree)
    sparring.fork(tmp_path / "run", tmp_path / "new", ["seed=1"])
    code, _, err = cli("play", tmp_path / "new", "--round", 0)
    assert code == 0, err
    done = sorted(str(f.parent.relative_to(tmp_path / "new")) for f in (tmp_path / "new").rglob("stage.json"))
    assert done == ["data", "round_000/samples", "start/eval", "start/tasks/sums"]


def test_a_base_before_preparation_is_not_measured_for_a_round(
    tmp_path: Path, tiny_model: Path, tiny_data: Path
) -> None:
    """It is no candidate for the best once there is a player 0."""
    rounds = [{"method": "sft"}, {"method": "spin", "reference": "best"}]
    sparring.run(recipe(tmp_path / "run", tiny_model, tiny_data, rounds=rounds))
    shutil.rmtree(tmp_path / "run" / "start" / "eval")
    shutil.rmtree(tmp_path / "run" / "round_000" / "groups")
    assert cli("pair", tmp_path / "run", "--round", 0).code == 0
    assert not (tmp_path / "run" / "start" / "eval").exists()


def test_activations_that_cannot_be_recomputed_are_told_before_a_round(
    tmp_path: Path, tiny_model: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaForCausalLM

    monkeypatch.setattr(LlamaForCausalLM, "supports_gradient_checkpointing", False)
    tree = recipe(tmp_path / "run", tiny_model, tiny_data, train={"gradient_checkpointing": True})
    code, _, err = cli("run", write_recipe(tmp_path / "r.yaml", tree))
    says = "train.gradient_checkpointing: LlamaForCausalLM cannot recompute activations; set it to false"
    assert code == 2 and says in err
    assert not list((tmp_path / "run").glob("*/samples*"))


def test_a_role_with_another_tokenizer_is_refused(tmp_path: Path, tiny_model: Path, tiny_data: Path) -> None:
    tokenizer = character_tokenizer()
    tokenizer.add_tokens(["other"])
    other = write_model(tmp_path / "other", tokenizer=tokenizer)
    tree = recipe(tmp_path / "run", tiny_model, tiny_data, rounds=[{"method": "spin", "reference": str(other)}])
    code, _, err = cli("run", write_recipe(tmp_path / "r.yaml", tree))
    assert code == 2 and "has another tokenizer than model.path" in err


def test_more_sft_is_not_stopped_for_not_helping(tmp_path: Path, tiny_model: Path, tiny_data: Path) -> None:
    tree = recipe(tmp_path / "run", tiny_model, tiny_data, rounds=[{"method": "sft", "repeat": 4}])
    tree["evaluate"] |= {"best": "gold_nll"}
    tree["train"] |= {"lr": 1.0, "clip": 0.0}  # every round is worse than the one before
    view = sparring.run(tree | {"controls": {"patience": 1}})
    assert sorted(view.players) == [0, 1, 2, 3, 4]


def test_runs_judged_differently_are_not_subtracted(tmp_path: Path, tiny_model: Path, tiny_data: Path) -> None:
    one = sparring.run(recipe(tmp_path / "one", tiny_model, tiny_data, rounds=[{"method": "spin"}]))
    other = recipe(tmp_path / "two", tiny_model, tiny_data, rounds=[{"method": "spin"}])
    other["evaluate"] |= {"verifier": "number"}
    assert compare([one, sparring.run(other)])[1][1].over_first is None


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ({"method": "exspin", "verifier": "gms8k"}, "verifier `gms8k`: unknown; the nearest is `gsm8k`"),
        ({"method": "sppo", "scorer": "verifier:gms8k"}, "the nearest is `gsm8k`"),
        ({"method": "spin", "reference": "pervious"}, "rounds: role `pervious`"),
        ({"method": "sft", "reference": "initial"}, "method `sft` has no role `reference`"),
    ],
)
def test_a_wrong_name_is_told_before_anything_is_played(
    entry: dict[str, Any], says: str, tmp_path: Path, tiny_model: Path, tiny_data: Path
) -> None:
    tree = recipe(tmp_path / "run", tiny_model, tiny_data, rounds=[entry])
    code, _, err = cli("run", write_recipe(tmp_path / "r.yaml", tree))
    assert code == 2 and says in err and len(err.splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"method": "sera", "repeat": 2}, {"method": "tpaw"}),
        ({"method": "dnpo"}, {"method": "spin", "memory": 1}),
        ({"method": "spin"}, {"method": "drift", "memory": 1}),
    ],
)
def test_groups_of_another_kind_are_not_trained_on_again(
    before: dict[str, Any], after: dict[str, Any], tmp_path: Path, tiny_model: Path, tiny_data: Path
) -> None:
    """SeRA's have no preferred answer before it selects, DNPO's may prefer the player's own."""
    tree = recipe(tmp_path / "run", tiny_model, tiny_data, rounds=[before, after])
    code, _, err = cli("run", write_recipe(tmp_path / "r.yaml", tree))
    says = f"would train again on the groups of round {before.get('repeat', 1) - 1}, which `{before['method']}` made"
    assert code == 2 and says in err and len(err.splitlines()) == 1
    alike = recipe(tmp_path / "run", tiny_model, tiny_data, rounds=[{"method": "alpha_spin"}, {"method": "tpaw"}])
    assert api.prepare(alike).plan.rounds[1].stage("groups").inputs.keys() >= {"round_000/groups"}


@pytest.mark.parametrize(
    ("evaluate", "says"),
    [
        ({"best": "sampled"}, "give evaluate.verifier, or choose by gold_nll or last"),
        ({"best": "greedy"}, "give evaluate.verifier, or choose by gold_nll or last"),
        ({"best": "sampled", "verifier": "number", "samples": 0}, "set it to 1 or more, or choose by greedy"),
    ],
)
def test_the_best_is_chosen_by_what_is_measured(
    evaluate: dict[str, Any], says: str, tmp_path: Path, tiny_model: Path, tiny_data: Path
) -> None:
    """Else no player would have that figure, and the last one would be the best in its name."""
    tree = recipe(tmp_path / "run", tiny_model, tiny_data, rounds=[{"method": "spin"}])
    tree["evaluate"] = evaluate
    code, _, err = cli("run", write_recipe(tmp_path / "r.yaml", tree))
    assert code == 2 and says in err and len(err.splitlines()) == 1
    tree["evaluate"] = evaluate | {"verifier": "number", "samples": 1}
    assert api.prepare(tree).config.evaluate.best == evaluate["best"]


def test_a_verifier_that_judges_nothing_is_named(tmp_path: Path, tiny_model: Path) -> None:
    data = write_jsonl(tmp_path / "d.jsonl", [{"prompt": f"say {i}", "completion": "yes"} for i in range(12)])
    tree = recipe(tmp_path / "run", tiny_model, data, rounds=[{"method": "exspin", "verifier": "gsm8k"}])
    code, _, err = cli("run", write_recipe(tmp_path / "r.yaml", tree))
    assert code == 1 and "the verifier can judge none of them" in err


def test_no_verifier_where_a_method_may_do_without(tmp_path: Path, tiny_model: Path, tiny_data: Path) -> None:
    tree = recipe(tmp_path / "run", tiny_model, tiny_data, rounds=[{"method": "dnpo", "verifier": None}])
    assert api.prepare(tree).plan.rounds[0].method.verifier is None


def test_paths_in_a_list_of_rounds_are_made_absolute(
    tmp_path: Path, tiny_model: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other").symlink_to(tiny_model)
    monkeypatch.chdir(tmp_path)
    entry = {"method": "spin", "repeat": 2, "reference": ["previous", "./other"]}
    view = sparring.run(recipe(tmp_path / "run", tiny_model, tiny_data, rounds=[entry]))
    assert view.recipe["rounds"][0]["reference"] == ["previous", str(tiny_model.resolve())]
    recorded = json.loads((view.rounds[1].path / "roles.json").read_text())
    assert recorded["reference"]["sha"] == view.players[0].sha


def test_official_pairs_longer_than_the_model_are_refused_before_play(
    tmp_path: Path, tiny_model: Path, tiny_data: Path
) -> None:
    tree = recipe(tmp_path / "run", tiny_model, tiny_data, rounds=[{"method": "spin_official"}])
    code, _, err = cli("run", write_recipe(tmp_path / "r.yaml", tree))
    assert code == 2 and "max_length: 1024 is more than the model's context of 256" in err
    assert not (tmp_path / "run" / "round_000" / "samples").exists()


def test_official_questions_longer_than_the_model_are_refused_before_play(tmp_path: Path, tiny_model: Path) -> None:
    """The released code cuts pairs, but what is played is the whole question."""
    told = [*rows(11), {"prompt": "say " + "so " * 90, "completion": "so", "id": "long"}]
    data = write_jsonl(tmp_path / "rows.jsonl", told)
    entry = {"method": "spin_official", "max_length": 200, "max_prompt_length": 100}
    tree = recipe(tmp_path / "run", tiny_model, data, rounds=[entry])
    tree["data"] |= {"long_prompt": "keep_end", "heldout_size": 0}
    code, _, err = cli("run", write_recipe(tmp_path / "r.yaml", tree))
    assert code == 2 and "rows.jsonl:12: its question of" in err
    assert "and the released code cuts no question; lower play.max_new_tokens" in err
    assert not list((tmp_path / "run" / "round_000").glob("samples/*"))
