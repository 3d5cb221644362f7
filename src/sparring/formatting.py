"""How texts and figures are written, in the terminal and in the report alike."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from sparring.rundir.view import STAGES

if TYPE_CHECKING:
    from sparring.rundir.view import RoundView, RunView

T = TypeVar("T")
NONE = "\u2013"
_HIDDEN = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    r"\ud800-\udfff\U000e0000-\U000e007f]"
)


def visible(text: str) -> str:
    r"""Text with every character that acts without being seen spelled out: control characters as their pictures (␛),
    bidi overrides, zero-width characters and lone surrogates as `\u202e`; newline and tab stay."""
    return _HIDDEN.sub(lambda match: _spelled(ord(match[0])), text)


def _spelled(code: int) -> str:
    if code < 0x20:
        return chr(0x2400 + code)
    return "\u2421" if code == 0x7F else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def clip(text: str, limit: int) -> str:
    """The first `limit` characters, made visible, with a note of how many more there are."""
    more = len(text) - limit
    return visible(text) if more <= 0 else f"{visible(text[:limit])} … ({more:,} more characters)"


def figure(value: Any, *, percent: bool = False, errors: float = 1.0) -> str:
    """`mean ± errors * se` of a summary's entry (or a plain number): one decimal in percent, else two; None: a dash."""
    mean, se = (value.get("mean"), value.get("se")) if isinstance(value, Mapping) else (value, None)
    if mean is None or not math.isfinite(mean):
        return NONE
    scale, form = (100.0, ".1f") if percent else (1.0, ".2f")
    width = f" ± {scale * errors * se:{form}}" if se is not None and math.isfinite(se) else ""
    return f"{scale * mean:{form}}{width}"


def seconds(value: float | None) -> str:
    """A duration in the unit one would say it in: `0.4 s`, `12 s`, `3 min 05 s`, `2 h 07 min`."""
    if value is None:
        return NONE
    if value < 9.95:
        return f"{value:.1f} s"
    whole = round(value)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def stages(rounds: Sequence[RoundView]) -> list[str]:
    """The stages of any of the rounds, in the order in which a round runs them; those that few methods have, if begun."""
    few = ("scores", "held")
    found = {name for turn in rounds for name, state in turn.stages.items() if name not in few or state != "-"}
    return [name for name in STAGES if name in found]


def rows(turn: RoundView, stage: str, row_type: type[T]) -> Sequence[T]:
    """The rows of a round's stage, none where it is not done."""
    return turn.rows(stage, row_type) if turn.stages.get(stage) == "done" else ()


def player_rows(run: RunView, figures: Mapping[int, Mapping[str, Any]] | None = None) -> list[dict[str, Any]]:
    """One row per player: `player`, `made_by`, `best` and the figures of its evaluation summary, None where missing.

    `figures` replaces the run's own evaluations.
    """
    known = figures if figures is not None else {n: run.evaluation(n) or {} for n in sorted(run.players)}
    return [{"player": n, "made_by": run.made_by(n), "best": n == run.best, **known[n]} for n in known]
