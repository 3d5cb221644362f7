"""The SPIN family against golden vectors (vectors.md §4b and §7), hand values, gradients, and its groups by hand."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor

from sparring import methods
from sparring.errors import InputError
from sparring.gradient import collate
from sparring.methods import ditto as ditto_file
from sparring.pair import gold_with_samples
from sparring.types import Batch, Finish, Frozen, Group, LogProbs, Played, Rendered, Sample, Turn

LOG2 = math.log(2)
POLICY, T_0, T_1, T_2 = (-40.0, -30.0), (-41.0, -28.0), (-44.0, -33.0), (-38.0, -35.0)
"""Common inputs III: log p(y), log p(y') under the learner and under players t, t−1 and t−2 = 0."""


def batch_of(
    policy: Sequence[Sequence[float]],
    frozen: Mapping[str, Sequence[Sequence[float]]],
    *,
    targets: Sequence[Sequence[float]] | None = None,
    weights: Sequence[float] | None = None,
    lengths: Sequence[int] | None = None,
) -> tuple[Tensor, LogProbs, Batch]:
    """Completions whose log-probs are the given sums, on the first of 1 or `lengths` tokens; the sums' leaf first."""
    leaf_BG = torch.tensor(policy, dtype=torch.float64, requires_grad=True)
    size_B, size_G = leaf_BG.shape
    counts_BG = torch.tensor([list(lengths or [1] * size_G)] * size_B)
    mask_BGT = torch.arange(int(counts_BG.max())) < counts_BG[..., None]
    weight_BGT = mask_BGT.double()

    def on_tokens(sums_BG: Tensor) -> LogProbs:
        return LogProbs(torch.nn.functional.pad(sums_BG[..., None], (0, mask_BGT.shape[-1] - 1)), weight_BGT)

    batch = Batch(
        torch.zeros(mask_BGT.shape, dtype=torch.long),
        mask_BGT,
        torch.tensor(targets or [[1.0] + [0.0] * (size_G - 1)] * size_B),
        torch.tensor(weights or [1.0] * size_B),
        {role: on_tokens(torch.tensor(table, dtype=torch.float64)) for role, table in frozen.items()},
        token_weight_BGT=weight_BGT,
    )
    return leaf_BG, on_tokens(leaf_BG), batch


def loss_of(
    name: str, hyper: dict[str, object], policy: Sequence[float], frozen: Mapping[str, Sequence[float]]
) -> tuple[float, list[float]]:
    """One group's loss and its gradient with respect to each log p_θ."""
    leaf, logps, batch = batch_of([policy], {role: [row] for role, row in frozen.items()})
    loss_B = methods.make(name, hyper).loss(logps, batch)
    assert loss_B.shape == (1,)
    loss_B.sum().backward()
    assert leaf.grad is not None
    return loss_B.item(), leaf.grad[0].tolist()


def close(digits: int = 10) -> float:
    return 0.51 * 10.0**-digits


# --- mixtures of players


@pytest.mark.parametrize(
    ("name", "hyper", "expected", "margin"),
    [
        ("alpha_spin", {"alpha": 0.25}, 0.6684596480, 0.5),
        ("alpha_spin", {"alpha": 0.0}, 0.5543552445, 3.0),  # SPIN
        ("alpha_spin", {"alpha": 1.0}, math.log1p(math.exp(0.7)), -7.0),  # DPO to player 0: r = −2, 5
        ("fictitious_play", {}, 0.5981388694, 2.0),
        ("fictitious_play", {"reference_mixture": "arithmetic"}, 0.5561392823, 2.9581279969),
        ("fictitious_play", {"alpha": 0.25}, 0.7057253035, -0.25),
        ("fictitious_play", {"history": 1}, 0.5543552445, 3.0),
    ],
)
def test_references_that_are_mixtures(name: str, hyper: dict[str, object], expected: float, margin: float) -> None:
    """vectors.md §4b; the gradient is ∓β σ(−β·margin)."""
    frozen = {"reference": T_0, "reference_1": T_1, "base": T_2}
    made = methods.make(name, {"beta": 0.1, **hyper})
    loss, slope = loss_of(name, {"beta": 0.1, **hyper}, POLICY, {r: v for r, v in frozen.items() if r in made.frozen})
    assert loss == pytest.approx(expected, abs=close())
    force = 0.1 / (1 + math.exp(0.1 * margin))
    assert slope == pytest.approx([-force, force], rel=1e-9)


def test_a_mixture_has_only_the_players_that_are_there() -> None:
    """Round 0 of every mixture is SPIN: the mean over the one player that exists."""
    for mixture in ("geometric", "arithmetic"):
        hyper = {"history": 3, "reference_mixture": mixture}
        assert loss_of("fictitious_play", hyper, POLICY, {"reference": T_0})[0] == pytest.approx(
            0.5543552445, abs=5e-11
        )
    arithmetic = {"alpha": 0.25, "reference_mixture": "arithmetic"}
    got = loss_of("fictitious_play", arithmetic, POLICY, {"reference": T_0, "reference_1": T_1, "base": T_2})[0]
    mixed = [0.25 * b + 0.75 * m for b, m in zip(T_2, (-41.6445598290, -28.6864318321), strict=True)]
    margin = (POLICY[0] - mixed[0]) - (POLICY[1] - mixed[1])
    assert got == pytest.approx(math.log1p(math.exp(-0.1 * margin)), abs=1e-10)


@pytest.mark.parametrize(("loss", "value"), [("hinge", 0.8), ("exponential", math.exp(-0.2)), ("correlation", 0.8)])
def test_the_convex_losses_of_fictitious_play(loss: str, value: float) -> None:
    got = loss_of("fictitious_play", {"loss": loss}, POLICY, {"reference": T_0, "reference_1": T_1})[0]
    assert got == pytest.approx(value, rel=1e-12)
    assert loss_of("alpha_spin", {"loss": loss, "alpha": 0.0}, POLICY, {"reference": T_0})[0] == pytest.approx(
        {"hinge": 0.7, "exponential": math.exp(-0.3), "correlation": 0.7}[loss], rel=1e-12
    )


def test_who_takes_part_in_mixtures() -> None:
    alpha = methods.make("alpha_spin", {"memory": 2})
    assert alpha.name == "alpha_spin"
    assert dict(alpha.roles(3)) == {"start": 3, "opponent": 3, "reference": 3, "base": 0}
    assert (alpha.frozen, alpha.plays, alpha.memory) == (("reference", "base"), (Turn(),), (1.0, 1.0))
    union = methods.make("fictitious_play", {"history": 3})
    assert dict(union.roles(0)) == {"start": 0, "opponent": 0, "reference": 0}
    assert dict(union.roles(1)) == {"start": 1, "opponent": 1, "reference": 1, "reference_1": 0}
    assert dict(union.roles(5)) == {"start": 5, "opponent": 5, "reference": 5, "reference_1": 4, "reference_2": 3}
    assert (union.plays, union.memory) == ((Turn(),), (1.0, 1.0))
    uniform = methods.make("fictitious_play", {"history": 3, "negatives": "uniform"})
    assert dict(uniform.roles(1))["opponent_1"] == 0 and "opponent_2" not in uniform.roles(1)
    assert [(turn.role, turn.split) for turn in uniform.plays] == [
        ("opponent", True),
        ("opponent_1", True),
        ("opponent_2", True),
    ]
    assert uniform.memory == ()


# --- TPAW


@pytest.mark.parametrize(
    ("players", "expected"), [((T_0,), 0.5543552445), ((T_0, T_1), 0.6016251137), ((T_0, T_1, T_2), 1.1577269751)]
)
def test_tpaw_grows_with_its_team(players: tuple[tuple[float, float], ...], expected: float) -> None:
    """vectors.md §4b."""
    team = dict(zip(("reference", "reference_1", "reference_2"), players, strict=False))
    assert loss_of("tpaw", {}, POLICY, team)[0] == pytest.approx(expected, abs=close())


def test_tpaw_in_detail() -> None:
    """vectors.md §4b: weights, gradients, and that they are those of weights that are not detached."""
    team = {"reference": T_0, "reference_1": T_1, "reference_2": T_2}
    _, slope = loss_of("tpaw", {}, POLICY, team)
    assert slope == pytest.approx([-0.2481382740, 0.0624575149], abs=close())
    whole = torch.tensor(POLICY, dtype=torch.float64, requires_grad=True)
    rewards = [0.1 * (whole - torch.tensor(player, dtype=torch.float64)) for player in (T_0, T_1, T_2)]
    share = torch.softmax(torch.stack([-0.5 * (p[0] - p[1]) for p in rewards]), 0)
    terms = torch.stack(
        [torch.log1p(torch.exp(-(a * p[0] - p[1]))) for a, p in zip((1.0, 1.0, 6.0), rewards, strict=True)]
    )
    assert share.tolist() == pytest.approx([0.2663901758, 0.2944066751, 0.4392031491], abs=close())
    (share * terms).sum().backward()
    assert whole.grad is not None and slope == pytest.approx(whole.grad.tolist(), rel=1e-12)
    figures = methods.make("tpaw", {}).metrics(*batch_of([POLICY], {r: [v] for r, v in team.items()})[1:])
    assert figures["hardest"].item() == pytest.approx(0.4392031491, abs=close())
    assert figures["fallen"].item() == pytest.approx(1 / 3)
    assert figures["margin"].item() == pytest.approx(0.3)
    unweighted = methods.make("tpaw", {"eta": 1.0}).metrics(*batch_of([POLICY], {r: [v] for r, v in team.items()})[1:])
    assert unweighted["fallen"].item() == pytest.approx(1 / 3)


def test_tpaw_at_the_start_of_a_round() -> None:
    """vectors.md §4b and §7: P_t(y) = 0 exactly, so the weight eta is on from the first step."""
    loss, slope = loss_of("tpaw", {}, T_0, {"reference": T_0})
    assert loss == pytest.approx(LOG2, rel=1e-12) and slope == pytest.approx([-0.3, 0.05], rel=1e-12)
    loss, slope = loss_of("tpaw", {}, T_0, {"reference": T_0, "reference_1": T_1, "reference_2": T_2})
    assert loss == pytest.approx(1.5522815026, abs=close())
    assert slope == pytest.approx([-0.3396361312, 0.0700955884], abs=close())


def test_tpaw_takes_the_rounding_of_a_start_for_0() -> None:
    for ahead, force in ((5e-5, 0.3), (2e-4, 0.05)):
        slope = loss_of("tpaw", {}, (T_0[0] + ahead, T_0[1]), {"reference": T_0})[1]
        assert slope[0] == pytest.approx(-force, rel=1e-3)


def test_tpaw_without_its_weights() -> None:
    """eta = 1 and gamma = 0: the mean of SPIN's losses to every player."""
    team = {"reference": T_0, "reference_1": T_1, "reference_2": T_2}
    each = [math.log1p(math.exp(-m)) for m in (0.3, 0.1, -0.7)]
    assert loss_of("tpaw", {"eta": 1.0, "gamma": 0.0}, POLICY, team)[0] == pytest.approx(sum(each) / 3, rel=1e-12)


def test_who_takes_part_in_tpaw() -> None:
    made = methods.make("tpaw", {})
    assert dict(made.roles(0)) == {"opponent": 0, "start": 0, "reference": 0}
    assert dict(made.roles(4)) == {"opponent": 4, "start": 4, "reference": 4, "reference_1": 3, "reference_2": 2}
    assert made.frozen == ("reference", "reference_1", "reference_2") and made.memory == (1.0, 1.0)
    assert methods.make("tpaw", {"n_max": 1}).memory == ()


# --- T-SPIN


@pytest.mark.parametrize(("alpha", "expected"), [(1.0, 10.4018603917), (0.1, 1.4045632128)])
def test_t_spin(alpha: float, expected: float) -> None:
    """vectors.md §4b."""
    loss, slope = loss_of("t_spin", {"alpha": alpha, "beta": 0.1}, (*POLICY, -26.0), {})
    assert loss == pytest.approx(expected, abs=close())
    one, two = (alpha / (1 + math.exp(alpha * d)) for d in (-10.0, -4.0))
    assert slope == pytest.approx([-one, one - 0.1 * two, 0.1 * two], rel=1e-9)


def test_t_spin_in_round_0_has_one_term() -> None:
    assert loss_of("t_spin", {"alpha": 0.1}, POLICY, {})[0] == pytest.approx(math.log1p(math.e), rel=1e-12)


def test_t_spin_of_means() -> None:
    """Ten, five and two tokens: log-probs per token −4, −6, −13."""
    _, logps, batch = batch_of([(*POLICY, -26.0)], {}, lengths=(10, 5, 2))
    loss = methods.make("t_spin", {"length_normalised": True}).loss(logps, batch).item()
    assert loss == pytest.approx(math.log1p(math.exp(-2.0)) + 0.1 * math.log1p(math.exp(-7.0)), rel=1e-12)


# --- pointwise losses


@pytest.mark.parametrize(("mu", "expected"), [(1, 0.4401896986), (3, 0.8760398649)])
def test_space(mu: int, expected: float) -> None:
    """vectors.md §4b: the number of samples is mu."""
    loss, slope = loss_of("space", {}, (-40.0, *[-30.0] * mu), {"reference": (-41.0, *[-28.0] * mu)})
    assert loss == pytest.approx(expected, abs=close())
    on_gold, on_sample = mu * math.exp(-1) / (1 + mu * math.exp(-1)), math.exp(-2) / (mu + math.exp(-2))
    assert slope == pytest.approx([-on_gold, *[on_sample] * mu], rel=1e-9)


@pytest.mark.parametrize(("mu", "expected"), [(1, 1.3863), (3, 2.2493), (7, 3.0142)])
def test_space_at_the_start_of_a_round(mu: int, expected: float) -> None:
    """vectors.md §7: log(1 + mu) + mu log(1 + 1/mu)."""
    row = [-4.0] * (1 + mu)
    loss = loss_of("space", {}, row, {"reference": row})[0]
    assert loss == pytest.approx(expected, abs=5e-5)
    assert loss == pytest.approx(math.log1p(mu) + mu * math.log1p(1 / mu), rel=1e-12)


def test_groups_of_different_sizes_have_their_own_mu() -> None:
    """A smaller group beside a larger one is padded with completions without tokens, which do not count."""
    groups = [
        Group("a", (0,), ((1,), (2,)), (1.0, 0.0), 1.0, ("gold", "s"), 0),
        Group("b", (0,), ((1,), (2,), (3,), (2,)), (1.0, 0.0, 0.0, 0.0), 1.0, ("gold", "s", "t", "u"), 0),
    ]
    held = [Frozen(g.sha, "reference", "p", ((-41.0,), *[(-28.0,)] * (len(g.completions) - 1))) for g in groups]
    batch = collate(groups, {"reference": held}, torch.device("cpu"), torch.float64)
    now = [[[-40.0], [-30.0], [0.0], [0.0]], [[-40.0], [-30.0], [-30.0], [-30.0]]]
    policy = LogProbs(torch.tensor(now, dtype=torch.float64, requires_grad=True), batch.token_weight_BGT)
    found = methods.make("space", {}).loss(policy, batch)
    assert found.tolist() == pytest.approx([0.4401896986, 0.8760398649], abs=close())
    gsil = methods.make("gsil", {"alpha": 1.0, "beta": 0.0}).loss(policy, batch)
    assert gsil.tolist() == pytest.approx([0.4401896986, 0.4401896986], abs=close())
    figures = methods.make("space", {}).metrics(policy, batch)
    assert {name: value.tolist() for name, value in figures.items()} == {
        "margin": pytest.approx([3.0, 3.0]),
        "accuracy": pytest.approx([1.0, 1.0]),
        "logp_gold": [-40.0, -40.0],
        "logp_sample": pytest.approx([-30.0, -30.0]),
        "misaligned": pytest.approx([1.0, 1.0]),
        "ratio_gold": [1.0, 1.0],
        "ratio_sample": pytest.approx([-2.0, -2.0]),
    }
    assert not any(value.requires_grad for value in figures.values())


def test_shares_of_samples_in_the_metrics() -> None:
    """Ratios 1 (gold) and −2, 1, 3: one of three is below; log-probs −40 and −30, −50, −40: one of three is above."""
    policy, reference = (-40.0, -30.0, -50.0, -40.0), (-41.0, -28.0, -51.0, -43.0)
    _, logps, batch = batch_of([policy], {"reference": [reference]})
    figures = methods.make("gsil", {}).metrics(logps, batch)
    assert figures["accuracy"].item() == pytest.approx(1 / 3)
    assert figures["misaligned"].item() == pytest.approx(1 / 3)
    assert figures["ratio_sample"].item() == pytest.approx(2 / 3)
    assert figures["logp_sample"].item() == pytest.approx(-40.0)


GSIL = ("bernoulli", "brier", "hinge", "kliep", "lsif")


@pytest.mark.parametrize(
    ("alpha", "beta", "expected"),
    [
        (0.01, 2.0, (2.2350743933, 0.7860416560, 2.98, 5.2327429852, 18.7653456272)),
        (0.1, 0.0, (1.2425355295, 0.4282942023, 1.7, 0.7187307531, -0.7700108951)),
    ],
)
def test_gsil(alpha: float, beta: float, expected: tuple[float, ...]) -> None:
    """vectors.md §4b, and the gradient by finite differences."""
    for loss, value in zip(GSIL, expected, strict=True):
        hyper: dict[str, object] = {"loss": loss, "alpha": alpha, "beta": beta}
        got, slope = loss_of("gsil", hyper, POLICY, {"reference": T_0})
        assert got == pytest.approx(value, abs=close())
        for i in range(2):
            up, down = ([p + e * (k == i) for k, p in enumerate(POLICY)] for e in (1e-5, -1e-5))
            rise = [loss_of("gsil", hyper, row, {"reference": T_0})[0] for row in (up, down)]
            assert slope[i] == pytest.approx((rise[0] - rise[1]) / 2e-5, abs=1e-8)


def test_gsil_at_the_start_of_a_round() -> None:
    """vectors.md §7, at the released script's beta = 2."""
    for loss, value in zip(GSIL, (2.2539, 0.7900, 3.0, 5.3891, 19.9100), strict=True):
        for alpha in (0.01, 1.0):
            got = loss_of("gsil", {"loss": loss, "alpha": alpha}, T_0, {"reference": T_0})[0]
            assert got == pytest.approx(value, abs=5.1e-5)


def test_several_samples_count_by_their_mean() -> None:
    """Samples with r = −2 and 3: the mean of both one-sample losses."""
    for name, hyper in (("gsil", {"loss": "lsif", "alpha": 0.1}), ("spif", {}), ("gsil", {"loss": "brier"})):
        one, two = (loss_of(name, hyper, (-40.0, p), {"reference": (-41.0, -28.0)})[0] for p in (-30.0, -25.0))
        both = loss_of(name, hyper, (-40.0, -30.0, -25.0), {"reference": (-41.0, -28.0, -28.0)})[0]
        assert both == pytest.approx((one + two) / 2, rel=1e-12)


def test_several_gold_answers_count_by_their_mean() -> None:
    """r = 1 and 3 for gold, −2 for the sample: KLIEP is −(0.1 + 0.3)/2 + e^−0.2."""
    _, logps, batch = batch_of(
        [(-40.0, -41.0, -30.0)], {"reference": [(-41.0, -44.0, -28.0)]}, targets=[(1.0, 1.0, 0.0)]
    )
    loss = methods.make("gsil", {"loss": "kliep", "alpha": 0.1, "beta": 0.0}).loss(logps, batch)
    assert loss.item() == pytest.approx(-0.2 + math.exp(-0.2), rel=1e-12)


def test_hinges_are_0_beyond_1() -> None:
    """f(y) = 2 and f(y') = −2."""
    hyper: dict[str, object] = {"loss": "hinge", "alpha": 1.0, "beta": 0.0}
    assert loss_of("gsil", hyper, (-40.0, -30.0), {"reference": (-42.0, -28.0)}) == (0.0, [0.0, 0.0])


def test_a_gold_answer_cannot_overflow_the_term_of_samples() -> None:
    """f(y) = 400: e^{2f} is beyond float64, but it is the samples' term."""
    loss, slope = loss_of(
        "gsil", {"loss": "lsif", "alpha": 1.0, "beta": 0.0}, (0.0, -30.0), {"reference": (-400.0, -30.0)}
    )
    assert loss == pytest.approx(0.5 - math.exp(400)) and slope == pytest.approx([-math.exp(400), 1.0])


def test_spif() -> None:
    """vectors.md §4b: (.1 − 1)² + (−.2 + 1)²; 2c² at θ = θ_t."""
    loss, slope = loss_of("spif", {"beta": 0.1, "bound": 1.0}, POLICY, {"reference": T_0})
    assert loss == pytest.approx(1.45, rel=1e-12)
    assert slope == pytest.approx([2 * 0.1 * -0.9, 2 * 0.1 * 0.8], rel=1e-12)
    for bound in (1.0, 0.5):
        assert loss_of("spif", {"bound": bound}, T_0, {"reference": T_0})[0] == pytest.approx(2 * bound**2)


GOLD_R, SAMPLE_R = (1.0, -0.5), (-2.0, 0.3)


def iris(tilt: float, **options: Sequence[float]) -> tuple[float, Tensor]:
    """The weighted mean over a batch of two with the ratios of vectors.md §4b, and its gradient [B, G]."""
    rows = list(zip(GOLD_R, SAMPLE_R, strict=True))
    leaf, logps, batch = batch_of(rows, {"reference": [(0.0, 0.0)] * 2}, **options)
    made = methods.make("iris", {"tilt": tilt})
    assert made.coupled
    loss_B = made.loss(logps, batch)
    assert loss_B.shape == (2,)
    mean = (batch.weight_B * loss_B).sum() / batch.weight_B.sum()
    mean.backward()
    assert leaf.grad is not None
    return mean.item(), leaf.grad


@pytest.mark.parametrize(("tilt", "expected"), [(0.5, 1.1943712169), (0.0, 1.1343109636), (1e-9, 1.1343109636)])
def test_iris(tilt: float, expected: float) -> None:
    """vectors.md §4b; the limit is SPACE's batch mean."""
    assert iris(tilt)[0] == pytest.approx(expected, abs=1e-7 if tilt == 1e-9 else close())


def test_iris_with_no_tilt_is_space() -> None:
    rows = list(zip(GOLD_R, SAMPLE_R, strict=True))
    leaf, logps, batch = batch_of(rows, {"reference": [(0.0, 0.0)] * 2}, weights=(3.0, 1.0))
    mean = (methods.make("space", {}).loss(logps, batch) * batch.weight_B).sum() / 4
    mean.backward()
    value, slope = iris(0.0, weights=(3.0, 1.0))
    assert value == pytest.approx(mean.item(), rel=1e-12)
    assert leaf.grad is not None and torch.allclose(slope, leaf.grad, atol=1e-15)


@pytest.mark.parametrize("tilt", [0.5, -0.7, 2.0])
def test_iris_weighs_gold_and_samples_apart(tilt: float) -> None:
    """Gradient: softmax(tilt·loss + log weight) over gold answers, and another over samples, times each own gradient."""
    _, slope = iris(tilt, weights=(3.0, 1.0))
    for column, sign, ratios in ((0, -1.0, GOLD_R), (1, 1.0, SAMPLE_R)):
        losses = [math.log1p(math.exp(sign * r)) for r in ratios]
        heavy = [w * math.exp(tilt * loss) for w, loss in zip((3.0, 1.0), losses, strict=True)]
        for row, r in enumerate(ratios):
            own = sign / (1 + math.exp(-sign * r))
            assert slope[row, column].item() == pytest.approx(heavy[row] / sum(heavy) * own, rel=1e-9)


# --- groups

END = 9


def rendered(name: str, gold: tuple[int, ...] = (1, 2, END)) -> Rendered:
    return Rendered(name, (7, 8), gold, "ab" if gold else "")


def said(name: str, tokens: tuple[int, ...], index: int = 0, t: int = 0, text: str = "?") -> Sample:
    finish: Finish = "stop"
    return Sample(name, f"p{t}" * 20, index, 0, tokens, text, finish, (-1.0,) * len(tokens), "s", round=t)


def test_gold_with_samples_keeps_everything_but_the_empty() -> None:
    rows = [rendered("x"), rendered("y", ()), rendered("z"), rendered("e")]
    samples = [
        said("x", (3, END)),
        said("x", (1, 2, END), 1),  # the gold answer
        said("x", (3, END), 2),  # a double
        said("y", (3, END)),
        said("e", ()),
    ]
    made = gold_with_samples(rows, samples, 4)
    assert [(g.example_id, g.completions, g.targets, g.weight, g.origin_round) for g in made.groups] == [
        ("x", ((1, 2, END), (3, END), (1, 2, END), (3, END)), (1.0, 0.0, 0.0, 0.0), 1.0, 4)
    ]
    assert made.groups[0].sources == ("gold", *(s.id for s in samples[:3])) and made.groups[0].prompt == (7, 8)
    assert made.dropped == {"no_gold": 1, "empty": 1}


@pytest.mark.parametrize("name", ["space", "gsil", "spif", "iris"])
def test_pointwise_methods_make_groups_of_all_samples(name: str) -> None:
    played = Played(2, [rendered("x")], [said("x", (1, 2, END)), said("x", (3, END), 1)])
    assert [len(g.completions) for g in methods.make(name, {}).groups(played).groups] == [3]
    assert dict(methods.make(name, {}).roles(2)) == {"opponent": 2, "reference": 2, "start": 2}


@pytest.mark.parametrize("name", ["tpaw", "alpha_spin", "fictitious_play"])
def test_pairwise_methods_make_spins_pairs(name: str) -> None:
    played = Played(2, [rendered("x")], [said("x", (1, 2, END)), said("x", (3, END), 1), said("x", (3, END), 2)])
    groups = methods.make(name, {}).groups(played).groups
    assert [(g.completions, g.weight, g.origin_round) for g in groups] == [(((1, 2, END), (3, END)), 2.0, 2)]


def test_t_spin_adds_the_first_rounds_answers() -> None:
    made = methods.make("t_spin", {})
    rows = [rendered("x"), rendered("y"), rendered("n", ()), rendered("m")]
    first = [said("x", (4, END)), said("x", ()), said("x", (5, END), 2), said("m", ())]
    now = [
        said("x", (6, END), 0, 2),
        said("x", (1, 2, END), 1, 2, "ab"),  # the gold answer: the second term still moves
        said("x", (7, END), 2, 2),
        said("x", (5, 5, END), 3, 2, "ab"),  # the gold answer in other tokens
        said("x", (), 4, 2),
        said("n", (6, END), 0, 2),
        said("m", (6, END), 0, 2),
    ]
    paired = made.groups(Played(2, rows, now, first))
    assert [g.completions[1:] for g in paired.groups] == [
        ((6, END), (4, END)),
        ((1, 2, END), (5, END)),
        ((7, END), (4, END)),
    ]
    assert {(g.completions[0], g.targets, g.origin_round) for g in paired.groups} == {
        ((1, 2, END), (1.0, 0.0, -1.0), 2)
    }
    assert paired.groups[1].sources == ("gold", now[1].id, first[2].id)
    assert paired.dropped == {"identical": 1, "empty": 1, "no_gold": 1, "no_first": 1}
    assert (list(made.recall(0)), list(made.recall(2)), made.frozen) == ([], [0], ())
    assert dict(made.roles(2)) == {"opponent": 2, "start": 2}
    assert [g.completions for g in made.groups(Played(0, rows, first)).groups] == [
        ((1, 2, END), (4, END)),
        ((1, 2, END), (5, END)),
    ]


def test_the_metrics_of_a_triple_are_those_of_gold_and_sample() -> None:
    _, logps, batch = batch_of([(*POLICY, -26.0)], {}, targets=[[1.0, 0.0, -1.0]])
    figures = methods.make("t_spin", {"alpha": 0.5}).metrics(logps, batch)
    assert figures["margin"].item() == -5.0 and figures["misaligned"].item() == 1.0


# --- SeRA


def sera_frozen(groups: Sequence[Group], table: Mapping[str, Mapping[str, float]]) -> dict[str, list[Frozen]]:
    """Role to frozen log-probs, by the source of each completion, spread over two tokens."""
    return {
        role: [
            Frozen(g.sha, role, "p", tuple((v[s], -0.0) if s != "gold" else (v[s] / 2, v[s] / 2) for s in g.sources))
            for g in groups
        ]
        for role, v in table.items()
    }


def test_sera_in_round_0_is_spin() -> None:
    made = methods.make("sera", {})
    played = Played(0, [rendered("x")], [said("x", (3, END)), said("x", (4, END), 1)])
    groups = made.groups(played).groups
    assert [g.sources[0] for g in groups] == ["gold", "gold"]
    assert made.select is not None and made.select(groups, {"reference": []}) == groups
    assert dict(made.roles(0)) == {"opponent": 0, "reference": 0, "start": 0}
    assert loss_of("sera", {}, POLICY, {"reference": T_0})[0] == pytest.approx(0.5543552445, abs=close())


def test_sera_keeps_the_largest_margins_and_ranks_samples() -> None:
    """Rewards (1 − .25)·log p_t + .25·log p_{t−1} − log p_0 by hand."""
    made = methods.make("sera", {"keep": 0.5, "earlier": 0.25})
    a, b, c = (said("x", (k, END), k, 2) for k in (3, 4, 5))
    paired = made.groups(Played(2, [rendered("x")], [a, b, c]))
    names = [g.sources for g in paired.groups]
    assert names == [("gold", a.id), ("gold", b.id), ("gold", c.id), (a.id, b.id), (a.id, c.id), (b.id, c.id)]
    assert [g.targets for g in paired.groups] == [(1.0, 0.0)] * 3 + [(0.0, 0.0)] * 3
    frozen = sera_frozen(
        paired.groups,
        {
            "reference": {"gold": -8.0, a.id: -4.0, b.id: -12.0, c.id: -4.0},
            "earlier": {"gold": -4.0, a.id: -8.0, b.id: -4.0, c.id: -16.0},
            "base": {"gold": -9.0, a.id: -6.0, b.id: -9.0, c.id: -6.0},
        },
    )
    # Rewards: gold −7 + 9 = 2, a −5 + 6 = 1, b −10 + 9 = −1, c −7 + 6 = −1; margins 1, 3, 3 and 2, 2, 0
    assert made.select is not None
    chosen = made.select(paired.groups, frozen)
    assert [i for i, group in enumerate(chosen) if group is not None] == [1, 2, 3]
    assert [g.targets for g in chosen if g is not None] == [(1.0, 0.0)] * 3
    assert dict(made.roles(2)) == {"opponent": 2, "reference": 2, "start": 2, "earlier": 1, "base": 0}
    assert made.frozen == ("reference", "earlier", "base")


def test_sera_turns_a_pair_around_and_drops_ties() -> None:
    made = methods.make("sera", {"keep": 1.0, "earlier": 0.0})
    a, b, c = (said("x", (k, END), k, 1) for k in (3, 4, 5))
    groups = made.groups(Played(1, [rendered("x")], [a, b, b, c])).groups
    assert [g.weight for g in groups] == [1.0, 2.0, 1.0, 2.0, 1.0, 2.0]
    even = {"gold": 0.0, a.id: 0.0, b.id: 0.0, c.id: 0.0}
    frozen = sera_frozen(groups, {"reference": even | {b.id: 1.0}, "earlier": even | {a.id: 50.0}, "base": even})
    assert made.select is not None
    chosen = made.select(groups, frozen)
    assert [g and g.targets for g in chosen] == [(1.0, 0.0), (1.0, 0.0), (1.0, 0.0), (0.0, 1.0), None, (1.0, 0.0)]
    assert [g.completions for g in chosen if g] == [g.completions for i, g in enumerate(groups) if i != 4]
    plain = methods.make("sera", {"bootstrap": False})
    assert len(plain.groups(Played(1, [rendered("x")], [a, b])).groups) == 2


def test_seras_ranked_pairs_are_chosen_by_the_size_of_their_difference() -> None:
    """Rewards 0, 3, 1: differences −3, −1, 2; the half of largest size is the first, turned around, and the last."""
    made = methods.make("sera", {"keep": 0.5, "earlier": 0.0})
    a, b, c = (said("x", (k, END), k, 1) for k in (3, 4, 5))
    groups = made.groups(Played(1, [rendered("x")], [a, b, c])).groups
    even = {"gold": 0.0, a.id: 0.0, b.id: 0.0, c.id: 0.0}
    frozen = sera_frozen(groups, {"reference": even | {b.id: 3.0, c.id: 1.0}, "earlier": even, "base": even})
    assert made.select is not None
    assert [g and g.targets for g in made.select(groups, frozen)[3:]] == [(0.0, 1.0), None, (1.0, 0.0)]


# --- DITTO


def test_ditto_compares_gold_with_everyone_and_later_with_earlier() -> None:
    made = methods.make("ditto", {})
    assert list(made.recall(2)) == [0, 1] and list(made.recall(0)) == []
    assert dict(made.roles(3)) == {"opponent": 3, "reference": 0, "start": 3}
    zero, one, two = (said("x", (3 + t, END), 0, t) for t in range(3))
    more = said("x", (3, END), 1, 2)  # what round 0 said
    double = said("x", (3, END), 1, 0)
    paired = made.groups(Played(2, [rendered("x"), rendered("y")], [two, more], [zero, double, one]))
    found = [(g.sources, g.origin_round, round(g.weight, 12)) for g in paired.groups]
    # 2 pairs now, weight 2; 2 in replay, weight 3 (one said twice); 3 between (more equals double): 8 in all
    assert found == [
        (("gold", two.id), 2, 2.8),
        (("gold", more.id), 2, 2.8),
        (("gold", zero.id), 0, round(0.2 * 8 * 2 / 3, 12)),
        (("gold", one.id), 1, round(0.2 * 8 / 3, 12)),
        ((one.id, zero.id), 1, round(0.1 * 8 / 3, 12)),
        ((two.id, zero.id), 2, round(0.1 * 8 / 3, 12)),
        ((two.id, one.id), 2, round(0.1 * 8 / 3, 12)),
    ]
    assert {g.targets for g in paired.groups} == {(1.0, 0.0)}
    assert paired.groups[5].completions == ((5, END), (3, END))
    assert made.groups(Played(2, [rendered("x")], [two, more], [zero, double, one])) == made.groups(
        Played(2, [rendered("x")], [two, more], [zero, double, one])
    )


def test_kinds_of_pairs_that_are_missing_leave_their_share() -> None:
    made = methods.make("ditto", {"replay": 0.3, "between": 0.0})
    now, old = said("x", (4, END), 0, 1), said("x", (3, END))
    assert [g.weight for g in made.groups(Played(0, [rendered("x")], [old])).groups] == [1.0]
    weights = [g.weight for g in made.groups(Played(1, [rendered("x")], [now], [old])).groups]
    assert weights == pytest.approx([1.4, 0.6])
    assert ditto_file.later_against_earlier(Played(1, [rendered("x")], [said("x", (), 0, 1)], [old])) == []
    # Gold's equal was the earlier answer: nothing is to be preferred to it
    gold = said("x", rendered("x").gold, 0, 0)
    assert ditto_file.later_against_earlier(Played(1, [rendered("x")], [now], [gold])) == []


def test_ditto_is_dpo_to_player_0() -> None:
    """beta .05, r_0 = −2 and 5: margin −.35."""
    loss = loss_of("ditto", {}, POLICY, {"reference": T_2})[0]
    assert loss == pytest.approx(math.log1p(math.exp(0.35)), rel=1e-12)


# --- refusals and records


@pytest.mark.parametrize(
    ("name", "hyper"),
    [
        ("tpaw", {"beta": 0.0}),
        ("tpaw", {"eta": 0.5}),
        ("tpaw", {"gamma": -1.0}),
        ("tpaw", {"n_max": 0}),
        ("alpha_spin", {"alpha": 1.5}),
        ("alpha_spin", {"memory": -1}),
        ("fictitious_play", {"history": 0}),
        ("fictitious_play", {"beta": -1.0}),
        ("fictitious_play", {"reference_mixture": "median"}),
        ("fictitious_play", {"negatives": "none"}),
        ("fictitious_play", {"loss": "square"}),
        ("t_spin", {"alpha": 0.0}),
        ("t_spin", {"beta": -0.1}),
        ("gsil", {"alpha": 0.0}),
        ("gsil", {"loss": "EPO"}),
        ("spif", {"beta": 0.0}),
        ("spif", {"bound": 0.0}),
        ("sera", {"keep": 0.0}),
        ("sera", {"earlier": 1.1}),
        ("sera", {"beta": 0.0}),
        ("ditto", {"expert": 0.0}),
        ("ditto", {"replay": -0.1}),
        ("space", {"mu": 3}),
    ],
)
def test_hyper_parameters_that_make_no_sense_are_refused_in_one_line(name: str, hyper: dict[str, object]) -> None:
    with pytest.raises(InputError, match=f"method `{name}`: ") as told:
        methods.make(name, hyper)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("name", "status", "pairing"),
    [
        ("tpaw", "reconstruction", {}),
        ("alpha_spin", "reconstruction", {}),
        ("fictitious_play", "reconstruction", {}),
        ("t_spin", "paper", {}),
        ("space", "paper", {}),
        ("gsil", "code", {}),
        ("spif", "reconstruction", {}),
        ("iris", "reconstruction", {}),
        ("sera", "reconstruction", {"bootstrap": True}),
        ("ditto", "code", {"expert": 0.7, "replay": 0.2, "between": 0.1}),
    ],
)
def test_every_method_says_where_it_comes_from(name: str, status: str, pairing: dict[str, object]) -> None:
    made = methods.make(name, {})
    assert (made.name, made.status, dict(made.pairing or {})) == (name, status, pairing)
    assert "arXiv" in made.paper
