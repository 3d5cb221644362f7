"""How long prompts and answers are, measured or assumed, and what a method makes of them.

A method's `groups` is a pure function, so it is asked: it is given made-up answers of these lengths and tells how many
groups of which completions there are, whatever the method.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import TypeVar

from sparring.config import Config
from sparring.cost.work import Item
from sparring.errors import InputError
from sparring.plan import RoundPlan
from sparring.types import Method, Played, Rendered, Sample, Score, Turn

T = TypeVar("T")
MOST = 256
"""Examples that stand for all, the longest of all among them."""
PROMPT, ANSWER = 200, 300
"""Tokens assumed where no data is at hand."""


@dataclass(frozen=True)
class Texts:
    """Examples by their lengths in tokens."""

    rows: tuple[tuple[int, int], ...]
    """(prompt, gold answer) of some that stand for all, the longest first."""
    train: int
    heldout: int
    sample: int | None = None
    """Tokens of a played answer; None: as long as the gold one."""
    told: str = ""
    """Where the lengths are from."""
    generated: float = 0.0
    """Share of the examples that came with an answer, which the first round of self-play takes as it is."""

    def played(self, gold: int, most: int) -> int:
        """Tokens of an answer to a prompt whose gold answer has so many."""
        return max(1, min(most, gold if self.sample is None else self.sample))


def assumed(config: Config, prompts: int | None, prompt: int | None, answer: int | None, sample: int | None) -> Texts:
    """Examples of one length. Raises InputError where nothing says how many there are."""
    train = prompts or config.data.limit
    if train is None:
        raise InputError("plan: nothing says how many prompts there are; give --prompts, or data.limit in the recipe")
    size = config.data.heldout_size
    given = config.data.heldout is not None or config.data.heldout_split is not None
    heldout = config.evaluate.limit if given else round(size * train) if isinstance(size, float) else size
    longest = config.data.max_prompt_tokens or PROMPT, config.data.max_answer_tokens or ANSWER
    rows = ((prompt or min(PROMPT, longest[0]), answer or min(ANSWER, longest[1])),)
    guessed = [name for name, value in (("prompt", prompt), ("answer", answer)) if value is None]
    told = f"lengths assumed: prompts of {rows[0][0]}, gold answers of {rows[0][1]} tokens"
    return Texts(rows, train, heldout, sample, told + (" (--prompt-tokens, --answer-tokens)" if guessed else ""))


def measured(
    rows: Sequence[tuple[int, int]], train: int, heldout: int, sample: int | None, generated: float = 0.0
) -> Texts:
    """Examples of a data set: evenly spaced ones among all by length, with the longest."""
    chosen = spread(sorted(rows, key=sum, reverse=True), min(len(rows), MOST))
    mean = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    told = f"lengths of the data: prompts of {mean[0]:.0f}, gold answers of {mean[1]:.0f} tokens on average"
    return Texts(tuple(chosen), train, heldout, sample, told, generated)


def spread(rows: Sequence[T], number: int) -> list[T]:
    """So many of them, evenly spaced and the first among them, each as often as the others to within one."""
    return [rows[i * len(rows) // number] for i in range(number)]


def groups(r: RoundPlan, texts: Texts) -> list[Item]:
    """The groups of a round's own samples, weighted so that they stand for all prompts.

    A judged answer is right and wrong, in turn and from prompt to prompt, or beats those behind it.
    """
    method, settings = r.method, r.settings.play
    fresh = count()

    def ids(length: int) -> tuple[int, ...]:
        # No two completions begin alike, so that none is dropped or shortened for it
        first = next(fresh) << 20
        return tuple(range(first, first + length))

    repeats = 1 if len(texts.rows) > 8 else 8
    rows, samples = [], []
    for n, (prompt, gold) in enumerate(texts.rows * repeats):
        name = str(n)
        retold = ids(prompt) if method.template is not None else None
        given = ids(gold) if not r.turns else None
        rows.append(Rendered(name, ids(prompt), ids(gold), "gold", given, "given" if given else None, retold=retold))
        length = texts.played(gold, _longest(method, name, settings.max_new_tokens))
        samples += [
            Sample(name, "player", i, 0, ids(length), f"{i}", "stop", (-1.0,) * length, "", t, turn.role)
            for t in (r.t, *method.recall(r.t))
            for i, turn in _answers(r, n)
        ]
    now = [s for s in samples if s.round == r.t]
    before = [s for s in samples if s.round != r.t]
    played = {s.id for s in now}
    scores = [_score(method, n, [s for s in now if s.example_id == row.example_id]) for n, row in enumerate(rows)]
    judged = scores if method.verifier is not None or method.scorer is not None else []
    if method.official is not None:
        from sparring.pair import gold_against_samples

        most = method.official.max_length
        made = gold_against_samples([_cut(row, most) for row in rows], now, r.t).groups
    else:
        made = method.groups(Played(r.t, rows, now, before, judged, end=-1)).groups
    prompts = min(r.settings.limit or texts.train, texts.train)
    each = prompts / (len(texts.rows) * repeats)
    return [
        Item(
            len(g.prompt),
            tuple(map(len, g.completions)),
            each,
            tuple(len(c) for c, source in zip(g.completions, g.sources, strict=True) if source not in played),
        )
        for g in made
    ]


def _cut(row: Rendered, most: int) -> Rendered:
    return Rendered(
        row.example_id, row.prompt[-most // 2 :], row.gold[: most - min(most // 2, len(row.prompt))], "gold"
    )


def _longest(method: Method, name: str, most: int) -> int:
    limit = method.answer_tokens(name) if method.answer_tokens is not None else None
    return min(most, limit or most)


def _answers(r: RoundPlan, n: int) -> list[tuple[int, Turn]]:
    """Numbers and turns of the answers to prompt n."""
    split = [turn for turn in r.turns if turn.split]
    turns = [turn for turn in r.turns if not turn.split or split[n % len(split)] is turn]
    found = [turn for turn in turns for _ in range(turn.samples or r.settings.play.samples)]
    return list(enumerate(found))


def _score(method: Method, n: int, own: Sequence[Sample]) -> Score:
    values = tuple(float((i + n) % 2 == 0) for i in range(len(own))) if method.verifier else ()
    wins = tuple(tuple((1 + (j > i) - (j < i)) / 2 for j in range(len(own))) for i in range(len(own)))
    return Score(own[0].example_id if own else "", tuple(s.id for s in own), values, wins if method.scorer else ())
