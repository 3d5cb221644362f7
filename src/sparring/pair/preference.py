"""Who is preferred to whom: groups from preference data and a verifier's verdicts; pure functions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import cycle, islice
from math import lcm

from sparring.pair.gold import same_answer
from sparring.types import Group, Paired, Rendered, Sample, Score

Answer = tuple[tuple[int, ...], str]
"""Token ids and where they are from (`Group.sources`)."""
MISMATCHED = "mismatched"
"""How the source of an answer to another prompt begins."""


def given_pairs(rows: Sequence[Rendered], origin_round: int) -> Paired:
    """Pairs (gold, the answer that came with the row) with targets (1, 0): chosen and rejected of preference data."""
    groups: list[Group] = []
    dropped: Counter[str] = Counter()
    for row in rows:
        if not row.gold or not row.generated:
            dropped["no_pair"] += 1
        elif row.gold == row.generated:
            dropped["identical"] += 1
        else:
            groups.append(pair(row, (row.gold, "gold"), (row.generated, "generated"), origin_round))
    return Paired(groups, dict(dropped))


def verified_pairs(
    rows: Sequence[Rendered],
    samples: Sequence[Sample],
    scores: Sequence[Score],
    origin_round: int,
    *,
    per_prompt: int,
    with_gold: bool,
    duplicates: str,
) -> Paired:
    """Pairs (right, wrong) of each prompt's answers, walking both lists together and wrapping. IRPO, 2404.19733 §2.

    Gold answers join the right ones, first in their list. Equal pairs are one group, weighted by their number
    (`weight`), or every answer and every pair is taken once (`drop`). A prompt without a wrong answer gives nothing.
    """
    groups: list[Group] = []
    dropped: Counter[str] = Counter()
    for row, verdicts in judged(rows, samples, scores, dropped):
        right = [(row.gold, "gold")] if with_gold and row.gold and "gold" not in row.cut else []
        right += [(s.tokens, s.id) for s, is_right in verdicts if is_right]
        wrong = [(s.tokens, s.id) for s, is_right in verdicts if not is_right]
        if duplicates == "drop":
            before = len(right) + len(wrong)
            right, wrong = _distinct(right), _distinct(wrong)
            dropped["duplicate"] += before - len(right) - len(wrong)
        if not right or not wrong:
            dropped["all_wrong" if wrong else "all_right"] += sum(source != "gold" for _, source in right + wrong)
            continue
        dropped["unused"] += max(0, len(right) - per_prompt) + max(0, len(wrong) - per_prompt)
        count = per_prompt if duplicates == "weight" else min(per_prompt, lcm(len(right), len(wrong)))
        walk = islice(zip(cycle(right), cycle(wrong), strict=False), count)
        groups += merged([pair(row, winner, loser, origin_round) for winner, loser in walk])
    return Paired(groups, {reason: n for reason, n in dropped.items() if n})


def judged(
    rows: Sequence[Rendered], samples: Sequence[Sample], scores: Sequence[Score], dropped: Counter[str]
) -> Iterator[tuple[Rendered, list[tuple[Sample, bool]]]]:
    """Each row with its finished answers and whether they are right; the others are counted in `dropped`.

    So is a gold answer that the verifier calls wrong.
    """
    by_id, known = {row.example_id: row for row in rows}, {sample.id: sample for sample in samples}
    for score in scores:
        verdicts: list[tuple[Sample, bool]] = []
        for name, value in zip(score.samples, score.values, strict=True):
            row, sample = by_id[score.example_id], known[name]
            if value is None:
                dropped["unjudged"] += 1
            elif sample.finish == "length" or not sample.tokens:
                dropped["unfinished"] += 1
            elif value <= 0.5 and same_answer(row, sample):
                dropped["identical"] += 1
            else:
                verdicts.append((sample, value > 0.5))
        yield by_id[score.example_id], verdicts


def pair(row: Rendered, winner: Answer, loser: Answer, origin_round: int, *, label: float = 1.0) -> Group:
    """A group of two with targets (label, 1 − label)."""
    completions, sources = (winner[0], loser[0]), (winner[1], loser[1])
    return Group(row.example_id, row.prompt, completions, (label, 1 - label), 1.0, sources, origin_round)


def alone(row: Rendered, answer: Answer, target: float, origin_round: int) -> Group:
    """A group of one."""
    return Group(row.example_id, row.prompt, (answer[0],), (target,), 1.0, (answer[1],), origin_round)


def merged(groups: Sequence[Group]) -> list[Group]:
    """Equal groups of one example as one, weighted by their number."""
    first: dict[tuple[object, ...], Group] = {}
    for group in groups:
        key = (group.example_id, group.completions, group.targets)
        known = first.get(key)
        first[key] = replace(known, weight=known.weight + group.weight) if known else group
    return list(first.values())


def with_mismatched(made: Paired) -> Paired:
    """Every group of one with another prompt's answer beside its own, for KTO's z0.

    The answers of all groups are moved on, round and round, by as many as the largest prompt has: each stands once
    under another prompt. A group that would get an answer to its own prompt is dropped.
    """
    groups = made.groups
    step = max(Counter(group.prompt for group in groups).values(), default=0)
    others = [groups[(i - step) % len(groups)] for i in range(len(groups))]
    whole = [
        replace(
            group,
            completions=(*group.completions, *other.completions),
            targets=(*group.targets, 0.0),
            sources=(*group.sources, f"{MISMATCHED}, of {other.example_id}"),
        )
        for group, other in zip(groups, others, strict=True)
        if group.prompt != other.prompt
    ]
    lost = len(groups) - len(whole)
    return Paired(whole, made.dropped | ({"no_mismatch": lost} if lost else {}))


def _distinct(answers: Sequence[Answer]) -> list[Answer]:
    first: dict[tuple[int, ...], Answer] = {}
    for answer in answers:
        first.setdefault(answer[0], answer)
    return list(first.values())
