"""Exact checks of an answer's result against the gold answer's."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Mapping
from decimal import Decimal
from typing import cast

from sparring import plugins
from sparring.errors import InputError, SparringError
from sparring.judge.boxed import boxed, boxed_answer, expression, symbolic
from sparring.judge.sql import sql, sql_ordered
from sparring.nearest import nearest
from sparring.types import Example, Verifier

GROUP = "sparring.verifiers"
_DECIMALS = r"(?:\.[0-9]++|(?!\.[0-9]))"
"""All decimals or none, if there are none: no `(?:…)?+`, as possessive groups keep half a repetition in Python 3.11.2."""
_NUMBER = re.compile(
    # Possessive throughout: giving digits back would read 1 out of 14/5, which the last line is there to refuse, and
    # giving spaces back takes quadratic time on an answer that ends in thousands of them.
    r"[\s*$€£]*+(?P<sign>[-−+]?)[\s$€£]*+"
    rf"(?P<digits>[0-9][0-9,]*+{_DECIMALS}|\.[0-9]++)"
    r"(?!\s*[-−+/*^=×÷]\s*[0-9$(]|[eE][-+]?[0-9]|[ \t]+[0-9]+[ \t]*/)"
)
_DIGITS = rf"(?:[0-9]{{1,3}}+(?:,[0-9]{{3}}){{1,12}}(?![0-9]|,[0-9]{{3}})|[0-9]++){_DECIMALS}|\.[0-9]++"
_SIGN = r"[-−+]?+[$€£]?+[-−+]?+"
_SIGNED = re.compile(rf"(?P<sign>{_SIGN})(?P<digits>{_DIGITS})")
_CALCULATION = re.compile(
    # A number with what it is calculated with. A hyphen after a word is no sign, nor are digits in a word a number.
    rf"(?:(?<![\w.)]){_SIGN})?(?<![\w.])(?:{_DIGITS})(?:(?:\s*+[-−+*/^×÷]\s*+|[eE]){_SIGN}(?:{_DIGITS}))*"
)
_UNIT = re.compile(r"(?:[^\W\d_]|\\(?:text|mathrm|mbox)\s*\{[^{}]*\})\^\{?$")
"""Before the exponent of a unit or a variable."""
_PART = re.compile(r"(?:\^|√|(?:\^|_|\}|\\[dt]?frac|\\sqrt(?:\[[^\]]{0,9}\])?)\s*\{)$")
"""Before the exponent of a number, what a root is taken of, and parts of a fraction."""
_BEFORE = 100
"""Characters before a number that are looked at for these."""


def gsm8k(example: Example, answer: str) -> bool | None:
    """Whether the number after the answer's last `####` equals the gold answer's; None where the gold has none.

    Commas, currency and percent signs, spaces, bold marks and a trailing dot do not matter, and 72.00 is 72. An
    answer without `####` is wrong, as is one that leaves a sum or a fraction there. Source: Cobbe et al. 2021,
    arXiv 2110.14168 (the data set's answer format).
    """
    gold = final_number(example.gold or "")
    return None if gold is None else final_number(answer) == gold


def final_number(text: str) -> Decimal | None:
    """The number right after the last `####`, exact; None where there is no mark or no number."""
    _, mark, rest = text.rpartition("####")
    found = _NUMBER.match(rest) if mark else None
    if found is None:
        return None
    value = Decimal(found["digits"].replace(",", ""))
    return value.copy_negate() if found["sign"] in ("-", "−") else value


def number(example: Example, answer: str) -> bool | None:
    """Whether the last number of the answer's text equals the gold answer's; None where the gold has none.

    Of a text with `####` only what follows the last of them counts. Commas between thousands, currency signs and
    trailing zeros do not matter, nor do exponents of units. What ends in a sum, a fraction, a root or a power has no
    number: 14/5 is not 5.
    """
    gold = last_number(example.gold or "")
    return None if gold is None else last_number(answer) == gold


def last_number(text: str) -> Decimal | None:
    """The last number of a text, exact; None where there is none, or where it is part of a calculation."""
    rest = text.rpartition("####")[2]
    found = None
    for match in reversed(list(_CALCULATION.finditer(rest))):
        before = rest[max(0, match.start() - _BEFORE) : match.start()]
        if not _UNIT.search(before):
            found = None if _PART.search(before) else _SIGNED.fullmatch(match[0])
            break
    if found is None:
        return None
    value = Decimal(found["digits"].replace(",", ""))
    return value.copy_negate() if re.search("[-−]", found["sign"]) else value


def text(example: Example, answer: str) -> bool | None:
    """Whether the answer is the gold answer, letter by letter but for whitespace around it; None without a gold one."""
    return None if example.gold is None else answer.strip() == example.gold.strip()


BUILT_IN: dict[str, Verifier] = {
    "gsm8k": gsm8k,
    "number": number,
    "boxed": boxed,
    "math": symbolic,
    "text": text,
    "sql": sql,
    "sql_ordered": sql_ordered,
}
VOTES: Mapping[Verifier, Callable[[str], Hashable | None]] = {
    gsm8k: final_number,
    number: last_number,
    boxed: boxed_answer,
    symbolic: expression,
}
"""What an answer votes for where a majority decides (maj@k); a verifier of one's own says so in its attribute `vote`."""


def load_verifier(name: str) -> Verifier:
    """A built-in verifier, `./file.py:name`, or what an installed package offers in group `sparring.verifiers`.

    Raises InputError: an unknown name (told with the nearest one), a file that fails, or something not callable.
    """
    found = BUILT_IN.get(name)
    if found is None:
        found = plugins.load_object(name) if plugins.is_file_reference(name) else plugins.entry_point(GROUP, name)
    if found is None:
        known = [*BUILT_IN, *plugins.entry_point_names(GROUP)]
        raise InputError(
            f"verifier `{name}`: unknown; the nearest is `{nearest(name, known)}`; your own is ./file.py:name"
        )
    if not callable(found):
        raise InputError(
            f"verifier `{name}`: not a function; it must take (example, answer) and give true, false or None"
        )
    return cast(Verifier, found)


def verdict(verifier: Verifier | None, example: Example, text: str) -> bool | None:
    """The verifier's word on an answer. Raises InputError, naming the example, where the verifier itself fails."""
    if verifier is None:
        return None
    try:
        verdict = verifier(example, text)
    except SparringError:
        raise
    except Exception as error:
        where = example.source or example.id
        raise InputError(
            f"verifier: {type(error).__name__}: {error} ({where}): it must give true, false or None for any answer"
        ) from error
    return None if verdict is None else bool(verdict)
