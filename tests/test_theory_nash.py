"""Exact steps and fixed points of the Nash family on toy T (vectors.md §8), through the library's own losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor

from sparring import methods
from sparring.gradient import gradient
from sparring.judge.score import wins_from_scores
from sparring.types import Frozen, Group, Method, Played, Rendered, Sample, Score
from test_theory import P_0, Tabular, log_table, policy

REWARD = [1.0, 0.5, 0.0, -0.5, -1.0, -1.5]
P_BASE = torch.tensor([0.10, 0.15, 0.20, 0.25, 0.20, 0.10], dtype=torch.float64)
BEATS = torch.tensor(wins_from_scores(REWARD), dtype=torch.float64)


def frozen_of(groups: Sequence[Group], roles: Mapping[str, Tensor]) -> dict[str, list[Frozen]]:
    """Every role's log-probs, given as its table of probabilities."""
    return {
        role: [Frozen(g.sha, role, role, tuple((float(p[c[0]].log()),) for c in g.completions)) for g in groups]
        for role, p in roles.items()
    }


def slope(model: Tabular, method: Method, groups: Sequence[Group], roles: Mapping[str, Tensor]) -> Tensor:
    """The gradient of one batch at the model, times its total weight."""
    model.first.grad = None
    gradient(model, groups, frozen_of(groups, roles), method, micro_batch=len(groups))
    assert model.first.grad is not None
    return model.first.grad * sum(g.weight for g in groups)


def minimiser(method: Method, groups: Sequence[Group], roles: Mapping[str, Tensor], start: Tensor) -> Tensor:
    """The policy at which the loss of these groups is least, found from `start`."""
    model = policy(start)
    frozen = frozen_of(groups, roles)
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=400, tolerance_grad=1e-13, tolerance_change=1e-18, line_search_fn="strong_wolfe"
    )

    def step() -> float:
        optimizer.zero_grad()
        return gradient(model, groups, frozen, method, micro_batch=len(groups)).loss

    optimizer.step(step)
    return log_table(model).detach()[:, 0].exp()


def every_pair(probabilities: Tensor) -> list[Group]:
    """Both answers from the same policy, the winner drawn by P: the population of own pairs."""
    return [
        Group("x", (0,), ((i,), (j,)), (1.0, 0.0), float(q_i * q_j * BEATS[i, j]), ("w", "l"), 0)
        for i, q_i in enumerate(probabilities)
        for j, q_j in enumerate(probabilities)
        if i != j
    ]


def normalised(weights: Tensor) -> Tensor:
    return weights / weights.sum()


def p_0_as_samples() -> Played:
    """Twenty samples whose shares are p_0 exactly, so that means over samples are expectations."""
    tokens = [y for y in range(6) for _ in range(round(20 * float(P_0[y])))]
    samples = [Sample("x", "sha", k, 0, (y,), str(y), "stop", (0.0,), "how") for k, y in enumerate(tokens)]
    wins = wins_from_scores([REWARD[y] for y in tokens])
    return Played(0, [Rendered("x", (0,), (0,), "")], samples, (), [Score("x", tuple(s.id for s in samples), (), wins)])


def sppo_step(eta: float, log_z: str) -> Tensor:
    method = methods.make("sppo", {"pairs": "all", "eta": eta, "log_z": log_z})
    return minimiser(method, method.groups(p_0_as_samples()).groups, {"reference": P_0}, P_0)


def test_sppos_step_with_the_exact_log_partition_is_multiplicative_weights() -> None:
    """vectors.md §8.7, η = 1, from samples to the minimiser; and the win rates and log Z behind it."""
    rates = BEATS @ P_0
    assert rates.tolist() == pytest.approx(
        [0.811654340, 0.733050537, 0.637851268, 0.531025996, 0.420666878, 0.316250481]
    )
    found = sppo_step(1.0, "exact")
    expected = [0.067476372162, 0.124751139999, 0.170134059483, 0.203862044399, 0.228201256966, 0.205575126991]
    assert found.tolist() == pytest.approx(expected, abs=1e-9)
    assert float((P_0 * rates.exp()).sum().log()) == pytest.approx(0.5118998505, abs=1e-9)


def test_sppos_step_with_half_eta_deviates_as_stated() -> None:
    """vectors.md §8.7: the minimiser over normalised policies with log Z ≈ η/2, and how far it is off."""
    expected = [0.067225868766, 0.124432749659, 0.169919852223, 0.203873841766, 0.228494047792, 0.206053639794]
    found = sppo_step(1.0, "half")
    assert found.tolist() == pytest.approx(expected, abs=1e-9)
    for eta, deviation, digits in [(1.0, 4.8e-4, 5e-6), (0.1, 5e-7, 5e-8), (2.0, 3.1e-3, 5e-5)]:
        weights = normalised(P_0 * (eta * BEATS @ P_0).exp())
        assert float((sppo_step(eta, "half") - weights).abs().max()) == pytest.approx(deviation, abs=digits)
        assert float((sppo_step(eta, "exact") - weights).abs().max()) < 1e-9


