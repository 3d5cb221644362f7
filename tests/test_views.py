"""What the terminal shows: exact lines, figures, and hostile text that stays text."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from fakerun import example, group, round_view, run_view, sample, summary
from sparring import views
from sparring.errors import InputError
from sparring.formatting import clip, figure, seconds, visible
from sparring.types import Frozen, Player, Rendered
from sparring.views.show import marked


def lines(renderable: Any, width: int = 120) -> list[str]:
    console = Console(record=True, width=width, color_system=None, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        console.print(renderable)
        return [line.rstrip() for line in console.export_text().splitlines()]


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("a\nb\tc", "a\nb\tc"),
        ("\x1b[31mred\x00\x7f\r", "␛[31mred␀␡␍"),
        ("ab\u202ecd\u2066\u200b\ufeff", "ab\\u202ecd\\u2066\\u200b\\ufeff"),
        ("\x9b31m\ud800\U000e0041", "\\u009b31m\\ud800\\U000e0041"),
        ("héllo 👩‍🚀 שלום", "héllo 👩‍🚀 שלום"),
    ],
)
def test_hidden_characters_are_spelled_out(raw: str, shown: str) -> None:
    assert visible(raw) == shown


def test_a_long_text_is_cut_with_its_number_of_missing_characters() -> None:
    assert clip("x" * 1_000_000, 10) == "xxxxxxxxxx … (999,990 more characters)"
    assert clip("x" * 10, 10) == "xxxxxxxxxx"


@pytest.mark.parametrize(
    ("value", "options", "shown"),
    [
        ({"mean": 0.4125, "se": 0.021}, {"percent": True}, "41.2 ± 2.1"),
        ({"mean": 0.5, "se": 0.1}, {"percent": True, "errors": 1.96}, "50.0 ± 19.6"),
        ({"mean": 12.345, "se": 0.1}, {}, "12.35 ± 0.10"),
        ({"mean": 12.0, "se": None}, {}, "12.00"),
        ({"mean": float("nan"), "se": 0.1}, {}, "–"),
        (None, {"percent": True}, "–"),
        (0.25, {"percent": True}, "25.0"),
    ],
)
def test_figures(value: Any, options: dict[str, Any], shown: str) -> None:
    assert figure(value, **options) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "–"),
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.6, "1 min 00 s"),
        (185, "3 min 05 s"),
        (7620, "2 h 07 min"),
    ],
)
def test_durations(value: float | None, shown: str) -> None:
    assert seconds(value) == shown


def test_status_shows_stages_figures_best_player_and_size(tmp_path: Path) -> None:
    (tmp_path / "one").write_bytes(b"x" * 1_500)
    (tmp_path / "two").hardlink_to(tmp_path / "one")
    unfinished = round_view(1, "spin", stages={"samples": "partial", "groups": "-"}, seconds={"samples": 4.0})
    rounds = [round_view(0, "sft", stages={"groups": "done", "player": "done", "eval": "done"}), unfinished]
    evaluations = {0: summary(None, None, 12.0), 1: summary(0.5, 0.55, 11.0)}
    run = run_view(tmp_path, rounds=rounds, evaluation=evaluations.get, best=1)
    assert lines(views.status(run)) == [
        "demo  1.5 kB on disk",
        "",
        "round   method   samples         groups       player            eval",
        "0       sft      - 12 s          done 0.1 s   done 3 min 05 s   done 9.0 s",
        "1       spin     partial 4.0 s   -            -                 -",
        "",
        "player   made by    sampled %     greedy %       gold_nll",
        "0        given              –            –   12.00 ± 0.25",
        "1 ★      spin      50.0 ± 3.5   55.0 ± 3.5   11.00 ± 0.25",
        "2        spin               –            –              –",
        "★ best; ± one standard error; gold_nll in nats, lower is better",
    ]


def test_status_tells_what_the_controls_did(tmp_path: Path) -> None:
    said = ["round 0: ended early, after 3 of 9 steps", "round 1 was not begun: [red]because"]
    shown = lines(views.status(run_view(tmp_path, control_lines=lambda: said)))
    assert shown[shown.index(said[0]) - 1 :][:4] == ["", *said, ""]


def test_results_end_with_the_controls_and_take_plain_rows() -> None:
    rows = [{"player": 0, "made_by": "sft", "sampled": 0.4, "greedy": 0.5, "gold_nll": 12.0}]
    shown = lines(views.results(rows, {"same steps, [red]SFT": summary(0.42, 0.5, 11.5)}))
    assert shown == [
        "player   made by                 sampled %     greedy %       gold_nll",
        "0        sft                          40.0         50.0          12.00",
        "         same steps, [red]SFT   42.0 ± 3.5   50.0 ± 3.5   11.50 ± 0.25",
        "± one standard error; gold_nll in nats, lower is better",
    ]


def test_samples_stand_beside_gold_with_log_probs() -> None:
    shown = lines(views.show_samples(run_view(Path(".")), 0, 1))
    assert shown[:2] == ["aa", "user: What is 0 + 0?"]
    assert shown[3].split("  ")[0] == " gold, reference log p -1.50"  # three gold tokens at -0.5
    assert shown[3].endswith("sample 0, stop, 3 tokens, own log p -2.00")
    assert shown[5].split() == ["It", "is", "0.", "It", "is", "1."]
    assert not any("What is 1" in line for line in shown)


def test_groups_show_targets_roles_and_where_replayed_samples_came_from() -> None:
    old = sample("aa", "It is 7.", 0)
    replayed = group("aa", old, 1, origin=0)
    run = run_view(Path("."), rounds=[round_view(0, "spin", [old]), round_view(1, "spin", [], [replayed])])
    shown = lines(views.show_groups(run, 1, 5), width=140)
    assert shown[0] == "aa  weight 1  replayed from round 0"
    assert shown[3].split("  ")[0] == " gold, target 1, reference log p -1.50"
    assert shown[3].endswith("opponent of round 0, stop, target 0, reference log p -4.50")
    assert shown[5].endswith("It is 7.")


def test_two_frozen_rows_of_one_group_are_told_once() -> None:
    run = run_view(Path("."))
    turn = run.rounds[0]
    turn.rows("frozen", Frozen).append(turn.rows("frozen", Frozen)[0])
    assert " ".join(lines(views.show_groups(run, 0, 1))).count("reference") == 2


def test_differing_words_are_marked_on_both_sides() -> None:
    text = marked("It is 12 apples.", "It is 13 apples.", "underline")
    assert [text.plain[s.start : s.end] for s in text.spans if s.style == "underline"] == ["12"]
    assert text.plain == "It is 12 apples."


def test_hostile_text_is_inert_in_the_terminal() -> None:
    bad = "[bold]x[/bold] \x1b]0;owned\x07 \u202e [link=file:///]y[/link]"
    run = run_view(
        Path("."),
        examples={"aa": example("aa", bad, bad)},
        rounds=[round_view(0, "spin", [sample("aa", bad + "\ud800" + "z" * 100_000)])],
    )
    console = Console(width=400, record=True, force_terminal=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        console.print(views.show_samples(run, 0, 1))
        text = console.export_text(styles=False)
    assert text.count("[bold]x[/bold] ␛]0;owned␇ \\u202e [link=file:///]y[/link]") >= 2
    assert "\x1b" not in text and "\u202e" not in text
    assert "more characters)" in text


def test_a_round_that_is_not_there_or_not_done_is_named() -> None:
    run = run_view(Path("."), rounds=[round_view(0, "spin", stages={"samples": "-"})])
    with pytest.raises(InputError, match=r"^demo: there is no round 3; it has 0$"):
        views.show_groups(run, 3, 1)
    with pytest.raises(InputError, match="not done"):
        views.show_samples(run, 0, 1)


def test_check_shows_the_loss_mask_lengths_and_counts() -> None:
    rows = [
        Rendered("e0", (7, 8, 9), (50, 51, 2), "fifty"),
        Rendered("e1", tuple(range(100)), (60, 61), "sixty", cut=("gold",)),
        Rendered("e2", (1,) * 20, (2,) * 5, "two"),
    ]
    counts = {"duplicates": 1200, "golds_cut": 1, "overlap": 0}
    renderer: Any = SimpleNamespace(end_id=2)
    shown = lines(views.check(rows, renderer, counts, train=3, heldout=1000, shown=2), width=400)
    assert shown[3:5] == ["7 8 9 │ 50 51 [2]", "fifty"]
    head, tail = " ".join(map(str, range(32))), " ".join(map(str, range(68, 100)))
    assert shown[7] == f"{head} … 36 more … {tail} │ 60 61 no end token: cut  cut: gold"
    assert "e2" not in shown
    start = shown.index("gold answer, tokens: 2 to 5, mean 3.3")
    assert [line.split() for line in shown[start + 1 : start + 5]] == [
        ["2..2", "█" * 40, "1"],
        ["3..3", "█" * 40, "1"],
        ["4..4", "0"],
        ["5..5", "█" * 40, "1"],
    ]
    assert shown[shown.index("prompt, tokens: 3 to 100, mean 41.0") + 1].split() == ["3..15", "█" * 40, "1"]
    assert shown[-5:] == [
        "3 training examples, 1,000 held out",
        "count        examples",
        "duplicates   1,200",
        "golds cut    1",
        "overlap      0",
    ]


def test_check_marks_trained_tokens_and_the_end_token_by_style() -> None:
    from sparring.views import _ids

    text = _ids(Rendered("e0", (7, 8), (50, 51, 2), ""), 2)
    styles = {text.plain[span.start : span.end]: span.style for span in text.spans}
    assert styles == {"e0": "bold", "7 8": "dim", "50 51": "green", " [2]": "bold reverse green"}


def test_methods_table_and_details() -> None:
    table = lines(views.methods(["spin", "sft"]), width=400)
    assert table[1].startswith(
        "spin     The learner prefers gold answers to those of the player it started from (opponent = reference = start)."
    )
    assert "beta=0.1, loss=logistic" in table[1] and "arXiv 2401.01335" in table[1]
    about = lines(views.method("spin"))
    assert about[0] == "spin  paper"
    assert "beta              float   0.1" in about
    with pytest.raises(InputError, match="spinn"):
        views.method("spinn")


def test_answers_stand_side_by_side() -> None:
    answer: Any = SimpleNamespace(tokens=(1, 2, 3), logps=(-1.0, -1.0, -1.0), finish="length")
    shown = "\n".join(
        lines(views.answers([(Player("p", 0, "0"), answer, "[b]four"), (Player("p", 2, "2"), answer, "4")]))
    )
    assert "player 0 (3 tokens, cut)" in shown and "player 2 (3 tokens, cut)" in shown and "[b]four" in shown
