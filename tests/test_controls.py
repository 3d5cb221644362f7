"""What keeps self-play from collapsing: the measurements by hand, going back, the best player, stopping, and roles."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import sparring
from helpers import cli, recipe, tree_hash, write_jsonl, write_recipe
from rundirs import records
from sparring import methods, players, preview, stages
from sparring.config import ControlsConfig, EvaluateConfig, ModelConfig, PlayConfig, TrainConfig
from sparring.controls import Limits, Watch, best_player, displacement, divergence, figure, limits, stop_reason
from sparring.gradient import gradient
from sparring.play.hf import play
from sparring.rundir.states import TrainStates, read_log
from sparring.rundir.store import Rows, read_json, write_json
from sparring.rundir.view import RunView
from sparring.train import Outcome, batch_rows, make_optimizer, train
from sparring.types import Frozen, Group, Rendered
from test_train import flat, frozen_under, llama, pairs

# Measurements ---------------------------------------------------------------------------------------------------------


def test_displacement_is_a_mean_per_token() -> None:
    pairs = [((-1.0, -2.0), (-1.5, -1.0)), ((-3.0,), (-2.0,)), ((), ())]
    assert displacement(pairs) == pytest.approx((0.5 - 1.0 - 1.0) / 3)
    assert displacement([((), ())]) == displacement([]) == 0.0


def test_divergence_is_k3() -> None:
    """exp(d) − 1 − d at d = ∓ln 2 is ln 2 − 1/2 and 1 − ln 2, whose mean is 1/4."""
    lower, higher = ((-1.0 - math.log(2),), (-1.0,)), ((-1.0 + math.log(2),), (-1.0,))
    assert divergence([lower]) == pytest.approx(math.log(2) - 0.5)
    assert divergence([higher]) == pytest.approx(1 - math.log(2))
    assert divergence([lower, higher]) == pytest.approx(0.25)
    assert divergence([(lower[0] + higher[0], (-1.0, -1.0))]) == pytest.approx(0.25)
    assert divergence([((-1.0,), (-1.0,))]) == divergence([]) == 0.0
    # Far from 0 the number stays one: a token that the learner excludes, and one that it gained without bound
    assert divergence([((-math.inf,), (-1.0,))]) == math.inf
    assert math.isfinite(divergence([((0.0,), (-1e6,))]))
    assert math.isnan(divergence([((math.nan,), (-1.0,))]))


def test_divergence_is_unbiased() -> None:
    """Over all answers of two tokens out of three, weighted by the start's probabilities, it is the exact KL."""
    draw = torch.Generator().manual_seed(0)
    first = torch.randn(2, 3, generator=draw).double().log_softmax(-1)
    second = torch.randn(2, 3, 3, generator=draw).double().log_softmax(-1)
    start, learner = zip(first, second, strict=True)

    def both(p: tuple[torch.Tensor, ...], q: tuple[torch.Tensor, ...]) -> tuple[float, float]:
        mean = exact = 0.0
        for a, b in itertools.product(range(3), repeat=2):
            old, new = ((float(of[0][a]), float(of[1][a, b])) for of in (p, q))
            mean += math.exp(sum(old)) * 2 * divergence([(new, old)])
            exact += math.exp(sum(old)) * (sum(old) - sum(new))
        return mean, exact

    mean, exact = both(start, learner)
    assert mean == pytest.approx(exact, rel=1e-6)
    # The other direction is another number
    assert abs(both(learner, start)[1] - exact) > 0.005


def test_a_hot_opponent_is_allowed_what_it_aims_at() -> None:
    settings = ControlsConfig(displacement=0.05, trust_region=0.3)
    assert limits(settings, {"hot_displacement": 0.0, "hot_kl": 0.0}) == Limits(0.05, 0.3)
    hot = limits(settings, {"hot_displacement": -0.2, "hot_kl": 0.4})
    assert (hot.displacement, hot.divergence) == (pytest.approx(0.25), pytest.approx(0.7))
    # Where decoding the start colder makes the data likelier, nothing is given away
    assert limits(settings, {"hot_displacement": 0.2, "hot_kl": 0.0}).displacement == 0.05
    off = ControlsConfig(displacement=None, trust_region=None)
    assert limits(off, {"hot_displacement": -0.2, "hot_kl": 0.4}) == Limits(None, None)
    assert [settings.guards, off.guards] == [True, False]
    assert ControlsConfig(displacement=None).guards and ControlsConfig(trust_region=None).guards


