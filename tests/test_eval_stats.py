"""Intervals, tests and pass@k against hand values, brute force and simulated coverage."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import numpy as np
import pytest

from helpers import script
from sparring.evaluate.core import Item, subset_sizes, values
from sparring.evaluate.stats import (
    Gain,
    bootstrap,
    difference_interval,
    maj_at_k,
    paired,
    pass_at_k,
    share,
    share_interval,
    sign_test,
    student95,
)

# Intervals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    # Wilson's interval: 0 of 10 and 10 of 10 are z²/(n + z²) away from their end
    [(0, 10, 0.0, 1.96**2 / (10 + 1.96**2)), (10, 10, 10 / (10 + 1.96**2), 1.0), (81, 263, 0.2553, 0.3662)],
)
def test_one_answer_per_prompt_has_wilsons_interval(right: int, n: int, low: float, high: float) -> None:
    got = share([1.0] * right + [0.0] * (n - right))
    assert got is not None
    assert (got["low"], got["high"]) == pytest.approx((low, high), abs=1e-4)


def test_answers_that_agree_count_as_one() -> None:
    """Eight equal answers to each prompt say as much as one; independent ones say more, and the interval is shorter."""
    alone = share([1.0] * 30 + [0.0] * 20)
    assert alone is not None
    spread = share([5 / 8] * 25 + [4.6 / 8] * 25)
    assert spread is not None and spread["mean"] == pytest.approx(0.6)
    assert spread["high"] - spread["low"] < 0.5 * (alone["high"] - alone["low"])


def test_share_interval_by_hand() -> None:
    # Values 1, ½, ½, 0; with a 0 and a 1 added: mean ½, variance (2.5 − 6/4)/5 = 0.2 against ¼, so 4/0.8 = 5 prompts
    low, high = share_interval(0.5, 1.5 / 4, 4)
    z2 = 1.96**2
    half = math.sqrt(z2 * (0.25 / 5 + z2 / 100)) / (1 + z2 / 5)
    assert (low, high) == pytest.approx((0.5 - half, 0.5 + half))


def test_difference_interval_by_hand() -> None:
    # 100 prompts, 12 gained and 4 lost: p12 = 13/102, p21 = 5/102 (Bonett and Price 2012, eq. 2)
    one, other = 13 / 102, 5 / 102
    half = 1.96 * math.sqrt((one + other - (one - other) ** 2) / 102)
    got = difference_interval(0.08, 0.16, 0.16, 100)
    assert got == pytest.approx((one - other - half, one - other + half))
    # Changes by a quarter: the added prompts changed by a quarter, too
    assert difference_interval(0.02, 0.01, 0.16, 100) == pytest.approx(tuple(v / 4 for v in got))
    # Nothing changed: not a point
    nothing = 1.96 * math.sqrt(2) / 102
    assert difference_interval(0.0, 0.0, 0.0, 100) == pytest.approx((-nothing, nothing))


def test_paired_gain() -> None:
    start = {"a": 0.0, "b": 0.0, "c": 1.0, "d": 0.5}
    end = {"a": 1.0, "b": 0.5, "c": 1.0, "d": 0.0}
    gain = paired(start, end, shares=True)
    assert gain is not None
    # Gains 1, ½, 0, −½
    assert (gain.mean, gain.how, gain.p) == (0.25, "paired over 4 prompts", 1.0)
    assert gain.se == pytest.approx(math.sqrt((0.75**2 + 0.25**2 + 0.25**2 + 0.75**2) / 3 / 4))
    low, high = gain.interval
    assert low < 0 < 0.25 < high and gain.noise
    nats = paired(start, end)
    assert nats is not None
    assert nats.interval == pytest.approx((0.25 - 3.182446 * nats.se, 0.25 + 3.182446 * nats.se), rel=2e-3)
    assert paired({"a": 1.0}, {"a": 0.0}) is None
    assert paired(start, end | {"e": 1.0}) is None
    assert Gain(1.0, 0.5, "unpaired").interval == pytest.approx((0.02, 1.98))


@pytest.mark.parametrize(
    ("freedom", "quantile"), [(1, 12.7062), (2, 4.30265), (3, 3.18245), (5, 2.57058), (10, 2.22814), (100, 1.98397)]
)
def test_students_quantile(freedom: int, quantile: float) -> None:
    assert student95(freedom) == pytest.approx(quantile, rel=2e-3)


@pytest.mark.parametrize(
    ("up", "down", "p"),
    # 2 · (C(10,0) + C(10,1) + C(10,2)) / 2^10
    [(8, 2, 2 * 56 / 1024), (2, 8, 2 * 56 / 1024), (5, 5, 1.0), (0, 0, 1.0), (6, 0, 2 / 64), (1, 0, 1.0)],
)
def test_sign_test(up: int, down: int, p: float) -> None:
    assert sign_test(up, down) == pytest.approx(p)


def test_sign_test_of_many_prompts_is_the_normal_tail() -> None:
    # 5100 against 4900: z = (200 − 1) / √10000
    assert sign_test(5100, 4900) == pytest.approx(math.erfc(1.99 / math.sqrt(2)), rel=1e-3)
    assert sign_test(20_000, 0) == 0.0  # below the smallest number there is


# pass@k and maj@k ------------------------------------------------------------------------------------------------


def test_pass_at_k_over_all_subsets() -> None:
    for n in range(1, 7):
        for right in range(n + 1):
            for k in range(1, n + 1):
                subsets = list(itertools.combinations([True] * right + [False] * (n - right), k))
                assert pass_at_k(n, right, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))
    with pytest.raises(ValueError, match="pass@5"):
        pass_at_k(4, 1, 5)


def vote(answers: tuple[str | None, ...]) -> float:
    """The right answer's share of the win, counted by hand."""
    counts = {name: answers.count(name) for name in set(answers) - {None}}
    most = max(counts.values(), default=0)
    return 1 / list(counts.values()).count(most) if counts.get("right") == most > 0 else 0.0


