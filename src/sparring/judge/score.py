"""How often each of a prompt's answers beats each other one: the matrix that the methods of the Nash family read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import cast

from sparring import plugins
from sparring.errors import InputError, SparringError
from sparring.judge.verify import BUILT_IN, load_verifier, verdict
from sparring.nearest import nearest
from sparring.types import Example, Scorer, Verifier

GROUP = "sparring.scorers"
_VERIFIER = "verifier:"
_TOLERANCE = 1e-6

Matrix = tuple[tuple[float, ...], ...]


def load_scorer(name: str) -> Scorer:
    """`verifier:NAME`, `./file.py:name`, or what an installed package offers in group `sparring.scorers`.

    The scorer takes an example and K answers and gives the K × K matrix of P(answer i beats answer j). What is loaded
    here checks every matrix: K rows of K numbers in [0, 1] with P[i][j] + P[j][i] = 1 to 1e-6, so ½ on the diagonal.
    Raises InputError: an unknown name, a file that fails, something not callable; and, when called, a scorer that fails
    or a matrix that is none, with the example's `file:line`.
    """
    if name.startswith(_VERIFIER):
        return partial(_checked, partial(wins_from_verdicts, load_verifier(name.removeprefix(_VERIFIER))), name)
    found = plugins.load_object(name) if plugins.is_file_reference(name) else plugins.entry_point(GROUP, name)
    if found is None:
        known = [*(_VERIFIER + verifier for verifier in BUILT_IN), *plugins.entry_point_names(GROUP)]
        raise InputError(
            f"scorer `{name}`: unknown; the nearest is `{nearest(name, known)}`; your own is ./file.py:name"
        )
    if not callable(found):
        raise InputError(f"scorer `{name}`: not a function; it must take (example, answers) and give a matrix")
    return partial(_checked, cast(Scorer, found), name)


def identity(name: str) -> str:
    """A scorer's name with the hash of the file behind it, if there is one: what goes into a stage's identity."""
    prefix = _VERIFIER if name.startswith(_VERIFIER) else ""
    return prefix + plugins.identity(name.removeprefix(prefix))


def wins_from_scores(scores: Sequence[float]) -> Matrix:
    """P[i][j] = sigmoid(s_i − s_j): the Bradley-Terry model, in which one score per answer gives all win rates.

    Source: SPPO's released code makes its matrix so from PairRM's scores; vectors V7.
    """
    return tuple(tuple(_sigmoid(one - other) for other in scores) for one in scores)


def wins_from_verdicts(verifier: Verifier, example: Example, answers: Sequence[str]) -> Matrix:
    """P[i][j] = ½ + (r_i − r_j) / 2 with r = 1 for a right answer and 0 for a wrong one.

    ½ against and for an answer that cannot be judged: no verdict says nothing about any pair (this library's choice).
    """
    verdicts = [verdict(verifier, example, answer) for answer in answers]
    return tuple(
        tuple(0.5 if one is None or other is None else 0.5 + (one - other) / 2 for other in verdicts)
        for one in verdicts
    )


def _sigmoid(x: float) -> float:
    small = math.exp(-abs(x))
    return (1.0 if x >= 0 else small) / (1.0 + small)


def _checked(scorer: Scorer, name: str, example: Example, answers: Sequence[str]) -> Matrix:
    where, size = example.source or example.id, len(answers)
    try:
        wins = tuple(tuple(float(value) for value in row) for row in scorer(example, answers))
    except SparringError:
        raise
    except Exception as error:
        raise InputError(
            f"scorer `{name}`: {type(error).__name__}: {' '.join(str(error).split())} ({where}): "
            "it must give a matrix of numbers for any answers"
        ) from error
    if len(wins) != size or any(len(row) != size for row in wins):
        shape = f"{len(wins)} rows of {', '.join(sorted({str(len(row)) for row in wins})) or 0}"
        raise InputError(f"scorer `{name}`: {shape} numbers for {size} answers ({where}): it must give {size} × {size}")
    for i, row in enumerate(wins):
        for j, value in enumerate(row):
            if not 0 <= value <= 1:
                raise InputError(
                    f"scorer `{name}`: P[{i}][{j}] = {value:g} ({where}): it must give probabilities; "
                    "scores become some by sparring.judge.score.wins_from_scores"
                )
            if abs(value + wins[j][i] - 1) > _TOLERANCE:
                raise InputError(
                    f"scorer `{name}`: P[{i}][{j}] + P[{j}][{i}] = {value:g} + {wins[j][i]:g} ({where}): "
                    "it must be 1; average both orders of a judge that depends on the order"
                )
    return wins