def watch(groups: Sequence[Group], start: Sequence[Frozen], allowed: Limits = Limits(0.05, 0.3)) -> Watch:
    return Watch(groups, start, allowed, checks=3, backoff=0.5, backoffs=2, batch_size=2)


@pytest.mark.parametrize(
    ("fall", "kl", "allowed", "said"),
    [
        (0.05, 0.3, Limits(0.05, 0.3), None),
        (0.051, 0.0, Limits(0.05, 0.3), "held-out log p(gold) fell by 0.051 nats per token, beyond 0.050"),
        (
            -9.0,
            0.301,
            Limits(0.05, 0.3),
            "KL(start ‖ learner) on held-out answers is 0.301 nats per token, beyond 0.300",
        ),
        (9.0, 9.0, Limits(None, None), None),
        (9.0, 0.0, Limits(None, 0.3), None),
        (0.0, 9.0, Limits(0.05, None), None),
        (math.nan, 0.0, Limits(0.05, 0.3), "held-out log p(gold) fell by nan nats per token, beyond 0.050"),
        (
            0.0,
            math.nan,
            Limits(0.05, 0.3),
            "KL(start ‖ learner) on held-out answers is nan nats per token, beyond 0.300",
        ),
        (
            0.0,
            math.inf,
            Limits(0.05, 0.3),
            "KL(start ‖ learner) on held-out answers is inf nats per token, beyond 0.300",
        ),
    ],
)
def test_which_limit_is_crossed(fall: float, kl: float, allowed: Limits, said: str | None) -> None:
    assert watch([], [], allowed).crossed({"held_displacement": -fall, "held_kl": kl}) == said


def test_a_reading_is_of_gold_and_of_the_starts_own_answers() -> None:
    """The learner is the start with its output layer halved: both figures from one unpadded forward pass each."""
    start, learner = llama(3), llama(3)
    with torch.no_grad():
        learner.lm_head.weight.mul_(0.5)
    groups = pairs(5, seed=2)
    # A prompt without gold has an empty first completion, which counts for nothing
    groups[2] = replace(groups[2], completions=((), groups[2].completions[1]))
    held = frozen_under(start, groups)["reference"]

    def oracle(model: torch.nn.Module, group: Group, which: int) -> torch.Tensor:
        tokens = torch.tensor([[*group.prompt, *group.completions[which]]])
        with torch.no_grad():
            table = model(tokens).logits[0].log_softmax(-1)[len(group.prompt) - 1 : -1]
        return table.gather(-1, tokens[0, len(group.prompt) :, None]).squeeze(-1).double()

    gold, played = (torch.cat([oracle(learner, g, i) - oracle(start, g, i) for g in groups]) for i in (0, 1))
    reading = watch(groups, held).read(learner)
    assert reading["held_displacement"] == pytest.approx(float(gold.mean()), abs=1e-5)
    assert reading["held_kl"] == pytest.approx(float((gold_k3 := played.exp() - 1 - played).mean()), abs=1e-5)
    assert gold_k3.mean() > 0.01 and abs(gold.mean()) > 0.01
    assert watch(groups, held).read(start) == pytest.approx({"held_displacement": 0.0, "held_kl": 0.0}, abs=1e-6)


