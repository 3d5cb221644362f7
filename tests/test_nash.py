"""SPPO, INPO, MNPO, Nash-MD and SPO: golden vectors, hand values, gradients, and the groups they make."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sparring import methods
from sparring.errors import InputError
from sparring.judge.score import wins_from_scores
from sparring.methods.sppo import log_partition
from sparring.types import Batch, LogProbs, Played, Rendered, Sample, Score

# vectors.md, common inputs I: (chosen, rejected) per pair
POLICY = [(-10.0, -12.0), (-50.0, -40.0), (-100.0, -100.0), (-3.0, -80.0)]
REFERENCE = [(-11.0, -11.5), (-48.0, -45.0), (-100.0, -100.0), (-30.0, -20.0)]
# vectors.md, common inputs III: log-probs of (y, y') under each player
III = {"policy": (-40.0, -30.0), "reference": (-41.0, -28.0), "reference_1": (-44.0, -33.0), "base": (-38.0, -35.0)}
V7 = wins_from_scores([2, 0.5, -1, 0, -3])


def batch_of(
    policy: Sequence[Sequence[float]],
    frozen: Mapping[str, Sequence[Sequence[float]]],
    targets: Sequence[Sequence[float]],
) -> tuple[LogProbs, Batch]:
    """One-token completions whose log-probs are the given sums."""

    def side(rows: Sequence[Sequence[float]]) -> LogProbs:
        values = torch.tensor(rows, dtype=torch.float64).unsqueeze(-1)
        return LogProbs(values, torch.ones_like(values))

    learner = side(policy)
    learner.token_BGT.requires_grad_()
    shape = learner.token_BGT.shape
    return learner, Batch(
        tokens_BGT=torch.zeros(shape, dtype=torch.long),
        mask_BGT=torch.ones(shape, dtype=torch.bool),
        targets_BG=torch.tensor(targets, dtype=torch.float64),
        weight_B=torch.ones(len(policy), dtype=torch.float64),
        frozen={role: side(rows) for role, rows in frozen.items()},
    )


def flipped(rows: Sequence[Sequence[float]]) -> list[tuple[float, ...]]:
    return [tuple(reversed(row)) for row in rows]


def played(wins: Sequence[Sequence[float]], t: int = 3, **changes: Sequence[object]) -> Played:
    """One prompt whose samples are the one-token answers 100, 101, …; `changes` has one value per sample."""
    samples = [
        replace(
            Sample("x", "sha", i, 0, (100 + i,), str(i), "stop", (-1.0,), "how", t),
            **{name: values[i] for name, values in changes.items()},
        )
        for i in range(len(wins))
    ]
    row = Rendered("x", (7, 8), (9,), "gold")
    score = Score("x", tuple(s.id for s in samples), (), tuple(map(tuple, wins)))
    return Played(t, [row], samples, (), [score])


def losses(name: str, hyper: Mapping[str, object], policy: LogProbs, batch: Batch) -> Tensor:
    return methods.make(name, hyper).loss(policy, batch)


def token_grad(policy: LogProbs) -> list[float]:
    grad = policy.token_BGT.grad
    assert grad is not None
    return grad.flatten().tolist()


# --- SPPO


@pytest.mark.parametrize("flip", [False, True])
def test_v6_sppo(flip: bool) -> None:
    """V6: each response against its own win rate; the order of the two does not matter."""
    targets = list(zip([0.9, 0.6, 0.5, 1], [0.2, 0.45, 0.5, 0], strict=True))
    turn = flipped if flip else list
    policy, batch = batch_of(turn(POLICY), {"reference": turn(REFERENCE)}, turn(targets))
    got = losses("sppo", {"eta": 1000.0}, policy, batch)
    assert got.tolist() == pytest.approx([124450.625, 6714.5, 0, 208664.5], rel=1e-12)


def test_v6_sppo_single() -> None:
    """V6: targets p and 1 − p."""
    targets = [(p, 1 - p) for p in (0.8, 0.55, 0.5, 1)]
    policy, batch = batch_of(POLICY, {"reference": REFERENCE}, targets)
    got = losses("sppo", {"pairs": "single"}, policy, batch)
    assert got.tolist() == pytest.approx([89550.625, 2864.5, 0, 208664.5], rel=1e-12)


def test_v9_trl_sppo_hard_is_twice_ours() -> None:
    """V9: TRL sums (A − 1/(2β))² and (B + 1/(2β))² where the official code halves the sum."""
    policy, batch = batch_of(POLICY, {"reference": REFERENCE}, [(1, 0)] * 4)
    got = losses("sppo", {"pairs": "hard", "eta": 1000.0}, policy, batch)
    assert got.tolist() == pytest.approx([249250.625, 253514.5, 250000, 208664.5], rel=1e-12)
    assert (2 * got).tolist() == pytest.approx([498501.25, 507029, 500000, 417329], rel=1e-12)


def test_v7_into_the_loss() -> None:
    """V7: PairRM's scores to targets to loss, by `groups` and `loss`."""
    for pairs, at, at_start in [
        ("official", 118173.8848166407, 118681.846995),
        ("single", 242612.6076055964, 243351.943329),
    ]:
        [group] = methods.make("sppo", {"pairs": pairs}).groups(played(V7)).groups
        assert group.completions == ((100,), (104,)) and group.weight == 1 and group.origin_round == 3
        assert group.prompt == (7, 8) and group.sources == ("x/sha/3.0", "x/sha/3.4")
        policy, batch = batch_of([(1, -0.5)], {"reference": [(0, 0)]}, [group.targets])
        assert losses("sppo", {"pairs": pairs}, policy, batch).item() == pytest.approx(at, rel=1e-12)
        policy, batch = batch_of([(-3, -4)], {"reference": [(-3, -4)]}, [group.targets])
        assert losses("sppo", {"pairs": pairs}, policy, batch).item() == pytest.approx(at_start, abs=5e-7)


