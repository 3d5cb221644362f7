"""The loop's data flow on a tiny run: who is frozen, what is trained on, what is replayed, what is given."""

from __future__ import annotations

import gc
import json
import math
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

import sparring
from helpers import character_tokenizer, recipe, write_jsonl, write_model
from sparring import api, players, preview
from sparring.config import ModelConfig
from sparring.controls import best_of
from sparring.errors import InputError, SparringError
from sparring.logps import score
from sparring.rundir import RunDir
from sparring.rundir.store import Rows
from sparring.rundir.view import RunView
from sparring.types import Frozen, Group, Message, Sample
from sparring.workshop import Workshop


def rescored(view: RunView, number: int, groups: list[Group]) -> list[tuple[tuple[float, ...], ...]]:
    """Per-token log-probs of groups under a player, loaded from its folder."""
    model = players.load_model(view.players[number].path, ModelConfig(device="cpu"))
    lines = [[score(model, [g.prompt], [c], batch_size=1)[0] for c in g.completions] for g in groups]
    return [tuple(line) for line in lines]


def close(one: tuple[tuple[float, ...], ...], two: tuple[tuple[float, ...], ...]) -> bool:
    flat_one, flat_two = ([x for line in lines for x in line] for lines in (one, two))
    return flat_one == pytest.approx(flat_two, abs=1e-5)


def test_every_round_starts_at_log_2_against_its_own_opponent(finished_run: Path) -> None:
    view = RunView(finished_run)
    assert [(r.t, r.method) for r in view.rounds] == [(-1, "sft"), (0, "spin"), (1, "spin")]
    for r in view.rounds[1:]:
        assert {role: player.round for role, player in r.roles.items()} == {
            "opponent": r.t,
            "reference": r.t,
            "start": r.t,
        }
        assert {player.sha for player in r.roles.values()} == {view.players[r.t].sha}
        assert r.log[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert {s.player for s in r.rows("samples", Sample)} == {view.players[r.t].sha}
        groups, frozen = list(r.rows("groups", Group)), list(r.rows("frozen", Frozen))
        assert [f.group for f in frozen] == [g.sha for g in groups]
        for row, expected in zip(frozen, rescored(view, r.t, groups), strict=True):
            assert close(row.logps, expected)


def test_samples_carry_the_players_own_log_probs(finished_run: Path) -> None:
    """What the sampler kept equals teacher forcing on the same tokens."""
    view = RunView(finished_run)
    r = view.rounds[1]
    prompts = {g.example_id: g.prompt for g in r.rows("groups", Group)}
    model = players.load_model(view.players[0].path, ModelConfig(device="cpu"))
    for sample in r.rows("samples", Sample):
        again = score(model, [prompts[sample.example_id]], [sample.tokens], batch_size=1)[0]
        assert list(sample.logps) == pytest.approx(list(again), abs=1e-5)


def test_per_round_lists_reach_their_round(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    rounds = [
        {
            "method": "spin",
            "repeat": 2,
            "beta": [0.5, 2.0],
            "train": {"lr": [1e-3, 1e-4], "warmup": 0.0, "schedule": "constant"},
        }
    ]
    view = sparring.run(recipe(tmp_path / "run", tiny_model, tiny_data, rounds=rounds))
    assert [r.hyper["beta"] for r in view.rounds] == [0.5, 2.0]
    assert [{row["lr"] for row in r.log} for r in view.rounds] == [{1e-3}, {1e-4}]
    assert sorted(view.players) == [0, 1, 2]
    assert view.players[0].path == str(tiny_model)


def test_memory_replays_the_last_round_against_this_rounds_opponent(
    tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    rounds = [{"method": "spin", "repeat": 3, "memory": 1, "memory_weight": 0.5, "train": {"lr": 1e-2}}]
    view = sparring.run(recipe(tmp_path / "run", tiny_model, tiny_data, rounds=rounds))
    own = {r.t: [g for g in r.rows("groups", Group) if g.origin_round == r.t] for r in view.rounds}
    for r in view.rounds:
        groups = list(r.rows("groups", Group))
        old = [g for g in groups if g.origin_round != r.t]
        # Only the round before: what that one replayed itself is not passed on.
        assert [g.sha for g in old] == [g.sha for g in own.get(r.t - 1, [])]
        assert {g.weight for g in old} <= {0.5}
        assert r.counts["groups"]["replayed"] == len(old)
        for row, expected in zip(r.rows("frozen", Frozen), rescored(view, r.t, groups), strict=True):
            assert close(row.logps, expected)
    # With another opponent than the one that answered, old pairs start with a margin.
    assert len(own[0]) == 12


def with_generated(path: Path) -> Path:
    return write_jsonl(
        path,
        [
            {
                "real": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"it is {i}"}],
                "generated": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"is {i} it"}],
            }
            for i in range(10, 22)
        ],
    )


