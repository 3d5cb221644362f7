"""Groups from win rates among a prompt's own samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sparring.types import Group, Paired, Played, Rendered, Sample


@dataclass(frozen=True, slots=True)
class Contest:
    """One prompt's samples with what the scorer says of each two."""

    row: Rendered
    samples: tuple[Sample, ...]
    wins: tuple[tuple[float, ...], ...]
    """wins[i][j] is the probability that sample i beats sample j."""

    @property
    def rates(self) -> list[float]:
        """Each sample's estimate of P(y > π_t | x): its mean over all K samples, itself included. Vectors V7."""
        return [sum(row) / len(row) for row in self.wins]

    def group(self, chosen: Sequence[int], targets: Sequence[float], origin_round: int) -> Group:
        """These samples as a group of weight 1."""
        completions = tuple(self.samples[i].tokens for i in chosen)
        sources = tuple(self.samples[i].id for i in chosen)
        return Group(self.row.example_id, self.row.prompt, completions, tuple(targets), 1.0, sources, origin_round)


def contests(played: Played) -> list[Contest]:
    """One contest per prompt, in the order of the scores."""
    rows = {row.example_id: row for row in played.rows}
    samples = {sample.id: sample for sample in played.samples}
    return [
        Contest(rows[score.example_id], tuple(samples[i] for i in score.samples), score.wins) for score in played.scores
    ]


def winner_first(contest: Contest, best: int, worst: int) -> tuple[float, float]:
    """Targets (1, 0): who won is all that the loss reads."""
    return 1.0, 0.0


def best_against_worst(
    played: Played, targets: Callable[[Contest, int, int], tuple[float, float]] = winner_first
) -> Paired:
    """Per prompt the pair of the samples with the highest and the lowest win rate, the first of those that are alike.

    Samples between the two are counted, as are those of prompts whose samples all win alike (`tie`): there is nothing
    to prefer. Source: SPPO's released code, which trains on ties too.
    """
    groups: list[Group] = []
    dropped: Counter[str] = Counter()
    for contest in contests(played):
        rates = contest.rates
        whole = [i for i, sample in enumerate(contest.samples) if sample.tokens]
        dropped["empty"] += len(rates) - len(whole)
        if not whole or max(rates[i] for i in whole) == min(rates[i] for i in whole):
            dropped["tie"] += len(whole)
            continue
        best, worst = max(whole, key=rates.__getitem__), min(whole, key=rates.__getitem__)
        if _same(contest.samples[best], contest.samples[worst]):
            dropped["identical"] += len(whole)
            continue
        dropped["between"] += len(whole) - 2
        groups.append(contest.group((best, worst), targets(contest, best, worst), played.t))
    return Paired(groups, {reason: n for reason, n in dropped.items() if n})


def all_samples(played: Played, targets: Callable[[Contest], Sequence[float]], *, ties: bool) -> Paired:
    """Per prompt one group of all its samples; without `ties` prompts are left out whose samples all win alike."""
    groups: list[Group] = []
    dropped: Counter[str] = Counter()
    for contest in contests(played):
        whole = [i for i, sample in enumerate(contest.samples) if sample.tokens]
        dropped["empty"] += len(contest.samples) - len(whole)
        if not whole or not (ties or len(set(contest.rates)) > 1):
            dropped["tie"] += len(whole)
            continue
        values = targets(contest)
        groups.append(contest.group(whole, [values[i] for i in whole], played.t))
    return Paired(groups, {reason: n for reason, n in dropped.items() if n})


def soft_targets(contest: Contest, best: int, worst: int) -> tuple[float, float]:
    """Targets (q, 1 − q) with q = P(best beats worst)."""
    return contest.wins[best][worst], contest.wins[worst][best]


def _same(one: Sample, other: Sample) -> bool:
    return one.tokens == other.tokens or one.text == other.text