def test_maj_at_k_over_all_subsets() -> None:
    rng = random.Random(0)
    for _ in range(60):
        answers = [rng.choice(["right", "right", "a", "b", "c", None]) for _ in range(rng.randint(1, 8))]
        wrong = tuple(sorted(answers.count(name) for name in "abc" if name in answers))
        for k in range(1, len(answers) + 1):
            subsets = list(itertools.combinations(answers, k))
            wanted = sum(vote(s) for s in subsets) / len(subsets)
            assert maj_at_k(answers.count("right"), wrong, answers.count(None), k) == pytest.approx(wanted), answers
    with pytest.raises(ValueError, match="maj@3"):
        maj_at_k(1, (1,), 0, 3)


def test_maj_at_k_of_many_answers_is_quick() -> None:
    # 64 answers that all differ but for 4 right ones: whoever is drawn twice wins
    assert 0.9 < maj_at_k(4, (1,) * 60, 0, 64) <= 1.0


def sampled(name: str, index: int, right: bool | None, text: str) -> Item:
    return Item(name, "sampled", index, text, (5,), "stop", right, (-1.0,))


def test_figures_of_items() -> None:
    items = [
        *(sampled("a", i, r, t) for i, (r, t) in enumerate([(True, "1"), (True, "1.0"), (False, "2"), (False, "2 ")])),
        *(sampled("b", i, r, t) for i, (r, t) in enumerate([(False, "3"), (False, "4"), (True, "5"), (None, "?")])),
    ]
    assert values(items, "pass@2") == {"a": pytest.approx(5 / 6), "b": pytest.approx(2 / 3)}
    # Right answers are one party however written; "2" and "2 " are one, too: two against two is a tie
    assert values(items, "maj@4") == {"a": 0.5}
    assert values(items, "maj@3") == {"a": pytest.approx(0.5), "b": pytest.approx(1 / 3)}
    # An abstaining vote: all wrong answers of `a` say nothing
    assert values(items, "maj@4", lambda text: None) == {"a": 1.0}
    assert values(items, "sampled") == {"a": 0.5, "b": pytest.approx(1 / 3)}
    assert values(items, "pass@x") == values(items, "nonsense") == {}
    assert [subset_sizes(n) for n in (0, 1, 2, 4, 6, 8)] == [[], [], [2], [2, 4], [2, 4, 6], [2, 4, 8]]