def test_sppo_targets() -> None:
    def targets(**hyper: object) -> tuple[float, ...]:
        [group] = methods.make("sppo", hyper).groups(played(V7)).groups
        return group.targets

    means = [0.8288505660, 0.6186294201, 0.3759179793, 0.5360752593, 0.1405267754]
    assert targets() == pytest.approx([means[0], means[4]], abs=5e-11)
    assert targets(pairs="single") == pytest.approx([0.9933071490757153, 1 - 0.9933071490757153], rel=1e-12)
    assert targets(pairs="hard") == (1, 0)
    assert targets(pairs="all") == pytest.approx(means, abs=5e-11)
    # log mean exp(2 P) over the five, by hand; its half-way approximation is η/2 = 1
    log_z = math.log(sum(math.exp(2 * p) for p in means) / 5)
    assert log_z > 1
    exact = targets(pairs="all", log_z="exact", eta=2.0)
    assert [2 * (p - 0.5) for p in exact] == pytest.approx([2 * p - log_z for p in means], abs=1e-9)
    both = targets(pairs="official", log_z="exact", eta=2.0)
    assert both == pytest.approx([exact[0], exact[4]], rel=1e-12)


def test_the_log_partition_does_not_overflow() -> None:
    assert log_partition([1.0, 0.0], 1000.0) == pytest.approx(1000 - math.log(2), rel=1e-12)
    assert log_partition([0.5, 0.5, 0.5], 3.0) == pytest.approx(1.5)


def test_sppo_gradient_by_hand() -> None:
    """d/dr ½Σ(r − η(p − ½))² = r − η(p − ½), none to the reference."""
    policy, batch = batch_of([(-10, -12)], {"reference": [(-11, -11.5)]}, [(0.9, 0.2)])
    batch.frozen["reference"].token_BGT.requires_grad_()
    losses("sppo", {"eta": 2.0}, policy, batch).sum().backward()
    assert token_grad(policy) == pytest.approx([1 - 0.8, -0.5 + 0.6])


def test_sppo_all_is_the_mean_over_the_samples_that_are_there() -> None:
    """Two prompts with three samples and with two: (r − η(p − ½))² = 1, 4, 9 and 1, 4."""
    policy, batch = batch_of([(1, 2, 3), (1, 2, 50)], {"reference": [(0, 0, 0), (0, 0, 0)]}, [(0.5,) * 3] * 2)
    mask = batch.mask_BGT.clone()
    mask[1, 2] = False
    got = losses("sppo", {"pairs": "all"}, policy, replace(batch, mask_BGT=mask))
    assert got.tolist() == pytest.approx([14 / 3, 5 / 2])
    metrics = methods.make("sppo", {"pairs": "all"}).metrics(policy, replace(batch, mask_BGT=mask))
    assert metrics["ratio_sample"].tolist() == pytest.approx([2, 1.5])


def test_sppo_metrics_are_in_units_of_the_target() -> None:
    policy, batch = batch_of(POLICY, {"reference": REFERENCE}, [(1, 0)] * 4)
    metrics = methods.make("sppo", {"eta": 1000.0}).metrics(policy, batch)
    assert metrics["margin"].tolist() == pytest.approx([0.0015, -0.007, 0, 0.087])


