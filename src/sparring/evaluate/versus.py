"""Two players side by side by their stored answers: nothing is answered again, and every gain is paired by prompt."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from sparring.errors import InputError
from sparring.evaluate.core import Item, Vote, is_share, subset_sizes, values, vote_of
from sparring.evaluate.stats import Figure, Gain, bootstrap, mean_se, paired, ratio_se, share
from sparring.judge.verify import load_verifier
from sparring.progress import OnRows, silent
from sparring.types import Example, Scorer

if TYPE_CHECKING:
    from sparring.rundir.view import RunView


@dataclass(frozen=True, slots=True)
class Win:
    """One prompt of a player's win rate: a row of its table."""

    example_id: str
    rate: float
    """How often the scorer prefers the player's answer, ½ for a tie."""


@dataclass(frozen=True)
class Versus:
    """One figure of two players, on the prompts that both were asked."""

    key: str
    one: Figure
    other: Figure
    gain: Gain | None
    """`one` less `other`; None of fewer than two prompts."""


def versus_players(
    one: RunView, player: int, other: RunView, against: int, *, task: str | None = None, scorer: Scorer | None = None
) -> list[Versus]:
    """`versus` of two players of one run or of two, on the held-out prompts or on a task, by what is on disk.

    `scorer` adds `win_rate` on the greedy answers, whose gain is the share of wins less that of losses. Raises
    InputError where a player was not evaluated so, where the two were judged or asked in another way, and where they
    were asked nothing in common.
    """
    how = [asked(run, number, task) for run, number in ((one, player), (other, against))]
    if differing := [key for key in how[0] if how[0][key] != how[1].get(key)]:
        told = "; ".join(f"{key}: {how[0][key]} and {how[1].get(key)}" for key in differing)
        raise InputError(
            f"players {player} and {against} were evaluated in other ways ({told}): their figures do not compare"
        )
    kind = one.tasks(player)[task]["kind"] if task else None
    if task and kind == "suite":
        return _suite(one, player, other, against, task)
    if kind == "wins":
        rates = [{w.example_id: w.rate for w in run.rows(n, task, Win)} for run, n in ((one, player), (other, against))]
        return _shares("win_rate", *rates)
    mine, theirs = list(one.items(player, task)), list(other.items(against, task))
    judge = one.tasks(player)[task].get("verifier") if task else one.config.evaluate.verifier
    found = versus(mine, theirs, vote=vote_of(load_verifier(judge)) if judge else None)
    if not found:
        raise InputError(
            f"players {player} and {against} were asked nothing in common; evaluate both on the same items"
        )
    if scorer is not None:
        found = [*_wins(win_rate(scorer, _examples(one, player, task, mine), mine, theirs)), *found]
    return found


def asked(run: RunView, player: int, task: str | None) -> dict[str, Any]:
    """How a player was asked and judged, verifiers and scorers by content. Raises InputError where it was not."""
    summary = run.tasks(player).get(task) if task else run.evaluation(player)
    if summary is None:
        what = f"`sparring eval {run.path} --player {player} --tasks {task}`" if task else f"`sparring run {run.path}`"
        raise InputError(
            f"{run.path}: player {player} has not been evaluated{f' on {task}' if task else ''}; {what} does it"
        )
    settings = _settings(run, player, f"tasks/{task}" if task else "eval")
    # Wins are by the evaluation's answers
    played = _settings(run, player, "eval") if summary.get("kind") == "wins" else settings
    how = {"verifier": settings.get(f"{'task' if task else 'evaluate'}.verifier")}
    how |= {"engine": played.get("evaluate.engine", "hf")}
    if not task:
        config = run.config
        held = {"temperature": config.evaluate.temperature, "max_new_tokens": config.evaluation_play.max_new_tokens}
        return how | held
    # The scorer's name, which has its folder, stands in for its identity in summaries of older versions
    scorer = summary.get("scorer_identity", summary.get("scorer"))
    how |= {key: summary.get(key) for key in ("temperature", "max_new_tokens")}
    return how | {"scorer": scorer, "player 0": summary.get("start")}


def _settings(run: RunView, player: int, stage: str) -> dict[str, Any]:
    """What a stage of a player's evaluation depended on."""
    from sparring.rundir.store import read_json

    return dict(read_json(run.folder(player) / stage / "stage.json")["settings"])


def _examples(run: RunView, player: int, task: str | None, items: Sequence[Item]) -> Mapping[str, Example]:
    """What was asked, by id. Raises InputError where a task's file holds it no longer."""
    if task is None:
        return run.heldout
    from sparring.evaluate.tasks import read

    file = Path(run.tasks(player)[task]["file"])
    examples = {example.id: example for example in read(file).examples}
    if any(item.example_id not in examples for item in items):
        raise InputError(f"{file}: has changed since player {player} did this task; evaluate it again")
    return examples


