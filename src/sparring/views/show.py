"""Samples and groups of a run for the terminal: prompt, then the answers side by side with differing words marked."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import SequenceMatcher
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Group as Renderables
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from sparring.errors import InputError
from sparring.formatting import NONE, clip, rows, visible
from sparring.types import Frozen, Group, Message, Sample

if TYPE_CHECKING:
    from sparring.rundir.view import RoundView, RunView

LONGEST = 2000
"""Characters shown of one text; comparing words takes quadratic time in the worst case."""


def show_samples(run: RunView, t: int, n: int) -> Renderables:
    """The first n samples of round t beside the gold answers, with log-probs (nats): own, and of gold by frozen role."""
    turn = _turn(run, t)
    samples = turn.rows("samples", Sample)[:n]
    gold = _gold_logps(turn, {row.id for row in samples})
    parts: list[RenderableType] = []
    for row in samples:
        example = run.examples.get(row.example_id)
        played = "off-policy sample" if row.settings_id == "off-policy" else "sample"
        own = _nats(sum(row.logps) if row.logps else None)
        heads = [
            f"gold{gold.get(row.id, '')}",
            f"{played} {row.index}, {row.finish}, {len(row.tokens)} tokens, own {own}",
        ]
        texts = [example.gold if example and example.gold is not None else NONE, row.text]
        parts += [_prompt(row.example_id, example.messages if example else ()), side_by_side(heads, texts), Text()]
    return Renderables(*parts)


def show_groups(run: RunView, t: int, n: int) -> Renderables:
    """The first n groups of round t: completions side by side with targets and frozen log-probs (nats) by role."""
    turn = _turn(run, t)
    groups = turn.rows("groups", Group)[:n]
    frozen = _frozen(turn, {group.sha for group in groups})
    samples = _sources(run, groups)
    parts: list[RenderableType] = []
    for group in groups:
        example = run.examples.get(group.example_id)
        heads, texts = [], []
        for i, source in enumerate(group.sources):
            sample = samples.get(source)
            own = {"gold": example.gold, "generated": example.generated}.get(source) if example else None
            known = sample.text if sample else own
            texts.append(known if known is not None else f"tokens {' '.join(map(str, group.completions[i]))}")
            what = f"{sample.role} of round {sample.round}, {sample.finish}" if sample else source
            heads.append(f"{what}, target {group.targets[i]:g}{_by_role(frozen.get(group.sha, {}), i)}")
        replay = "" if group.origin_round == t else f"  replayed from round {group.origin_round}"
        title = f"{group.example_id}  weight {group.weight:g}{replay}"
        parts += [_prompt(title, example.messages if example else ()), side_by_side(heads, texts), Text()]
    return Renderables(*parts)


def _turn(run: RunView, t: int) -> RoundView:
    for turn in run.rounds:
        if turn.t == t:
            return turn
    known = ", ".join(str(turn.t) for turn in run.rounds) or "none"
    raise InputError(f"{run.name}: there is no round {t}; it has {known}")


def _gold_logps(turn: RoundView, samples: set[str]) -> dict[str, str]:
    """Sample id to the gold answer's log-probs by frozen role, for those samples that made a group."""
    found = {
        source: group
        for group in rows(turn, "groups", Group)
        for source in group.sources
        if source in samples and "gold" in group.sources
    }
    frozen = _frozen(turn, {group.sha for group in found.values()})
    return {source: _by_role(frozen.get(group.sha, {}), group.sources.index("gold")) for source, group in found.items()}


def _frozen(turn: RoundView, wanted: set[str]) -> dict[str, dict[str, Frozen]]:
    """Group content hash to role to log-probs."""
    found: dict[str, dict[str, Frozen]] = {}
    for row in rows(turn, "frozen", Frozen) if wanted else ():
        if row.group in wanted:
            found.setdefault(row.group, {})[row.role] = row
    return found


def _sources(run: RunView, groups: Iterable[Group]) -> dict[str, Sample]:
    """The groups' samples by id, from the rounds that played them."""
    wanted = {source for group in groups for source in group.sources}
    found: dict[str, Sample] = {}
    for turn in run.rounds:
        # A sample's id ends in round.index
        ids = {source for source in wanted if source.rpartition("/")[2].startswith(f"{turn.t}.")}
        if ids:
            found |= {row.id: row for row in rows(turn, "samples", Sample) if row.id in ids}
    return found


def _by_role(frozen: Mapping[str, Frozen], i: int) -> str:
    """`, reference log p -12.30` for each frozen role's view of a group's completion i."""
    return "".join(f", {role} {_nats(sum(row.logps[i]))}" for role, row in frozen.items())


def _nats(value: float | None) -> str:
    return "log p " + (NONE if value is None else f"{value:.2f}")


def _prompt(title: str, messages: Sequence[Message]) -> Text:
    text = Text(visible(title), style="bold")
    for message in messages:
        text.append(f"\n{visible(message.role)}: ", style="not bold dim")
        text.append(clip(message.content, LONGEST), style="not bold")
    return text


def side_by_side(heads: Sequence[str], texts: Sequence[str]) -> Table:
    """One column per text; each differs from the first in its underlined words, the first from the second."""
    table = Table(expand=True, box=SIMPLE_HEAD, pad_edge=False)
    for head in heads[:4]:
        table.add_column(Text(visible(head)), ratio=1, overflow="fold", header_style="dim")
    shown = [clip(text, LONGEST) for text in texts[:4]]
    firsts = [marked(shown[0], shown[1], "underline green")] if len(shown) > 1 else [Text(text) for text in shown]
    table.add_row(*firsts, *(marked(text, shown[0], "underline red") for text in shown[1:]))
    if len(texts) > 4:
        table.caption = f"and {len(texts) - 4} more completions"
    return table


def marked(text: str, other: str, style: str) -> Text:
    """`text` with the words that `other` does not have in the same order in `style`."""
    words, others = (re.findall(r"\s+|\w+|[^\w\s]", side) for side in (text, other))
    result = Text()
    for tag, start, end, _, _ in SequenceMatcher(None, words, others, autojunk=False).get_opcodes():
        result.append("".join(words[start:end]), style="" if tag == "equal" else style)
    return result
