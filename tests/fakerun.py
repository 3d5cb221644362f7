"""A run without a disk: the attributes of `sparring.rundir.view.RunView`, made from real dataclasses."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from sparring.config import Config, DataConfig, EvaluateConfig, ModelConfig
from sparring.errors import InputError
from sparring.types import Example, Frozen, Group, Message, Player, Sample


class Table(list[Any]):
    """Rows as `RoundView.rows` gives them."""

    def column(self, name: str) -> Iterator[Any]:
        return (getattr(row, name) for row in self)


def share(mean: float, n: int = 200) -> dict[str, float]:
    return {"mean": mean, "se": math.sqrt(mean * (1 - mean) / n), "n": n}


def summary(sampled: float | None, greedy: float | None, nll: float) -> dict[str, Any]:
    return {
        "n": 200,
        "gold_nll": {"mean": nll, "se": 0.25, "n": 200},
        "gold_nll_token": {"mean": nll / 20, "se": 0.01, "n": 200},
        "sampled": None if sampled is None else share(sampled),
        "greedy": None if greedy is None else share(greedy),
        "answer_tokens": 21.5,
        "truncated": 0.025,
        "empty": 0.0,
    }


def example(name: str, prompt: str, gold: str) -> Example:
    return Example(id=name, messages=(Message("user", prompt),), gold=gold)


def sample(name: str, text: str, t: int = 0, index: int = 0, logps: tuple[float, ...] = (-0.5, -1.25, -0.25)) -> Sample:
    return Sample(name, f"{t}" * 64, index, 7, (5, 6, 2), text, "stop", logps, "abc", round=t)


def group(name: str, source: Sample, t: int = 0, origin: int | None = None) -> Group:
    return Group(
        name, (1, 2), ((4, 5, 2), source.tokens), (1.0, 0.0), 1.0, ("gold", source.id), t if origin is None else origin
    )


def round_view(
    t: int,
    method: str,
    samples: list[Sample] | None = None,
    groups: list[Group] | None = None,
    *,
    steps: int = 0,
    stages: dict[str, str] | None = None,
    seconds: dict[str, float] | None = None,
) -> SimpleNamespace:
    frozen = [
        Frozen(g.sha, "reference", f"{t}" * 64, tuple(tuple(-0.5 - i for _ in c) for i, c in enumerate(g.completions)))
        for g in groups or []
    ]
    rows = {"samples": samples or [], "groups": groups or [], "frozen": frozen}

    done = stages or {"samples": "done", "groups": "done", "frozen": "done", "player": "done", "eval": "done"}

    def read(stage: str, row_type: type) -> Table:
        if done.get(stage) != "done":
            raise InputError(f"round_{t:03d}/{stage}: this stage is not done yet")
        assert all(isinstance(row, row_type) for row in rows[stage])
        return Table(rows[stage])

    log = [
        {
            "step": i + 1,
            "loss": 0.69 * math.exp(-i / 30),
            "grad_norm": 1.0 + 0.3 * math.sin(i),
            "lr": 1e-4 * (1 - i / max(steps, 1)),
            "margin": 0.02 * i,
            "accuracy": 0.5,
            "logp_gold": -20.0 + 0.05 * i,
            "logp_sample": -18.0 - 0.05 * i,
            "tokens": 1000,
            "seconds": 0.1,
        }
        for i in range(steps)
    ]
    return SimpleNamespace(
        t=t,
        method=method,
        hyper={"beta": 0.1, "loss": "logistic"} if method == "spin" else {},
        path=Path(f"round_{t:03d}"),
        stages=done,
        roles={"start": Player(f"p{t}", t, f"{t}" * 64), "opponent": Player(f"p{t}", t, f"{t}" * 64)},
        rows=read,
        log=log,
        alarms=[],
        counts={"groups": {"groups": 2, "dropped": {"identical": 3}, "golds_cut": 0}, "player": {"sha": "f0" * 32}},
        seconds=seconds or {"samples": 12.0, "groups": 0.1, "frozen": 3.0, "player": 185.0, "eval": 9.0},
    )


def item(
    name: str, kind: str, text: str, right: bool | None = None, logps: tuple[float, ...] = (-1.0,)
) -> SimpleNamespace:
    return SimpleNamespace(
        example_id=name, kind=kind, index=0, text=text, tokens=(1, 2, 3), finish="stop", right=right, logps=logps
    )


def run_view(path: Path, **changes: Any) -> Any:
    """Player 0 given, two rounds of SPIN; `changes` replace attributes."""
    examples = {n: example(n, f"What is {i} + {i}?", f"It is {i + i}.") for i, n in enumerate(("aa", "bb", "cc"))}
    played = [sample("aa", "It is 1."), sample("bb", "That is 2.")]
    evaluations = {0: summary(0.4, 0.5, 12.0), 1: summary(0.5, 0.55, 11.0), 2: summary(0.6, 0.56, 10.5)}
    run: dict[str, Any] = {
        "path": path,
        "name": "demo",
        "config": Config(
            model=ModelConfig(path="start"),
            data=DataConfig(path="rows.jsonl"),
            evaluate=EvaluateConfig(verifier="gsm8k"),
        ),
        "env": {"versions": {"torch": "2.13.0", "sparring": "0.1.0"}, "data": {"rows.jsonl": "e3b0c44298fc1c14"}},
        "rounds": [
            round_view(0, "spin", played, [group(s.example_id, s) for s in played], steps=120),
            round_view(1, "spin", played, [group(s.example_id, s, 1) for s in played], steps=120),
        ],
        "players": {n: Player(f"p{n}", n, f"{n}" * 64) for n in range(3)},
        "evaluation": evaluations.get,
        "made_by": lambda player: "spin" if player > 0 else "given",
        "items": lambda player: iter(()),
        "tasks": lambda player: {},
        "best": 2,
        "ended": {},
        "evaluations": lambda upto=None: {n: e for n, e in evaluations.items() if upto is None or n <= upto},
        "best_player": lambda upto=None: 2 if upto is None else min(2, upto),
        "stop_reason": lambda t: None,
        "control_lines": list,
        "finished": True,
        "holder": None,
        "live": None,
        "examples": examples,
        "heldout": {"h1": example("h1", "What is 20 + 22?", "20 + 22 = 42\n#### 42")},
    }
    return SimpleNamespace(**(run | changes))
