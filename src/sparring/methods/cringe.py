"""Cringe: gold answers by likelihood, own answers unlearnt token by token against what else is likely there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from sparring.late import Tensor
from sparring.losses.cringe import POSITIVE, REDUCTION, Contrast, reduced, unwanted_sum, weighed_by_tokens
from sparring.methods import choice
from sparring.pair import gold_with_samples, same_answer
from sparring.types import Batch, LogProbs, Method, Paired, Played


def method(
    *,
    alpha: float = 0.5,
    k: int = 5,
    positive: str = "sample",
    detach_positive: bool = False,
    reduction: str = "token",
    verifier: str | None = None,
    memory: int = 0,
) -> Method:
    """−log p_θ of positive answers + alpha · Σ_t log(1 + exp(s_t[n_t] − s⁺_t)) of negative ones, s the raw logits.

    s⁺_t is drawn from the softmax over the k largest logits but that of n_t, the negative answer's token.

    alpha, k: 0.5 and 5, the paper's for BlenderBot 2 2.7B as told by a summary; the released code's are 1 and 1.
    positive: `sample` draws s⁺_t (the paper's); `expect` takes the mean over its law, which has no gradient: the same
        gradient in the mean (this library's choice).
    detach_positive: no gradient to s⁺_t; off in the released code.
    reduction: `token`: the sum over a batch by its number of tokens (released code); `sum`: every prompt's plain sum.
    verifier: none: gold is positive and every own answer negative (this library's choice, in SPIN's manner). With one,
        own right answers are positive, wrong ones negative and unjudged ones left out: the paper's classifier step, but
        without its balance of half and half.
    memory: earlier rounds whose groups are trained on again; the paper's iterations add to the training set, so as many
        as there are. None by default (this library's choice).
    """
    if memory < 0:
        raise ValueError(f"memory counts rounds (0, 1, …), not {memory}")
    if alpha < 0:
        raise ValueError(f"alpha must be 0 or above, not {alpha:g}: below it own answers would be reinforced")
    how = Contrast(k, choice("positive", positive, POSITIVE), detach_positive)
    by_token = choice("reduction", reduction, REDUCTION)

    def roles(t: int) -> Mapping[str, int]:
        return {"opponent": t, "start": t}

    def groups(played: Played) -> Paired:
        made = told_apart(played, judged=verifier is not None)
        return replace(made, groups=weighed_by_tokens(made.groups)) if by_token else made

    def objective(policy: LogProbs, batch: Batch) -> Tensor:
        wanted_BG = batch.targets_BG > 0
        likelihood_B = (policy.sum_BG * wanted_BG).sum(-1)
        return reduced(-likelihood_B + alpha * unwanted_sum(policy, batch, ~wanted_BG, how).sum(-1), batch, by_token)

    def metrics(policy: LogProbs, batch: Batch) -> Mapping[str, Tensor]:
        logp_BG = policy.sum_BG.detach()
        own_BG = batch.mask_BGT.any(-1)[:, 1:]
        return {"logp_gold": logp_BG[:, 0], "logp_sample": logp_BG[:, 1:].sum(-1) / own_BG.sum(-1)}

    return Method(
        name="cringe",
        paper="Adolphs et al. 2022, arXiv 2211.05826, as its released code (ParlAI) has it",
        roles=roles,
        groups=groups,
        loss=objective,
        metrics=metrics,
        frozen=(),
        verifier=verifier,
        memory=(1.0,) * memory,
        needs=("policy_logits",),
        pairing={"reduction": reduction},
        status="code",
    )


def told_apart(played: Played, *, judged: bool) -> Paired:
    """Groups (gold, s_1 … s_K), one per prompt; target 1 for gold and for samples that are right, 0 for the others.

    A sample that is the gold answer is left out: it would be learnt and unlearnt at once.
    """
    verdicts = {i: value for s in played.scores for i, value in zip(s.samples, s.values, strict=True)}
    rows = {row.example_id: row for row in played.rows}
    kept = []
    dropped: Counter[str] = Counter()
    for sample in played.samples:
        row = rows.get(sample.example_id)
        if row is not None and same_answer(row, sample):
            dropped["identical"] += 1
        elif judged and verdicts[sample.id] is None:
            dropped["unjudged"] += 1
        else:
            kept.append(sample)
    made = gold_with_samples(played.rows, kept, played.t)
    right = {i for i, value in verdicts.items() if judged and value == 1}
    groups = [
        replace(group, targets=(1.0, *(float(source in right) for source in group.sources[1:])))
        for group in made.groups
    ]
    return Paired(groups, dict(dropped + Counter(made.dropped)))