def test_answers_that_came_with_the_data_are_round_0s_samples(tiny_model: Path, tmp_path: Path) -> None:
    data = with_generated(tmp_path / "spin.jsonl")
    tree = recipe(
        tmp_path / "run", tiny_model, data, rounds=[{"method": "spin", "repeat": 2}], evaluate={"verifier": None}
    )
    view = sparring.run(tree)
    first, second = view.rounds
    given = list(first.rows("samples", Sample))
    assert {s.player for s in given} == {"unknown"}
    assert {s.settings_id for s in given} == {"off-policy"}
    assert all(s.text.startswith("is ") and s.text.endswith(" it") and s.finish == "stop" for s in given)
    assert first.counts["samples"]["off_policy"] == len(given) == 8
    model = players.load_model(str(tiny_model), ModelConfig(device="cpu"))
    prompts = {g.example_id: g.prompt for g in first.rows("groups", Group)}
    for sample in given:  # rescored by player 0, as nobody knows who wrote them
        again = score(model, [prompts[sample.example_id]], [sample.tokens], batch_size=1)[0]
        assert list(sample.logps) == pytest.approx(list(again), abs=1e-5)
    assert {s.player for s in second.rows("samples", Sample)} == {view.players[1].sha}
    assert view.rounds[1].counts["samples"]["off_policy"] == 0


def test_gold_only_leaves_them_out(tiny_model: Path, tmp_path: Path) -> None:
    data = with_generated(tmp_path / "spin.jsonl")
    tree = recipe(
        tmp_path / "run",
        tiny_model,
        data,
        rounds=[{"method": "spin"}],
        data={"gold_only": True},
        evaluate={"verifier": None},
    )
    view = sparring.run(tree)
    assert {s.player for s in view.rounds[0].rows("samples", Sample)} == {view.players[0].sha}