def test_what_sppo_leaves_out() -> None:
    tied = methods.make("sppo", {}).groups(played([[0.5] * 3] * 3))
    assert tied.groups == [] and tied.dropped == {"tie": 3}
    assert len(methods.make("sppo", {"pairs": "all"}).groups(played([[0.5] * 3] * 3)).groups[0].completions) == 3
    assert methods.make("sppo", {}).groups(played(V7)).dropped == {"between": 3}
    same = methods.make("sppo", {}).groups(played(V7, tokens=[(1,), (2,), (3,), (4,), (1,)]))
    assert same.groups == [] and same.dropped == {"identical": 5}
    empty = methods.make("sppo", {}).groups(played(V7, tokens=[(), (2,), (3,), (4,), (5,)]))
    assert empty.groups[0].completions == ((2,), (5,)) and empty.dropped == {"empty": 1, "between": 2}
    # An empty sample is not trained on, but it was played: the win rates count it
    assert empty.groups[0].targets == pytest.approx([0.6186294201, 0.1405267754], abs=5e-11)
    whole = methods.make("sppo", {"pairs": "all"}).groups(played(V7, tokens=[(), (2,), (3,), (4,), (5,)]))
    assert whole.groups[0].completions == ((2,), (3,), (4,), (5,)) and whole.dropped == {"empty": 1}
    assert whole.groups[0].targets[0] == pytest.approx(0.6186294201, abs=5e-11)


def test_of_samples_that_win_alike_the_first_is_taken() -> None:
    """Verdicts right, right, wrong, wrong, as in the released code's argmax and argmin."""
    wins = [[0.5, 0.5, 1, 1], [0.5, 0.5, 1, 1], [0, 0, 0.5, 0.5], [0, 0, 0.5, 0.5]]
    assert methods.make("sppo", {}).groups(played(wins)).groups[0].completions == ((100,), (102,))


# --- INPO and MNPO


@pytest.mark.parametrize("flip", [False, True])
def test_inpo(flip: bool) -> None:
    """vectors.md §4b, common inputs III with ref = θ_{t−2}: h = −1/3, (h − 200/3)² = 4489."""
    turn = flipped if flip else list
    frozen = {role: turn([III[role]]) for role in ("base", "reference")}
    policy, batch = batch_of(turn([III["policy"]]), frozen, turn([(1, 0)]))
    loss = losses("inpo", {"ratio": 1 / 3, "eta": 0.0075}, policy, batch)
    assert loss.item() == pytest.approx(4489.0, rel=1e-12)
    assert losses("inpo", {}, policy, batch).item() == loss.item()  # these are the defaults
    loss.sum().backward()
    slope = 2 * (-1 / 3 - 200 / 3)
    assert token_grad(policy) == pytest.approx([-slope, slope] if flip else [slope, -slope])


def test_td_mnpo() -> None:
    """vectors.md §4b: history (θ_t, θ_{t−1}) with weights (.7, .3); h = −.7333333."""
    frozen = {role: [III[role]] for role in ("base", "reference", "reference_1")}
    policy, batch = batch_of([III["policy"]], frozen, [(1, 0)])
    for weights in [(0.7, 0.3), (7, 3)]:
        hyper = {"history_weights": weights, "log_probs": "sum"}
        assert losses("mnpo", hyper, policy, batch).item() == pytest.approx(4542.76, abs=5e-3)
        assert losses("mnpo", hyper, policy, batch).item() == pytest.approx((-11 / 15 - 200 / 3) ** 2, rel=1e-12)
    # (1, 0) is INPO; none given is equal weights: Σ = −12, h = −10 + 1 + 8
    assert losses("mnpo", {"history_weights": (1, 0)}, policy, batch).item() == pytest.approx(4489.0)
    assert losses("mnpo", {}, policy, batch).item() == pytest.approx((-1 - 200 / 3) ** 2)


def test_mnpo_divides_the_weights_by_those_of_the_players_that_are_there() -> None:
    """Round 0 has no θ_{t−1}: weights (.7, .3) become (1)."""
    frozen = {role: [III[role]] for role in ("base", "reference")}
    policy, batch = batch_of([III["policy"]], frozen, [(1, 0)])
    assert losses("mnpo", {"history_weights": (0.7, 0.3)}, policy, batch).item() == pytest.approx(4489.0)


