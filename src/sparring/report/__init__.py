"""A run as one self-contained HTML page: no network, no scripts, every text of a model or data set escaped."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparring.errors import InputError
from sparring.formatting import NONE, clip, figure, player_rows, rows, seconds, stages, visible
from sparring.report.verdict import Z95, verdict
from sparring.types import Frozen, Message, Sample

if TYPE_CHECKING:
    from sparring.rundir.view import RoundView, RunView

MOST_EXAMPLES = 40
MOST_CHARACTERS = 4000
"""Of one text; the page says how many more there are."""

Summaries = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Answer:
    """One answer as the page shows it."""

    who: str
    text: str
    notes: tuple[str, ...]
    right: bool | None = None


@dataclass(frozen=True)
class Shown:
    """A prompt with its gold answer and what players answered."""

    id: str
    messages: tuple[Message, ...]
    gold: str | None
    answers: tuple[Answer, ...]


def write_report(
    run: RunView,
    path: Path,
    figures: Mapping[int, Mapping[str, Any]] | None = None,
    *,
    extra: Summaries | None = None,
    split: str = "held-out examples",
) -> Path:
    """Write the run's page to `path`, whole or not at all, and return it.

    `figures` replaces the players' evaluation summaries, for example by those of a test split, named by `split`;
    `extra` gives control rows for the table: name to evaluation summary. Raises InputError where it cannot be written.
    """
    text = page(run, extra or {}, figures, split)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise InputError(f"{path}: cannot write the report: {error.strerror}; give another place") from None
    return path


def page(
    run: RunView,
    extra: Summaries,
    figures: Mapping[int, Mapping[str, Any]] | None = None,
    split: str = "held-out examples",
) -> str:
    """The page as HTML."""
    from jinja2 import Environment, StrictUndefined

    # finalize sees every expression before autoescape does, so no text reaches the page with hidden characters in it
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: visible(value) if type(value) is str else value,
    )
    environment.filters |= {"clip": lambda text: clip(text, MOST_CHARACTERS), "figure": figure, "seconds": seconds}
    template = environment.from_string(resources.files(__name__).joinpath("page.html.j2").read_text(encoding="utf-8"))
    names = stages(run.rounds)
    return template.render(
        run=run,
        verdict=verdict(run, figures),
        rows=player_rows(run, figures),
        split=split,
        extra=extra,
        z=Z95,
        dash=NONE,
        charts=_charts(run),
        examples=_evaluated(run) or _played(run),
        stages=names,
        tokens={turn.t: _tokens(run, turn) for turn in run.rounds},
        totals=_totals(run),
        config=_yaml(run),
        env=_flat(run.env),
        counts={turn.t: _counts(turn) for turn in run.rounds},
    )


def _charts(run: RunView) -> list[dict[str, Any]]:
    from markupsafe import Markup

    from sparring.report import curves

    charts = [*curves.by_round(run), *curves.by_step(run)]
    return [{"chart": chart, "svg": Markup(curves.draw(chart, f"c{i}"))} for i, chart in enumerate(charts)]


def _evaluated(run: RunView) -> list[Shown]:
    """Held-out examples with every player's greedy and first sampled answer."""
    answers: dict[str, list[Answer]] = {}
    for n in sorted(run.players):
        for item in run.items(n):
            if item.kind == "gold" or item.index > 0:
                continue
            if item.example_id not in answers and len(answers) == MOST_EXAMPLES:
                continue
            found = answers.setdefault(item.example_id, [])
            found.append(Answer(f"player {n}", item.text, (item.kind, *_size(item.tokens, item.finish)), item.right))
    return [_shown(run, name, found) for name, found in answers.items()]


def _played(run: RunView) -> list[Shown]:
    """Training examples with the first sample of each round: what there is to read before an evaluation."""
    answers: dict[str, list[Answer]] = {}
    for turn in run.rounds:
        for sample in islice(rows(turn, "samples", Sample), MOST_EXAMPLES):
            if sample.index == 0 and (sample.example_id in answers or len(answers) < MOST_EXAMPLES):
                answer = Answer(f"round {turn.t}", sample.text, ("sampled", *_size(sample.tokens, sample.finish)))
                answers.setdefault(sample.example_id, []).append(answer)
    return [_shown(run, name, found) for name, found in answers.items()]


def _size(tokens: tuple[int, ...], finish: str) -> tuple[str, ...]:
    return (f"{len(tokens):,} tokens", *(["cut at the limit"] if finish == "length" else []))


def _shown(run: RunView, name: str, answers: list[Answer]) -> Shown:
    example = run.heldout.get(name) or run.examples.get(name)
    return Shown(name, example.messages if example else (), example.gold if example else None, tuple(answers))


def _tokens(run: RunView, turn: RoundView) -> dict[str, int]:
    """Stage to the completion tokens it sampled or scored; for `player`, prompt and completion tokens of its steps."""
    counts = {
        "samples": sum(len(sample.tokens) for sample in rows(turn, "samples", Sample)),
        "frozen": sum(len(logps) for row in rows(turn, "frozen", Frozen) for logps in row.logps),
        "eval": sum(len(item.tokens) for item in run.items(turn.t + 1)),
    }
    if turn.log:  # with `log_every` above 1 the log holds some of the steps: their mean stands for the others
        mean = sum(row.get("tokens", 0) for row in turn.log) / len(turn.log)
        counts["player"] = round(mean * turn.log[-1]["step"])
    return {name: count for name, count in counts.items() if count}


def _totals(run: RunView) -> dict[str, float]:
    return {name: sum(turn.seconds.get(name) or 0.0 for turn in run.rounds) for name in stages(run.rounds)}


def _counts(turn: RoundView) -> list[tuple[str, str]]:
    """Rows, tokens and drops, whatever the stages counted, by dotted name; without zeros and hashes."""
    return [(name, value) for name, value in _flat(turn.counts) if value.isdigit() and value != "0"]


def _yaml(run: RunView) -> str:
    import yaml

    dumped: str = yaml.safe_dump(run.config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100)
    return dumped


def _flat(tree: Mapping[str, Any], before: str = "") -> list[tuple[str, str]]:
    """Nested mappings as rows of dotted name and text."""
    rows: list[tuple[str, str]] = []
    for key, value in tree.items():
        name = f"{before}{key}"
        rows += _flat(value, f"{name}.") if isinstance(value, Mapping) else [(name, str(value))]
    return rows
