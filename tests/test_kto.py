"""KTO: values, where its gradients go, and which answers stand beside which."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sparring import methods
from sparring.errors import InputError
from sparring.losses.preference import kto
from sparring.pair.preference import merged
from sparring.stages.pair import _Lengths
from sparring.types import Batch, Group, LogProbs, Played, Rendered, Sample, Score
from test_dpo import row, sample, score

# Common inputs I (vectors.md): log-ratios of the chosen and of the rejected answers
A = [1.0, -2.0, 0.0, 27.0]
B = [-0.5, 5.0, 0.0, -60.0]


def batch_of(
    ratios: Sequence[float], others: Sequence[float], desirable: Sequence[bool], weights: Sequence[float] | None = None
) -> tuple[LogProbs, Batch]:
    """Answers of two tokens with these log-ratios to a reference of −1 each, and the mismatched ones beside."""
    half = torch.tensor([ratios, others], dtype=torch.float64).T[..., None] / 2
    policy = (half.expand(-1, -1, 2) - 0.5).clone().requires_grad_()
    ones = torch.ones(policy.shape, dtype=torch.float64)
    targets = torch.tensor([[float(good), 0.0] for good in desirable], dtype=torch.float64)
    weight_B = torch.tensor(weights or [1.0] * len(ratios), dtype=torch.float64)
    frozen = {"reference": LogProbs(-0.5 * ones, ones)}
    return LogProbs(policy, ones), Batch(torch.zeros(ones.shape, dtype=torch.long), ones > 0, targets, weight_B, frozen)


def values(policy: LogProbs, batch: Batch, **hyper: object) -> Tensor:
    return methods.make("kto", hyper).loss(policy, batch)


# --- values ----------------------------------------------------------------------------------------------------------


def test_desirable_and_undesirable() -> None:
    """vectors.md §4, common inputs II: u = 1 and v = −2 at z0 = 0.5."""
    found = values(*batch_of([1.0, -2.0], [1.2, -0.2], [True, False]))
    assert found.tolist() == pytest.approx([0.487503, 0.437823], abs=5.1e-7)
    found = values(*batch_of([1.0, -2.0], [1.2, -0.2], [True, False]), desirable=1.25, undesirable=0.5)
    assert found.tolist() == pytest.approx([1.25 * 0.487503, 0.5 * 0.437823], abs=1e-6)


def test_kto_pair() -> None:
    """vectors.md V8: z0 of each half is the other half's mean log-ratio, at least 0 (here 0 and 6.5)."""
    chosen = values(*batch_of(A, B, [True] * 4)).tolist()
    rejected = values(*batch_of(B, A, [False] * 4)).tolist()
    assert chosen == pytest.approx([0.47502081, 0.54983400, 0.5, 0.06297336], abs=5.1e-9)
    assert rejected == pytest.approx([0.33181223, 0.46257015, 0.34298954, 0.00129235], abs=5.1e-9)


def test_half_where_a_round_starts() -> None:
    """vectors.md §7."""
    assert values(*batch_of([0.0, 0.0], [0.0, 0.0], [True, False])).tolist() == [0.5, 0.5]


def test_z0_zero_is_apo_zero() -> None:
    """The two halves add up to vectors.md V10's apo_zero."""
    up = values(*batch_of(A, B, [True] * 4), z0="zero")
    down = values(*batch_of(B, A, [False] * 4), z0="zero")
    assert (up + down).tolist() == pytest.approx([0.962523, 1.172293, 1, 0.065446], abs=5.1e-7)


def test_z0_is_the_weighted_mean_and_never_negative() -> None:
    policy, batch = batch_of([1.0, -2.0], [2.0, -1.0], [True, False], weights=[3.0, 1.0])
    figures = methods.make("kto", {}).metrics(policy, batch)
    assert figures["z0"].tolist() == [1.25, 1.25]  # (3·2 − 1) / 4
    assert figures["margin"].tolist() == pytest.approx([0.1 * (1 - 1.25), 0.1 * (2 + 1.25)])
    assert figures["accuracy"].tolist() == [0.0, 1.0]
    assert figures["desirable"].tolist() == [1.0, 0.0]
    assert figures["ratio"].tolist() == pytest.approx([1.0, -2.0])
    below = methods.make("kto", {}).metrics(*batch_of([1.0, -2.0], [-2.0, 1.0], [True, False]))
    assert below["z0"].tolist() == [0.0, 0.0]


