"""The report's browser: which prompts are shown, what players answered, and what self-play did to every token of it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from sparring.errors import InputError
from sparring.formatting import visible
from sparring.report.tokens import LEVELS, Duel, Key, Moved, Piece, Rescored, coloured, duels, moved, split
from sparring.report.verdict import by_example, figure_to_tell
from sparring.rundir import COLOURS
from sparring.types import Sample

if TYPE_CHECKING:
    from sparring.evaluate import Item
    from sparring.rundir.view import RunView

log = logging.getLogger("sparring")

MOST_EXAMPLES = 48
MOST_CHARACTERS = 4000
"""Of one text; the page says how many more there are."""
ALL_CHARACTERS = 1_000_000
"""Of all texts of the page together: the longest are cut first."""
ALL_PIECES = 40_000
"""Tokens that are coloured, of all texts of the page together."""
TAGS = ("won", "lost", "changed", "longest")

Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True)
class Text:
    """A text as the page shows it: coloured pieces, then the rest of it."""

    pieces: tuple[Piece, ...]
    rest: str
    more: int = 0
    """Characters that are left out."""
    moved: tuple[Moved, ...] = ()


@dataclass(frozen=True)
class Answer:
    """One answer as the page shows it."""

    who: str
    kind: str
    notes: tuple[str, ...]
    right: bool | None
    text: Text


@dataclass(frozen=True)
class Shown:
    """A prompt with its gold answer and what players answered."""

    id: str
    title: str
    messages: tuple[tuple[str, Text], ...]
    """Role and content."""
    gold: Text | None
    answers: tuple[Answer, ...]
    tags: tuple[str, ...]
    """Those of `TAGS` that hold of it."""


@dataclass(frozen=True)
class Browser:
    """The examples of the page."""

    shown: tuple[Shown, ...]
    total: int
    """Prompts that were evaluated, or played."""
    tallies: Mapping[str, tuple[int, int]]
    """Tag to how many of the shown prompts and of all have it; only tags that any has."""
    versus: str
    """What won means, in words; empty where nothing was compared."""
    kind: str
    """Which answers `changed` looks at: greedy or sampled."""
    duels: tuple[Duel, ...]
    """Rounds by which something on the page is coloured."""
    whole: bool
    """Whether players' answers are coloured too, not the gold answers alone."""


@dataclass
class _Raw:
    """A text before its share of the page is known."""

    text: str
    key: Key | None = None
    tokens: tuple[int, ...] = ()
    pieces: Sequence[tuple[str, int]] = ()


@dataclass
class _Draft:
    """An example before its texts are cut to their share."""

    id: str
    prompt: list[tuple[str, _Raw]]
    gold: _Raw | None
    answers: list[tuple[str, Item | Sample, _Raw]]

    @property
    def raws(self) -> list[_Raw]:
        return (
            [raw for _, raw in self.prompt] + [raw for _, _, raw in self.answers] + ([self.gold] if self.gold else [])
        )


def gather(run: RunView) -> Browser:
    """Held-out prompts with every player's greedy and first sampled answer; before any evaluation, what was played.

    At most `MOST_EXAMPLES`, a quarter of them for each of `TAGS` that has as many, the others in the order of the data.
    """
    items = {n: [item for item in run.items(n) if item.index == 0] for n in sorted(run.players)}
    items = {n: found for n, found in items.items() if found}
    # Players before self-play say nothing of what it did
    known = {n: found for n, found in items.items() if n >= 0} or items
    return _evaluated(run, known) if known else _played(run)


def _evaluated(run: RunView, items: Mapping[int, Sequence[Item]]) -> Browser:
    first, last = min(items), run.best if run.best is not None and run.best in items else max(items)
    tags, versus, kind = _tags(run, items, first, last)
    order = list(dict.fromkeys(item.example_id for found in items.values() for item in found))
    drafts = {name: _draft(run, name) for name in _choose(order, tags)}
    for n, found in items.items():
        for item in found:
            draft = drafts.get(item.example_id)
            if draft is not None and item.kind != "gold":
                key = (item.example_id, item.kind, run.players[n].sha)
                draft.answers.append((f"player {n}", item, _Raw(item.text, key, tuple(item.tokens))))
            elif draft is not None and draft.gold is not None:
                draft.gold.tokens = tuple(item.tokens)
    logps = known_logps(run, drafts.keys())
    by = [d for d in duels(run) if any(d.learner in found and d.opponent in found for found in logps.values())]
    shown = _shown(list(drafts.values()), tags, logps, by, _decoder(run) if by else None)
    # What there is most to see in comes first; among equals the order of the data
    shown.sort(key=lambda example: (len(example.tags), _moved(example)), reverse=True)
    among = {
        tag: (sum(tag in example.tags for example in shown), sum(tag in found for found in tags.values()))
        for tag in TAGS
    }
    whole = any(answer.text.moved for example in shown for answer in example.answers)
    tallies = {tag: counts for tag, counts in among.items() if counts[1]}
    return Browser(tuple(shown), len(order), tallies, versus, kind, tuple(by), whole)


