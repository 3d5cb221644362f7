"""How a stage's work is cut: over the processes of a run, and between an engine that samples and ours that scores.

The loop makes stages one by one and knows nothing of this but `made`; a process of a crew does `part`s.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparring import stages
from sparring.config import Config, Sampling
from sparring.plan import RoundPlan, Stage
from sparring.rundir import Counts
from sparring.workshop import Workshop

PLAY, SCORE = "play", "score"
"""Steps of a stage in which an engine samples: what that does, and what is ours."""
PARTS: dict[str, dict[str, Callable[..., Any]]] = {
    "samples": {"": stages.play_shards, PLAY: stages.play_shards, SCORE: stages.engine_gap},
    "frozen": {"": stages.frozen_shards},
    "held": {"": stages.held, PLAY: stages.held_played, SCORE: stages.held_scored},
    "eval": {"": stages.answer_shards, PLAY: stages.played_shards, SCORE: stages.gold_shards},
    "task": {"": stages.task, PLAY: stages.task_played, SCORE: stages.task_scored},
}
"""What a process does of a stage that several share, or that another engine plays and ours scores."""
COUNTED = ("samples", "frozen", "eval")
"""Stages that are counted by the supervisor, from what all have written."""
LIGHT = ("data", "groups")
"""Stages that need no model, and are done by the supervisor itself."""


@dataclass(frozen=True)
class Step:
    """What several processes do of a stage before the next step begins."""

    name: str
    all: bool
    """Every process takes part, else the first alone."""
    cut: bool = False
    """Players are cut over all processes, which do everything at the same time."""


def steps(config: Config, stage: Stage, r: RoundPlan | None) -> tuple[Step, ...]:
    """The steps of a stage, in order."""
    cut = config.cluster.sharded
    if engined(config, stage, r):
        return Step(PLAY, False), Step(SCORE, cut or stage.name == "eval", cut)
    if stage.name == "player":
        return (Step("", True),)
    cut = cut and stage.name in ("frozen", "task")
    return (Step("", cut or stage.name in COUNTED, cut),)


def engined(config: Config, stage: Stage, r: RoundPlan | None) -> bool:
    """Whether another engine than the built-in one samples in a stage."""
    return stage.name in ("samples", "held", "eval", "task") and sampler(config, stage, r).engine_kind != "hf"


def sampler(config: Config, stage: Stage, r: RoundPlan | None) -> Sampling:
    """The settings that say who samples in a stage that does."""
    return r.settings.play if stage.name == "samples" and r is not None else config.evaluate


def part(shop: Workshop, folder: str, name: str) -> Counts | None:
    """One process's part of a stage's step; what was counted where that is all of it."""
    making = shop.run.partial(folder)
    of_start = [(stage, None) for stage in (shop.plan.start_eval, *shop.plan.start_tasks)]
    of_rounds = [(stage, r) for r in shop.plan.rounds for stage in r.stages]
    stage, r = next((stage, r) for stage, r in (*of_start, *of_rounds) if stage.folder == folder)
    make = PARTS.get(stage.name, {}).get(name) or stages.MAKE.get(stage.name) or stages.wins
    given = {"r": r} if stage.name in stages.MAKE else measured(shop, stage, shop.plan.first if r is None else r.t + 1)
    step = next(step for step in steps(shop.config, stage, r) if step.name == name)
    with shop.together(f"{folder}-{name}".replace("/", "+")) if step.cut else nullcontext():
        counts = make(shop, making, **given)
    return None if stage.name in COUNTED else counts


def made(shop: Workshop, stage: Stage, make: Callable[[Workshop, Path], Counts], folder: Path) -> Counts:
    """Fill a stage's folder, with other processes where the run has several and the stage is one of its plan."""
    size = shop.config.cluster.processes
    planned = any(other.folder == stage.folder for other in shop.plan.stages)
    if size > 1 and planned and stage.name not in LIGHT:
        r = next((r for r in shop.plan.rounds if stage in r.stages), None)
        # A training's lines come while it lasts
        tell = shop.metrics.sync if stage.name == "player" else lambda: None
        counts: Counts = {}
        for step in steps(shop.config, stage, r):
            if step.name == PLAY and sampler(shop.config, stage, r).engine_kind == "vllm":
                shop.crew.close()  # the devices are the engine's; the next order starts processes that hold nothing
            counts = shop.crew.do(stage.folder, step.name, size if step.all else 1, shop.progress, tell)
        tell()
        if stage.name not in COUNTED:
            return counts
    return make(shop, folder)


def measured(shop: Workshop, stage: Stage, number: int) -> dict[str, Any]:
    """Which player such a stage measures, and by which task."""
    named = {task.label: task for task in shop.config.evaluate.tasks if stage.name == "task"}
    return {"number": number} | ({"task": named[stage.folder.rpartition("/")[2]]} if named else {})