def test_choices_by_sum_and_by_byte() -> None:
    def choice(index: int, text: str, right: bool, *logps: float) -> Item:
        return Item("q", "choice", index, text, (1,) * len(logps), "stop", right, logps)

    # −3 against −4: the first by its sum; −3 / 2 bytes against −4 / 4 bytes (two letters of two bytes): the second
    items = [choice(0, "ab", True, -1.0, -2.0), choice(1, "éé", False, -4.0)]
    assert (values(items, "acc"), values(items, "acc_norm")) == ({"q": 1.0}, {"q": 0.0})
    tied = [choice(0, "ab", False, -1.0), choice(1, "cd", True, -1.0)]
    assert values(tied, "acc") == {"q": 0.0}  # of equal ones the first


# Bootstrap and coverage --------------------------------------------------------------------------------------------


def test_bootstrap_of_a_mean_is_its_standard_error() -> None:
    rows = np.random.default_rng(1).normal(3.0, 2.0, (400, 1))
    got = bootstrap(rows, lambda v: v[..., 0].mean(-1), resamples=4000)
    assert got is not None
    se = rows.std(ddof=1) / 20
    assert got["mean"] == pytest.approx(rows.mean()) and got["se"] == pytest.approx(se, rel=0.05)
    assert (got["low"], got["high"]) == pytest.approx((got["mean"] - 1.97 * se, got["mean"] + 1.97 * se), abs=0.1 * se)
    assert bootstrap(rows, lambda v: v[..., 0].mean(-1), resamples=4000) == got
    assert bootstrap(rows[:0], lambda v: v[..., 0].mean(-1)) is None
    alone = bootstrap(rows[:1], lambda v: v[..., 0].mean(-1))
    assert alone is not None and alone["se"] is None


@pytest.fixture(scope="module")
def coverage() -> Any:
    return script("coverage")


def test_intervals_cover(coverage: Any) -> None:
    """Issue 5, figure 2: 93 to 97 % of accuracy, clustered by prompt, pass@k and paired differences."""
    rng, trials, n = np.random.default_rng(0), 2500, 200
    found = [
        *(coverage.accuracy(rng, trials, n, 1, mu, math.inf) for mu in (0.1, 0.5, 0.9)),
        *(coverage.accuracy(rng, trials, n, 4, mu, 2.0) for mu in (0.1, 0.5, 0.9)),
        *(coverage.pass_at(rng, trials, n, 8, 2, mu, 2.0) for mu in (0.1, 0.5, 0.8)),
        *(coverage.pass_at(rng, trials, n, 8, 4, mu, 1.0) for mu in (0.1, 0.5)),
        coverage.difference(rng, trials, n, 1, 0.5, math.inf, 0.3, 0.3),
        coverage.difference(rng, trials, n, 4, 0.5, 2.0, 0.3, 0.3),
        coverage.difference(rng, trials, n, 4, 0.1, 2.0, 0.05, 0.2),
        coverage.nats(rng, trials, n),
    ]
    assert {case.about: case.covered for case in found if not 0.93 <= case.covered <= 0.97} == {}


def test_intervals_hold_where_the_normal_one_fails(coverage: Any) -> None:
    rng, trials = np.random.default_rng(1), 4000
    for case in (
        coverage.accuracy(rng, trials, 50, 1, 0.98, math.inf),
        coverage.accuracy(rng, trials, 50, 4, 0.02, 2.0),
        coverage.difference(rng, trials, 50, 1, 0.85, math.inf, 0.05, 0.1),
    ):
        assert case.plain < 0.85 and case.covered > 0.915, case
