r"""Answers in mathematical notation: what stands in the last `\boxed{…}`, compared as a number, as text, or symbolically."""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache
from typing import Any

from sparring.errors import InputError
from sparring.types import Example

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_DRESS = re.compile(
    r"\\(?:left|right|displaystyle)(?![a-zA-Z])|\\[!,;: ]|\\?[$%]|\^(?:\\circ|\{\\circ\})|\s+|(?<=\d),(?=\d{3}(?!\d))"
)
_WORDS = re.compile(r"\\(?:text|mathrm|textbf|mbox)\s*\{([^{}]*)\}")
_CONSTANT = re.compile(r"\\mathrm\s*\{\s*([ie])\s*\}")
_DELIMITED = re.compile(r"\$|\\[(\[]|\\begin")
_PROSE = re.compile(r"(?<![\\a-zA-Z])(?!(?:sin|cos|tan|cot|log|ln|exp|sqrt|pi)(?![a-zA-Z]))[a-zA-Z]{2,}")
_NUMBER = re.compile(
    r"(?P<sign>[-−+]?)(?:\\frac\{(?P<over>\d{1,99})\}\{(?P<under>\d{1,99})\}|(?P<plain>\d{1,99}(?:\.\d{0,99})?|\.\d{1,99})"
    r"(?:/(?P<below>\d{1,99}))?)"
)


def boxed(example: Example, answer: str) -> bool | None:
    r"""Whether the content of the answer's last `\boxed{…}` equals the gold answer's; None where the gold says nothing.

    The gold answer is the content of its own last box, else what follows its last `####`, else all of it. Numbers,
    decimal or a fraction, are compared exactly; anything else as text without spaces, sizes, units and signs of dollars,
    percent and degrees. An answer without a box is wrong. Source: Hendrycks et al. 2021, arXiv 2103.03874 (MATH).
    """
    gold = canonical(_gold(example.gold or ""))
    return None if not gold else boxed_answer(answer) == gold


def boxed_answer(text: str) -> str | None:
    r"""The canonical content of the last `\boxed{…}` (or `\fbox`); None where there is none, or it never closes."""
    content = last_box(text)
    return None if content is None else canonical(content)


def last_box(text: str) -> str | None:
    r"""What stands between the braces of the last `\boxed{…}`; None where there is none, or it never closes."""
    starts = [match.end() for match in _BOX.finditer(text)]
    if not starts:
        return None
    depth = 1
    for at in range(starts[-1], len(text)):
        if text[at - 1] != "\\":
            depth += {"{": 1, "}": -1}.get(text[at], 0)
        if depth == 0:
            return text[starts[-1] : at]
    return None


def canonical(text: str) -> str:
    """One spelling for answers that say the same: a number as a fraction in lowest terms, else the bare text."""
    text = _CONSTANT.sub(r"\1", text.strip())
    unit = _WORDS.sub(_unit, text)
    # Words are units beside something that says anything itself, which brackets and commas do not
    bare = unit if re.search(r"\w", _DRESS.sub("", unit)) else _WORDS.sub(r"\1", text)
    bare = _DRESS.sub("", bare.replace("dfrac", "frac").replace("tfrac", "frac")).rstrip(".")
    bare = re.sub(r"\\frac(\d)(\d)", r"\\frac{\1}{\2}", bare)
    found = _NUMBER.fullmatch(bare)
    if found is None:
        return bare
    below = Fraction(found["under"] or found["below"] or 1)
    if below == 0:
        return bare
    value = Fraction(found["over"] or found["plain"]) / below
    return str(-value if found["sign"] in ("-", "−") else value)


def _unit(words: re.Match[str]) -> str:
    """Nothing, but for halves of a day."""
    return words[1] if words[1].replace(".", "").strip().lower() in ("am", "pm") else ""


def symbolic(example: Example, answer: str) -> bool | None:
    r"""Whether the answer's final expression equals the gold answer's by math-verify; None where the gold has none.

    It reads LaTeX and plain expressions, boxed or at the end of a text, and compares them with sympy: ½ and 0.5, x² + 1
    and 1 + x². What takes longer than five seconds is wrong. Raises InputError without the extra `[math]`.
    """
    parse, verify = _math_verify()
    gold = example.gold or ""
    content, rest = last_box(gold), gold.rpartition("####")[2].strip()
    # Of an expression outside of formulas math-verify takes the first number that it can find: 2 of 2x+1
    if content is not None:
        expected = parse(rf"\boxed{{{content}}}")
    elif _DELIMITED.search(rest) or _PROSE.search(rest):
        expected = parse(rest)
    else:
        expected = parse(f"${rest}$") or parse(rest)
    return bool(verify(expected, parse(answer))) if expected else None


@lru_cache(maxsize=2**16)  # every figure of a vote asks anew, in the same order
def expression(text: str) -> str | None:
    """What `symbolic` reads out of an answer: its last box, else its final expression, in the spelling of `canonical`.

    None where there is neither. Raises InputError where it takes the extra `[math]`, which is not there.
    """
    content = boxed_answer(text)
    if content is not None:
        return content
    found = _math_verify()[0](text)
    return canonical(str(found[-1])) if found else None


def _math_verify() -> tuple[Callable[..., list[Any]], Callable[..., bool]]:
    try:
        from math_verify import parse, verify
    except ImportError:
        raise InputError(
            "verifier `math`: math-verify is not installed; pip install 'sparring[math]', or take `boxed` or `number`"
        ) from None
    return parse, verify


def _gold(text: str) -> str:
    content = last_box(text)
    return content if content is not None else text.rpartition("####")[2]
