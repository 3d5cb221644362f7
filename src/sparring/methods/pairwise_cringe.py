"""Pairwise Cringe: the Cringe loss of a pair, through a gate that shuts once the learner tells the two apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from sparring.late import Tensor, torch
from sparring.losses import pair_columns, pair_metrics
from sparring.losses.cringe import POSITIVE, REDUCTION, Contrast, reduced, unwanted_sum, weighed_by_tokens
from sparring.methods import choice, dpo
from sparring.types import Batch, LogProbs, Method, Paired, Played


def method(
    *,
    alpha: float = 0.5,
    k: int = 5,
    b: float = 0.0,
    tau: float = 10.0,
    detach_gate: bool = True,
    positive: str = "sample",
    detach_positive: bool = False,
    reduction: str = "sum",
    pairs: str = "gold",
    verifier: str = "gsm8k",
    scorer: str | None = None,
    per_prompt: int = 10,
    with_gold: bool = True,
) -> Method:
    """g · [−log p_θ(y_w) + alpha · Cringe(y_l)], g = σ((b − M)/tau), M = log p_θ(y_w) − log p_θ(y_l); no reference.

    The paper's symbols, constants and treatment of g were not accessible: what follows is this library's choice.

    alpha, k: as for `cringe`: weight of the negative answer and number of likely tokens that it is held against.
    b: margin in nats at which the gate is half shut; 0.
    tau: softness of the gate in nats; 10. Towards 0 it trains pairs with M < b and no others.
    detach_gate: no gradient through g; off, the loss also falls by widening the margin.
    positive, detach_positive: as for `cringe`.
    reduction: `sum` over a pair's tokens, or divided by their number, which is then the pair's weight (`token`).
    pairs, verifier, scorer: where pairs come from, as for `dpo`: `gold`, `data`, `verified` or `best_worst`, which is
        the paper's with its reward model as scorer.
    per_prompt, with_gold: of `verified`, as for `dpo`: pairs of a prompt, and whether gold counts among the right answers.
    """
    if alpha < 0 or tau <= 0:
        raise ValueError(f"alpha is at least 0 and tau above 0; not {alpha:g} and {tau:g}")
    how = Contrast(k, choice("positive", positive, POSITIVE), detach_positive)
    by_token = choice("reduction", reduction, REDUCTION)
    pairing = dpo.method(
        loss="simpo", pairs=pairs, verifier=verifier, scorer=scorer, per_prompt=per_prompt, with_gold=with_gold
    )

    def groups(played: Played) -> Paired:
        made = pairing.groups(played)
        return replace(made, groups=weighed_by_tokens(made.groups)) if by_token else made

    def gate(policy: LogProbs, batch: Batch) -> Tensor:
        winner_B, loser_B = pair_columns(policy.sum_BG, batch.targets_BG)
        return torch.sigmoid((b - (winner_B - loser_B)) / tau)

    def objective(policy: LogProbs, batch: Batch) -> Tensor:
        winner_B, _ = pair_columns(policy.sum_BG, batch.targets_BG)
        first_B = batch.targets_BG[:, 0] >= batch.targets_BG[:, 1]
        unwanted_B = unwanted_sum(policy, batch, torch.stack([~first_B, first_B], -1), how).sum(-1)
        gate_B = gate(policy, batch)
        both_B = reduced(alpha * unwanted_B - winner_B, batch, by_token)
        return (gate_B.detach() if detach_gate else gate_B) * both_B

    def metrics(policy: LogProbs, batch: Batch) -> Mapping[str, Tensor]:
        return {**pair_metrics(policy, batch), "gate": gate(policy, batch).detach()}

    return replace(
        pairing,
        name="pairwise_cringe",
        paper="Xu et al. 2023, arXiv 2312.16682, from its abstract and reviews; the Cringe term as in `cringe`",
        groups=groups,
        loss=objective,
        metrics=metrics,
        needs=("policy_logits",),
        pairing={**(pairing.pairing or {}), "reduction": reduction},
        status="reconstruction",
    )