def test_gradients() -> None:
    """d/dr = −λ_D β σ(1−σ) for desirable answers, +λ_U β σ(1−σ) for others; none through z0."""
    policy, batch = batch_of([1.0, -2.0], [1.2, -0.2], [True, False])
    values(policy, batch, beta=0.3, desirable=2.0, undesirable=0.5).sum().backward()
    slope = [1 / (1 + math.exp(-x)) for x in (0.3 * 0.5, 0.3 * -2.5)]
    expected = [-2.0 * 0.3 * slope[0] * (1 - slope[0]), 0.5 * 0.3 * slope[1] * (1 - slope[1])]
    grad = policy.token_BGT.grad
    assert grad is not None
    assert grad[:, 0, 0].tolist() == pytest.approx(expected, rel=1e-12)
    assert grad[:, 1].abs().max().item() == 0.0


def test_the_function_alone() -> None:
    ratio = torch.tensor([1.0, -2.0], dtype=torch.float64)
    assert kto(ratio, torch.tensor([True, False]), 0.5, beta=0.1).tolist() == pytest.approx(
        [0.487503, 0.437823], abs=1e-6
    )
    far = kto(torch.tensor([1e5, -1e5]), torch.tensor([True, False]), 0.0, beta=1.0)
    assert far.tolist() == [0.0, 0.0]


# --- groups ----------------------------------------------------------------------------------------------------------

END = 9


def short(groups: Sequence[Group]) -> list[tuple[str, int, float, float]]:
    """Example, first token, target, weight."""
    return [(g.example_id, g.completions[0][0], g.targets[0], g.weight) for g in groups]


def made_of(played: Played, **hyper: object) -> tuple[list[tuple[str, int, float, float]], dict[str, int]]:
    made = methods.make("kto", {"z0": "zero", **hyper}).groups(played)
    assert all(len(g.completions) == len(g.targets) == len(g.sources) == 1 for g in made.groups)
    return short(made.groups), made.dropped


ROWS: list[Rendered] = [
    row("a", (1, END), (2, END)),
    row("b", (3, END)),
    row("c", (), (4, END)),
    row("d", (5, END), (5, END)),
]


def test_answers_of_the_data_need_no_partner() -> None:
    found, dropped = made_of(Played(1, ROWS))
    assert found == [("a", 1, 1.0, 1.0), ("a", 2, 0.0, 1.0), ("b", 3, 1.0, 1.0), ("c", 4, 0.0, 1.0)]
    assert dropped == {"identical": 1}
    groups = methods.make("kto", {"z0": "zero"}).groups(Played(1, ROWS)).groups
    assert [(g.sources, g.origin_round) for g in groups[:2]] == [(("gold",), 1), (("generated",), 1)]


def own() -> list[Sample]:
    return [sample("a", i, (t, END)) for i, t in enumerate([6, 6, 7, 1])] + [sample("b", 0, (8,), finish="length")]


def test_gold_against_own_answers_in_halves() -> None:
    """Equal numbers of both kinds: the gold answer counts as often as the samples it is held against."""
    found, dropped = made_of(Played(0, ROWS, own()), answers="gold")
    gold = [("a", 1, 1.0, 3.0), ("b", 3, 1.0, 1.0)]
    assert sorted(found) == sorted([*gold, ("a", 6, 0.0, 2.0), ("a", 7, 0.0, 1.0), ("b", 8, 0.0, 1.0)])
    assert dropped == {"identical": 1}


def test_verified_answers() -> None:
    samples = own()
    samples.insert(4, sample("a", 4, (1, END), "again"))  # gold that is called wrong
    scores: list[Score] = [score(samples[:5], values=(0.0, 0.0, None, 1.0, 0.0)), score(samples[5:], values=(1.0,))]
    played = Played(0, ROWS, samples, scores=scores)
    found, dropped = made_of(played, answers="verified")
    assert found == [("a", 1, 1.0, 2.0), ("a", 6, 0.0, 2.0), ("b", 3, 1.0, 1.0)]
    assert dropped == {"unjudged": 1, "unfinished": 1, "identical": 1}
    found, _ = made_of(played, answers="verified", with_gold=False)
    assert found == [("a", 6, 0.0, 2.0), ("a", 1, 1.0, 1.0)]
    cut = [replace(ROWS[0], cut=("gold",)), *ROWS[1:]]
    assert made_of(replace(played, rows=cut), answers="verified")[0] == [
        ("a", 6, 0.0, 2.0), ("a", 1, 1.0, 1.0), ("b", 3, 1.0, 1.0),
    ]  # fmt: skip


