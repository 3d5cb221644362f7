"""The comparison's tasks: the demo's sums and three variants of them, as pure functions of a seed.

noisy: the demo's own two-step sums, half of the training answers sloppy.
clean: the same sums without slips.
hard:  three steps instead of two, half of the answers sloppy.
many:  `59?` asks for any chain of two steps that ends in 59; gold is one of very many right answers.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path

from sparring.demo.task import SLOPPY, Step, apply, write_answer
from sparring.types import Example

TRAIN, HELDOUT = 10_000, 1_000
STEPS: list[Step] = [(operator, operand) for operator in "+-" for operand in range(2, 10)]
_LINE = re.compile(r"(\d+)([+-])(\d+)=(\d+)")


def chain(rng: random.Random, steps: int) -> tuple[int, list[Step]]:
    """A start and steps whose true results all have two digits."""
    while True:
        start, taken = rng.randrange(10, 90), [rng.choice(STEPS) for _ in range(steps)]
        value, good = start, True
        for step in taken:
            value = apply(value, step)
            good = good and 10 <= value <= 99
        if good:
            return start, taken


def sums(rng: random.Random, *, steps: int, sloppy: float) -> Callable[[bool], dict[str, str]]:
    """Prompts `start±b±c?` with their written-out answers; no prompt comes twice."""
    seen: set[str] = set()

    def draw(train: bool) -> dict[str, str]:
        while True:
            start, taken = chain(rng, steps)
            prompt = f"{start}{''.join(f'{o}{n}' for o, n in taken)}?"
            if prompt not in seen:
                break
        seen.add(prompt)
        slips = train and rng.random() < sloppy
        return {"prompt": prompt, "completion": write_answer(start, taken, rng if slips else None)}

    return draw


def targets(rng: random.Random) -> Callable[[bool], dict[str, str]]:
    """Prompts `59?`, answered by one random chain that ends there, half of the training answers sloppily."""

    def draw(train: bool) -> dict[str, str]:
        start, taken = chain(rng, 2)
        value = start
        for step in taken:
            value = apply(value, step)
        slips = train and rng.random() < SLOPPY
        return {"prompt": f"{value}?", "completion": write_answer(start, taken, rng if slips else None)}

    return draw


def write(folder: Path, task: str, seed: int) -> None:
    """Write `train.jsonl`, `validation.jsonl` and `test.jsonl` in prompt/completion format."""
    rng = random.Random(f"{task} {seed}")
    draw = {
        "noisy": lambda: sums(rng, steps=2, sloppy=SLOPPY),
        "clean": lambda: sums(rng, steps=2, sloppy=0.0),
        "hard": lambda: sums(rng, steps=3, sloppy=SLOPPY),
        "many": lambda: targets(rng),
    }[task]()
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in (("train", TRAIN), ("validation", HELDOUT), ("test", HELDOUT)):
        rows = [json.dumps(draw(name == "train")) + "\n" for _ in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(rows), encoding="utf-8")


def verify(example: Example, answer: str) -> bool | None:
    """Whether an answer is right, by arithmetic on the prompt; the gold answer, which may be sloppy, is not read."""
    prompt, final = example.messages[-1].content, re.search(r"#### (\d+)\s*$", answer)
    if re.fullmatch(r"\d+\?", prompt):
        return final is not None and final[1] == prompt[:-1] and _sound(answer.splitlines()[:-1], final[1])
    found = re.fullmatch(r"(\d+)((?:[+-]\d)+)\?", prompt)
    if found is None:
        return None
    value = int(found[1])
    for operator, operand in re.findall(r"([+-])(\d)", found[2]):
        value = apply(value, (operator, int(operand)))
    return final is not None and int(final[1]) == value


def _sound(lines: list[str], final: str) -> bool:
    """Whether every step is right and takes up the result of the one before it."""
    before = None
    for line in lines:
        step = _LINE.fullmatch(line)
        if (
            step is None
            or before not in (None, step[1])
            or apply(int(step[1]), (step[2], int(step[3]))) != int(step[4])
        ):
            return False
        before = step[4]
    return before == final