def test_the_held_stage_counts_what_a_hot_opponent_aims_at(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    """At temperature 2 the target is the start decoded at 1/2: its logits times 2."""
    counts: dict[float, Any] = {}
    for temperature in (1.0, 2.0, 0.5):
        tree = recipe(
            tmp_path / f"{temperature}",
            tiny_model,
            tiny_data,
            rounds=[{"method": "spin"}],
            play={"temperature": temperature},
        )
        counts[temperature] = sparring.run(tree).rounds[0].counts["held"]
    assert counts[1.0] == counts[0.5] == {"prompts": 4, "hot_displacement": 0.0, "hot_kl": 0.0}
    folder = tmp_path / "2.0" / "round_000" / "held"
    model = players.load_model(str(tiny_model), ModelConfig(device="cpu"))
    # Whatever the opponent's temperature, the answers are the start's at temperature 1, by other seeds than training's
    groups = [list(Rows(tmp_path / f"{t}" / "round_000" / "held" / "groups", Group)) for t in counts]
    assert groups[0] == groups[1] == groups[2]
    view = RunView(tmp_path / "2.0")
    answers = play(
        model,
        [Rendered(g.example_id, g.prompt, g.completions[0], "") for g in groups[0]],
        view.players[0],
        PlayConfig(max_new_tokens=8),
        preview.make_renderer(view),
        seed=-1,
        round=0,
    )
    assert [g.completions[1] for g in groups[0]] == [answer.tokens for answer in answers]
    parts: tuple[list[float], list[float]] = ([], [])
    rows = zip(Rows(folder / "groups", Group), Rows(folder / "frozen", Frozen), strict=True)
    for group, frozen in rows:
        assert [source.partition("/")[0] for source in group.sources] == ["gold", group.example_id]
        for i, (completion, line) in enumerate(zip(group.completions, frozen.logps, strict=True)):
            tokens = torch.tensor([[*group.prompt, *completion]])
            with torch.no_grad():
                logits = model(tokens).logits[0, len(group.prompt) - 1 : -1].double()
            cold, hot = (
                (k * logits).log_softmax(-1).gather(-1, torch.tensor(completion)[:, None])[:, 0] for k in (1, 2)
            )
            assert list(line) == pytest.approx(cold.tolist(), abs=1e-5)
            parts[i].extend((hot - cold).tolist())
    gold, played = (torch.tensor(part) for part in parts)
    assert counts[2.0]["hot_displacement"] == pytest.approx(float(gold.mean()), abs=1e-5)
    assert counts[2.0]["hot_kl"] == pytest.approx(float((played.exp() - 1 - played).mean()), abs=1e-5)
    assert counts[2.0]["hot_kl"] > 0.001


# Going back -----------------------------------------------------------------------------------------------------------

LR, BACKOFF = 1e-3, 0.3
SETTINGS: dict[str, Any] = {
    "batch_size": 4,
    "epochs": 4,
    "lr": LR,
    "warmup": 0.0,
    "schedule": "constant",
    "micro_batch": 4,
}
GROUPS = pairs(12)


@dataclass
class Scripted:
    """A guard whose readings cross a limit where the script says so."""

    script: Sequence[bool]
    backoffs: int = 9
    checks: int = 6
    backoff: float = BACKOFF
    read_at: list[torch.Tensor] = field(default_factory=list)

    def read(self, model: torch.nn.Module) -> dict[str, float]:
        self.read_at.append(flat(model))
        return {"held_displacement": -0.5 * self.script[len(self.read_at) - 1], "held_kl": 0.0}

    def crossed(self, reading: Mapping[str, float]) -> str | None:
        return "too far" if reading["held_displacement"] < 0 else None


@dataclass
class Tether:
    """A guard that lets the weights go so far from their start only: its word depends on the weights alone."""

    start: torch.Tensor
    length: float
    backoffs: int = 9
    checks: int = 4
    backoff: float = 0.75

    def read(self, model: torch.nn.Module) -> dict[str, float]:
        return {"held_displacement": 0.0, "held_kl": float((flat(model) - self.start).norm())}

    def crossed(self, reading: Mapping[str, float]) -> str | None:
        return "too far" if reading["held_kl"] > self.length else None


@pytest.fixture(scope="module")
def reference() -> dict[str, list[Frozen]]:
    return frozen_under(llama(7), GROUPS)


def trained(
    states: TrainStates, guard: Any, reference: dict[str, list[Frozen]], **settings: Any
) -> tuple[torch.Tensor, Outcome]:
    model = llama()
    method = methods.make("spin", {"beta": 0.5})
    outcome = train(model, GROUPS, reference, method, TrainConfig(**(SETTINGS | settings)), states, seed=1, guard=guard)
    return flat(model), outcome


def by_hand(rates: Sequence[float], reference: dict[str, list[Frozen]]) -> torch.Tensor:
    """The weights after so many plain steps at these rates."""
    model, method = llama(), methods.make("spin", {"beta": 0.5})
    optimizer = make_optimizer(model.parameters(), TrainConfig(**SETTINGS))
    for step, rate in enumerate(rates):
        rows = batch_rows(step, len(GROUPS), 4, seed=1)
        held = {"reference": [reference["reference"][i] for i in rows]}
        optimizer.zero_grad()
        gradient(model, [GROUPS[i] for i in rows], held, method, micro_batch=4)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    return flat(model)


def log_of(states: TrainStates) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """Rows of steps, without their seconds, and rows of going back."""
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in read_log(states.folder / "log.jsonl")]
    return [row for row in rows if "backoff" not in row], [row for row in rows if "backoff" in row]


