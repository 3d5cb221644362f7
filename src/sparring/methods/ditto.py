"""DITTO: few demonstrations, above every player's answers; a later player's above an earlier one's."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations

from sparring.methods import spin
from sparring.pair import gold_against_samples, same_answer
from sparring.types import Group, Method, Paired, Played, Sample


def method(*, beta: float = 0.05, expert: float = 0.7, replay: float = 0.2, between: float = 0.1) -> Method:
    """DPO on gold against this round's answers, gold against every earlier round's, and later against earlier answers.

    loss = log(1 + exp(−beta·[log-ratio of the preferred answer − that of the other])), log-ratios to player 0.

    beta: the released code's 0.05.
    expert, replay, between: shares of the three kinds of pairs in the objective, the released code's 0.7, 0.2, 0.1.
        They are weights of the pairs, where the code draws a batch's pairs at random (this library's choice).
    """
    if beta <= 0 or expert <= 0 or min(replay, between) < 0:
        raise ValueError(
            f"beta and expert are above 0, replay and between at least 0; not {beta:g}, {expert:g}, {replay:g}, {between:g}"
        )

    def roles(t: int) -> Mapping[str, int]:
        return {"opponent": t, "reference": 0, "start": t}

    def recall(t: int) -> Sequence[int]:
        return range(max(0, t))

    def groups(played: Played) -> Paired:
        now = gold_against_samples(played.rows, played.samples, played.t)
        old, later = replays(played), later_against_earlier(played)
        return Paired(mixed([(expert, now.groups), (replay, old), (between, later)]), now.dropped)

    # SPIN's loss with player 0 as the reference is DPO's
    return replace(
        spin.method(beta=beta),
        name="ditto",
        paper="Shaikh et al. 2024, arXiv 2406.00888 and its released code",
        roles=roles,
        groups=groups,
        by_prompt=False,  # shares are of all groups
        recall=recall,
        pairing={"expert": expert, "replay": replay, "between": between},
        status="code",
    )


def replays(played: Played) -> list[Group]:
    """Pairs (gold, answer) of every earlier round."""
    rounds = sorted({sample.round for sample in played.recalled})
    return [
        group
        for t in rounds
        for group in gold_against_samples(played.rows, [s for s in played.recalled if s.round == t], t).groups
    ]


def later_against_earlier(played: Played) -> list[Group]:
    """Pairs (later player's answer, earlier player's) to one prompt, the samples taken in their order.

    None of equals, and none with gold's equal: an earlier player's would be the worse answer.
    """
    told: defaultdict[str, defaultdict[int, list[Sample]]] = defaultdict(lambda: defaultdict(list))
    for sample in (*played.recalled, *played.samples):
        if sample.tokens:
            told[sample.example_id][sample.round].append(sample)
    return [
        Group(row.example_id, row.prompt, (new.tokens, old.tokens), (1.0, 0.0), 1.0, (new.id, old.id), late)
        for row in played.rows
        for early, late in combinations(sorted(told[row.example_id]), 2)
        for new, old in zip(told[row.example_id][late], told[row.example_id][early], strict=False)
        if new.tokens != old.tokens and not any(same_answer(row, sample) for sample in (new, old))
    ]


def mixed(kinds: Sequence[tuple[float, Sequence[Group]]]) -> list[Group]:
    """All groups, their weights scaled so that each kind has its share of the objective; the mean weight is kept.

    A kind that has no groups leaves its share to the others.
    """
    present = [(share, groups, sum(g.weight for g in groups)) for share, groups in kinds if share > 0 and groups]
    shares = sum(share for share, _, _ in present)
    whole = sum(weight for _, _, weight in present)
    return [
        replace(group, weight=group.weight * share / shares * whole / weight)
        for share, groups, weight in present
        for group in groups
    ]
