"""ExSPIN: SPIN on the answers that a verifier has found wrong."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import partial

from sparring.late import Tensor
from sparring.losses import CONVEX, log_ratios, pair_columns, pair_metrics
from sparring.methods import choice, previous
from sparring.pair import gold_against_samples
from sparring.types import Batch, LogProbs, Method, Paired, Played


def method(
    *,
    verifier: str = "gsm8k",
    beta: float = 0.1,
    loss: str = "logistic",
    right: str = "drop",
    duplicates: str = "weight",
) -> Method:
    """SPIN's loss on the pairs (gold, sample) whose sample is wrong: right answers in other words are no negatives.

    verifier: tells right from wrong, by execution in the paper (`sql`); the default suits GSM8K's answers. Samples that
        it cannot judge make no pair (this library's choice) and are counted.
    beta: the paper sweeps 0.1 to 1.2; 0.1 is SPIN's.
    loss: logistic, hinge, exponential or correlation, as for SPIN; the paper's is SPIN's.
    right: `drop` the right samples (the paper), or keep their gold answers alone (`gold`): ℓ(β r(gold)), this library's
        reconstruction of SPFT-SQL's error-driven loss (arXiv 2509.03937).
    duplicates: equal samples of one prompt: `weight` counts them, `drop` keeps one.
    """
    if beta <= 0:
        raise ValueError(f"beta must be above 0, not {beta:g}: below it the learner would prefer its old answers")
    convex = choice("loss", loss, CONVEX)
    keep = choice("right", right, {"drop": False, "gold": True})
    choice("duplicates", duplicates, {"weight": 0, "drop": 0})

    def groups(played: Played) -> Paired:
        verdicts = {i: value for s in played.scores for i, value in zip(s.samples, s.values, strict=True)}
        pair = partial(gold_against_samples, played.rows, origin_round=played.t, duplicates=duplicates)
        wrong = pair([s for s in played.samples if verdicts[s.id] == 0])
        rights = [s for s in played.samples if verdicts[s.id] == 1]
        kept = pair(rights) if keep else Paired([], {"right": len(rights)})
        unjudged = len(played.samples) - len(rights) - sum(verdicts[s.id] == 0 for s in played.samples)
        dropped = Counter(wrong.dropped) + Counter(kept.dropped) + Counter(unjudged=unjudged)
        # The sample's target tells the loss whether it counts: 0 where it is wrong
        return Paired([*wrong.groups, *(replace(g, targets=(1.0, 0.5)) for g in kept.groups)], dict(dropped))

    def objective(policy: LogProbs, batch: Batch) -> Tensor:
        gold, sample = pair_columns(log_ratios(policy, batch), batch.targets_BG)
        wrong = (batch.targets_BG.min(-1).values == 0).to(sample.dtype)
        return convex(beta * (gold - wrong * sample))

    return Method(
        name="exspin",
        paper="Liang et al. 2025, Entropy 27(3):235, Algorithm 2, Eq. 11 and 14, from summaries that cite its pages",
        roles=previous,
        groups=groups,
        by_prompt=True,
        loss=objective,
        metrics=partial(pair_metrics, beta=beta),
        verifier=verifier,
        pairing={"right": right, "duplicates": duplicates},
    )