def test_going_back_is_as_if_the_steps_had_never_been_taken(tmp_path: Path, reference: dict[str, list[Frozen]]) -> None:
    """Twelve steps, measured at every second: bad at 4, at 4 again, and at 8."""
    bad = [False, True, True, False, False, True, False, False, False]
    guard, states = Scripted(bad), TrainStates(tmp_path / "train", "key")
    weights, outcome = trained(states, guard, reference)
    assert outcome == Outcome(steps=12, total=12, backoffs=3)
    assert len(guard.read_at) == len(bad)
    rates = [LR] * 2 + [LR * BACKOFF**2] * 4 + [LR * BACKOFF**3] * 6
    assert torch.equal(weights, by_hand(rates, reference))
    # So is what was measured: the tries that were undone as well
    assert torch.equal(guard.read_at[1], by_hand([LR] * 4, reference))
    assert torch.equal(guard.read_at[2], by_hand([LR] * 2 + [LR * BACKOFF] * 2, reference))
    steps, alarms = log_of(states)
    assert [row["step"] for row in steps] == list(range(1, 13))
    assert [row["lr"] for row in steps] == pytest.approx(rates)
    assert ["held_kl" in row for row in steps] == [step % 2 == 0 for step in range(1, 13)]
    assert [(row["step"], row["backoff"], row["crossed_at"]) for row in alarms] == [(2, 1, 4), (2, 2, 4), (6, 3, 8)]
    assert {row["held_displacement"] for row in alarms} == {-0.5}


@pytest.mark.parametrize(("good", "backoffs"), [(2, 1), (2, 0), (0, 2), (0, 0)])
def test_training_ends_at_its_last_good_step(
    good: int, backoffs: int, tmp_path: Path, reference: dict[str, list[Frozen]]
) -> None:
    states = TrainStates(tmp_path / "train", "key")
    guard = Scripted([False] * good + [True] * 9, backoffs)
    weights, outcome = trained(states, guard, reference)
    assert outcome == Outcome(steps=2 * good, total=12, backoffs=backoffs + 1)
    assert len(guard.read_at) == good + backoffs + 1
    assert torch.equal(weights, by_hand([LR] * (2 * good), reference))
    steps, alarms = log_of(states)
    assert [row["step"] for row in steps] == list(range(1, 2 * good + 1))
    assert [row["backoff"] for row in alarms] == list(range(1, backoffs + 2))
    # A training that was ended is not gone on with
    after = Scripted([], backoffs)
    again, same = trained(TrainStates(tmp_path / "train", "key"), after, reference)
    assert same == outcome and torch.equal(again, weights) and after.read_at == []


def test_how_often_states_are_kept_changes_no_result(tmp_path: Path, reference: dict[str, list[Frozen]]) -> None:
    """`save_every` says how, not what: a guard goes back to where it measured, whatever was kept in between."""
    found = []
    for every in (1, 3, 100):
        states = TrainStates(tmp_path / f"{every}", "key")
        guard = Tether(flat(llama()), 0.9)
        weights, outcome = trained(states, guard, reference, save_every=every)
        found.append((weights, outcome, log_of(states)))
    assert found[0][1].backoffs > 0
    for weights, outcome, log in found[1:]:
        assert torch.equal(weights, found[0][0])
        assert (outcome, log) == found[0][1:]


class Killed(BaseException):
    """What stops a training at once, as a kill does."""


class Mortal(TrainStates):
    """States that are killed right before their n-th reading or writing; in between nothing changes on disk."""

    moment, last = 0, -1

    def _at(self) -> None:
        if self.moment == self.last:
            raise Killed
        self.moment += 1

    def load(self) -> Any:
        self._at()
        return super().load()

    def save(self, step: int, tensors: dict[str, torch.Tensor]) -> None:
        self._at()
        super().save(step, tensors)

    def log(self, row: dict[str, float]) -> None:
        self._at()
        super().log(row)


