"""The report: its verdict, its figures, and that no text of a model or data set can act in it."""

from __future__ import annotations

import math
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fakerun import example, item, round_view, run_view, sample, summary
from helpers import cli
from hostile import ALL_OF_IT, HOSTILE, hostile_run
from sparring.config import Config, EvaluateConfig
from sparring.errors import InputError
from sparring.report import fingerprint, page, refresh_report, write_report
from sparring.report.curves import Chart, Line, by_round, by_step, draw, tick
from sparring.report.examples import MOST_EXAMPLES, gather, waterline
from sparring.report.rescore import rescore
from sparring.report.table import rows
from sparring.report.tokens import END, Duel, classes, coloured, duels, moved, split
from sparring.report.verdict import verdict
from sparring.rundir.view import RunView
from sparring.types import Frozen, Player, Sample
from sparring.views import live


class Parsed(HTMLParser):
    """Elements, attributes and table rows of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.text, self.cell = "", False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.cell = tag in ("td", "th") or (self.cell and tag not in ("tr", "p"))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        data = data.replace("\xa0", " ")
        self.text += data
        if self.cell:
            self.rows[-1][-1] += data.strip("\n")


def evaluations(start: float | None, end: float | None, nll: float = 11.0) -> dict[int, dict[str, Any]]:
    return {0: summary(start, start, 12.0), 1: summary(end, end, nll)}


@pytest.mark.parametrize(
    ("figures", "best", "sentence"),
    [
        (
            evaluations(0.4, 0.6),
            1,
            "Player 1 answers 60.0 % of held-out prompts right when sampling, 20.0 points above player 0 "
            "(95 % interval +10.4 to +29.6).",
        ),
        (
            evaluations(0.4, 0.45),
            1,
            "Player 1 answers 45.0 % of held-out prompts right when sampling, 5.0 points above player 0 "
            "(within noise, 95 % interval −4.7 to +14.7).",
        ),
        (
            evaluations(0.6, 0.4),
            1,
            "Player 1 answers 40.0 % of held-out prompts right when sampling, 20.0 points below player 0 "
            "(95 % interval −29.6 to −10.4).",
        ),
        (
            evaluations(0.6, 0.4),
            0,
            "No round improved on player 0, which answers 60.0 % of held-out prompts right when sampling.",
        ),
        (
            evaluations(None, None),
            1,
            "No answer was checked, as the verifier could judge none; the held-out gold answers cost 11.00 nats each under player 1, "
            "1.00 less than under player 0 (95 % interval −1.69 to −0.31; lower is better).",
        ),
        (
            evaluations(None, None, 12.1),
            1,
            "No answer was checked, as the verifier could judge none; the held-out gold answers cost 12.10 nats each under player 1, "
            "0.10 more than under player 0 (within noise, 95 % interval −0.59 to +0.79; lower is better).",
        ),
        ({0: summary(0.4, 0.5, 12.0)}, None, "Player 0 answers 40.0 % of held-out prompts right when sampling."),
        ({}, None, "No player has been evaluated yet."),
    ],
)
def test_verdict_says_gain_noise_loss_and_what_is_missing(
    figures: dict[int, Any], best: int | None, sentence: str
) -> None:
    assert verdict(run_view(Path("."), evaluation=figures.get, best=best)).sentence == sentence


def test_verdict_says_why_no_answer_was_checked() -> None:
    config = Config(evaluate=EvaluateConfig())
    told = verdict(run_view(Path("."), evaluation=evaluations(None, None).get, best=1, config=config))
    assert told.sentence.startswith(
        "No answer was checked, as there is no verifier; the held-out gold answers cost 11.00"
    )
    config = Config(evaluate=EvaluateConfig(verifier="gsm8k", best="sampled"))
    told = verdict(run_view(Path("."), evaluation=evaluations(None, None).get, best=1, config=config))
    assert told.detail.startswith("The last player that no guard stopped counts as the best.")


ANSWERS = "40.0 % of held-out prompts right when sampling."


@pytest.mark.parametrize(
    ("rule", "figures", "best", "sentence"),
    [
        # Killed behind SFT: self-play has not begun
        ("auto", {-1: summary(0.1, 0.1, 13.0), 0: summary(0.4, 0.4, 12.0)}, None, f"Player 0 answers {ANSWERS}"),
        # Another figure chose than the one that is told, by which a later player is far better
        ("gold_nll", evaluations(0.4, 0.6, 14.0), 0, f"Player 0 is the best; it answers {ANSWERS}"),
        ("last", evaluations(0.4, 0.6), 0, f"Player 0 is the best; it answers {ANSWERS}"),
        ("sampled", evaluations(0.4, 0.2), 0, f"No round improved on player 0, which answers {ANSWERS}"),
    ],
)
def test_verdict_says_no_round_improved_only_where_that_was_measured(
    rule: Any, figures: dict[int, Any], best: int | None, sentence: str
) -> None:
    config = Config(evaluate=EvaluateConfig(verifier="gsm8k", best=rule))
    players = {n: Player(f"p{n}", n, f"{n}" * 64) for n in figures}
    run = run_view(Path("."), evaluation=figures.get, best=best, config=config, players=players)
    assert verdict(run).sentence == sentence


def test_figures_from_elsewhere_are_not_paired_by_the_run_s_items() -> None:
    """Not even where those differ by as much."""

    def items(player: int) -> Any:
        return (item(f"h{i}", "sampled", "", i < (30 if player else 20)) for i in range(50))

    figures = evaluations(0.4, 0.6)
    run = run_view(Path("."), evaluation=figures.get, items=items, best=1)
    assert verdict(run).detail.endswith("The 95 % interval is paired over 50 prompts.")
    kept = run_view(Path("."), evaluation=evaluations(0.4, 0.2).get, best=0)
    assert verdict(kept, figures).sentence == f"Player 0 is the best; it answers {ANSWERS}"
    assert verdict(run, figures).detail.endswith("The 95 % interval is unpaired.")
    assert "+10.4 to +29.6" in verdict(run, figures).sentence
    own, others = ([row.cells[0].gain for row in rows(run, given, {})[1]][1] for given in (None, figures))
    assert others == "▲\u00a0+20.0 [+10.4,\u00a0+29.6]" != own


def test_figures_from_elsewhere_do_not_say_how_the_best_was_chosen() -> None:
    own = {n: summary(0.4, 0.4, 12.0) | {"task:sums": {"mean": 0.5}} for n in (0, 1)}
    config = Config(evaluate=EvaluateConfig(verifier="gsm8k", tasks=("sums.jsonl",), best="task:sums"))
    run = run_view(Path("."), evaluation=own.get, best=1, config=config)
    for figures in (None, evaluations(0.4, 0.6)):
        assert verdict(run, figures).detail.startswith("The best player was chosen by its figure on task:sums.")


def test_verdict_pairs_by_prompt_when_every_item_is_kept() -> None:
    def items(player: int) -> Any:
        rights = [False, True, False, False] if player == 0 else [True, True, True, False]
        return (item(f"h{i}", "sampled", "", right) for i, right in enumerate(rights))

    figures = {0: summary(0.25, None, 12.0), 1: summary(0.75, None, 12.0)}
    told = verdict(run_view(Path("."), evaluation=figures.get, items=items, best=1))
    # Gains 1, 0, 1, 0 and the two that are added, 1 and −1: mean 1/3, variance 4/6 − 1/9 (Bonett and Price)
    half = 1.96 * math.sqrt((4 / 6 - 1 / 9) / 6)
    assert f"(within noise, 95 % interval −{100 * (half - 1 / 3):.1f} to +{100 * (half + 1 / 3):.1f})" in told.sentence
    assert (
        told.detail
        == "The best player was chosen by held-out sampled accuracy. The 95 % interval is paired over 4 prompts."
    )


def test_verdict_does_not_pair_items_that_are_not_those_of_the_summary() -> None:
    def items(player: int) -> Any:
        return (item(f"h{i}", "sampled", "", bool(player)) for i in range(4))

    told = verdict(run_view(Path("."), evaluation=evaluations(0.4, 0.45).get, items=items, best=1))
    assert "−4.7 to +14.7" in told.sentence and told.detail.endswith("unpaired.")


@pytest.mark.parametrize(
    ("rule", "figures", "detail"),
    [
        ("greedy", evaluations(0.4, 0.6), "The best player was chosen by held-out greedy accuracy. "),
        ("auto", evaluations(None, None), "The last player that no guard stopped counts as the best. "),
        ("gold_nll", evaluations(0.4, 0.6), "The best player was chosen by held-out gold_nll. "),
    ],
)
def test_verdict_says_how_the_best_player_was_chosen(rule: Any, figures: dict[int, Any], detail: str) -> None:
    config = Config(evaluate=EvaluateConfig(best=rule))
    told = verdict(run_view(Path("."), evaluation=figures.get, best=1, config=config))
    assert told.detail == detail + "The 95 % interval is unpaired."
    assert ("decoding greedily" in told.sentence) == (rule == "greedy")


def test_page_has_figures_with_intervals_controls_cost_and_provenance(tmp_path: Path) -> None:
    path = write_report(
        run_view(tmp_path), tmp_path / "report.html", extra={"same steps, SFT": summary(0.42, None, 11.5)}
    )
    assert path == tmp_path / "report.html" and [p.name for p in tmp_path.iterdir()] == ["report.html"]
    seen = Parsed(path.read_text(encoding="utf-8"))
    # The figures' errors add up in squares where no items are kept: 1.96 · √(0.4·0.6/200 + 0.5·0.5/200) = 9.7 points
    assert seen.rows[:5] == [
        ["Player", "Made by", "Sampled, %", "Greedy, %", "gold_nll"],
        ["0", "given", "40.0 ± 6.8", "50.0 ± 6.9", "12.00 ± 0.49"],
        [
            "1",
            "spin",
            "50.0 ± 6.9▲ +10.0 [+0.3, +19.7]",
            "55.0 ± 6.9≈ +5.0 [−4.8, +14.8]",
            "11.00 ± 0.49▼ −1.00 [−1.69, −0.31]",
        ],
        [
            "2best",
            "spin",
            "60.0 ± 6.8▲ +20.0 [+10.4, +29.6]",
            "56.0 ± 6.9≈ +6.0 [−3.8, +15.8]",
            "10.50 ± 0.49▼ −1.50 [−2.19, −0.81]",
        ],
        ["control", "same steps, SFT", "42.0 ± 6.8", "–", "11.50 ± 0.49"],
    ]
    assert seen.rows[5] == ["Round", "Method", "samples", "groups", "frozen", "player", "eval", "all"]
    cost = ["0", "spin", "12 s", "0.1 s", "3.0 s", "3 min 05 s120,000 tokens", "9.0 s", "3 min 29 s"]
    assert seen.rows[6] == cost
    assert seen.rows[8] == ["all", "", "24 s", "0.2 s", "6.0 s", "6 min 10 s", "18 s", "6 min 58 s"]
    assert seen.rows[10][3] == "groups, groups: 2groups, dropped, identical: 3"
    assert "start: player 0 000000000000" in seen.rows[10][2]
    assert ["versions.torch", "2.13.0"] in seen.rows and ["data.rows.jsonl", "e3b0c44298fc1c14"] in seen.rows
    assert "evaluate:\n  verifier: gsm8k\n" in seen.text


def test_every_task_has_its_column_and_its_own_interval() -> None:
    def told(player: int) -> dict[str, Any]:
        arc = {"mean": 0.25 + player / 10, "se": 0.01, "n": 400, "low": 0.2 + player / 10, "high": 0.31 + player / 10}
        mt = {"mean": 5.5 + player, "se": 0.2, "n": 80, "unit": "score"}
        return summary(0.4, None, 12.0) | {"task:arc": arc, "task:arc:acc": arc, "task:mt": mt, "pass@1": mt}

    seen = Parsed(page(run_view(Path("."), evaluation=told), {}))
    assert seen.rows[0][2:] == ["Sampled, %", "arc, %", "mt", "gold_nll"]
    assert seen.rows[1][3:5] == ["25.0 [20.0, 31.0]", "5.50 ± 0.39"]
    assert seen.rows[3][3:5] == ["45.0 [40.0, 51.0]▲ +20.0 [+17.2, +22.8]", "7.50 ± 0.39▲ +2.00 [+1.45, +2.55]"]


def test_page_is_self_contained_accessible_and_without_scripts() -> None:
    text = page(run_view(Path(".")), {})
    seen = Parsed(text)
    tags = {tag for tag, _ in seen.elements}
    assert not tags & {"script", "link", "img", "iframe", "object", "embed", "base", "form"}
    loading = [v for _, attributes in seen.elements for k, v in attributes.items() if k in ("src", "href", "action")]
    assert loading and all(target and target.startswith("#") for target in loading)
    ids = [attributes["id"] for _, attributes in seen.elements if "id" in attributes]
    assert len(ids) == len(set(ids)) and {target[1:] for target in loading if target} <= set(ids)
    assert all(attributes.get("scope") in ("row", "col") for tag, attributes in seen.elements if tag == "th")
    assert ("a", {"class": "skip", "href": "#main"}) in seen.elements
    assert "light-dark(" in text and "@media print" in text and "#010" not in text
    urls = set(re.findall(r"https?://[^\s\"<]+", text))
    assert urls <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}


def test_hostile_text_is_inert_everywhere_it_can_come_from(tmp_path: Path) -> None:
    run = hostile_run(tmp_path)
    text = write_report(run, tmp_path / "r.html", extra={ALL_OF_IT: summary(0.1, 0.1, 1.0)}).read_text("utf-8")
    items = {"items": lambda player: iter([item("h1", "greedy", f"a {player}", True)]), "control_lines": lambda: ["a"]}
    clean, seen = Parsed(page(run_view(tmp_path, **items), {"a": summary(0.1, 0.1, 1.0)})), Parsed(text)
    assert {tag for tag, _ in seen.elements} <= {tag for tag, _ in clean.elements}
    assert {k for _, attributes in seen.elements for k in attributes if k.startswith("on")} == set()
    assert {v for _, attributes in seen.elements for k, v in attributes.items() if k in ("href", "src")} <= {
        v for _, attributes in clean.elements for k, v in attributes.items() if k in ("href", "src")
    }
    for raw, shown in HOSTILE.items():
        assert shown in seen.text, raw
    assert not set("\u202e\u2066\u2069\u200b\u2028\u0000\u001b\ufeff") & set(text)
    assert "(996,000 more characters)" in text and "w" * 4001 not in text


def test_answers_of_every_player_stand_under_their_prompt() -> None:
    def items(player: int) -> Any:
        return iter([item("h1", "gold", "not shown"), item("h1", "greedy", f"answer {player}", player == 2)])

    seen = Parsed(page(run_view(Path("."), items=items), {}))
    assert "3 answers, 1 right" in seen.text and "20 + 22 = 42\n#### 42" in seen.text and "not shown" not in seen.text
    assert "player 2 greedy, 3 tokens, ✓ right" in seen.text and "player 0 greedy, 3 tokens, ✗ wrong" in seen.text


def test_samples_are_shown_where_nothing_was_evaluated_and_at_most_so_many() -> None:
    many = [sample(f"e{i}", f"text {i};") for i in range(60)]
    run = run_view(Path("."), rounds=[round_view(0, "spin", many)], examples={"e0": example("e0", "Why?", "So.")})
    seen = Parsed(page(run, {}))
    assert "text 47;" in seen.text and "text 48;" not in seen.text and "Why?" in seen.text
    assert "round 0 sampled, 3 tokens" in seen.text and "48 of 60 prompts." in seen.text


def test_as_many_prompts_are_shown_where_each_has_several_samples() -> None:
    eight = [replace(sample(f"e{i}", f"text {i}.{k};"), index=k) for i in range(60) for k in range(8)]
    browser = gather(run_view(Path("."), rounds=[round_view(0, "spin", eight)], examples={}))
    assert [shown.id for shown in browser.shown] == [f"e{i}" for i in range(48)] and browser.total == 60
    assert [[answer.text.rest for answer in shown.answers] for shown in browser.shown[:2]] == [
        ["text 0.0;"],
        ["text 1.0;"],
    ]


def browsed(answers: dict[int, dict[str, tuple[bool, str, int]]]) -> Any:
    """A run of players 0, 1 and 2, the best, with greedy answers by example: right, text, number of tokens."""

    def items(player: int) -> Any:
        for name, (right, text, size) in answers[player].items():
            yield SimpleNamespace(**vars(item(name, "greedy", text, right)) | {"tokens": (1,) * size})

    names = {name for found in answers.values() for name in found}
    evaluations = {n: summary(None, 0.5, 10.0) for n in answers}
    heldout = {name: example(name, f"prompt {name}", "gold") for name in names}
    return run_view(Path("."), items=items, evaluation=evaluations.get, heldout=heldout)


def test_examples_are_tagged_by_what_became_of_them() -> None:
    before = {f"h{i}": (i % 2 == 0, "same", 3) for i in range(20)}
    after = before | {
        "h0": (False, "worse", 3),
        "h1": (True, "better", 3),
        "h2": (True, "same", 9),
        "h4": (True, "x", 3),
    }
    browser = gather(browsed({0: before, 1: before, 2: after}))
    shown = {s.id: s.tags for s in browser.shown}
    assert shown["h0"] == ("lost", "changed") and shown["h1"] == ("won", "changed")
    assert shown["h2"] == ("longest",) and shown["h4"] == ("changed",) and shown["h5"] == ()
    assert browser.tallies == {"won": (1, 1), "lost": (1, 1), "changed": (3, 3), "longest": (1, 1)}
    assert browser.versus == "player 2 is right more often than player 0"
    assert [s.id for s in browser.shown][:3] == ["h0", "h1", "h2"]


def test_no_kind_of_example_crowds_out_another() -> None:
    before = {f"h{i:03}": (False, "a", 3) for i in range(300)}
    after = {name: (i < 290, "b", 3) for i, name in enumerate(before)} | {"h299": (False, "a", 50)}
    browser = gather(browsed({0: before, 1: before, 2: after}))
    assert len(browser.shown) == MOST_EXAMPLES and browser.total == 300
    assert browser.tallies["won"][1] == 290 and browser.tallies["longest"] == (1, 1)
    assert "h299" in {s.id for s in browser.shown}


@pytest.mark.parametrize(
    ("sizes", "budget", "cap"), [([3, 10, 20], 100, 20), ([3, 10, 20], 21, 9), ([3, 10, 20], 6, 2), ([], 5, 0)]
)
def test_a_budget_is_shared_by_cutting_the_longest(sizes: list[int], budget: int, cap: int) -> None:
    assert waterline(sizes, budget) == cap  # 3 + 9 + 9 = 21
    assert sum(min(size, cap) for size in sizes) <= budget


def test_a_run_that_has_just_begun_has_a_page() -> None:
    waiting = round_view(0, "spin", stages={"samples": "partial"}, seconds={})
    run = run_view(Path("."), rounds=[waiting], players={}, best=None, evaluation=lambda n: None)
    assert "No player has been evaluated yet." in Parsed(page(run, {})).text


def test_a_run_that_was_cut_before_its_start_was_written_is_told(finished_run: Path, tmp_path: Path) -> None:
    for name in ("env.json", "config.yaml"):
        shutil.copy(finished_run / name, tmp_path / name)
    run = RunView(tmp_path)
    assert (run.players, run.finished, run.control_lines(), live.report(run)["players"]) == ({}, False, [], [])
    for arguments in (["status"], ["status", "--json"], ["report"]):
        code, out, err = cli(*arguments, tmp_path)
        assert (code, err) == (0, "") and out
    text = Parsed((tmp_path / "report.html").read_text(encoding="utf-8")).text
    assert "No player has been evaluated yet." in text


def test_an_unwritable_place_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"missing/report.html: cannot write the report: No such file or directory"):
        write_report(run_view(tmp_path), tmp_path / "missing" / "report.html")


def test_curves_carry_the_run_s_figures() -> None:
    charts = {chart.title: chart for chart in by_round(run_view(Path("."), ended={2: True}))}
    sampled = next(line for line in charts["Accuracy"].lines if line.label == "sampled")
    assert [(x, round(y, 6), round(e, 4)) for x, y, e in sampled.points] == [
        (0, 40, 6.7896),
        (1, 50, 6.9296),
        (2, 60, 6.7896),
    ]
    assert (
        charts["Truncated"].words
        == "Truncated, % of held-out answers. truncated: player 0 2.5, player 1 2.5, player 2 2.5; alarms at player 2"
    )


def test_players_before_self_play_do_not_set_the_scale() -> None:
    found = {-1: summary(0.0, 0.0, 99.0), 0: summary(0.4, 0.4, 12.0), 1: summary(0.5, 0.5, 11.0)}
    players = {n: Player(f"p{n}", n, str(n + 2) * 64) for n in found}
    rounds = [round_view(-1, "sft", steps=10), round_view(0, "spin", steps=20)]
    run = run_view(Path("."), players=players, evaluation=found.get, rounds=rounds)
    assert [point[0] for point in by_round(run)[0].lines[0].points] == [0, 1]
    assert max(x for x, _, _ in by_step(run)[0].lines[0].points if math.isfinite(x)) == 20
    alone = run_view(Path("."), players={-1: players[-1]}, evaluation=found.get, rounds=rounds[:1])
    assert [point[0] for point in by_round(alone)[0].lines[0].points] == [-1]
    assert max(x for x, _, _ in by_step(alone)[0].lines[0].points if math.isfinite(x)) == 10


def test_steps_run_on_over_rounds_and_are_thinned_to_means() -> None:
    rounds = [round_view(0, "sft", steps=10), round_view(1, "spin", steps=240)]
    rounds[1].alarms = [{"step": 100, "crossed_at": 120, "backoff": 1}]
    charts = {chart.title: chart for chart in by_step(run_view(Path("."), rounds=rounds))}
    rate = charts["Learning rate"]
    points = [point for point in rate.lines[0].points if math.isfinite(point[0])]
    assert rate.breaks == (10,) and rate.alarms == (130,) and len(points) == 10 + 120
    assert points[10][:2] == (10 + 1.5, pytest.approx(1e-4 * (1 - 0.5 / 240)))  # the mean of steps 1 and 2
    assert [line.label for line in charts["Log-probabilities"].lines] == ["log p(gold)", "log p(sample)"]
    assert charts["Margin"].lines[0].points[1][1] == pytest.approx(0.02)
    assert "var(--alarm)" in draw(rate, "c1") and "var(--alarm)" not in draw(replace(rate, alarms=()), "c1")


def test_a_chart_takes_the_page_s_colours_and_keeps_its_ids_apart() -> None:
    chart = Chart("Accuracy", "%", "player", (Line("a", ((0, 1, 0.5), (1, 2, 0.5))), Line("b", ((0, 2, 0.1),), 1)))
    svg = draw(chart, "c7")
    assert svg.startswith('<svg viewBox="') and svg.rstrip().endswith("</svg>")
    assert "var(--line-1)" in svg and "var(--line-2)" in svg and "var(--rule)" in svg and ">player<" in svg
    assert all(name.startswith("c7-") for name in re.findall(r'\bid="([^"]*)"', svg))
    assert svg == draw(chart, "c7") and "<metadata" not in svg and "DejaVu" not in svg


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.5, "0.5"),
        (5e-7, "5e−7"),
        (9e-4, "9e−4"),
        (0.002, "0.002"),
        (-32, "−32"),
        (12345, "12,345"),
        (0, "0"),
        (41.23, "41.2"),
    ],
)
def test_ticks(value: float, shown: str) -> None:
    assert tick(value) == shown


def test_what_the_controls_did_is_told_and_drawn(tmp_path: Path) -> None:
    quiet = Parsed(page(run_view(tmp_path), {}))
    assert "Controls:" not in quiet.text
    run = run_view(tmp_path, control_lines=lambda: ["round 1: ended early, after 12 of <b>100</b> steps"])
    for turn in run.rounds:
        turn.log = [{**row, "held_kl": 0.01 * row["step"]} for row in turn.log[::10]]
    told = Parsed(page(run, {}))
    assert "Controls: round 1: ended early, after 12 of <b>100</b> steps." in told.text
    chart = next(chart for chart in by_step(run) if chart.title == "Held-out KL")
    points = [y for _, y, _ in chart.lines[0].points if math.isfinite(y)]
    assert points[0] == pytest.approx(0.01 * run.rounds[0].log[0]["step"])


# Tokens


def test_tokens_become_pieces_and_the_bytes_of_a_character_stay_together() -> None:
    codes = [b"a", "é".encode()[:1], "é".encode()[1:], b" b", b"", "€".encode()[:2]]

    def decode(tokens: Sequence[int]) -> str:
        return b"".join(codes[i] for i in tokens).decode(errors="replace")

    assert split(decode, range(5)) == [("a", 1), ("é", 2), (" b", 1), ("", 1)]
    assert split(decode, [0, 5]) == [("a", 1), ("\ufffd", 1)]  # nothing is lost where a character has no end


def test_pieces_whose_text_depends_on_what_stands_before_join_up_to_the_whole() -> None:
    def decode(tokens: Sequence[int]) -> str:
        return " ".join("abcdefgh"[i] for i in tokens)  # as sentencepiece does: the first word has no space

    assert "".join(text for text, _ in split(decode, range(8))) == decode(range(8))
    assert [text for text, _ in split(decode, range(3))] == ["a", " b", " c"]


def test_a_token_s_shift_is_the_learner_s_log_prob_less_the_opponent_s() -> None:
    by = [Duel("round 0", "one", "zero", "a", ""), Duel("round 1", "two", "one", "b", "")]
    logps = {"zero": (-1.0, -2.0, -0.5, -3.0), "one": (-0.75, -4.0, -0.25, -3.05)}
    pieces = [("x", 1), ("é", 2), ("", 1)]
    made = coloured(pieces, logps, by)
    assert [piece.shifts for piece in made] == [(0.25, None), (-1.75, None), (pytest.approx(-0.05), None)]
    assert [classes(piece, by) for piece in made] == ["au1", "ad3", ""]
    assert made[2].text == END and made[1].title == "−1.75, – nats"
    (told,) = moved(pieces, logps, by)
    assert (told.letter, told.total, told.most) == ("a", "−1.55", (("é", "−1.75"), ("x", "+0.25")))


@pytest.fixture(scope="module")
def scored_run(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> RunView:
    path = tmp_path_factory.mktemp("scored") / "run"
    shutil.copytree(finished_run, path, symlinks=True)
    return RunView(path)


def test_gold_answers_are_coloured_from_stored_figures_and_the_others_once_scored(scored_run: RunView) -> None:
    by = duels(scored_run)
    assert [(d.name, d.words) for d in by] == [
        ("round 0", "player 1 against player 0"),
        ("round 1", "player 2 against player 1"),
        ("all rounds", by[2].words),
    ]
    before = gather(scored_run)
    assert not before.whole and all(not answer.text.moved for s in before.shown for answer in s.answers)
    gold = {n: {i.example_id: i.logps for i in scored_run.items(n) if i.kind == "gold"} for n in (0, 1)}
    for shown in before.shown:
        assert shown.gold is not None
        shifts = [piece.shifts[0] for piece in shown.gold.pieces]
        told = [a - b for a, b in zip(gold[1][shown.id], gold[0][shown.id], strict=True)]
        assert shifts == pytest.approx(told, abs=1e-9)
        example = scored_run.heldout[shown.id]
        assert "".join(p.text for p in shown.gold.pieces) == f"{example.gold}{END}"
    count = rescore(scored_run)
    answers = [i for n in (0, 1, 2) for i in scored_run.items(n) if i.kind != "gold" and i.index == 0]
    assert count == 2 * len(answers)  # three players, each scores the other two's answers
    after = gather(scored_run)
    assert after.whole and all(len(answer.text.moved) == 3 for s in after.shown for answer in s.answers)
    # A player's answer is likelier, or not, by what scoring it again says: its own stored log-probs are the same numbers
    from sparring import logps, players, preview

    shown = next(s for s in after.shown if any(a.kind == "greedy" for a in s.answers))
    theirs = next(i for i in scored_run.items(0) if i.example_id == shown.id and i.kind == "greedy")
    renderer = preview.make_renderer(scored_run)
    prompt = renderer.prompt(scored_run.heldout[shown.id].messages)
    lines = [
        logps.score(players.load_model(p.path, scored_run.config.model), [prompt], [theirs.tokens], batch_size=1)[0]
        for p in (scored_run.players[0], scored_run.players[1])
    ]
    shifts = [p.shifts[0] for p in next(a for a in shown.answers if a.who == "player 0").text.pieces]
    assert shifts == pytest.approx([b - a for a, b in zip(*lines, strict=True)], abs=1e-4)
    assert rescore(scored_run) == 0


def test_answers_that_came_without_log_probs_are_scored_by_all(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that gives text gives none."""
    shutil.copytree(finished_run, tmp_path / "run", symlinks=True)
    stored = RunView.items
    monkeypatch.setattr(
        RunView,
        "items",
        lambda run, n, task=None: (i if i.kind == "gold" else replace(i, logps=()) for i in stored(run, n, task)),
    )
    run = RunView(tmp_path / "run")
    answers = [i for n in (0, 1, 2) for i in run.items(n) if i.kind != "gold" and i.index == 0]
    assert rescore(run) == 3 * len(answers) and rescore(run) == 0
    coloured = gather(run)
    assert coloured.whole and all(len(answer.text.moved) == 3 for s in coloured.shown for answer in s.answers)


