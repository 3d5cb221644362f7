"""SeRA: the players' own implicit rewards choose which pairs are trained on, and rank pairs of samples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations

from sparring.methods import spin
from sparring.pair import gold_against_samples
from sparring.types import Frozen, Group, Method, Paired, Played


def method(*, beta: float = 0.1, keep: float = 0.7, earlier: float = 0.3, bootstrap: bool = True) -> Method:
    """SPIN on the pairs with the largest implicit reward margins, from round 1 on also on ranked pairs of samples.

    The reward of an answer is (1 − earlier)·log p_t + earlier·log p_{t−1} − log p_0, by players and not by the learner,
    so it is known before training. Round 0 has no reward and keeps every pair. The text of the paper was not accessible
    beyond its idea; roles, defaults and SPIN's loss (to player t) are this library's choice.

    beta: SPIN's 0.1.
    keep: share of the pairs (gold, sample), and of the ranked pairs, that is trained on: those of largest margin.
    earlier: weight of player t − 1 in the ensemble of rewards; 0 is player t alone.
    bootstrap: whether two different samples of one prompt make a pair, the one of higher reward preferred.
    """
    if beta <= 0 or not 0 < keep <= 1 or not 0 <= earlier <= 1:
        raise ValueError(
            f"beta is above 0, keep in 0 … 1 without 0, earlier in 0 … 1; not {beta:g}, {keep:g}, {earlier:g}"
        )

    def roles(t: int) -> Mapping[str, int]:
        judges = {"earlier": t - 1, "base": 0} if t > 0 else {}
        return {"opponent": t, "reference": t, "start": t, **judges}

    def groups(played: Played) -> Paired:
        paired = gold_against_samples(played.rows, played.samples, played.t)
        ranked = sample_pairs(paired.groups) if bootstrap and played.t > 0 else []
        return Paired(paired.groups + ranked, paired.dropped)

    def reward(frozen: Mapping[str, Sequence[Frozen]], i: int, place: int) -> float:
        now, before, base = (math.fsum(frozen[role][i].logps[place]) for role in ("reference", "earlier", "base"))
        return (1 - earlier) * now + earlier * before - base

    def select(groups: Sequence[Group], frozen: Mapping[str, Sequence[Frozen]]) -> Sequence[Group | None]:
        if "base" not in frozen:
            return list(groups)
        chosen: list[Group | None] = [None] * len(groups)
        gaps = [reward(frozen, i, 0) - reward(frozen, i, 1) for i in range(len(groups))]
        ranked = [i for i, group in enumerate(groups) if "gold" not in group.sources]
        gold = [i for i, group in enumerate(groups) if "gold" in group.sources]
        for i in largest(gold, gaps, keep):
            chosen[i] = groups[i]
        for i in largest([i for i in ranked if gaps[i] != 0], [abs(gap) for gap in gaps], keep):
            chosen[i] = replace(groups[i], targets=(1.0, 0.0) if gaps[i] > 0 else (0.0, 1.0))
        return chosen

    return replace(
        spin.method(beta=beta),
        name="sera",
        paper="Ko et al., ICLR 2025, arXiv 2410.09362 (idea)",
        roles=roles,
        groups=groups,
        frozen=("reference", "earlier", "base"),
        select=select,
        pairing={"bootstrap": bootstrap},
        status="reconstruction",
    )


def sample_pairs(pairs: Sequence[Group]) -> list[Group]:
    """Every two different samples of one prompt as a pair whose targets, (0, 0), `select` decides."""
    by_prompt: dict[str, list[Group]] = {}
    for pair in pairs:
        by_prompt.setdefault(pair.example_id, []).append(pair)
    return [
        replace(
            one,
            completions=(one.completions[1], two.completions[1]),
            targets=(0.0, 0.0),
            weight=one.weight * two.weight,
            sources=(one.sources[1], two.sources[1]),
        )
        for same in by_prompt.values()
        for one, two in combinations(same, 2)
    ]


def largest(rows: Sequence[int], values: Sequence[float], share: float) -> list[int]:
    """That share of the rows, rounded up, whose values are largest; the earlier row where they are equal."""
    return sorted(rows, key=lambda i: (-values[i], i))[: math.ceil(share * len(rows))]
