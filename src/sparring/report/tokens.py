"""What self-play taught, token by token: answers in pieces, and how far each round moved the log-prob of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sparring.formatting import NONE
from sparring.report.table import signed

if TYPE_CHECKING:
    from sparring.rundir.view import RunView
    from sparring.types import Player

LEVELS = (0.1, 0.5, 1.5)
"""A token whose log-prob moved by less than the first is not coloured; nats."""
END = "\u220e"
"""Stands for a token without text: an end token."""
_MOST_ROUNDS = 8
_LETTERS = "abcdefghi"
_AROUND = 4

Key = tuple[str, str, str]
"""Example id, kind (`gold`, `greedy`, `sampled`), and the sha of the player that answered; empty for gold."""


@dataclass(frozen=True, slots=True)
class Rescored:
    """One player's log-probs of an answer that the report shows: a row of the folder `colours`."""

    example_id: str
    kind: str
    """`greedy` or `sampled`."""
    answered: str
    """Sha of the player that answered."""
    player: str
    """Sha of the player whose log-probs these are."""
    logps: tuple[float, ...]
    """Per token, at temperature 1, in nats."""


@dataclass(frozen=True)
class Duel:
    """Two players by whose log-probs tokens can be coloured: a round of self-play, or all of them together."""

    name: str
    """`round 0`, or `all rounds`."""
    learner: str
    """Sha of the player it made."""
    opponent: str
    """Sha of the player that it played against."""
    letter: str
    """What the page's class names call it."""
    words: str
    """`player 1 against player 0`."""


@dataclass(frozen=True)
class Piece:
    """The text of a token, or of the few that make up one character, and the nats by which each duel moved it."""

    text: str
    shifts: tuple[float | None, ...]

    @property
    def title(self) -> str:
        """The numbers in words."""
        return ", ".join(NONE if shift is None else signed(shift, 2) for shift in self.shifts) + " nats"


@dataclass(frozen=True)
class Moved:
    """What one duel did to a whole text."""

    letter: str
    total: str
    """The sum over its tokens, in nats, with sign."""
    most: tuple[tuple[str, str], ...]
    """The tokens that moved most: text and nats."""


def duels(run: RunView) -> list[Duel]:
    """The last eight rounds of self-play whose learner is there, and where there are several the best player's against
    the first opponent: what they came to together."""
    numbers = {player.sha: n for n, player in run.players.items()}
    found: list[tuple[str, int, int]] = []
    for turn in run.rounds:
        roles: Mapping[str, Player] = turn.roles
        opponent = roles.get("opponent") or roles.get("start")
        if turn.t >= 0 and turn.t + 1 in run.players and opponent is not None and opponent.sha in numbers:
            found.append((f"round {turn.t}", turn.t + 1, numbers[opponent.sha]))
    if len(found) > 1:
        best = run.best if run.best is not None and run.best > found[0][2] else found[-1][1]
        found = [*found[-_MOST_ROUNDS:], ("all rounds", best, found[0][2])]
    return [
        Duel(name, run.players[n].sha, run.players[m].sha, letter, f"player {n} against player {m}")
        for letter, (name, n, m) in zip(_LETTERS, found, strict=False)
    ]


def split(decode: Callable[[Sequence[int]], str], tokens: Sequence[int]) -> list[tuple[str, int]]:
    """Token ids as pieces of text, each with its number of tokens: bytes of one character stay together.

    A token is decoded behind a few of those before it, since what a token says may depend on them.
    """
    pieces: list[tuple[str, int]] = []
    ends = [0]
    for end in range(1, len(tokens) + 1):
        before = ends[max(0, len(ends) - 1 - _AROUND)]
        text = decode(tokens[before:end])[len(decode(tokens[before : ends[-1]])) :]
        if not text.endswith("\ufffd") or end == len(tokens):
            pieces.append((text, end - ends[-1]))
            ends.append(end)
    return pieces


def coloured(
    pieces: Sequence[tuple[str, int]], logps: Mapping[str, Sequence[float]], by: Sequence[Duel]
) -> tuple[Piece, ...]:
    """Pieces with the learner's log-prob less the opponent's, for each duel; None where either is unknown.

    `logps`: a player's sha to its log-prob of every token.
    """
    made, at = [], 0
    for text, count in pieces:
        part = slice(at, at + count)
        shifts = tuple(
            sum(logps[duel.learner][part]) - sum(logps[duel.opponent][part])
            if duel.learner in logps and duel.opponent in logps
            else None
            for duel in by
        )
        made.append(Piece(text or END, shifts))
        at += count
    return tuple(made)


def classes(piece: Piece, by: Sequence[Duel]) -> str:
    """The page's class names of a piece: a duel's letter, `u` or `d`, and a level from 1 to 3."""
    names = []
    for duel, shift in zip(by, piece.shifts, strict=True):
        level = sum(abs(shift) >= bound for bound in LEVELS) if shift is not None else 0
        if level:
            names.append(f"{duel.letter}{'u' if shift and shift > 0 else 'd'}{level}")
    return " ".join(names)


def moved(
    pieces: Sequence[tuple[str, int]], logps: Mapping[str, Sequence[float]], by: Sequence[Duel], most: int = 3
) -> tuple[Moved, ...]:
    """For each duel that is known, the whole answer's shift and those of its pieces that moved most, the furthest first."""
    shown, told = coloured(pieces, logps, by), []
    for i, duel in enumerate(by):
        if duel.learner in logps and duel.opponent in logps:
            total = sum(logps[duel.learner]) - sum(logps[duel.opponent])
            far = sorted(((piece.shifts[i] or 0.0, piece.text) for piece in shown), key=lambda pair: -abs(pair[0]))
            words = tuple((_named(text), signed(shift, 2)) for shift, text in far[:most] if abs(shift) >= LEVELS[0])
            told.append(Moved(duel.letter, signed(total, 2), words))
    return tuple(told)


def _named(text: str) -> str:
    """A token within a sentence: line breaks, tabs and mere spaces as their signs."""
    text = text.replace("\n", "\u21b5").replace("\t", "\u21e5")
    return text if text.strip() else text.replace(" ", "\u2423")