@dataclass
class Marked:
    """A guard that knows the weights which are too far: its word depends on nothing else."""

    bad: Sequence[torch.Tensor]
    backoffs: int
    checks: int = 3
    backoff: float = BACKOFF

    def read(self, model: torch.nn.Module) -> dict[str, float]:
        return {"held_displacement": 0.0, "held_kl": float(any(torch.equal(flat(model), w) for w in self.bad))}

    def crossed(self, reading: Mapping[str, float]) -> str | None:
        return "too far" if reading["held_kl"] else None


@pytest.mark.parametrize(("backoffs", "outcome"), [(3, Outcome(6, 6, 3)), (2, Outcome(4, 6, 3)), (0, Outcome(0, 6, 1))])
def test_a_kill_anywhere_around_going_back_changes_nothing(
    backoffs: int, outcome: Outcome, tmp_path: Path, reference: dict[str, list[Frozen]]
) -> None:
    """Six steps, measured at every second: bad at 2, at 4 and at 6 when first reached."""
    rates = [[LR * BACKOFF**k] * 2 for k in range(4)]
    bad = [by_hand(steps, reference) for steps in (rates[0], rates[1] * 2, rates[1] + rates[2] * 2)]

    def one(states: TrainStates) -> tuple[torch.Tensor, Outcome]:
        return trained(states, Marked(bad, backoffs), reference, max_steps=6)

    whole = Mortal(tmp_path / "whole", "key")
    weights, ended = one(whole)
    assert ended == outcome
    assert torch.equal(weights, by_hand((rates[1] + rates[2] + rates[3])[: outcome.steps], reference))
    log = log_of(whole)
    assert [(row["step"], row["crossed_at"]) for row in log[1]] == [(0, 2), (2, 4), (4, 6)][: outcome.backoffs]
    for moment in range(whole.moment):
        states = Mortal(tmp_path / f"{moment}", "key")
        states.last = moment
        with pytest.raises(Killed):
            one(states)
        again = TrainStates(tmp_path / f"{moment}", "key")
        resumed, same = one(again)
        assert torch.equal(resumed, weights), moment
        assert same == outcome
        assert log_of(again) == log


def test_without_a_guard_no_state_is_kept_before_the_first_step(
    tmp_path: Path, reference: dict[str, list[Frozen]]
) -> None:
    states = Mortal(tmp_path / "train", "key")
    _, outcome = trained(states, None, reference, max_steps=2)
    assert outcome == Outcome(2, 2, 0)
    assert not (tmp_path / "train" / "state").exists()
    steps, _ = log_of(states)
    assert not any("held_kl" in row for row in steps)