def test_mnpo_takes_means_and_inpo_sums() -> None:
    """Winner of two tokens, loser of one: Δ = −2 as means and −6 as sums, and likewise for the frozen players."""

    def side(winner: tuple[float, float], loser: float) -> LogProbs:
        weight = torch.tensor([[[1.0, 1.0], [1.0, 0.0]]], dtype=torch.float64)
        return LogProbs(torch.tensor([[list(winner), [loser, 0.0]]], dtype=torch.float64), weight)

    policy, base, last = side((-3, -5), -2), side((-1, -1), -1), side((-2, -2), -1)
    mask = torch.tensor([[[True, True], [True, False]]])
    batch = Batch(mask.long(), mask, torch.tensor([[1.0, 0.0]]), torch.ones(1), {"base": base, "reference": last})
    hyper = {"ratio": 0.25, "eta": 0.5}
    mean = -2 - (0.25 * 0 + 0.75 * -1) - 1
    total = -6 - (0.25 * -1 + 0.75 * -3) - 1
    assert losses("mnpo", hyper, policy, batch).item() == pytest.approx(mean**2)
    assert losses("mnpo", hyper | {"log_probs": "sum"}, policy, batch).item() == pytest.approx(total**2)
    assert losses("inpo", hyper, policy, batch).item() == pytest.approx(total**2)
    assert losses("inpo", hyper | {"log_probs": "mean"}, policy, batch).item() == pytest.approx(mean**2)


def test_inpo_and_mnpo_at_the_start() -> None:
    """vectors.md §7: (1/(2η))² when every reference is θ_t."""
    policy, batch = batch_of([(-4, -9)], {r: [(-4, -9)] for r in ("base", "reference", "reference_1")}, [(1, 0)])
    for name in ("inpo", "mnpo"):
        assert losses(name, {"eta": 0.2}, policy, batch).item() == pytest.approx(6.25)


def test_mnpo_roles_and_pairs() -> None:
    made = methods.make("mnpo", {"history": 3})
    assert made.frozen == ("base", "reference", "reference_1", "reference_2")
    assert made.roles(0) == {"opponent": 0, "start": 0, "base": 0, "reference": 0}
    assert made.roles(4) == {
        "opponent": 4, "start": 4, "base": 0, "reference": 4, "reference_1": 3, "reference_2": 2,
    }  # fmt: skip
    assert methods.make("inpo", {}).frozen == ("base", "reference")
    [group] = made.groups(played(V7)).groups
    assert group.completions == ((100,), (104,)) and group.targets == (1, 0)


# --- Nash-MD


def test_nash_md_by_hand() -> None:
    """(β · log-ratio − (P − ½)) · log p: here (.1 · 3 − .25) · −10; the log-ratio in front is not differentiated."""
    policy, batch = batch_of([(-10,)], {"reference": [(-13,)]}, [(0.75,)])
    loss = losses("nash_md", {"beta": 0.1}, policy, batch)
    assert loss.tolist() == pytest.approx([-0.5])
    loss.sum().backward()
    assert token_grad(policy) == pytest.approx([0.05])
    metrics = methods.make("nash_md", {}).metrics(policy, batch)
    assert {k: v.tolist() for k, v in metrics.items()} == {"win_rate": [0.75], "kl": [3.0], "logp_sample": [-10.0]}


def test_nash_md_groups() -> None:
    """Own samples 0, 1 against the mixture's 2, 3: P is the mean over the latter, which are not trained on."""
    wins = [[0.5, 0.9, 0.6, 0.8], [0.1, 0.5, 0.2, 0.0], [0.4, 0.8, 0.5, 0.5], [0.2, 1.0, 0.5, 0.5]]
    made = methods.make("nash_md", {"share": 0.25})
    paired = made.groups(played(wins, role=["opponent", "opponent", "mixture", "mixture"]))
    assert [g.completions for g in paired.groups] == [((100,),), ((101,),)]
    assert [g.targets for g in paired.groups] == [pytest.approx((0.7,)), pytest.approx((0.1,))]
    assert [(t.role, t.mixed_with, t.share) for t in made.plays] == [
        ("opponent", None, 0.0),
        ("mixture", "reference", 0.25),
    ]
    assert made.roles(3) == {"opponent": 3, "mixture": 3, "reference": 0, "start": 3}
    alone = made.groups(played([[0.5]]))
    assert alone.groups == [] and alone.dropped == {"no_rival": 1}
    empty = made.groups(
        played(wins, role=["opponent", "opponent", "mixture", "mixture"], tokens=[(), (1,), (2,), (3,)])
    )
    assert len(empty.groups) == 1 and empty.dropped == {"empty": 1}


