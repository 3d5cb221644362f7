"""TPAW: the learner against a team of recent players, each weighed by how hard it is."""

from __future__ import annotations

from collections.abc import Mapping

from sparring.late import Tensor, torch
from sparring.losses import log_ratios, logistic, pair_columns, pair_metrics
from sparring.pair import gold_against_samples
from sparring.types import Batch, LogProbs, Method, Paired, Played

ROUNDING = 1e-4
"""Nats. A round starts at P_t(y) = 0, which two forward passes reproduce to rounding only: still taken for 0."""


def method(*, beta: float = 0.1, eta: float = 6.0, gamma: float = 0.5, n_max: int = 3) -> Method:
    """SPIN's loss against players t, t−1, … at once, on the pairs of the same rounds.

    With P_j(u) = beta·log p_θ(u)/p_j(u), margin m_j = P_j(y) − P_j(y'):
    loss = Σ_j softmax_j(−gamma·m_j) · log(1 + exp(−(α_j·P_j(y) − P_j(y')))), α_j = eta where P_j(y) ≤ 0, else 1.

    beta: λ; SPIN's 0.1 is this library's choice; the accessible text does not state it.
    eta: weight of a gold answer whose reward has fallen to 0 or below; the paper's 6. 1 is no such weight.
    gamma: how much the hardest player leads; the paper's 0.5. 0 weighs all alike.
    n_max: size of the team and number of rounds whose pairs are trained on; the paper's 3.
    """
    if beta <= 0 or eta < 1 or gamma < 0:
        raise ValueError(f"beta is above 0, eta at least 1, gamma at least 0; not {beta:g}, {eta:g}, {gamma:g}")
    if n_max < 1:
        raise ValueError(f"n_max counts players (1, 2, …), not {n_max}")
    team = ("reference", *(f"reference_{k}" for k in range(1, n_max)))

    def roles(t: int) -> Mapping[str, int]:
        # The learner's first rounds have a smaller team: only players of self-play take part
        earlier = {role: t - k for k, role in enumerate(team) if k == 0 or t - k >= 0}
        return {"opponent": t, "start": t, **earlier}

    def groups(played: Played) -> Paired:
        return gold_against_samples(played.rows, played.samples, played.t)

    def rewards(policy: LogProbs, batch: Batch) -> tuple[Tensor, Tensor]:
        present = [role for role in team if role in batch.frozen]
        columns = [pair_columns(beta * log_ratios(policy, batch, role), batch.targets_BG) for role in present]
        return torch.stack([gold for gold, _ in columns], -1), torch.stack([sample for _, sample in columns], -1)

    def weights(gold_BJ: Tensor, sample_BJ: Tensor) -> tuple[Tensor, Tensor]:
        # Detaching changes no gradient: α is a step, and the learner's part of m_j is the same for every player
        gold, sample = gold_BJ.detach(), sample_BJ.detach()
        alpha_BJ = torch.where(gold <= beta * ROUNDING, eta, 1.0)
        return alpha_BJ, torch.softmax(-gamma * (gold - sample), -1)

    def objective(policy: LogProbs, batch: Batch) -> Tensor:
        gold_BJ, sample_BJ = rewards(policy, batch)
        alpha_BJ, share_BJ = weights(gold_BJ, sample_BJ)
        return (share_BJ * logistic(alpha_BJ * gold_BJ - sample_BJ)).sum(-1)

    def metrics(policy: LogProbs, batch: Batch) -> Mapping[str, Tensor]:
        gold_BJ, sample_BJ = rewards(policy, batch)
        _, share_BJ = weights(gold_BJ, sample_BJ)
        fallen = (gold_BJ.detach() <= beta * ROUNDING).double().mean(-1)
        return {**pair_metrics(policy, batch, beta), "fallen": fallen, "hardest": share_BJ.amax(-1)}

    return Method(
        name="tpaw",
        paper="Wu et al. 2026, ACL long.847, arXiv 2605.09922, from a description: its full text was not accessible",
        roles=roles,
        groups=groups,
        by_prompt=True,
        loss=objective,
        metrics=metrics,
        frozen=team,
        memory=(1.0,) * (n_max - 1),
        pairing={},
        status="reconstruction",
    )