def test_a_run_says_what_its_guard_did(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    """With no room at all the round ends where it began: its player is its start, and is marked so."""
    rounds = [{"method": "spin", "train": {"lr": 1e-2, "warmup": 0.0}}]
    controls = {"trust_region": 1e-9, "backoffs": 1}
    tree = recipe(
        tmp_path / "run", tiny_model, tiny_data, rounds=rounds, controls=controls, evaluate={"verifier": None}
    )
    view = sparring.run(tree)
    counts = view.rounds[0].counts["player"]
    assert (counts["steps"], counts["backoffs"], counts["ended_early"]) == (0, 2, "0 of 3 steps")
    same = [players.load_model(view.players[n].path, ModelConfig(device="cpu")) for n in (0, 1)]
    assert torch.equal(flat(same[0]), flat(same[1]))
    assert (view.ended, view.unmoved) == ({1: True}, {1})
    assert view.best == 0  # no verifier says which player is better, and player 1 is none of its own
    lines = view.control_lines()
    assert len(lines) == 3 and lines[-1] == "round 0: ended early, after 0 of 3 steps"
    assert all(line.startswith("round 0: at step 1 held-out log p(gold) had moved by ") for line in lines[:2])
    code, out, err = cli("status", tmp_path / "run")
    assert (code, err) == (0, "")
    assert lines[-1] in out


def test_a_player_that_no_candidate_was_before_it_counts(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    """A guarded round of preparation that kept no step makes player 0, and what it is again is no candidate."""
    rounds: list[Any] = [{"method": "dpo", "train": {"lr": 1e-2, "warmup": 0.0}}, {"method": "spin"}]
    controls = {"trust_region": 1e-9, "backoffs": 0}
    rows = [json.loads(line) | {"generated": "no idea at all"} for line in tiny_data.read_text().splitlines()]
    data = write_jsonl(tmp_path / "data.jsonl", rows)
    evaluate = {"verifier": None, "best": "gold_nll"}
    view = sparring.run(recipe(tmp_path / "run", tiny_model, data, rounds=rounds, controls=controls, evaluate=evaluate))
    # The rate begins at 0, so that the one step which round 0 keeps moves nothing
    assert [r.counts["player"]["steps"] for r in view.rounds] == [0, 1]
    assert (view.ended, view.unmoved, view.best) == ({0: True, 1: True}, {1}, 0)


# The best player and stopping -----------------------------------------------------------------------------------------


def scored(*means: float, se: float | None = 0.02, name: str = "sampled") -> dict[int, Any]:
    return {n: {name: {"mean": mean, "se": se}} for n, mean in enumerate(means)}


SAMPLED = EvaluateConfig(verifier="gsm8k")


def test_what_best_is_chosen_by() -> None:
    assert figure(SAMPLED) == "sampled"
    assert figure(EvaluateConfig()) == figure(EvaluateConfig(verifier="gsm8k", samples=0)) == "last"
    assert figure(EvaluateConfig(best="gold_nll")) == "gold_nll"


def test_the_best_player_with_a_figure() -> None:
    assert best_player(scored(0.50, 0.60, 0.585, 0.57), SAMPLED, {}) == 2
    assert best_player(scored(0.50, 0.60, 0.50, se=None), SAMPLED, {}) == 1
    # A player that a guard ended is judged by its figure like any other
    assert best_player(scored(0.50, 0.60, 0.50), SAMPLED, {1: True}) == 1
    # But for one of whose round no step was kept, which is an earlier one
    assert best_player(scored(0.50, 0.50, 0.50), SAMPLED, {1: True, 2: True}, {1, 2}) == 0
    assert best_player(scored(0.50, 0.50, 0.50), SAMPLED, {1: True, 2: True}, {1}) == 2
    nll = EvaluateConfig(best="gold_nll")
    assert best_player(scored(3.0, 2.0, 2.01, 2.2, name="gold_nll"), nll, {}) == 2
    # Players that were not evaluated do not count
    assert best_player(scored(0.50, 0.60) | {2: None, 3: {"sampled": None}}, SAMPLED, {}) == 1


def test_the_best_player_without_a_figure() -> None:
    nobody: dict[int, Any] = dict.fromkeys(range(4))
    assert best_player(nobody, EvaluateConfig(), {}) == 3
    assert best_player(nobody, EvaluateConfig(), {3: True}) == 2
    assert best_player(nobody, EvaluateConfig(), {0: False, 1: False, 2: True, 3: True}) == 1
    assert best_player(nobody, EvaluateConfig(), dict.fromkeys(range(4), True)) == 0
    # With a verifier but no held-out prompts as well
    assert best_player({0: {"n": 0}, 1: {"n": 0}}, SAMPLED, {}) == 1
    assert best_player(scored(0.9, 0.1), EvaluateConfig(best="last"), {}) == 1


def test_when_self_play_stops() -> None:
    worse = scored(0.50, 0.60, 0.50, 0.40)
    said = "no player after 1 was better by sampled: the last {} did not help (controls.patience)"
    assert stop_reason(worse, SAMPLED, {}, 1) == said.format("round")
    assert stop_reason(worse, SAMPLED, {}, 2) == said.format("2 rounds")
    assert stop_reason(worse, SAMPLED, {}, 3) is None
    assert stop_reason(worse, SAMPLED, {}, None) is None
    assert stop_reason({}, SAMPLED, {}, 1) is None
    # Within one standard error the later player wins, so it goes on
    assert stop_reason(scored(0.50, 0.60, 0.58), SAMPLED, {}, 1) is None
    assert stop_reason(scored(0.50, 0.60, 0.579), SAMPLED, {}, 1) == said.format("round")
    # Rounds of which a guard left nothing are no better by any figure, though the later of equals wins
    equal, both = scored(0.50, 0.50, 0.50), {1: True, 2: True}
    said = "no player after 0 was better by sampled: the last 2 rounds did not help (controls.patience)"
    assert stop_reason(equal, SAMPLED, both, 2, {1, 2}) == said
    assert stop_reason(equal, SAMPLED, both, 2, {1}) is None
    # Without a figure only rounds that a guard ended count as no help
    nobody: dict[int, Any] = dict.fromkeys(range(3))
    assert stop_reason(nobody, EvaluateConfig(), {}, 1) is None
    assert stop_reason(nobody, EvaluateConfig(), {1: True, 2: True}, 2) is not None
    assert stop_reason(nobody, EvaluateConfig(), {1: True, 2: False}, 1) is None


def scripted_accuracy(patch: pytest.MonkeyPatch, means: Mapping[int, float]) -> None:
    """Evaluations whose sampled accuracy is what is given, ± 0.02."""
    whole = stages.evaluation

    def measured(shop: Any, folder: Path, *, number: int) -> Any:
        counts = whole(shop, folder, number=number)
        share = {"mean": means[number], "se": 0.02, "n": 100}
        write_json(folder / "summary.json", read_json(folder / "summary.json") | {"sampled": share})
        return counts

    patch.setattr(stages, "evaluation", measured)


def test_a_run_stops_after_rounds_that_did_not_help(
    tiny_model: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted_accuracy(monkeypatch, {0: 0.5, 1: 0.6, 2: 0.55, 3: 0.57, 4: 0.9, 5: 0.9})
    tree = recipe(tmp_path / "run", tiny_model, tiny_data, rounds=[{"method": "spin", "repeat": 5}])
    view = sparring.run(tree)
    assert sorted(view.players) == [0, 1, 2, 3]
    assert view.best == 1
    assert not (tmp_path / "run" / "round_003").exists()
    why = "no player after 1 was better by sampled: the last 2 rounds did not help (controls.patience)"
    assert [view.stop_reason(t) for t in range(6)] == [None, None, None, why, None, None]
    code, out, err = cli("status", tmp_path / "run")
    assert (code, err) == (0, "")
    assert f"round 3 was not begun: {why}" in out
    # Nothing is claimed while the newest player is still being measured
    cut = Path(shutil.copytree(tmp_path / "run", tmp_path / "cut", symlinks=True))
    shutil.rmtree(cut / "round_002" / "eval")
    assert RunView(cut).stop_reason(3) is None and RunView(cut).control_lines() == []
    shutil.copytree(tmp_path / "run" / "round_002" / "eval", cut / "round_002" / "eval")
    assert RunView(cut).stop_reason(3) == why
    shutil.rmtree(cut / "round_000" / "eval")  # which may have been the best
    assert RunView(cut).stop_reason(3) is None
    # The same call, and the run's own name, do not go on
    before = records(tmp_path / "run")
    for again in (tree, tmp_path / "run"):
        assert sparring.run(again).best == 1
        assert records(tmp_path / "run") == before
    # Patience is no part of what was done: more of it goes on where the run stopped
    assert sorted(sparring.run(tmp_path / "run", ["controls.patience=3"]).players) == [0, 1, 2, 3, 4, 5]
    after = records(tmp_path / "run")
    assert {folder: after[folder] for folder in before} == before
    assert RunView(tmp_path / "run").best == 5


def test_a_rule_that_would_have_stopped_it_does_not_hold_a_run_that_went_on(
    tiny_model: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Round 2 is done, and gave the best player: another patience, or another version's rule, comes too late for it."""
    scripted_accuracy(monkeypatch, {0: 0.6, 1: 0.5, 2: 0.5, 3: 0.9, 4: 0.9})
    tree = recipe(tmp_path / "run", tiny_model, tiny_data, rounds=[{"method": "spin", "repeat": 3}])
    assert sorted(sparring.run(tree | {"controls": {"patience": None}}).players) == [0, 1, 2, 3]
    assert RunView(tmp_path / "run").best == 3
    assert sorted(sparring.run(tree, ["controls.patience=2", "rounds.0.repeat=4"]).players) == [0, 1, 2, 3, 4]


# Roles ----------------------------------------------------------------------------------------------------------------


def test_roles_by_name_and_by_path(
    tiny_model: Path, tiny_data: Path, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Player 1 is the best when round 2 begins, and stays what that round had as its best when player 3 is better."""
    scripted_accuracy(monkeypatch, {-1: 0.1, 0: 0.5, 1: 0.6, 2: 0.4, 3: 0.9})
    elsewhere = str(finished_run / "round_001" / "player")
    rounds = [
        {"method": "sft"},
        {
            "method": "spin",
            "repeat": 3,
            "opponent": ["previous", "initial", elsewhere],
            "reference": ["initial", "previous", "best"],
            "start": ["best", "initial", "previous"],
        },
    ]
    tree = recipe(tmp_path / "run", tiny_model, tiny_data, rounds=rounds, controls={"patience": None})
    view = sparring.run(tree)
    shas = {number: player.sha for number, player in view.players.items()}
    assert len(set(shas.values())) == 5
    wanted: list[dict[str, int | None]] = [
        {"opponent": 0, "reference": 0, "start": 0},
        {"opponent": 0, "reference": 1, "start": 0},
        {"opponent": None, "reference": 1, "start": 2},
    ]
    outside = players.identify(elsewhere)
    for r, numbers in zip(view.rounds[1:], wanted, strict=True):
        roles = read_json(r.path / "roles.json")
        assert {role: player["round"] for role, player in roles.items()} == numbers
        assert {role: player["sha"] for role, player in roles.items()} == {
            role: outside if number is None else shas[number] for role, number in numbers.items()
        }
        # Those who are named are those who did it
        assert {row.player for row in r.rows("frozen", Frozen)} == {roles["reference"]["sha"]}
        assert {s.player for s in r.rows("samples", sparring.Sample)} == {roles["opponent"]["sha"]}
    assert read_json(view.rounds[3].path / "roles.json")["opponent"]["path"] == elsewhere
    # A round whose start is its reference begins at log 2, others do not
    first = [r.log[0]["loss"] for r in view.rounds[1:]]

    assert first[0] == pytest.approx(math.log(2), abs=1e-7)
    assert all(abs(loss - math.log(2)) > 5e-6 for loss in first[1:])
    assert (view.best, view.best_player(upto=2), view.best_player(upto=0)) == (3, 1, 0)
    before = tree_hash(tmp_path / "run" / "round_002")
    assert sparring.run(tree).best == 3
    assert tree_hash(tmp_path / "run" / "round_002") == before
    shutil.rmtree(view.rounds[3].path / "frozen")
    again = sparring.run_stage(tmp_path / "run", "freeze", 2).rounds[3]
    assert {row.player for row in again.rows("frozen", Frozen)} == {shas[1]}


def test_a_changed_evaluation_touches_rounds_that_use_the_best(
    tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    rounds = [{"method": "spin", "repeat": 2, "reference": ["previous", "best"]}]
    plan = sparring.api.prepare(recipe(tmp_path / "run", tiny_model, tiny_data, rounds=rounds)).plan
    other = sparring.api.prepare(
        recipe(tmp_path / "run", tiny_model, tiny_data, rounds=rounds), ["evaluate.samples=2"]
    ).plan
    keys = [{stage.folder: stage.key for stage in p.stages} for p in (plan, other)]
    changed = {folder for folder in keys[0] if keys[0][folder] != keys[1][folder]}
    assert changed == {"start/eval", "round_000/eval", "round_001/frozen", "round_001/player", "round_001/eval"}
    by_last = sparring.api.prepare(
        recipe(tmp_path / "run", tiny_model, tiny_data, rounds=rounds), ["evaluate.best=last"]
    ).plan
    keys.append({stage.folder: stage.key for stage in by_last.stages})
    changed = {folder for folder in keys[0] if keys[0][folder] != keys[2][folder]}
    assert changed == {"round_001/frozen", "round_001/player", "round_001/eval"}


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        (
            {"method": "sft", "opponent": "best"},
            "rounds: opponent=best: method `sft` has no role `opponent` in round 0; it has",
        ),
        (
            {"method": "spin", "base": "initial"},
            "rounds: base=initial: method `spin` has no role `base` in round 0; it has",
        ),
        ({"method": "spin", "opponents": "best"}, "opponents"),
        ({"method": "spin", "reference": "bset"}, "bset"),
    ],
)
def test_a_wrong_role_is_told_in_one_line(
    entry: dict[str, str], said: str, tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    tree = recipe(tmp_path / "run", tiny_model, tiny_data, rounds=[entry])
    code, out, err = cli("run", write_recipe(tmp_path / "recipe.yaml", tree))
    assert (code, out) == (2, "")
    assert err.startswith("sparring: ") and err.count("\n") == 1 and said in err
    assert not (tmp_path / "run").exists()