# --- SPO


@pytest.mark.parametrize(
    ("log_ratio", "advantage", "loss", "slope"),
    [
        (0.0, 0.3, -0.3, -0.3),
        (math.log(1.5), 0.3, -0.36, 0.0),  # beyond 1 + ε: no more gain
        (math.log(0.5), 0.3, -0.15, -0.15),
        (math.log(1.5), -0.2, 0.3, 0.3),
        (math.log(0.5), -0.2, 0.16, 0.0),
    ],
)
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_spo_by_hand(log_ratio: float, advantage: float, loss: float, slope: float, ratio: str) -> None:
    """−min(ρA, clip(ρ, .8, 1.2) A) and its derivative by log p."""
    policy, batch = batch_of([(-5 + log_ratio,)], {"reference": [(-5,)]}, [(advantage,)])
    got = losses("spo", {"clip": 0.2, "ratio": ratio}, policy, batch)
    assert got.tolist() == pytest.approx([loss])
    got.sum().backward()
    assert token_grad(policy) == pytest.approx([slope])


def test_spo_token_and_sequence_ratios() -> None:
    """Answers of two tokens and one: ρ = 1.1, 1.1 | .9 per token, 1.21 (clipped to 1.2) | .9 per answer."""
    reference = torch.full((1, 3, 2), -1.0, dtype=torch.float64)
    steps = torch.tensor([[[1.1, 1.1], [0.9, 7.0], [7.0, 7.0]]], dtype=torch.float64).log()
    weight = torch.tensor([[[1.0, 1.0], [1.0, 0.0], [0.0, 0.0]]], dtype=torch.float64)
    policy, last = LogProbs((reference + steps) * weight, weight), LogProbs(reference * weight, weight)
    targets = torch.tensor([[0.25, -0.25, 0.0]], dtype=torch.float64)
    batch = Batch(weight.long(), weight.bool(), targets, torch.ones(1), {"reference": last})
    token, sequence = (losses("spo", {"ratio": r}, policy, batch).item() for r in ("token", "sequence"))
    assert token == pytest.approx(-(1.1 - 0.9) * 0.25 / 2)
    assert sequence == pytest.approx(-(1.2 - 0.9) * 0.25 / 2)
    metrics = methods.make("spo", {}).metrics(policy, batch)
    assert metrics["advantage_spread"].tolist() == [0.25]
    assert metrics["ratio_sample"].tolist() == pytest.approx([(2 * math.log(1.1) + math.log(0.9)) / 2])


def test_spo_groups() -> None:
    made = methods.make("spo", {})
    [group] = made.groups(played(V7)).groups
    means = [0.8288505660, 0.6186294201, 0.3759179793, 0.5360752593, 0.1405267754]
    assert group.targets == pytest.approx([p - 0.5 for p in means], abs=5e-11)
    assert sum(group.targets) == pytest.approx(0, abs=1e-12)
    tied = made.groups(played([[0.5] * 2] * 2))
    assert tied.groups == [] and tied.dropped == {"tie": 2}


# --- all of them


@pytest.mark.parametrize(
    ("name", "hyper"),
    [
        ("sppo", {"eta": 0.0}),
        ("sppo", {"pairs": "best"}),
        ("sppo", {"log_z": "exact", "pairs": "hard"}),
        ("sppo", {"log_z": "exact", "pairs": "single"}),
        ("mnpo", {"history": 0}),
        ("mnpo", {"history": 2, "history_weights": (1.0,)}),
        ("mnpo", {"history_weights": (0.0, 1.0)}),
        ("mnpo", {"history_weights": (1.0, -1.0)}),
        ("inpo", {"ratio": 1.5}),
        ("inpo", {"eta": 0.0}),
        ("inpo", {"log_probs": "max"}),
        ("nash_md", {"beta": -1.0}),
        ("nash_md", {"share": 1.5}),
        ("spo", {"clip": 0.0}),
        ("spo", {"ratio": "none"}),
    ],
)
def test_bad_hyper_parameters(name: str, hyper: dict[str, object]) -> None:
    with pytest.raises(InputError, match=f"method `{name}`"):
        methods.make(name, hyper)


@pytest.mark.parametrize("name", ["sppo", "inpo", "mnpo", "nash_md", "spo"])
def test_the_scorer_is_a_hyper_parameter(name: str) -> None:
    assert methods.make(name, {"scorer": "./mine.py:wins"}).scorer == "./mine.py:wins"