def _played(run: RunView) -> Browser:
    """Training prompts with the first sample of each round: what there is to read before an evaluation."""
    drafts: dict[str, _Draft] = {}
    ids: set[str] = set()
    for turn in [turn for turn in run.rounds if turn.stages.get("samples") == "done"]:
        played = turn.rows("samples", Sample)
        ids.update(played.column("example_id"))
        for sample in islice((sample for sample in played if sample.index == 0), MOST_EXAMPLES):
            if sample.example_id in drafts or len(drafts) < MOST_EXAMPLES:
                draft = drafts.setdefault(sample.example_id, _draft(run, sample.example_id))
                draft.answers.append((f"round {turn.t}", sample, _Raw(sample.text)))
    shown = _shown(list(drafts.values()), {}, {}, [], None)
    return Browser(tuple(shown), len(ids), {}, "", "", (), False)


def _draft(run: RunView, name: str) -> _Draft:
    example = run.heldout.get(name) or run.examples.get(name)
    if example is None:
        return _Draft(name, [], None, [])
    gold = None if example.gold is None else _Raw(example.gold, (name, "gold", ""))
    return _Draft(name, [(message.role, _Raw(message.content)) for message in example.messages], gold, [])


def _shown(
    drafts: Sequence[_Draft],
    tags: Mapping[str, tuple[str, ...]],
    logps: Mapping[Key, Mapping[str, Sequence[float]]],
    by: Sequence[Duel],
    decode: Decode | None,
) -> list[Shown]:
    make = _texts([raw for draft in drafts for raw in draft.raws], logps, by, decode)

    def told(who: str, answer: Item | Sample, raw: _Raw) -> Answer:
        notes = (f"{len(answer.tokens):,} tokens", *(["cut at the limit"] if answer.finish == "length" else []))
        return Answer(who, getattr(answer, "kind", "sampled"), notes, getattr(answer, "right", None), make(raw))

    return [
        Shown(
            draft.id,
            draft.prompt[-1][1].text if draft.prompt else draft.id,
            tuple((role, make(raw)) for role, raw in draft.prompt),
            make(draft.gold) if draft.gold else None,
            tuple(told(*answer) for answer in draft.answers),
            tags.get(draft.id, ()),
        )
        for draft in drafts
    ]


