r"""Boxed answers: what stands in the last `\boxed{…}`, compared exactly; math-verify where it is installed."""

from __future__ import annotations

import importlib.util
import sys
import time

import pytest

from sparring.errors import InputError
from sparring.evaluate.core import Item, values, vote_of
from sparring.judge.boxed import boxed, boxed_answer, canonical, expression, last_box, symbolic
from sparring.judge.verify import final_number, load_verifier, text
from sparring.types import Example, Message


def example(gold: str | None) -> Example:
    return Example("x", (Message("user", "q"),), gold)


@pytest.mark.parametrize(
    ("answer", "content"),
    [
        (r"so \boxed{42}.", "42"),
        (r"\boxed{1} then \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\fbox {x^{2}}", "x^{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{(1, 2\}}", r"(1, 2\}"),
        (r"\boxed{4", None),
        (r"\boxed 4", None),
        ("42", None),
        ("", None),
    ],
)
def test_last_box(answer: str, content: str | None) -> None:
    assert last_box(answer) == content


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (r"\frac{1}{2}", "0.5"),
        (r"\dfrac{2}{4}", "1/2"),
        (r"\frac12", r"\tfrac{1}{2}"),
        (r"-\frac{3}{6}", "−0.50"),
        ("1,234,567", "1234567.0"),
        (r"\$3.50", "3.5"),
        (r"25\%", "25"),
        (r"90^\circ", "90"),
        (r"5\text{ cm}", "5"),
        (r"\text{Monday}", "Monday"),
        (r"\left(1, 2\right)", "(1,2)"),
        (r"x^2 + 1", "x^2+1"),
        (r"\text{A}.", "A"),
        (r"(\text{B})", "(B)"),
        (r"2\mathrm{i}", "2i"),
        (r"5\,\mathrm{cm}", "5"),
        (r"2:00\text{ p.m.}", "2:00 p.m."),
        ("+7", "7."),
    ],
)
def test_one_spelling(one: str, other: str) -> None:
    assert canonical(one) == canonical(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("1/2", "2"),
        ("-1", "1"),
        ("x^2", "x2"),
        ("1,23", "123"),
        ("(1,2)", "(2,1)"),
        ("1/0", "1"),
        ("0.1", "0.10001"),
        (r"(\text{B})", r"(\text{C})"),
        (r"\text{red},\text{blue}", r"\text{red},\text{green}"),
        (r"2\mathrm{i}", "2"),
        (r"2:00\text{ p.m.}", r"2:00\text{ a.m.}"),
    ],
)
def test_what_differs_stays_different(one: str, other: str) -> None:
    assert canonical(one) != canonical(other)


@pytest.mark.parametrize(
    ("gold", "answer", "right"),
    [
        (r"we get $\boxed{\frac{3}{4}}$", r"it is \boxed{0.75}", True),
        (r"we get $\boxed{\frac{3}{4}}$", "it is 0.75", False),
        ("so 18 eggs\n#### 18", r"\boxed{18}", True),
        ("18", r"\boxed{18.0}", True),
        (r"\boxed{x+1}", r"\boxed{1+x}", False),
        ("", r"\boxed{1}", None),
        (None, r"\boxed{1}", None),
    ],
)
def test_boxed(gold: str | None, answer: str, right: bool | None) -> None:
    assert boxed(example(gold), answer) is right


@pytest.mark.parametrize(
    "hostile", [r"\boxed{" * 20_000, r"\boxed{" + "9" * 200_000 + "}", r"\boxed{" + "{" * 200_000, " " * 300_000]
)
def test_long_answers_take_no_time(hostile: str) -> None:
    start = time.perf_counter()
    assert boxed(example("1"), hostile) is False
    assert time.perf_counter() - start < 2


def test_text_and_votes() -> None:
    assert text(example("Paris"), " Paris\n") is True
    assert text(example("Paris"), "paris") is False
    assert text(example(None), "paris") is None
    assert vote_of(load_verifier("gsm8k")) is final_number
    assert vote_of(load_verifier("boxed")) is boxed_answer and boxed_answer(r"\boxed{2/4}") == "1/2"
    assert vote_of(load_verifier("text")) is None and vote_of(None) is None

    def mine(example: Example, answer: str) -> bool:
        return True

    mine.vote = str.lower  # type: ignore[attr-defined]
    assert vote_of(mine) is str.lower


@pytest.mark.skipif(importlib.util.find_spec("math_verify") is None, reason="math-verify is not installed")
def test_answers_to_math_vote_for_what_is_judged() -> None:
    """Three say 5 and two 4, which is right: the majority is wrong, whether the 5 stands in a box or not."""
    verifier, asked = load_verifier("math"), example("4")
    for five in ("The answer is $5$", r"\boxed{5}", "It is 5.0."):
        said = ["The answer is $5$", "The answer is $5$", five, "The answer is $4$", "4 it is"]
        items = [
            Item("a", "sampled", i, text, (1,), "stop", verifier(asked, text), (0.0,)) for i, text in enumerate(said)
        ]
        assert [item.right for item in items] == [False] * 3 + [True] * 2
        assert values(items, "maj@5", vote_of(verifier)) == {"a": 0.0}
    assert expression("It is $0.5$") == expression(r"so $\frac{1}{2}$") == boxed_answer(r"\boxed{2/4}") == "1/2"
    assert expression("no number") is None


def test_math_says_which_extra_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(InputError, match=r"pip install 'sparring\[math\]'"):
        load_verifier("math")(example("1"), "1")


EXPRESSIONS = {
    r"\boxed{2x+1}": "2",
    r"\boxed{3\sqrt{2}}": "3",
    r"\boxed{2\pi}": "2",
    r"\boxed{(1, 2)}": "2",
    r"\boxed{\left( 3, \frac{\pi}{2} \right)}": "3",
    r"\boxed{\sqrt{\frac{1}{2}}}": r"\frac{1}{2}",
    r"\boxed{\frac{1}{2}x+3}": r"\frac{1}{2}",
}
"""Golds, and a number that stands in each and is not it."""


@pytest.mark.skipif(importlib.util.find_spec("math_verify") is None, reason="math-verify is not installed")
@pytest.mark.parametrize(
    ("gold", "answer", "right"),
    [
        (r"$\boxed{x^2+1}$", r"thus \boxed{1 + x^2}", True),
        (r"\boxed{\frac{1}{2}}", "The answer is $0.5$", True),
        ("#### 1,000", "It is 1000.", True),
        ("72", "no number", False),
        ("72", r"\boxed{73}", False),
        ("", "72", None),
        *((gold, gold, True) for gold in EXPRESSIONS),
        *((gold.removeprefix(r"\boxed{")[:-1], gold, True) for gold in EXPRESSIONS),
        *((gold, rf"\boxed{{{part}}}", False) for gold, part in EXPRESSIONS.items()),
        ("so 18 eggs", r"\boxed{18}", True),
        ("The answer is $2x+1$.", r"\boxed{1+2x}", True),
        (r"5\text{ cm}", r"\boxed{5}", True),
    ],
)
def test_math(gold: str, answer: str, right: bool | None) -> None:
    assert symbolic(example(gold), answer) is right
