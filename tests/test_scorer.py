"""Scorers: PairRM's probabilities (vectors V7), verdicts as win rates, and what a matrix has to be."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparring.errors import InputError
from sparring.judge.score import identity, load_scorer, wins_from_scores
from sparring.types import Example, Message

EXAMPLE = Example("e", (Message("user", "1 + 1?"),), "2\n#### 2", source="rows.jsonl:7")


def scorer_file(tmp_path: Path, matrix: str) -> str:
    path = tmp_path / "mine.py"
    path.write_text(f"def wins(example, answers):\n    return {matrix}\n")
    return f"{path}:wins"


def test_v7_probabilities_from_scores() -> None:
    wins = wins_from_scores([2, 0.5, -1, 0, -3])
    assert wins[0] == pytest.approx([0.5, 0.817574, 0.952574, 0.880797, 0.993307], abs=5e-7)
    assert wins[0][4] == pytest.approx(0.9933071490757153, rel=1e-14)
    means = [sum(row) / 5 for row in wins]
    assert means == pytest.approx([0.8288505660, 0.6186294201, 0.3759179793, 0.5360752593, 0.1405267754], abs=5e-11)


def test_scores_far_apart_do_not_overflow() -> None:
    assert wins_from_scores([-1e4, 1e4]) == ((0.5, 0.0), (1.0, 0.5))


def test_a_verifiers_verdicts_as_win_rates() -> None:
    """½ + (r_i − r_j)/2: right beats wrong, equals tie."""
    wins = load_scorer("verifier:gsm8k")(EXAMPLE, ["#### 2", "#### 3", "#### 2.0"])
    assert wins == ((0.5, 1.0, 0.5), (0.0, 0.5, 0.0), (0.5, 1.0, 0.5))


def test_an_answer_that_cannot_be_judged_ties_with_all(tmp_path: Path) -> None:
    path = tmp_path / "v.py"
    path.write_text("def right(example, answer):\n    return {'y': True, 'n': False}.get(answer)\n")
    wins = load_scorer(f"verifier:{path}:right")(EXAMPLE, ["y", "?", "n"])
    assert wins == ((0.5, 0.5, 1.0), (0.5, 0.5, 0.5), (0.0, 0.5, 0.5))


def test_an_own_scorer_gets_the_example_and_the_answers(tmp_path: Path) -> None:
    name = scorer_file(tmp_path, "[[.5, .25 if example.gold and answers == ['a', 'b'] else 9], [.75, .5]]")
    assert load_scorer(name)(EXAMPLE, ["a", "b"]) == ((0.5, 0.25), (0.75, 0.5))


@pytest.mark.parametrize(
    ("matrix", "problem"),
    [
        ("[[.5, .5]]", "1 rows of 2 numbers for 2 answers"),
        ("[[.5, .5], [.5]]", "2 rows of 1, 2 numbers for 2 answers"),
        ("[]", "0 rows of 0 numbers for 2 answers"),
        ("[[.5, 1.5], [-.5, .5]]", "P[0][1] = 1.5"),
        ("[[.5, float('nan')], [.5, .5]]", "P[0][1] = nan"),
        ("[[.5, .6], [.5, .5]]", "P[0][1] + P[1][0] = 0.6 + 0.5"),
        ("[[.6, .5], [.5, .5]]", "P[0][0] + P[0][0] = 0.6 + 0.6"),
        ("[['x', .5], [.5, .5]]", "ValueError"),
        ("None", "TypeError"),
        ("1 / 0", "ZeroDivisionError"),
    ],
)
def test_a_matrix_that_is_none_is_told_with_the_row(tmp_path: Path, matrix: str, problem: str) -> None:
    with pytest.raises(InputError) as told:
        load_scorer(scorer_file(tmp_path, matrix))(EXAMPLE, ["a", "b"])
    message = str(told.value)
    assert problem in message and "rows.jsonl:7" in message and "it must" in message and "\n" not in message


def test_float32_noise_is_no_fault(tmp_path: Path) -> None:
    wins = load_scorer(scorer_file(tmp_path, "[[.5, .3000001], [.7, .5]]"))(EXAMPLE, ["a", "b"])
    assert wins[0][1] == 0.3000001


def test_a_verifier_that_fails_is_told_with_the_row(tmp_path: Path) -> None:
    path = tmp_path / "v.py"
    path.write_text("def right(example, answer):\n    raise KeyError('db')\n")
    with pytest.raises(InputError, match=r"KeyError.*rows\.jsonl:7"):
        load_scorer(f"verifier:{path}:right")(EXAMPLE, ["y"])


def test_unknown_names(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nearest is `verifier:gsm8k`"):
        load_scorer("verifer:gsm8k")
    with pytest.raises(InputError, match="verifier `gsm9k`: unknown"):
        load_scorer("verifier:gsm9k")
    path = tmp_path / "x.py"
    path.write_text("wins = 3\n")
    with pytest.raises(InputError, match="not a function"):
        load_scorer(f"{path}:wins")


def test_identity_follows_the_file(tmp_path: Path) -> None:
    assert identity("verifier:gsm8k") == "verifier:gsm8k"
    name = scorer_file(tmp_path, "[[.5]]")
    before = identity(name), identity(f"verifier:{name}")
    assert before[0].startswith("mine.py:wins@") and before[1] == f"verifier:{before[0]}"
    scorer_file(tmp_path, "[[0.5]]")
    assert identity(name) != before[0] and identity(f"verifier:{name}") != before[1]