def test_tokens_in_the_cost_table_are_those_of_the_rows(finished_run: Path) -> None:
    run = RunView(finished_run)
    turn = run.rounds[-1]
    played = sum(len(sample.tokens) for sample in turn.rows("samples", Sample))
    scored = sum(len(line) for row in turn.rows("frozen", Frozen) for line in row.logps)
    judged = sum(len(i.tokens) for i in run.items(turn.t + 1))
    row = next(row for row in Parsed(page(run, {})).rows if row[:2] == ["1", "spin"] and "tokens" in row[2])
    told = [int(re.sub(r"^.*?s(?=[\d,]+ tokens)|\D", "", cell)) for cell in row if "tokens" in cell]
    assert [told[0], told[1], told[3]] == [played, scored, judged]


# Once is enough


def test_the_page_is_not_made_again_until_the_run_changed(finished_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_run, run, symlinks=True)
    view, file = RunView(run), run / "report.html"
    refresh_report(view, file)
    made = file.stat().st_mtime_ns
    begun = time.perf_counter()
    refresh_report(view, file)
    assert time.perf_counter() - begun < 0.1 and file.stat().st_mtime_ns == made
    summary_file, log = run / "round_001" / "eval" / "summary.json", run / "round_000" / "train" / "log.jsonl"
    for touch in (
        lambda: summary_file.write_text(summary_file.read_text().replace('"n"', '"n" ', 1)),
        lambda: log.write_text(log.read_text() + "\n"),
        lambda: ((run / "best").unlink(), (run / "best").symlink_to("start")),
    ):
        before = fingerprint(view)
        touch()
        assert fingerprint(view) != before
    refresh_report(view, file)
    assert fingerprint(view) in file.read_text() and file.stat().st_mtime_ns != made
    file.write_text("<html>")
    assert refresh_report(view, file) == file and fingerprint(view) in file.read_text()


def test_the_page_of_a_moved_run_is_still_its_page(finished_run: Path, tmp_path: Path) -> None:
    shutil.copytree(finished_run, tmp_path / "a", symlinks=True)
    key = fingerprint(RunView(tmp_path / "a"))
    (tmp_path / "a").rename(tmp_path / "b")
    assert fingerprint(RunView(tmp_path / "b")) == key
