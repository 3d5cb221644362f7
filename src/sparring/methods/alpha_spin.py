"""alpha-SPIN: the reference is a geometric mixture of the last player and the one where self-play started."""

from __future__ import annotations

from dataclasses import replace

from sparring.methods import fictitious_play
from sparring.types import Method


def method(*, beta: float = 0.1, alpha: float = 0.1, memory: int = 0, loss: str = "logistic") -> Method:
    """SPIN with a second KL to player 0: fictitious play with a history of one and a share of the base.

    loss = ℓ(beta·[d log p_θ − alpha·d log p_0 − (1 − alpha)·d log p_t]), d = value at y minus value at y'.

    beta: λ_1 + λ_2, the sum of both KL weights; SPIN's 0.1; the paper's value is not accessible.
    alpha: share of player 0, λ_2/beta: 0 is SPIN, 1 has the fixed reference of DPO. 0.1 is this library's choice; the
        accessible text does not state it. The fixed point is p_0^w p_data^(1−w), w = alpha·beta/(1 + alpha·beta).
    memory: earlier rounds whose pairs are trained on again, as in `spin`.
    loss: logistic, hinge, exponential or correlation.
    """
    if memory < 0:
        raise ValueError(f"memory counts rounds (0, 1, …), not {memory}")
    played = fictitious_play.method(beta=beta, alpha=alpha, history=1, loss=loss)
    return replace(played, name="alpha_spin", memory=(1.0,) * memory)