def test_inpo_with_the_base_alone_is_ipo() -> None:
    """vectors.md §8.6: summed IPO, reference p_base, τ = .5, both responses from p_0."""
    method = methods.make("inpo", {"ratio": 1.0, "eta": 0.5})
    found = minimiser(method, every_pair(P_0), {"base": P_BASE, "reference": P_0}, P_0)
    expected = [0.156077994990, 0.200059206210, 0.220499821917, 0.222602995359, 0.142811861183, 0.057948120342]
    assert found.tolist() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("ratio", "eta"), [(1 / 3, 0.9), (0.8, 0.5), (0.0, 2.0)])
def test_inpos_exact_step(ratio: float, eta: float) -> None:
    """p_{t+1} ∝ p_base^(τ/η) p_t^(1 − τ/η) exp(P(y > p_t)/η)."""
    method = methods.make("inpo", {"ratio": ratio, "eta": eta})
    found = minimiser(method, every_pair(P_0), {"base": P_BASE, "reference": P_0}, P_0)
    expected = normalised(P_BASE**ratio * P_0 ** (1 - ratio) * (BEATS @ P_0 / eta).exp())
    assert float((found - expected).abs().max()) < 1e-9


def test_mnpos_exact_step() -> None:
    """The same with p_t^λ p_{t−1}^(1 − λ) in the place of p_t; answers still come from p_t."""
    before = P_BASE.flip(0)
    method = methods.make("mnpo", {"ratio": 0.25, "eta": 1.0, "history_weights": (0.7, 0.3), "log_probs": "sum"})
    roles = {"base": P_BASE, "reference": P_0, "reference_1": before}
    found = minimiser(method, every_pair(P_0), roles, P_0)
    expected = normalised(P_BASE**0.25 * P_0 ** (0.75 * 0.7) * before ** (0.75 * 0.3) * (BEATS @ P_0).exp())
    assert float((found - expected).abs().max()) < 1e-9


def nash(tau: float) -> Tensor:
    """The Nash policy of the game with τ per nat of KL to the base: p ∝ p_base exp(P(y > p)/τ)."""
    p = P_BASE
    for _ in range(500):
        p = normalised((p * normalised(P_BASE * (BEATS @ p / tau).exp())).sqrt())
    return p


def test_inpo_rests_at_the_nash_policy_and_approaches_it() -> None:
    """Its fixed point is p ∝ p_base exp(P(y > p)/τ), τ = ratio · η; from p_0 the rounds come nearer."""
    ratio, eta = 0.5, 1.0
    rest = nash(ratio * eta)
    method = methods.make("inpo", {"ratio": ratio, "eta": eta})
    roles = {"base": P_BASE, "reference": rest}
    assert slope(policy(rest), method, every_pair(rest), roles).norm() < 1e-12
    assert slope(policy(P_0), method, every_pair(P_0), roles | {"reference": P_0}).norm() > 1e-2
    p = P_0
    for _ in range(14):
        p = minimiser(method, every_pair(p), {"base": P_BASE, "reference": p}, p)
    assert float((p - rest).abs().max()) < 1e-4


def singles(probabilities: Tensor, targets: Tensor) -> list[Group]:
    return [Group("x", (0,), ((y,),), (float(targets[y]),), float(q), ("s",), 0) for y, q in enumerate(probabilities)]


def logit_gradient(objective: Tensor, logits: Tensor) -> Tensor:
    [grad] = torch.autograd.grad(objective, logits)
    return grad


def test_nash_mds_first_step_is_the_games_gradient() -> None:
    """On-policy the expected gradient is that of β KL(p_θ ‖ p_base) − P(p_θ > mixture)."""
    mixture = normalised((P_0 * P_BASE).sqrt())
    method = methods.make("nash_md", {"beta": 0.3})
    found = slope(policy(P_0), method, singles(P_0, BEATS @ mixture), {"reference": P_BASE})
    logits = P_0.log().requires_grad_()
    p = torch.softmax(logits, -1)
    objective = 0.3 * (p * (p.log() - P_BASE.log())).sum() - p @ BEATS @ mixture
    assert torch.allclose(found, logit_gradient(objective, logits), atol=1e-12)


def test_nash_md_rests_where_the_rival_is_the_player_itself() -> None:
    """share = 0, β = τ: the gradient vanishes at the Nash policy."""
    rest = nash(0.4)
    method = methods.make("nash_md", {"beta": 0.4, "share": 0.0})
    assert slope(policy(rest), method, singles(rest, BEATS @ rest), {"reference": P_BASE}).norm() < 1e-12


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_spos_first_step_is_the_gradient_of_the_win_rate(ratio: str) -> None:
    """At p_θ = p_t the gradient is that of −P(p_θ > p_t), from samples whose shares are p_0."""
    method = methods.make("spo", {"ratio": ratio})
    found = slope(policy(P_0), method, method.groups(p_0_as_samples()).groups, {"reference": P_0})
    logits = P_0.log().requires_grad_()
    assert torch.allclose(found, logit_gradient(-(torch.softmax(logits, -1) @ BEATS @ P_0), logits), atol=1e-12)
