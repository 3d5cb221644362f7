"""Samples and gold answers to groups: pure functions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from sparring.types import Group, Paired, Rendered, Sample


def gold_alone(rows: Sequence[Rendered], origin_round: int, *, by_token: bool) -> Paired:
    """One group of one completion per row with a gold answer, weighted by its number of tokens or all alike."""
    groups = [
        Group(
            r.example_id, r.prompt, (r.gold,), (1.0,), float(len(r.gold)) if by_token else 1.0, ("gold",), origin_round
        )
        for r in rows
        if r.gold
    ]
    return Paired(groups, _counts(no_gold=len(rows) - len(groups)))


def gold_against_samples(
    rows: Sequence[Rendered], samples: Sequence[Sample], origin_round: int, *, duplicates: str = "weight"
) -> Paired:
    """Pairs (gold, sample) with targets (1, 0), in the order of rows and sample indices. SPIN Algorithm 1.

    A sample that is the gold answer makes no pair: with the same tokens its gradient is zero, and with the same
    finished text in other tokens it would teach the learner to prefer one spelling of an answer to another. Equal
    samples of one prompt make one pair, weighted by their number (`weight`) or not (`drop`).
    """
    by_id = {row.example_id: row for row in rows}
    pairs: dict[tuple[str, tuple[int, ...]], Group] = {}
    dropped: Counter[str] = Counter()
    for sample in samples:
        row = by_id.get(sample.example_id)
        if row is None or not row.gold:
            dropped["no_gold"] += 1
        elif not sample.tokens:
            dropped["empty"] += 1
        elif same_answer(row, sample):
            dropped["identical"] += 1
        else:
            key = (row.example_id, sample.tokens)
            known = pairs.get(key)
            if known is None:
                completions = (row.gold, sample.tokens)
                sources = ("gold", sample.id)
                pairs[key] = Group(row.example_id, row.prompt, completions, (1.0, 0.0), 1.0, sources, origin_round)
            elif duplicates == "drop":
                dropped["duplicate"] += 1
            else:
                pairs[key] = replace(known, weight=known.weight + 1.0)
    return Paired(list(pairs.values()), _counts(**dropped))


def gold_with_samples(rows: Sequence[Rendered], samples: Sequence[Sample], origin_round: int) -> Paired:
    """Groups (gold, s_1 … s_K) with targets (1, 0 … 0), one per prompt with samples, in the order of the rows.

    For losses that take every completion alone: a sample that is the gold answer, or another's equal, stays.
    """
    by_id = {row.example_id: row for row in rows if row.gold}
    told: dict[str, list[Sample]] = {name: [] for name in by_id}
    dropped: Counter[str] = Counter()
    for sample in samples:
        if sample.example_id not in told:
            dropped["no_gold"] += 1
        elif not sample.tokens:
            dropped["empty"] += 1
        else:
            told[sample.example_id].append(sample)
    groups = [
        Group(
            name,
            by_id[name].prompt,
            (by_id[name].gold, *(s.tokens for s in own)),
            (1.0, *[0.0] * len(own)),
            1.0,
            ("gold", *(s.id for s in own)),
            origin_round,
        )
        for name, own in told.items()
        if own
    ]
    return Paired(groups, _counts(**dropped))


def same_answer(row: Rendered, sample: Sample) -> bool:
    """Whether a sample is the gold answer, by tokens or, when finished, by text."""
    return sample.tokens == row.gold or (
        sample.finish == "stop" and "gold" not in row.cut and sample.text == row.gold_text
    )


def replayed(groups: Sequence[Group], weight: float) -> list[Group]:
    """Groups of an earlier round with their weight scaled, for a method's `memory`."""
    return [replace(group, weight=group.weight * weight) for group in groups]


def _counts(**counts: int) -> dict[str, int]:
    return {reason: n for reason, n in counts.items() if n}
