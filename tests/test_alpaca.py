"""AlpacaEval's format, and LC-min against hand values, a 40-digit solution and statsmodels."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mpmath
import numpy as np
import pytest

from helpers import cli, write_jsonl, write_model
from sparring.errors import InputError
from sparring.evaluate.alpaca import (
    LcMin,
    Output,
    compare,
    lc_min,
    read_outputs,
    run_alpaca,
    summary_lines,
    write_outputs,
)
from sparring.evaluate.ledger import Ledger
from sparring.play.chat import Chat, Reply
from sparring.types import Message

# fmt: off
# 60 comparisons with their fit by statsmodels 0.15.0: GLM(wins, add_constant(tanh(delta / delta.std(ddof=1))), Binomial())
# .fit(tol=1e-14, cov_type="HC0"), its intercept's standard error times p(1 − p)
DELTAS = [
    -42, -120, 112, -49, -241, 28, 311, 204, -291, -460, -267, -68, -778, -146, -454, -300, -243, -175, 43, 233, -119, 330,
    -280, 25, 191, -52, -303, -357, -217, -14, -383, -143, -128, 82, -16, 27, -276, -119, 155, 368, -458, 374, 324, 154, -1,
    -174, 357, 508, 460, 315, 27, -442, -81, 117, -467, 39, 49, 129, -435, -279,
]
WINS = [
    .5, 0, 1, 0, 0, 0, 1, .5, 0, 0, 1, 1, 1, 0, .5, 1, 1, 0, 1, 0, 1, .5, 1, 1, 0, 1, 0, 1, .5, 1, 1, 1, 0, 0, 1, .5, 0, 1, 1,
    1, 1, 0, .5, 0, 1, 1, 0, 0, 0, .5, 0, 1, 0, 1, 1, 0, .5, 0, 1, 0,
]
# fmt: on
THETA, VALUE, SE = (0.018814046295738185, -0.6579468255185728), 0.5047033728376642, 0.06054551089259918


def found(fit: LcMin) -> tuple[float, float, tuple[float, float]]:
    assert fit.value is not None and fit.se is not None and fit.theta is not None and fit.reason == ""
    return fit.value, fit.se, fit.theta


# LC-min ---------------------------------------------------------------------------------------------------------------


def test_lc_min_is_the_fit_of_statsmodels() -> None:
    value, se, theta = found(lc_min(WINS, DELTAS))
    assert (value, *theta) == pytest.approx((VALUE, *THETA), abs=1e-9)
    assert se == pytest.approx(SE, abs=1e-9)
    assert abs(value - sum(WINS) / len(WINS)) > 0.01  # it does correct something here


def test_lc_min_by_hand_where_lengths_take_two_values() -> None:
    # ±200 characters: the fit goes through both logits, ln 3 (6 of 8 won) and −ln 3 + … (2 of 8), so θ0 is their mean
    wins = [1, 1, 1, 1, 1, 1, 0, 0, 1, 0, 0, 0, 0.5, 0.5, 0, 0]
    deltas = [200] * 8 + [-200] * 8
    sd = 200 * math.sqrt(16 / 15)
    one, other = math.log(6 / 2), math.log(2 / 6)
    value, _, theta = found(lc_min(wins, deltas))
    assert theta == pytest.approx(((one + other) / 2, (one - other) / 2 / math.tanh(200 / sd)), abs=1e-9)
    assert value == pytest.approx(0.5, abs=1e-9)
    # 7 of 8 won where the reference is longer
    value, _, theta = found(lc_min([1, *wins[:6], 0, *wins[8:]], deltas))
    assert theta[0] == pytest.approx((math.log(7) + other) / 2, abs=1e-9)
    assert value == pytest.approx(1 / (1 + math.exp(-(math.log(7) - math.log(3)) / 2)), abs=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_lc_min_solves_the_likelihood_equations(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n = 40
    deltas = rng.normal(50, 400, n).round()
    wins = rng.choice([0, 0.5, 1], n)
    x = [mpmath.tanh(mpmath.mpf(float(d)) / mpmath.mpf(float(deltas.std(ddof=1)))) for d in deltas]

    def equations(a: Any, b: Any) -> list[Any]:
        rest = [float(w) - 1 / (1 + mpmath.exp(-(a + b * t))) for w, t in zip(wins, x, strict=True)]
        return [mpmath.fsum(rest), mpmath.fsum(r * t for r, t in zip(rest, x, strict=True))]

    with mpmath.workdps(40):
        a, b = mpmath.findroot(equations, (0, 0))
    value, _, theta = found(lc_min(list(wins), list(deltas)))
    assert theta == pytest.approx((float(a), float(b)), abs=1e-9)
    assert value == pytest.approx(float(1 / (1 + mpmath.exp(-a))), abs=1e-9)


def test_exchanging_player_and_reference_mirrors_lc_min() -> None:
    value, se, (intercept, slope) = found(lc_min(WINS, DELTAS))
    mirrored = found(lc_min([1 - w for w in WINS], [-d for d in DELTAS]))
    assert mirrored[0] == pytest.approx(1 - value, abs=1e-12) and mirrored[1] == pytest.approx(se, abs=1e-12)
    assert mirrored[2] == pytest.approx((-intercept, slope), abs=1e-9)


def test_lengths_that_are_equal_leave_the_win_rate() -> None:
    wins = [1, 0, 0.5, 1, 1]
    value, se, theta = found(lc_min(wins, [0] * 5))
    assert value == pytest.approx(0.7, abs=1e-12) and theta == (pytest.approx(math.log(7 / 3), abs=1e-9), 0.0)
    # The sandwich of an intercept alone: sqrt(Σ(y − p)²)/n
    assert se == pytest.approx(math.sqrt(sum((w - 0.7) ** 2 for w in wins)) / 5, abs=1e-12)


def test_a_player_that_wins_by_length_alone_is_brought_back_to_a_half() -> None:
    rng = np.random.default_rng(1)
    deltas = rng.normal(-300, 300, 4000)  # the player writes more
    x = np.tanh(deltas / deltas.std(ddof=1))
    wins = (rng.random(4000) < 1 / (1 + np.exp(2 * x))).astype(float)
    value, se, _ = found(lc_min(list(wins), list(deltas)))
    assert wins.mean() > 0.65
    assert abs(value - 0.5) < 3 * se < 0.06


def test_the_standard_error_covers() -> None:
    rng = np.random.default_rng(2)
    truth, covered, times = 1 / (1 + math.exp(-0.4)), 0, 300
    for _ in range(times):
        deltas = rng.normal(-100, 250, 200)
        x = np.tanh(deltas / deltas.std(ddof=1))
        wins = (rng.random(200) < 1 / (1 + np.exp(-(0.4 - 1.0 * x)))).astype(float)
        value, se, _ = found(lc_min(list(wins), list(deltas)))
        covered += abs(value - truth) < 1.96 * se
    assert 0.91 <= covered / times <= 0.98  # 0.95 ± 3 standard errors of 300 draws


@pytest.mark.parametrize(
    ("wins", "deltas", "reason"),
    [
        ([], [], "two comparisons"),
        ([1], [5], "two comparisons"),
        ([1, 1, 1], [1, -5, 9], "every comparison was won"),
        ([0, 0], [1, -5], "every comparison was lost"),
        ([1, 0, 1, 0], [7, 7, 7, 7], "length difference is the same everywhere"),
        ([1, 1, 0, 0], [5, 3, -2, -4], "length difference alone tells"),
        ([0, 0, 1, 1], [5, 3, -2, -4], "length difference alone tells"),
        ([1, 1, 0, 0], [5, 3, 3, -4], "length difference alone tells"),  # quasi-separated: they touch
        ([1, 0.5, 0], [5, 3, -4], "length difference alone tells"),
    ],
)
def test_no_number_where_the_likelihood_has_no_maximum(wins: list[float], deltas: list[float], reason: str) -> None:
    fit = lc_min(wins, deltas)
    assert (fit.value, fit.se, fit.theta, fit.n) == (None, None, None, len(wins))
    assert reason in fit.reason


def test_a_fit_next_to_separation_is_right_or_none() -> None:
    # One loss among the wins keeps the maximum finite, however steep
    deltas = [10 * i for i in range(1, 51)] + [-10 * i for i in range(1, 51)]
    wins = [1.0] * 50 + [0.0] * 50
    wins[0], wins[50] = 0.0, 1.0
    value, _, theta = found(lc_min(wins, deltas))
    assert value == pytest.approx(0.5, abs=1e-9) and theta[1] > 5


@pytest.mark.parametrize(
    ("wins", "deltas"), [([1, 2], [1, 2]), ([1, -0.1], [1, 2]), ([1, 0], [1]), ([1, 0], [1, math.nan])]
)
def test_numbers_out_of_range_are_refused(wins: list[float], deltas: list[float]) -> None:
    with pytest.raises(ValueError, match="wins must be numbers"):
        lc_min(wins, deltas)


# The format -----------------------------------------------------------------------------------------------------------

ROWS = [Output("do ü", "done\n", "p", "set"), Output("go", "", "p", "set")]


def test_the_format_is_alpaca_evals_and_reads_back(tmp_path: Path) -> None:
    write_outputs(tmp_path / "new" / "o.json", ROWS)
    assert json.loads((tmp_path / "new" / "o.json").read_text(encoding="utf-8")) == [
        {"instruction": "do ü", "output": "done\n", "generator": "p", "dataset": "set"},
        {"instruction": "go", "output": "", "generator": "p", "dataset": "set"},
    ]
    assert read_outputs(tmp_path / "new" / "o.json") == ROWS
    lines = write_jsonl(
        tmp_path / "o.jsonl", [{"instruction": "a", "output": "b", "generator": "g", "datasplit": "eval"}]
    )
    assert read_outputs(lines) == [Output("a", "b", "g")]
    assert read_outputs(write_jsonl(tmp_path / "i.jsonl", [{"instruction": "a"}]), complete=False) == [
        Output("a", "", "")
    ]


GOOD = {"instruction": "a", "output": "b", "generator": "g"}


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"output": "b", "generator": "g"}, "o.jsonl:2: no `instruction`; the row has output, generator"),
        ({"instruction": "a", "generator": "g"}, "o.jsonl:2: no `output`"),
        ({"instruction": "a", "output": "b"}, "o.jsonl:2: no `generator`"),
        ({**GOOD, "output": None}, "o.jsonl:2: `output` is no text"),
        ({**GOOD, "instruction": " "}, "o.jsonl:2: `instruction` is empty"),
        ({**GOOD, "generator": "h"}, "o.jsonl:2: generator 'h', but the rows before are of 'g'"),
        ([1], "o.jsonl:2: the row is a list"),
    ],
)
def test_bad_rows_are_told_by_file_and_line(tmp_path: Path, row: Any, told: str) -> None:
    with pytest.raises(InputError, match=told):
        read_outputs(write_jsonl(tmp_path / "o.jsonl", [GOOD, row]))


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.json: no such file"):
        read_outputs(tmp_path / "none.json")
    (tmp_path / "o.json").write_text("[]")
    with pytest.raises(InputError, match=r"o\.json: no rows in it"):
        read_outputs(tmp_path / "o.json")
    (tmp_path / "o.json").write_text(json.dumps([GOOD, {"instruction": "x"}]))
    with pytest.raises(InputError, match=r"o\.json\[1\]: no `output`"):
        read_outputs(tmp_path / "o.json")


# Comparing ------------------------------------------------------------------------------------------------------------


def longer(messages: Sequence[Message]) -> str | None:
    """Prefers the longer answer; cannot read `?`, has no room for `!`."""
    first, second = messages[1].content.split("# Answer A\n")[1].split("\n\n# Which")[0].split("\n\n# Answer B\n")
    if "!" in first + second:
        return None
    if "?" in first + second:
        return "hm"
    return "[[A]]" if len(first) > len(second) else "[[B]]" if len(first) < len(second) else "[[A]]"


def test_a_comparison_by_hand(tmp_path: Path) -> None:
    ours = ["longer", "x", "same", "why?", "no!", "xxxx"]
    theirs = ["short", "longer", "mean", "b", "b", "yy"]
    outputs = [Output(f"q{i}", text, "p") for i, text in enumerate(ours)]
    references = [Output(f"q{i}", text, "r") for i, text in reversed(list(enumerate(theirs)))]
    figures = compare(outputs, references, longer, Ledger(tmp_path / "j.jsonl"))
    # won, lost, tied (always the first: flipped), unread, unanswered, won
    assert (figures["wins"], figures["ties"], figures["losses"], figures["flipped"]) == (2, 1, 1, 1)
    assert (figures["judgements"], figures["unread"], figures["unanswered"]) == (12, 2, 2)
    assert figures["win_rate"]["mean"] == 0.625 and figures["win_rate"]["n"] == 4
    assert figures["LC-min"]["mean"] is None and "length difference alone tells" in figures["LC-min"]["reason"]
    assert figures["characters"]["output"]["mean"] == pytest.approx((6 + 1 + 4 + 4 + 3 + 4) / 6)


def test_length_differences_are_the_references_less_the_players(tmp_path: Path) -> None:
    def by_name(messages: Sequence[Message]) -> str:
        text = messages[1].content
        return "[[C]]" if "tie" in text else "[[A]]" if text.index("win") < text.index("lose") else "[[B]]"

    words = ["win", "lose", "win", "tie", "lose", "win"]
    outputs = [Output(f"q{i}", w + "." * (7 * i % 5), "p") for i, w in enumerate(words)]
    other = {"win": "lose", "lose": "win", "tie": "tie"}
    references = [Output(f"q{i}", other[w] + "," * (3 * i % 4), "r") for i, w in enumerate(words)]
    figures = compare(outputs, references, by_name, Ledger(tmp_path / "j.jsonl"))
    wins = [{"win": 1.0, "lose": 0.0, "tie": 0.5}[w] for w in words]
    deltas = [len(r.output) - len(o.output) for o, r in zip(outputs, references, strict=True)]
    value, se, theta = found(lc_min(wins, deltas))
    assert (figures["LC-min"]["mean"], figures["LC-min"]["se"], figures["theta"]) == (value, se, theta)


def test_an_instruction_that_stands_twice_is_compared_twice(tmp_path: Path) -> None:
    outputs = [Output("q", "long one", "p"), Output("q", "s", "p")]
    references = [Output("q", "mid", "r"), Output("q", "mid", "r")]
    figures = compare(outputs, references, longer, Ledger(tmp_path / "j.jsonl"))
    assert (figures["wins"], figures["losses"]) == (1, 1)
    with pytest.raises(InputError, match="1 of 2 instructions have no reference output; the first is 'q'"):
        compare(outputs, references[:1], longer, Ledger(tmp_path / "j.jsonl"))


def test_the_command_exports_compares_and_asks_nothing_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparring import players

    model = write_model(tmp_path / "model", context=160)
    reference = write_jsonl(
        tmp_path / "ref.jsonl",
        [{"instruction": f"do {i}", "output": "x" * i, "generator": "r", "dataset": "d"} for i in range(6)],
    )
    (tmp_path / "mine.py").write_text("def judge(messages):\n    return '[[C]]'\n")
    out = tmp_path / "out"
    command = ["alpaca", model, "--data", reference, "--judge", f"{tmp_path}/mine.py:judge", "--out", out,
               "--max-new-tokens", 8, "--generator", "tiny", "--limit", 5]  # fmt: skip
    code, told, err = cli(*command)
    assert (code, err) == (0, "")
    assert "win rate  50.00 ± 0.00 (n = 5)" in told and "LC-min    50.00 ± 0.00 (n = 5)" in told
    outputs = read_outputs(out / "outputs.json")
    assert [(o.instruction, o.generator, o.dataset) for o in outputs] == [(f"do {i}", "tiny", "d") for i in range(5)]
    monkeypatch.setattr(players, "load_model", None)
    assert cli(*command).out == told
    # What was exported is read back and compared as it is
    code, again, err = cli("alpaca", out / "outputs.json", "--data", reference, "--judge", f"{tmp_path}/mine.py:judge",
                           "--out", tmp_path / "second")  # fmt: skip
    assert (code, err) == (0, "") and "win rate  50.00 ± 0.00 (n = 5)" in again


def test_a_limit_is_of_the_data_and_the_outputs_follow(tmp_path: Path) -> None:
    write_outputs(tmp_path / "r.json", [Output(f"q{i}", "mid", "r") for i in range(5)])
    write_outputs(tmp_path / "o.json", [Output(f"q{i}", "longer", "p") for i in (4, 3, 2, 0)])
    paths = tmp_path / "o.json", tmp_path / "r.json"
    result = run_alpaca(*paths, tmp_path / "out", judge=longer, limit=3)
    assert [row.instruction for row in read_outputs(tmp_path / "out" / "outputs.json")] == ["q2", "q0"]
    assert (result["outputs"], result["missing"], result["wins"], result["judgements"]) == (2, 1, 2, 4)
    assert summary_lines(result)[0] == "outputs: 2, of which 0 empty; 1 instructions have none"
    assert run_alpaca(*paths, tmp_path / "out", judge=longer)["missing"] == 1
    write_outputs(tmp_path / "o.json", [Output("q4", "longer", "p")])
    with pytest.raises(
        InputError, match=r"o\.json: has no output for the first 2 instructions of .*r\.json; raise the limit"
    ):
        run_alpaca(*paths, tmp_path / "out", limit=2)


def test_without_a_judge_it_exports(tmp_path: Path) -> None:
    write_outputs(tmp_path / "o.json", ROWS)
    result = run_alpaca(tmp_path / "o.json", tmp_path / "o.json", tmp_path / "out")
    assert result == {"benchmark": "alpaca", "player": "p", "missing": 0, "outputs": 2, "empty": 1}
    assert read_outputs(tmp_path / "out" / "outputs.json") == ROWS


def test_the_players_settings_are_sppos(tmp_path: Path) -> None:
    asked: list[dict[str, Any]] = []

    class Told(Chat):
        def replies(self, conversations: Any, keys: Any, **settings: Any) -> Any:
            asked.append(settings | {"talks": list(conversations)})
            return ((i, Reply(f"no {i}", 2, "stop")) for i in range(len(conversations)))

    write_outputs(tmp_path / "o.json", ROWS)
    player = Told("told", lambda: None)  # type: ignore[arg-type, return-value]
    result = run_alpaca(player, tmp_path / "o.json", tmp_path / "out", generator="g")
    talks = [(Message("user", "do ü"),), (Message("user", "go"),)]
    assert asked == [{"temperature": 0.7, "top_p": 0.9, "max_new_tokens": 2048, "talks": talks}]
    assert read_outputs(tmp_path / "out" / "outputs.json") == [
        Output("do ü", "no 0", "g", "set"), Output("go", "no 1", "g", "set"),
    ]  # fmt: skip
    assert result["answers"]["n"] == 2 and result["temperature"] == 0.7
