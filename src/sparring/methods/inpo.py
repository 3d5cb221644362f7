"""INPO: no-regret steps towards the Nash policy of a KL-regularised preference game."""

from __future__ import annotations

from dataclasses import replace

from sparring.methods import mnpo
from sparring.types import Method


def method(
    *, scorer: str = "verifier:gsm8k", ratio: float = 1 / 3, eta: float = 0.0075, log_probs: str = "sum"
) -> Method:
    """(h − 1/(2η))², h = Δ_θ − (τ/η) Δ_base − (1 − τ/η) Δ_t, Δ = log p(winner) − log p(loser): MNPO with one player.

    An exact step is p_{t+1} ∝ p_base^(τ/η) p_t^(1 − τ/η) exp(P(y > p_t)/η), whose fixed point p ∝ p_base exp(P(y > p)/τ)
    is the Nash policy of the game that pays τ per nat of KL to the base.

    scorer: gives the win rates among a prompt's samples; the best is the winner and the worst the loser (this library's
        choice; not verified against the paper). The default takes a verifier's word (this library's choice).
    ratio: τ/η. The base is player 0. 1/3 and
    eta: 0.0075 are the defaults of MNPO's released code, of which this is a setting.
    log_probs: `sum` (the formula) or `mean` per token.
    """
    made = mnpo.method(scorer=scorer, ratio=ratio, eta=eta, history=1, log_probs=log_probs)
    return replace(made, name="inpo", paper="Zhang et al. 2024, arXiv 2407.00617; TD-MNPO with weights (1, 0)")