def test_nothing_of_a_run_stays_in_memory(
    tiny_model: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the model that was used last, though whoever started the run keeps its workshop."""
    shops: list[Workshop] = []
    models: list[weakref.ref[Any]] = []
    read = Workshop._read

    def noted(self: Workshop, path: str, config: Any) -> Any:
        model = read(self, path, config)
        models.append(weakref.ref(model))
        shops.append(self)
        return model

    monkeypatch.setattr(Workshop, "_read", noted)
    sparring.run(recipe(tmp_path / "run", tiny_model, tiny_data, rounds=[{"method": "sft"}]))
    gc.collect()
    assert models and not any(model() for model in models)
    gone = [weakref.ref(shop) for shop in shops]
    shops.clear()
    gc.collect()
    assert not any(shop() for shop in gone)


def test_a_workshop_that_has_read_its_data_goes_at_once(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    """One that is made aside holds a whole base, which must not wait for Python's collector."""
    path = sparring.run(recipe(tmp_path / "run", tiny_model, tiny_data, rounds=[{"method": "sft"}])).path
    found = api.prepare(path)
    shop = Workshop(RunDir(path), found.config, found.plan, found.start)
    asked = [("train", longest, 3) for longest in (8, 9, 10, 11, 12)]
    first = [shop.rendered(*how) for how in asked]
    assert all(len(rendering.rows) == 3 for rendering in first)
    assert [shop.rendered(*how) is known for how, known in zip(asked[1:], first[1:], strict=True)] == [True] * 4
    assert shop.rendered(*asked[0]) is not first[0]  # the last four are kept
    gc.disable()
    try:
        gone = weakref.ref(shop)
        del shop
        assert gone() is None
    finally:
        gc.enable()


def test_limit_takes_the_first_examples_of_the_shuffle(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    rounds = [{"method": "sft"}, {"method": "spin", "limit": 5, "play": {"samples": 3}, "duplicates": "drop"}]
    view = sparring.run(recipe(tmp_path / "run", tiny_model, tiny_data, rounds=rounds))
    order = list(view.examples)
    assert [g.example_id for g in view.rounds[0].rows("groups", Group)] == order
    samples = list(view.rounds[1].rows("samples", Sample))
    assert sorted({s.example_id for s in samples}, key=order.index) == order[:5]
    assert [sum(s.example_id == name for s in samples) for name in order[:5]] == [3] * 5
    assert {s.index for s in samples} == {0, 1, 2}


def test_nothing_left_to_train_on_is_an_error_not_a_silent_round(
    tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    own = tmp_path / "none.py"
    own.write_text(
        "import dataclasses\n"
        "from sparring.methods import spin\n"
        "from sparring.types import Paired\n"
        "def method(*, beta: float = 0.1):\n"
        "    plain = spin.method(beta=beta)\n"
        "    return dataclasses.replace(plain, groups=lambda played: Paired([], {'identical': len(played.samples)}))\n"
    )
    with pytest.raises(
        SparringError, match=r"nothing to train on: of 12 samples all were dropped \(\{'identical': 12\}\)"
    ):
        sparring.run(recipe(tmp_path / "run", tiny_model, tiny_data, rounds=[{"method": f"{own}:method"}]))


def test_bf16_compute_runs_with_float32_players(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    tree = recipe(tmp_path / "run", tiny_model, tiny_data, rounds=[{"method": "spin"}])
    tree["model"]["compute"] = "bfloat16"
    view = sparring.run(tree)
    assert view.rounds[0].log[0]["loss"] == pytest.approx(math.log(2), abs=5e-2)
    model = players.load_model(view.players[1].path, ModelConfig(device="cpu"))
    start = players.load_model(str(tiny_model), ModelConfig(device="cpu"))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    moved = [a != b for a, b in zip(model.parameters(), start.parameters(), strict=True)]
    # A learning rate of 1e-3 in bf16 weights would leave most of them where they were.
    assert sum(float(m.sum()) for m in moved) > 0.5 * sum(m.numel() for m in moved)


def test_best_is_the_last_player_within_one_standard_error() -> None:
    scores = {0: (0.50, 0.02), 1: (0.60, 0.02), 2: (0.585, 0.02), 3: (0.57, 0.02)}
    assert best_of(scores) == 2
    assert best_of({0: (3.0, 0.1), 1: (2.0, 0.1), 2: (2.05, 0.1), 3: (2.2, 0.1)}, lower_wins=True) == 2


def test_a_player_is_an_ordinary_hugging_face_folder(finished_run: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    view = RunView(finished_run)
    folder = view.players[2].path
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    assert model.dtype == torch.float32
    assert AutoTokenizer.from_pretrained(folder, local_files_only=True).eos_token == "<eos>"
    card = (Path(folder) / "README.md").read_text()
    assert "Player 2" in card and view.players[1].sha[:16] in card and "beta: 0.1" in card
    assert (finished_run / "best").resolve() == (Path(view.players[view.best or 0].path)).resolve()


def test_a_template_that_writes_the_time_gives_one_prompt_per_run(tiny_data: Path, tmp_path: Path) -> None:
    """Every stage and a fork see the prompt that was answered, whenever and in whatever process they are done."""
    tokenizer = character_tokenizer()
    tokenizer.chat_template = (
        "{{ strftime_now('%f') }} {% for m in messages %}{{ m['content'] }}"
        "{% if m['role'] == 'assistant' %}<eos>{% endif %}{% endfor %}{% if add_generation_prompt %}?{% endif %}"
    )
    model = write_model(tmp_path / "model", tokenizer=tokenizer)
    tree = recipe(tmp_path / "run", model, tiny_data, rounds=[{"method": "spin"}])
    view = sparring.run(tree)
    sparring.fork(view.path, tmp_path / "fork", t=0)
    sparring.run_stage(tmp_path / "fork", "play", 0)
    again = sparring.run(tmp_path / "fork")
    for run in (view, again):
        samples = {s.id: s for s in run.rounds[0].rows("samples", Sample)}
        pairs = list(zip(run.rounds[0].rows("groups", Group), run.rounds[0].rows("frozen", Frozen), strict=True))
        assert len(pairs) > 4
        for group, frozen in pairs:
            assert list(frozen.logps[1]) == pytest.approx(list(samples[group.sources[1]].logps), abs=1e-5)
    assert [g.prompt for g in view.rounds[0].rows("groups", Group)] == [
        g.prompt for g in again.rounds[0].rows("groups", Group)
    ]
    written = {tokenizer.decode(g.prompt[:6]) for g in view.rounds[0].rows("groups", Group)}
    date = json.loads((view.path / "data" / "date.json").read_text())
    assert written == {date[-6:]}
    bench = preview.make_renderer(view).prompt([Message("user", "q")])
    assert tokenizer.decode(bench) == f"{date[-6:]} q?"


def test_a_pad_token_without_an_embedding_does_no_harm(tiny_data: Path, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    plain = sparring.run(recipe(tmp_path / "plain", model, tiny_data, rounds=[{"method": "spin"}]))
    tokenizer = character_tokenizer(pad_token=None)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(str(model))
    view = sparring.run(recipe(tmp_path / "run", model, tiny_data, rounds=[{"method": "spin"}]))
    answers = [[s.tokens for s in v.rounds[0].rows("samples", Sample)] for v in (plain, view)]
    assert answers[0] == answers[1]


def test_a_token_without_an_embedding_is_named(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    tokenizer = character_tokenizer()
    rows = len(tokenizer)
    tokenizer.add_tokens(["é"])
    tokenizer.save_pretrained(str(model))
    data = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": f"a{i}", "completion": f"a é {i}"} for i in range(9)])
    tree = recipe(tmp_path / "run", model, data, data={"heldout_size": 0})
    wanted = (
        f"{model}: its tokenizer writes `é` as {rows}, but the model has {rows} embeddings; "
        "resize them (model.resize_token_embeddings) or give the model its own tokenizer"
    )
    for do in (sparring.run, preview.check):
        with pytest.raises(InputError) as error:
            do(tree)
        assert str(error.value) == wanted


def test_a_template_file_and_the_stop_ids_are_saved_with_players(
    tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    template = tmp_path / "t.jinja"
    template.write_text(
        "{% for m in messages %}{{ m['role'] + ':' + m['content'] }}{% if m['role'] == 'assistant' %}<eos>{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    tree = recipe(tmp_path / "run", tiny_model, tiny_data, rounds=[{"method": "sft"}])
    tree["model"]["chat_template"] = str(template)
    view = sparring.run(tree)
    folder = Path(view.players[max(view.players)].path)
    assert AutoTokenizer.from_pretrained(folder, local_files_only=True).chat_template == template.read_text()
    stops = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    assert stops == list(preview.make_renderer(view).stop_ids) == [character_tokenizer().eos_token_id]


def test_each_frozen_role_has_a_folder(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    own = tmp_path / "two.py"
    own.write_text(
        "import dataclasses\n"
        "from sparring.methods import spin\n"
        "def method(*, beta: float = 0.1):\n"
        "    plain = spin.method(beta=beta)\n"
        "    roles = lambda t: {**plain.roles(t), 'zero': 0}\n"
        "    return dataclasses.replace(plain, frozen=('zero', *plain.frozen), roles=roles)\n"
    )
    tree = recipe(tmp_path / "run", tiny_model, tiny_data, rounds=[{"method": f"{own}:method", "repeat": 2}])
    view = sparring.run(tree)
    last = view.rounds[1]
    groups, found = list(last.rows("groups", Group)), list(last.rows("frozen", Frozen))
    assert last.counts["frozen"]["rows"] == len(found) == 2 * len(groups)
    for role, number in (("reference", 1), ("zero", 0)):
        held = list(Rows(last.path / "frozen" / role, Frozen))
        assert held == [row for row in found if row.role == role]
        assert {row.player for row in held} == {view.players[number].sha}
        assert [row.group for row in held] == [g.sha for g in groups]
        for row, expected in zip(held, rescored(view, number, groups), strict=True):
            assert close(row.logps, expected)


@pytest.mark.gpu
def test_a_round_on_a_gpu_is_the_cpus(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    """float32 on CUDA: same start, losses close to the CPU's; auto compute is bfloat16 there."""
    found: dict[str, Any] = {}
    for device in ("cpu", "cuda"):
        tree = recipe(tmp_path / device, tiny_model, tiny_data, rounds=[{"method": "spin"}])
        tree["model"] |= {"device": device, "compute": "float32"}
        found[device] = sparring.run(tree).rounds[0].log
    assert found["cuda"][0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert [r["loss"] for r in found["cuda"]] == pytest.approx([r["loss"] for r in found["cpu"]], rel=1e-2)
    assert players.compute_dtype(ModelConfig(device="cuda")) == torch.bfloat16


def test_a_players_own_samples_keep_the_samplers_log_probs(
    tiny_model: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is scored are gold answers, and the few groups on which the sampler's word is checked."""
    import sparring.logps

    asked: list[int] = []
    score = sparring.logps.score
    monkeypatch.setattr(sparring.logps, "score", lambda m, p, c, **k: (asked.append(len(c)), score(m, p, c, **k))[1])
    tree = recipe(tmp_path / "run", tiny_model, tiny_data, rounds=[{"method": "spin"}])
    view = sparring.run(tree, ["controls.displacement=null", "controls.trust_region=null"])
    first = view.rounds[0]
    groups, samples = list(first.rows("groups", Group)), {s.id: s for s in first.rows("samples", Sample)}
    evaluated = 2 * len(view.heldout)
    assert sum(asked) == evaluated + 2 * min(len(groups), 16) + len(groups)
    assert 0 < first.counts["frozen"]["sampler_gap"] < 1e-5
    for group, row, expected in zip(groups, first.rows("frozen", Frozen), rescored(view, 0, groups), strict=True):
        assert row.logps[1] == samples[group.sources[1]].logps
        assert close(row.logps, expected)


@pytest.mark.parametrize("limit", [1e-3, 0.0])
def test_a_sampler_that_differs_is_not_believed(
    tiny_model: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: float
) -> None:
    import sparring.stages.pair as stage

    monkeypatch.setattr(stage, "MOST_GAP", limit)
    tree = recipe(tmp_path / "run", tiny_model, tiny_data, rounds=[{"method": "spin"}])
    view = sparring.run(tree)
    groups, samples = (
        list(view.rounds[0].rows("groups", Group)),
        {s.id: s for s in view.rounds[0].rows("samples", Sample)},
    )
    frozen = list(view.rounds[0].rows("frozen", Frozen))
    same = [row.logps[1] == samples[g.sources[1]].logps for g, row in zip(groups, frozen, strict=True)]
    assert all(same) == (limit > 0)
    for row, expected in zip(frozen, rescored(view, 0, groups), strict=True):
        assert close(row.logps, expected)


def test_samplers_log_probs_that_could_not_be_checked_are_not_believed(
    tiny_model: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparring.stages.pair.PROBED", 0)
    view = sparring.run(recipe(tmp_path / "run", tiny_model, tiny_data, rounds=[{"method": "spin"}]))
    first = view.rounds[0]
    groups, samples = list(first.rows("groups", Group)), {s.id: s for s in first.rows("samples", Sample)}
    assert "sampler_gap" not in first.counts["frozen"]
    rows = first.rows("frozen", Frozen)
    assert not all(row.logps[1] == samples[g.sources[1]].logps for g, row in zip(groups, rows, strict=True))


def test_of_two_players_samples_each_has_the_log_probs_of_its_own(
    tiny_model: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the prompts are answered by either player: the first groups do not tell of the others."""
    monkeypatch.setattr("sparring.stages.pair.PROBED", 1)
    entry = {"method": "fictitious_play", "repeat": 2, "negatives": "uniform", "train": {"lr": 0.05}}
    view = sparring.run(recipe(tmp_path / "run", tiny_model, tiny_data, rounds=[entry]))
    last = view.rounds[1]
    groups, samples = list(last.rows("groups", Group)), {s.id: s for s in last.rows("samples", Sample)}
    for role, number in (("reference", 1), ("reference_1", 0)):
        rows, kept = list(Rows(last.path / "frozen" / role, Frozen)), 0
        for group, row, expected in zip(groups, rows, rescored(view, number, groups), strict=True):
            assert close(row.logps, expected)
            own = samples[group.sources[1]].player == view.players[number].sha
            kept += own and row.logps[1] == samples[group.sources[1]].logps
        assert kept == sum(samples[g.sources[1]].player == view.players[number].sha for g in groups) > 0