def test_equal_answers_are_merged_by_verdict_and_example() -> None:
    one = Group("a", (7,), ((1, END),), (1.0,), 1.0, ("gold",), 0)
    apart = [one, replace(one, targets=(0.0,)), replace(one, example_id="b"), replace(one, completions=((2, END),))]
    assert merged([*apart, replace(one, weight=2.5, sources=("x",))]) == [replace(one, weight=3.5), *apart[1:]]


def test_every_answer_stands_once_under_another_prompt() -> None:
    rows = [row(name, (i, END), (10 + i, END)) for i, name in enumerate("abcd", 1)]
    made = methods.make("kto", {}).groups(Played(0, rows))
    first = [g.completions[0][0] for g in made.groups]
    beside = [g.completions[1][0] for g in made.groups]
    assert first == [1, 11, 2, 12, 3, 13, 4, 14]
    assert beside == [4, 14, 1, 11, 2, 12, 3, 13]  # moved on by two, the largest number of one prompt
    assert [g.targets for g in made.groups[:2]] == [(1.0, 0.0), (0.0, 0.0)]
    assert made.groups[2].sources == ("gold", "mismatched, of a")
    assert made.dropped == {}


def test_a_prompt_alone_has_no_mismatch() -> None:
    made = methods.make("kto", {}).groups(Played(0, [row("a", (1, END), (2, END))]))
    assert (made.groups, made.dropped) == ([], {"no_mismatch": 2})
    assert methods.make("kto", {}).groups(Played(0, [])).groups == []
    # Other examples of the same prompt are no mismatch either
    twins = [row("a", (1, END)), replace(row("b", (2, END)), prompt=row("a").prompt), row("c", (3, END))]
    made = methods.make("kto", {}).groups(Played(0, twins))
    assert [(g.completions[0][0], g.completions[1][0]) for g in made.groups] == [(2, 3), (3, 1)]
    assert made.dropped == {"no_mismatch": 1}


# --- the record ------------------------------------------------------------------------------------------------------


def test_who_takes_part() -> None:
    data, gold = methods.make("kto", {}), methods.make("kto", {"answers": "gold"})
    assert (data.roles(1), data.plays, data.frozen) == ({"reference": 1, "start": 1}, (), ("reference",))
    assert gold.roles(1) == {"opponent": 1, "reference": 1, "start": 1}
    assert [turn.role for turn in gold.plays] == ["opponent"]
    assert methods.make("kto", {"answers": "verified"}).verifier == "gsm8k"
    assert data.verifier is None
    assert data.coupled and not methods.make("kto", {"z0": "zero"}).coupled
    assert data.pairing == methods.make("kto", {"beta": 0.5, "desirable": 2.0}).pairing
    assert data.pairing != methods.make("kto", {"z0": "zero"}).pairing != gold.pairing


@pytest.mark.parametrize(
    ("hyper", "message"),
    [
        ({"beta": 0.0}, "are above 0"),
        ({"desirable": -1.0}, "are above 0"),
        ({"undesirable": 0.0}, "are above 0"),
        ({"answers": "x"}, "answers `x` is unknown; known are data, gold, verified"),
        ({"z0": "x"}, "z0 `x` is unknown; known are mismatched, zero"),
    ],
)
def test_refused_hyper_parameters(hyper: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        methods.make("kto", hyper)


def test_lengths_are_those_of_the_prompts_own_answers() -> None:
    """Desirable answers of 4 tokens (gold) and undesirable ones of 2; what stands beside them is another prompt's."""
    samples = [sample(name, 0, (7, 2)) for name in "ab"]
    played = Played(1, [row("a", (5, 5, 5, 2)), row("b", (6, 6, 6, 2))], samples)
    for z0 in ("mismatched", "zero"):
        made = methods.make("kto", {"answers": "gold", "z0": z0}).groups(played).groups
        lengths = _Lengths()
        lengths.add(made)
        assert (lengths.groups, lengths.gap) == (4, 2.0), made


def test_lengths_of_single_answers_with_win_rates_are_told_at_the_ends_alone() -> None:
    """Nash-MD's groups: an answer and its rate; the ones between are neither preferred nor not."""
    rates, sizes = (1.0, 0.75, 0.5, 0.0), (9, 5, 5, 4)
    lengths = _Lengths()
    lengths.add([Group("a", (1,), ((3,) * n,), (rate,), 1.0, ("s",), 0) for rate, n in zip(rates, sizes, strict=True)])
    assert (lengths.groups, lengths.gap) == (4, 5.0)
