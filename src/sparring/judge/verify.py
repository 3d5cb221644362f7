"""Exact checks of an answer's result against the gold answer's."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import cast

from sparring import plugins
from sparring.errors import InputError
from sparring.nearest import nearest
from sparring.types import Example, Verifier

GROUP = "sparring.verifiers"
_NUMBER = re.compile(
    # Possessive throughout: giving digits back would read 1 out of 14/5, which the last line is there to refuse, and
    # giving spaces back takes quadratic time on an answer that ends in thousands of them.
    r"[\s*$€£]*+(?P<sign>[-−+]?)[\s$€£]*+"
    r"(?P<digits>[0-9][0-9,]*+(?:\.[0-9]++)?+|\.[0-9]++)"
    r"(?!\s*[-−+/*^=×÷]\s*[0-9$(]|[eE][-+]?[0-9])"
)


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


BUILT_IN: dict[str, Verifier] = {"gsm8k": gsm8k}


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
