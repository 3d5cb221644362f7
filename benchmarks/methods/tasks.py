"""The comparison's tasks: the demo's sums and five variants of them, as pure functions of a seed.

noisy: the demo's own two-step sums, half of the training answers sloppy.
clean: the same sums without slips.
hard:  three steps instead of two, half of the answers sloppy.
many:  `59?` asks for any chain of two steps that ends in 59; gold is one of very many right answers.
few:   300 clean two-step sums, for a model that was pre-trained on everything else (`broad`).
small: the noisy sums, for a model of a third of the width, which twenty epochs of SFT do not teach all of them.
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
FEW = 300
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


def broad(rng: random.Random) -> list[dict[str, str]]:
    """Clean sums of one and of three steps, and clean targets: no prompt is a two-step sum."""
    # Of one step there are about 1,200 sums
    one, three, target = sums(rng, steps=1, sloppy=0.0), sums(rng, steps=3, sloppy=0.0), targets(rng)
    return [draw(False) for draw, count in ((one, 1_000), (three, 5_000), (target, 4_000)) for _ in range(count)]


def write(folder: Path, task: str, seed: int) -> None:
    """Write `train.jsonl`, `validation.jsonl` and `test.jsonl` in prompt/completion format; `few` has `broad.jsonl` too."""
    rng = random.Random(f"{task} {seed}")
    draw = {
        "noisy": lambda: sums(rng, steps=2, sloppy=SLOPPY),
        "clean": lambda: sums(rng, steps=2, sloppy=0.0),
        "hard": lambda: sums(rng, steps=3, sloppy=SLOPPY),
        "many": lambda: targets(rng),
        "few": lambda: sums(rng, steps=2, sloppy=0.0),
        "small": lambda: sums(rng, steps=2, sloppy=SLOPPY),
    }[task]()
    counts = {"train": FEW if task == "few" else TRAIN, "validation": HELDOUT, "test": HELDOUT}
    files = {name: [draw(name == "train") for _ in range(count)] for name, count in counts.items()}
    if task == "few":
        files["broad"] = broad(rng)
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


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
