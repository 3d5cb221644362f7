"""The embedded task: two-step sums in GSM8K's format, with gold answers of which half are written sloppily.

    59+8-6?   →   59+8=67
                  67-6=61
                  #### 61

Noisy gold is the point. SFT can at best copy the noise, so its sampled accuracy stops at the data's own; an opponent
that answers at a temperature above 1 moves self-play's fixed point to a sharpened data law, which has fewer slips.
Everything here is a pure function of the seed.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from sparring.types import Example

TRAIN, HELDOUT = 10_000, 2_000
SLOPPY, SLIP = 0.5, 0.5
"""Share of sloppy training documents, and the chance that one of their steps slips."""
MAX_ANSWER_TOKENS = 24
"""An answer has 20 tokens with its end token; a broken one may be longer."""

Step = tuple[str, int]
_PROMPT = re.compile(r"(\d\d)([+-])(\d)([+-])(\d)\?")
_FINAL = re.compile(r"#### (-?\d+)\s*$")


@dataclass(frozen=True)
class Problem:
    """A two-step sum with one written answer."""

    prompt: str
    answer: str
    sloppy: bool
    """The writer was a sloppy one; by luck the answer may still be right."""


@dataclass(frozen=True)
class Splits:
    """Three lists of problems; no prompt is in two of them."""

    train: list[Problem]
    validation: list[Problem]
    test: list[Problem]


def apply(value: int, step: Step) -> int:
    """The true result of one step."""
    operator, operand = step
    return value + operand if operator == "+" else value - operand


def slip(value: int, step: Step, rng: random.Random) -> int:
    """A wrong result of one step: the carry or borrow is forgotten where there is one, else it is off by one."""
    operator, operand = step
    result, units = apply(value, step), value % 10
    if operator == "+" and units + operand > 9:
        return result - 10
    if operator == "-" and units < operand:
        return result + 10
    return result + rng.choice((-1, 1))


def write_answer(start: int, steps: Iterable[Step], rng: random.Random | None = None) -> str:
    """The written answer; with `rng` a sloppy writer's, whose slips carry over into the next step.

    Every result has two digits: a draw that leaves 10..99 is drawn again, since answers of other lengths would teach
    the model to recognise slips by their shape.
    """
    while True:
        value, lines, results = start, [], []
        for step in steps:
            slips = rng is not None and rng.random() < SLIP
            result = slip(value, step, rng) if slips and rng is not None else apply(value, step)
            lines.append(f"{value}{step[0]}{step[1]}={result}")
            results.append(result)
            value = result
        if all(10 <= result <= 99 for result in results):
            return "\n".join([*lines, f"#### {value}"])


def universe() -> list[tuple[int, tuple[Step, Step]]]:
    """Every problem: start 10..89, two operands 2..9, both true results of two digits; in a fixed order."""
    steps = [(operator, operand) for operator in "+-" for operand in range(2, 10)]
    return [
        (start, (first, second))
        for start in range(10, 90)
        for first in steps
        for second in steps
        if 10 <= apply(start, first) <= 99 and 10 <= apply(apply(start, first), second) <= 99
    ]


def problems(seed: int, *, train: int = TRAIN, heldout: int = HELDOUT) -> Splits:
    """Training problems, half of them answered sloppily, and two clean held-out sets of `heldout` problems.

    Raises ValueError where the universe has fewer problems than asked for.
    """
    rng = random.Random(seed)
    drawn = rng.sample(universe(), train + 2 * heldout)

    def problem(start: int, steps: tuple[Step, Step], sloppy: bool) -> Problem:
        prompt = f"{start}{''.join(f'{operator}{operand}' for operator, operand in steps)}?"
        return Problem(prompt, write_answer(start, steps, rng if sloppy else None), sloppy)

    return Splits(
        train=[problem(*each, sloppy=rng.random() < SLOPPY) for each in drawn[:train]],
        validation=[problem(*each, sloppy=False) for each in drawn[train : train + heldout]],
        test=[problem(*each, sloppy=False) for each in drawn[train + heldout :]],
    )


def write(folder: Path, seed: int) -> None:
    """Write `train.jsonl`, `validation.jsonl` and `test.jsonl` in prompt/completion format."""
    folder.mkdir(parents=True, exist_ok=True)
    splits = problems(seed)
    for name, rows in (("train", splits.train), ("validation", splits.validation), ("test", splits.test)):
        lines = [json.dumps({"prompt": row.prompt, "completion": row.answer}) + "\n" for row in rows]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def verify(example: Example, answer: str) -> bool | None:
    """Whether the answer ends in `#### N` with N the prompt's true value; as in GSM8K, its steps are not checked.

    The truth is computed from the prompt, not read from the gold answer, which may be sloppy. None where the prompt
    is not a problem of this task.
    """
    problem = _PROMPT.fullmatch(example.messages[-1].content) if example.messages else None
    if problem is None:
        return None
    start, *parts = problem.groups()
    truth = apply(apply(int(start), (parts[0], int(parts[1]))), (parts[2], int(parts[3])))
    final = _FINAL.search(answer)
    return final is not None and int(final.group(1)) == truth
