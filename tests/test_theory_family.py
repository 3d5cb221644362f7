"""Exact rounds of the SPIN family on tabular policies, through the library's own losses: fixed points and rates.

Toy T and its closed forms: vectors.md §8.3-8.5. A round minimises the population loss: every pair (y, y') weighted by
p_data(y) q(y'), where q is the law of the opponent's answers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from sparring import methods
from sparring.gradient import collate
from sparring.types import Batch, Frozen, Group, LogProbs
from test_theory import P_0, P_DATA, centred, kl

P_BASE = torch.tensor([0.10, 0.15, 0.20, 0.25, 0.20, 0.10], dtype=torch.float64)
NUDGE = centred(torch.tensor([3.0, -1.0, 2.0, -2.0, 1.0, 0.0], dtype=torch.float64)) * 1e-3
"""A small displacement in log-space, for rates that hold near the fixed point only."""
OTHER = centred(torch.tensor([1.0, 2.0, -3.0, 0.0, -1.0, 2.0], dtype=torch.float64)) * 1e-3


def population(q: Tensor, frozen: Mapping[str, Tensor], copies: int = 1) -> Batch:
    """All groups (y, y' `copies` times) with the frozen roles' log-tables, as one batch of one-token answers."""
    groups, weights = [], (P_DATA[:, None] * q).flatten().tolist()
    pairs = [(i, j) for i in range(6) for j in range(6)]
    for (i, j), weight in zip(pairs, weights, strict=True):
        completions = ((i,), *[(j,)] * copies)
        groups.append(Group("x", (0,), completions, (1.0, *[0.0] * copies), weight, ("gold",), 0))
    held = {
        role: [Frozen(g.sha, role, "p", tuple((float(table[c[0]]),) for c in g.completions)) for g in groups]
        for role, table in frozen.items()
    }
    return collate(groups, held, torch.device("cpu"), torch.float64)


def objective(name: str, hyper: dict[str, Any], log_p: Tensor, batch: Batch) -> Tensor:
    loss_B = methods.make(name, hyper).loss(LogProbs(log_p[batch.tokens_BGT], batch.token_weight_BGT), batch)
    return (batch.weight_B * loss_B).sum() / batch.weight_B.sum()


def solve(name: str, hyper: dict[str, Any], batch: Batch, start: Tensor) -> tuple[Tensor, float]:
    """The minimiser's log-table and the minimum, from the log-table `start`."""
    logits = start.clone().requires_grad_()
    search = torch.optim.LBFGS(
        [logits], max_iter=500, tolerance_grad=1e-14, tolerance_change=1e-20, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        search.zero_grad()
        loss = objective(name, hyper, torch.log_softmax(logits, -1), batch)
        loss.backward()
        return loss

    search.step(closure)  # type: ignore[arg-type]
    return torch.log_softmax(logits.detach(), -1), closure().item()


def slope(name: str, hyper: dict[str, Any], batch: Batch, log_p: Tensor) -> float:
    """Norm of the gradient with respect to the logits."""
    logits = log_p.clone().requires_grad_()
    objective(name, hyper, torch.log_softmax(logits, -1), batch).backward()
    assert logits.grad is not None
    return float(logits.grad.norm())


def near(found: Tensor, expected: Tensor, tolerance: float = 1e-6) -> bool:
    return bool((centred(found) - centred(expected)).abs().max() < tolerance)


# --- alpha-SPIN: vectors.md §8.3


def alpha_round(log_p: Tensor, alpha: float, beta: float) -> Tensor:
    batch = population(log_p.exp(), {"reference": log_p, "base": P_BASE.log()})
    return solve("alpha_spin", {"alpha": alpha, "beta": beta}, batch, log_p)[0]


def test_alpha_spin_rounds_end_between_base_and_data() -> None:
    """p_1, KL of every round and the fixed point p_base^w p_data^(1−w), w = 1/6, at alpha .1, beta 2; eigenvalue .4."""
    alpha, beta = 0.1, 2.0
    w = alpha * beta / (1 + alpha * beta)
    assert w == pytest.approx(1 / 6)
    fixed = torch.log_softmax(w * P_BASE.log() + (1 - w) * P_DATA.log(), -1)
    expected = [0.259042682559, 0.238086899981, 0.207395953635, 0.140630004197, 0.096645937895, 0.058198521732]
    assert fixed.exp().tolist() == pytest.approx(expected, abs=1e-11)
    tables = [P_0.log()]
    for _ in range(4):
        tables.append(alpha_round(tables[-1], alpha, beta))
    first = [0.150375920781, 0.188629146977, 0.204213369666, 0.181478964552, 0.158435926210, 0.116866671814]
    assert tables[1].exp().tolist() == pytest.approx(first, abs=1e-7)
    found = [kl(P_DATA, table) for table in tables]
    assert found == pytest.approx([0.59121123, 0.12668897, 0.03669825, 0.016162069, 0.010352494], abs=2e-7)
    assert kl(P_DATA, fixed) == pytest.approx(0.0072297766, abs=1e-9)
    for before, after in pairwise(tables):
        assert near(after - fixed, 0.4 * (before - fixed))
    assert near(alpha_round(fixed, alpha, beta), fixed)


@pytest.mark.parametrize(("alpha", "beta", "rate"), [(0.1, 0.1, -9.1), (0.5, 0.5, -1.5), (0.5, 1.0, -0.5)])
def test_regularisation_alone_does_not_restore_contraction(alpha: float, beta: float, rate: float) -> None:
    """Eigenvalue 1 − alpha − 1/beta: a larger alpha makes it more negative."""
    w = alpha * beta / (1 + alpha * beta)
    fixed = torch.log_softmax(w * P_BASE.log() + (1 - w) * P_DATA.log(), -1)
    after = alpha_round(torch.log_softmax(fixed + 10 * NUDGE, -1), alpha, beta)
    assert near(after - fixed, rate * 10 * NUDGE)


# --- pointwise losses: vectors.md §8.4


@pytest.mark.parametrize(("mu", "minimum"), [(1, 1.1215947187), (3, 1.8411973006), (7, 2.5226395257)])
def test_space_reaches_the_data_in_one_round(mu: int, minimum: float) -> None:
    found, value = solve("space", {}, population(P_0, {"reference": P_0.log()}, mu), P_0.log())
    assert (found - P_DATA.log()).abs().max() < 1e-6
    assert value == pytest.approx(minimum, abs=5.1e-11)
    assert slope("space", {}, population(P_DATA, {"reference": P_DATA.log()}, mu), P_DATA.log()) < 1e-12


def test_gsil_bernoulli_reaches_the_data_in_one_round() -> None:
    hyper = {"loss": "bernoulli", "alpha": 1.0, "beta": 0.0}
    found, value = solve("gsil", hyper, population(P_0, {"reference": P_0.log()}), P_0.log())
    assert (found - P_DATA.log()).abs().max() < 1e-6
    assert value == pytest.approx(1.1215947187, abs=5.1e-11)


@pytest.mark.parametrize("loss", ["bernoulli", "brier", "hinge", "kliep", "lsif"])
def test_which_gsil_losses_are_stationary_at_the_density_ratio(loss: str) -> None:
    """f = log p_data/p_t (alpha 1, beta 0): all but hinge. At the released offset 2 KLIEP alone, which offsets do not change."""
    batch = population(P_0, {"reference": P_0.log()})
    norm = slope("gsil", {"loss": loss, "alpha": 1.0, "beta": 0.0}, batch, P_DATA.log())
    assert norm > 0.1 if loss == "hinge" else norm < 1e-12
    offset = slope("gsil", {"loss": loss, "alpha": 1.0, "beta": 2.0}, batch, P_DATA.log())
    assert offset < 1e-12 if loss == "kliep" else offset > 0.02


@pytest.mark.parametrize("loss", ["bernoulli", "brier", "hinge", "kliep", "lsif"])
@pytest.mark.parametrize("beta", [0.0, 2.0])
def test_gsil_stays_at_the_data(loss: str, beta: float) -> None:
    """At p_t = p_data both terms' gradients are multiples of E ∇log p = 0, whatever the offset."""
    batch = population(P_DATA, {"reference": P_DATA.log()})
    assert slope("gsil", {"loss": loss, "beta": beta, "alpha": 1.0}, batch, P_DATA.log()) < 1e-12


@pytest.mark.parametrize(
    ("name", "hyper"),
    [
        ("tpaw", {}),
        ("spif", {}),
        ("iris", {"tilt": 0.0}),
        ("iris", {"tilt": 2.0}),
        ("iris", {"tilt": -0.5}),
        ("fictitious_play", {"reference_mixture": "arithmetic"}),
        ("fictitious_play", {}),
        ("sera", {}),
    ],
)
def test_the_family_stays_at_the_data(name: str, hyper: dict[str, Any]) -> None:
    """Every frozen player is p_data: no gradient."""
    frozen = {role: P_DATA.log() for role in methods.make(name, hyper).frozen}
    assert slope(name, hyper, population(P_DATA, frozen), P_DATA.log()) < 1e-12
    assert slope(name, hyper, population(P_0, dict.fromkeys(frozen, P_0.log())), P_0.log()) > 1e-3


# --- SPIF (our own results: docs/methods/spif.md)


def test_spif_minimum() -> None:
    """[(p_data + p_t)·beta·r − bound·(p_data − p_t)] / p_θ is the same for every answer, r = log p_θ/p_t."""
    beta, bound = 0.5, 0.8
    found, _ = solve("spif", {"beta": beta, "bound": bound}, population(P_0, {"reference": P_0.log()}), P_0.log())
    pull = ((P_DATA + P_0) * beta * (found - P_0.log()) - bound * (P_DATA - P_0)) / found.exp()
    assert (pull - pull.mean()).abs().max() < 1e-6
    assert (found - P_0.log()).abs().max() > 0.1


@pytest.mark.parametrize(
    ("beta", "bound", "rate"), [(1.0, 1.0, 0.5), (0.5, 1.0, 0.0), (0.1, 1.0, -4.0), (0.25, 1.0, -1.0)]
)
def test_spif_rate(beta: float, bound: float, rate: float) -> None:
    """Near p_data a round multiplies the log-error by 1 − bound/(2·beta): the threshold is beta > bound/4."""
    start = torch.log_softmax(P_DATA.log() + NUDGE, -1)
    found, _ = solve("spif", {"beta": beta, "bound": bound}, population(start.exp(), {"reference": start}), start)
    assert near(found - P_DATA.log(), rate * NUDGE, 2e-5)


# --- T-SPIN without its second term (our own result: docs/methods/t_spin.md)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_t_spins_first_term_flattens_the_data(alpha: float) -> None:
    """p_{t+1} ∝ (p_data/p_t)^(1/alpha): fixed point p_data^(1/(1+alpha)), rate −1/alpha; alpha = 1 is a two-cycle."""
    first, _ = solve("t_spin", {"alpha": alpha}, population(P_0, {}), P_0.log())
    assert near(first, (P_DATA.log() - P_0.log()) / alpha)
    fixed = torch.log_softmax(P_DATA.log() / (1 + alpha), -1)
    assert slope("t_spin", {"alpha": alpha}, population(fixed.exp(), {}), fixed) < 1e-12
    start = torch.log_softmax(fixed + NUDGE, -1)
    again, _ = solve("t_spin", {"alpha": alpha}, population(start.exp(), {}), start)
    assert near(again - fixed, -NUDGE / alpha)


# --- fictitious play with a history of two: vectors.md §8.5

CASES: dict[str, tuple[str, bool]] = {
    "spin": ("spin", False),
    "mixed reference": ("fictitious_play", False),
    "mixed negatives": ("spin", True),
    "both": ("fictitious_play", True),
}


def coefficients(case: str, beta: float) -> tuple[float, float]:
    """(a, b) of the linearised map u_{t+1} = a·u_t + b·u_{t−1} of the centred log-errors."""
    return {
        "spin": (1 - 1 / beta, 0.0),
        "mixed reference": (0.5 - 1 / beta, 0.5),
        "mixed negatives": (1 - 0.5 / beta, -0.5 / beta),
        "both": (0.5 * (1 - 1 / beta), 0.5 * (1 - 1 / beta)),
    }[case]


def radius(case: str, beta: float) -> float:
    a, b = coefficients(case, beta)
    return float(torch.linalg.eigvals(torch.tensor([[a, b], [1.0, 0.0]], dtype=torch.float64)).abs().max())


def play(case: str, beta: float, now: Tensor, before: Tensor) -> Tensor:
    """One exact round from players t and t − 1; with mixed negatives the pairs of both rounds are the batch."""
    name, mixed = CASES[case]
    q = (now.exp() + before.exp()) / 2 if mixed else now.exp()
    frozen = {"reference": now} | ({"reference_1": before} if name == "fictitious_play" else {})
    return solve(name, {"beta": beta}, population(q, frozen), now)[0]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("beta", [0.4, 2.0])
def test_the_linear_map_of_two_players(case: str, beta: float) -> None:
    now, before = (torch.log_softmax(P_DATA.log() + u, -1) for u in (NUDGE, OTHER))
    a, b = coefficients(case, beta)
    assert near(play(case, beta, now, before) - P_DATA.log(), a * NUDGE + b * OTHER, 3e-5)


@pytest.mark.parametrize(
    ("case", "threshold"), [("spin", 1 / 2), ("mixed reference", 1.0), ("mixed negatives", 1 / 2), ("both", 1 / 3)]
)
def test_the_thresholds_of_contraction(case: str, threshold: float) -> None:
    assert radius(case, threshold) == pytest.approx(1.0, abs=1e-9)
    assert radius(case, 1.02 * threshold) < 1 < radius(case, 0.98 * threshold)


def test_mixing_both_converges_where_spin_does_not() -> None:
    """beta = .4, eight exact rounds: with reference and negatives mixed they contract, in the three others they do not."""
    beta, sizes = 0.4, {}
    for case in CASES:
        now, before = (torch.log_softmax(P_DATA.log() + NUDGE, -1) for _ in range(2))
        for _ in range(8):
            now, before = play(case, beta, now, before), now
        errors = [centred(table - P_DATA.log()).norm() for table in (now, before)]
        sizes[case] = float(sum(errors) / NUDGE.norm())
    assert sizes.pop("both") < 1 < 2 < min(sizes.values())
    assert sizes["mixed reference"] > sizes["spin"] > 20  # mixing the reference alone makes it worse


def test_space_is_gsil_at_one_sample_per_answer() -> None:
    """SPACE's loss differs from GSIL's Bernoulli (alpha 1, beta 0) by no more than rounding at mu = 1."""
    batch = population(P_0, {"reference": P_0.log()})
    bernoulli = {"loss": "bernoulli", "alpha": 1.0, "beta": 0.0}
    values = [
        float(objective(name, hyper, P_BASE.log(), batch)) for name, hyper in (("space", {}), ("gsil", bernoulli))
    ]
    assert math.isclose(*values, rel_tol=1e-14)
