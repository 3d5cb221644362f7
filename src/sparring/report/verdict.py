"""What a run came to, in one sentence: the best player, its gain over player 0 and whether that is more than noise."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from sparring import controls
from sparring.errors import InputError
from sparring.evaluate.core import Item, is_share, values, vote_of
from sparring.evaluate.harness import SuiteItem
from sparring.evaluate.stats import Z95, Gain, paired
from sparring.evaluate.tasks import headline, suite_values
from sparring.evaluate.versus import Win
from sparring.judge.verify import load_verifier

if TYPE_CHECKING:
    from sparring.rundir.view import RunView

__all__ = ["Z95", "Gain", "Verdict", "by_example", "paired", "verdict"]


@dataclass(frozen=True)
class Verdict:
    """What a run came to, in words."""

    sentence: str
    detail: str
    """How the interval was made and how the best player was chosen."""


def verdict(run: RunView, figures: Mapping[int, Mapping[str, Any]] | None = None) -> Verdict:
    """The run's sentence. Accuracies in percentage points, gold_nll in nats per answer, intervals of 95 %.

    `figures` replaces the run's own evaluation summaries, whose items are then of other prompts: the interval is unpaired.
    """
    known = dict(figures) if figures else {n: s for n in sorted(run.players) if (s := run.evaluation(n))}
    if not known:
        return Verdict("No player has been evaluated yet.", "")
    best = run.best if run.best is not None and run.best in known else max(known)
    key = figure_to_tell(run, known[best])
    if key is None:
        return Verdict(f"Player {best} was evaluated, but on no answer that could be checked or scored.", "")
    gain = _gain(None if figures else run, known, best, key)
    detail = " ".join(
        [_chosen(run, run.evaluation(best) or {}), f"The 95 % interval is {gain.how}." if gain else ""]
    ).strip()
    if key == "gold_nll":
        return Verdict(_gold_sentence(best, known, key, gain, bool(run.config.evaluate.verifier)), detail)
    chose = not figures and controls.figure(run.config.evaluate) == key
    return Verdict(_accuracy_sentence(best, known, key, gain, chose), detail)


def figure_to_tell(run: RunView, summary: Mapping[str, Any]) -> str | None:
    first = "greedy" if run.config.evaluate.best == "greedy" else "sampled"
    return next((key for key in (first, "sampled", "greedy", "gold_nll") if summary.get(key)), None)


def _gain(run: RunView | None, known: Mapping[int, Mapping[str, Any]], best: int, key: str) -> Gain | None:
    """The best player's figure less player 0's: paired by prompt where every item of both is in the run, else unpaired."""
    if best == 0 or not known.get(0, {}).get(key):
        return None
    start, end = known[0][key], known[best][key]
    matched = run and paired(by_example(run, 0, key), by_example(run, best, key), shares=is_share(key))
    if matched and math.isclose(matched.mean, end["mean"] - start["mean"], abs_tol=1e-6):
        return matched
    if start.get("se") is None or end.get("se") is None:
        return None
    return Gain(end["mean"] - start["mean"], math.hypot(start["se"], end["se"]), "unpaired")


def by_example(run: RunView, player: int, key: str) -> dict[str, float]:
    """Example id to the player's mean figure on it (`evaluate.values`), on a task for `task:NAME` or `task:NAME:FIGURE`.

    Of a suite's column its items' values where the column is their plain mean; nothing for a suite's mean, which weighs
    columns. Nothing where the player was not evaluated so, and nothing of votes whose verifier is gone.
    """
    if not key.startswith("task:"):
        return _values(run.items(player), key, run.config.evaluate.verifier)
    _, name, *named = key.split(":")
    summary = run.tasks(player).get(name, {})
    figure = named[0] if named else headline(summary) or ""
    match summary.get("kind"):
        case "exact" | "choice":
            return _values(run.items(player, name), figure, summary.get("verifier"))
        case "wins":
            return {win.example_id: win.rate for win in run.rows(player, name, Win)} if figure == "win_rate" else {}
        case "suite":
            columns = [column for column in summary["harness"]["columns"] if column["task"] == figure]
            own = suite_values(run.rows(player, name, SuiteItem), columns).get(figure, {})
            # A group weighs its tasks, and leaderboard-v2 rescales: such a figure is no mean over items
            return own if own and math.isclose(fmean(own.values()), summary[figure]["mean"], abs_tol=1e-9) else {}
    return {}


def _values(items: Iterable[Item], key: str, verifier: str | None) -> dict[str, float]:
    """`values` with the votes that the evaluation counted."""
    if not (key.startswith("maj@") and verifier):
        return values(items, key)
    try:
        return values(items, key, vote_of(load_verifier(verifier)))
    except InputError:
        return {}


def _accuracy_sentence(
    best: int, known: Mapping[int, Mapping[str, Any]], key: str, gain: Gain | None, chose: bool
) -> str:
    """`chose`: the figure is what the best was chosen by."""
    how = "when sampling" if key == "sampled" else "when decoding greedily"
    share = f"{100 * known[best][key]['mean']:.1f} % of held-out prompts right {how}"
    if best == max(known) == 0:
        return f"Player 0 answers {share}."
    if best == 0 and chose:
        return f"No round improved on player 0, which answers {share}."
    if best == 0:
        return f"Player 0 is the best; it answers {share}."
    if gain is None:
        return f"Player {best} answers {share}; there is no figure of player 0 to compare it with."
    side = "above" if gain.mean >= 0 else "below"
    low, high = (_signed(100 * end, 1) for end in gain.interval)
    noise = "within noise, " if gain.noise else ""
    return (
        f"Player {best} answers {share}, {abs(100 * gain.mean):.1f} points {side} player 0 "
        f"({noise}95 % interval {low} to {high})."
    )


def _gold_sentence(
    best: int, known: Mapping[int, Mapping[str, Any]], key: str, gain: Gain | None, verified: bool
) -> str:
    cost = f"{known[best][key]['mean']:.2f} nats each under player {best}"
    why = "the verifier could judge none" if verified else "there is no verifier"
    start = f"No answer was checked, as {why}; the held-out gold answers cost {cost}"
    if gain is None:
        return f"{start}."
    side = "less" if gain.mean <= 0 else "more"
    low, high = (_signed(end, 2) for end in gain.interval)
    noise = "within noise, " if gain.noise else ""
    interval = f"{noise}95 % interval {low} to {high}; lower is better"
    return f"{start}, {abs(gain.mean):.2f} {side} than under player 0 ({interval})."


def _chosen(run: RunView, summary: Mapping[str, Any]) -> str:
    if run.best is None:
        return "No best player has been chosen yet; this is the last one evaluated."
    rule = controls.figure(run.config.evaluate)
    if not summary.get(rule):
        rule = "last"
    if rule.startswith("task:"):
        return f"The best player was chosen by its figure on {rule}."
    named = {"sampled": "sampled accuracy", "greedy": "greedy accuracy"}.get(rule, rule if rule != "last" else "")
    return (
        f"The best player was chosen by held-out {named}."
        if named
        else "The last player that no guard stopped counts as the best."
    )


def _signed(value: float, digits: int) -> str:
    return f"{value:+.{digits}f}".replace("-", "\u2212")