def _tags(
    run: RunView, items: Mapping[int, Sequence[Item]], first: int, last: int
) -> tuple[dict[str, tuple[str, ...]], str, str]:
    """Example id to what holds of it, what won means, and the kind of answers that were compared for `changed`."""
    summary = run.evaluation(last) or {}
    key = figure_to_tell(run, summary) if last != first else None
    before, after = (by_example(run, n, key) if key else {} for n in (first, last))
    sign = -1 if key == "gold_nll" else 1
    gains = {name: sign * (after[name] - before[name]) for name in after if name in before}
    answered = [{(i.example_id, i.kind): i.text for i in items[n] if i.kind != "gold"} for n in (first, last)]
    kind = "greedy" if any(k == "greedy" for _, k in answered[1]) else "sampled"
    lengths: dict[str, int] = {}
    for found in items.values():
        for item in found:
            if item.kind != "gold":
                lengths[item.example_id] = max(lengths.get(item.example_id, 0), len(item.tokens))
    usual = median(lengths.values()) if lengths else 0
    longest = set(sorted(lengths, key=lambda name: -lengths[name])[: max(1, len(lengths) // 10)])
    tags = {}
    for name in lengths:
        texts = [found.get((name, kind)) for found in answered]
        holds = (gains.get(name, 0) > 0, gains.get(name, 0) < 0, last != first and texts[0] != texts[1])
        tags[name] = tuple(
            tag for tag, true in zip(TAGS, (*holds, name in longest and lengths[name] > usual), strict=True) if true
        )
    if key is None:
        return tags, "", kind
    better = "finds the gold answer likelier" if key == "gold_nll" else "is right more often"
    return tags, f"player {last} {better} than player {first}", kind


def _choose(order: Sequence[str], tags: Mapping[str, tuple[str, ...]]) -> list[str]:
    chosen: set[str] = set()
    for tag in TAGS:
        chosen |= set([name for name in order if tag in tags.get(name, ())][: MOST_EXAMPLES // len(TAGS)])
    for name in order:
        if len(chosen) < MOST_EXAMPLES:
            chosen.add(name)
    return [name for name in order if name in chosen]


def _moved(example: Shown) -> int:
    """How many tokens of an example the last duel coloured."""
    texts = [answer.text for answer in example.answers] + ([example.gold] if example.gold else [])
    return sum(abs(piece.shifts[-1] or 0) >= LEVELS[0] for text in texts for piece in text.pieces)


def known_logps(run: RunView, ids: Collection[str]) -> dict[Key, dict[str, Sequence[float]]]:
    """Of every shown text, the log-probs that are stored: a player's sha to its log-prob of each token.

    Every evaluation scored the gold answers, and every player its own; `sparring report --tokens` adds the others.
    """
    found: dict[Key, dict[str, Sequence[float]]] = {}
    sizes: dict[Key, int] = {}
    for n, player in run.players.items():
        for item in run.items(n):
            if item.example_id in ids and item.index == 0:
                key = (item.example_id, item.kind, "" if item.kind == "gold" else player.sha)
                sizes[key] = len(item.tokens)
                own = found.setdefault(key, {})
                if len(item.logps) == len(item.tokens):  # an engine that gives text gives none
                    own[player.sha] = item.logps
    folder = Path(run.path) / COLOURS
    if folder.exists():
        from sparring.rundir.store import Rows

        for row in Rows(folder, Rescored):
            key = (row.example_id, row.kind, row.answered)
            if sizes.get(key) == len(row.logps):
                found[key].setdefault(row.player, row.logps)
    return found


def _decoder(run: RunView) -> Decode | None:
    """The run's way from token ids to text; None where its tokenizer is not at hand."""
    from sparring.preview import make_renderer

    try:
        return make_renderer(run).decode
    except (InputError, OSError) as error:
        log.warning("the report shows no token colours: %s", error)
        return None


def _texts(
    raws: Sequence[_Raw],
    logps: Mapping[Key, Mapping[str, Sequence[float]]],
    by: Sequence[Duel],
    decode: Decode | None,
) -> Callable[[_Raw], Text]:
    """Raw texts to shown ones that fit the page together: each within its share of characters and coloured tokens."""
    limit = min(MOST_CHARACTERS, waterline([len(raw.text) for raw in raws], ALL_CHARACTERS))
    scored = [raw for raw in raws if _scored(raw, logps, by)] if decode else []
    most = waterline([len(raw.tokens) for raw in scored], ALL_PIECES)
    for raw in scored:
        assert decode is not None
        pieces = split(decode, raw.tokens[:most])
        joined = "".join(text for text, _ in pieces)
        # Where decoding piece by piece is not decoding the whole, the text is shown as it is
        if joined == decode(raw.tokens[:most]):
            raw.pieces = pieces

    def make(raw: _Raw) -> Text:
        told: list[tuple[str, int]] = []
        size = 0
        for text, count in raw.pieces:
            size += len(text)
            if size > limit:
                break
            told.append((text, count))
        joined = "".join(text for text, _ in told)
        whole = len(told) == len(raw.pieces) and len(raw.tokens) <= most
        rest = "" if whole and told else raw.text[len(joined) :] if raw.text.startswith(joined) else None
        if rest is None:
            told, joined, rest = [], "", raw.text
        room = max(limit - len(joined), 0)
        table = logps.get(raw.key, {}) if raw.key else {}
        return Text(
            coloured(told, table, by),
            visible(rest[:room])[: 2 * limit],
            max(len(rest) - room, 0),
            moved(told, table, by) if told else (),
        )

    return make


def _scored(raw: _Raw, logps: Mapping[Key, Mapping[str, Sequence[float]]], by: Sequence[Duel]) -> bool:
    table = logps.get(raw.key, {}) if raw.key else {}
    return bool(raw.tokens) and any(
        len(table.get(duel.learner, ())) == len(table.get(duel.opponent, ())) == len(raw.tokens) for duel in by
    )


def waterline(sizes: Sequence[int], budget: int) -> int:
    """The largest cap under which `sizes`, each cut at it, add up to no more than `budget`."""
    left = budget
    for i, size in enumerate(sorted(sizes)):
        share = left // (len(sizes) - i)
        if size > share:
            return share
        left -= size
    return max(sizes, default=0)