def _suite(one: RunView, player: int, other: RunView, against: int, task: str) -> list[Versus]:
    from sparring.evaluate.harness import SuiteItem
    from sparring.evaluate.tasks import suite_values

    columns = one.tasks(player)[task]["harness"]["columns"]
    both = [suite_values(run.rows(n, task, SuiteItem), columns) for run, n in ((one, player), (other, against))]
    return [row for name in both[0] for row in _shares(name, both[0][name], both[1].get(name, {}))]


def _shares(key: str, one: Mapping[str, float], other: Mapping[str, float]) -> list[Versus]:
    """One figure of values in [0, 1], on what both have; none where that is nothing."""
    mine, theirs = _common(one, other)
    won, lost = share(mine.values()), share(theirs.values())
    return [Versus(key, won, lost, paired(theirs, mine, shares=True))] if won and lost else []


def _wins(rates: Mapping[str, float]) -> list[Versus]:
    return _shares("win_rate", rates, {name: 1 - rate for name, rate in rates.items()})


def versus(one: Sequence[Item], other: Sequence[Item], *, vote: Vote | None = None) -> list[Versus]:
    """Every figure that both players' items give, with the paired gain of `one` over `other`.

    Prompts that only one of them was asked are left out, and figures whose votes cannot be read here. `vote`: see
    `values`. The gain of `gold_nll_token`, a ratio of
    sums, has a bootstrap interval and no p-value.
    """
    found = []
    for key in _keys(one, other):
        try:
            mine, theirs = _common(values(one, key, vote), values(other, key, vote))
        except InputError:
            continue
        if not mine:
            continue
        shares = is_share(key)
        both = [(share if shares else mean_se)(v.values()) or {} for v in (mine, theirs)]
        found.append(Versus(key, both[0], both[1], paired(theirs, mine, shares=shares)))
        if key == "gold_nll":
            found.append(_per_token(one, other, mine))
    return found


def win_rate(
    scorer: Scorer, examples: Mapping[str, Example], one: Iterable[Item], other: Iterable[Item], kind: str = "greedy",
    on_rows: OnRows = silent,
) -> dict[str, float]:  # fmt: skip
    """Example id to how often the scorer prefers `one`'s answers to `other`'s: `share` of the values is the win rate.

    Every pair of answers with the same index is asked about in both orders, and the two are averaged; equal answers
    tie at ½ unasked. `kind`: `greedy` or `sampled`. Raises InputError where the scorer fails (`judge.score.load_scorer`).
    """
    theirs = {(i.example_id, i.index): i.text for i in other if i.kind == kind}
    rates: dict[str, list[float]] = {}
    for item in one:
        text = theirs.get((item.example_id, item.index))
        if item.kind != kind or text is None:
            continue
        rate = 0.5
        if text != item.text:
            first = scorer(examples[item.example_id], [item.text, text])[0][1]
            second = scorer(examples[item.example_id], [text, item.text])[1][0]
            rate = (first + second) / 2
        rates.setdefault(item.example_id, []).append(rate)
        on_rows(1, 0)
    return {name: fmean(own) for name, own in rates.items()}


def _keys(*players: Sequence[Item]) -> list[str]:
    samples = min(max((i.index + 1 for i in items if i.kind == "sampled"), default=0) for items in players)
    drawn = [f"{kind}@{k}" for k in subset_sizes(samples) for kind in ("pass", "maj")]
    return ["sampled", "greedy", *drawn, "acc", "acc_norm", "gold_nll"]


def _common(one: Mapping[str, float], other: Mapping[str, float]) -> tuple[dict[str, float], dict[str, float]]:
    both = [name for name in one if name in other]
    return {name: one[name] for name in both}, {name: other[name] for name in both}


def _per_token(one: Sequence[Item], other: Sequence[Item], names: Iterable[str]) -> Versus:
    import numpy as np

    sums = [
        {i.example_id: (-math.fsum(i.logps), float(len(i.tokens))) for i in items if i.kind == "gold"}
        for items in (one, other)
    ]
    rows = np.array([[*sums[0][name], *sums[1][name]] for name in names])
    figures = [ratio_se(rows[:, at].tolist(), rows[:, at + 1].tolist()) or {} for at in (0, 2)]
    drawn = bootstrap(
        rows,
        lambda v: v[..., 0].sum(-1) / v[..., 1].sum(-1) - v[..., 2].sum(-1) / v[..., 3].sum(-1),
    )
    gain = None
    if drawn and drawn["se"] is not None:
        gain = Gain(drawn["mean"], drawn["se"], f"paired over {len(rows)} prompts", (drawn["low"], drawn["high"]))
    return Versus("gold_nll_token", figures[0], figures[1], gain)
