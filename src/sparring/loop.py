"""The loop: play → judge → pair → freeze → train → evaluate, round after round.

A stage is a function that fills a folder (`stages.py`); `RunDir.once` calls it unless its folder is there. Nothing but
files crosses from one stage to the next, so resuming, forking and running one stage alone are the same code.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from sparring import stages
from sparring.card import write_cards
from sparring.config import Config, Sampling
from sparring.plan import RoundPlan, Stage
from sparring.rundir import Counts
from sparring.rundir.store import read_json
from sparring.rundir.view import RunView
from sparring.workshop import Workshop

log = logging.getLogger("sparring")

PLAY, SCORE = "play", "score"
"""Steps of a stage in which an engine samples: what that does, and what is ours."""
MAKE = {
    "samples": stages.samples,  # the opponent answers every prompt
    "scores": stages.scores,  # only methods that judge: what a verifier or scorer says of the answers
    "groups": stages.groups,  # gold answers and samples become what the loss compares
    "frozen": stages.frozen,  # the reference's log-probs of it, once
    "held": stages.held,  # held-out answers of the round's start, by which the guard sees how far training moves
    "player": stages.player,  # groups + frozen + loss → the next player
}
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
MEASURES = ("eval", "task", "wins")
"""The stages that measure a player."""


def advance(shop: Workshop, only: Collection[str] | None = None) -> None:
    """Do every stage that is not done yet, in order; given folders, those alone, whatever the stop rule says."""
    with telling(shop):
        _advance(shop, only)


@contextmanager
def telling(shop: Workshop) -> Iterator[None]:
    """What is done within it is told: to who looks on, to the metrics and their trackers, and in the players' cards."""
    try:
        shop.metrics.sync()
        yield
        write_cards(RunView(shop.run.path))
    finally:
        shop.crew.close()
        shop.progress.close()
        shop.trackers.close()


def _advance(shop: Workshop, only: Collection[str] | None) -> None:
    def wanted(stage: Stage) -> bool:
        return only is None or stage.folder in only

    once(shop, wanted, shop.plan.data, stages.data)
    for stage in (shop.plan.start_eval, *shop.plan.start_tasks):
        once(shop, wanted, stage, measure(shop, stage, shop.plan.first))
    for r in shop.plan.rounds:
        if only is None and (reason := RunView(shop.run.path).stop_reason(r.t)):
            log.info("%s: not begun: %s", r.folder, reason)
            break
        recorded = (shop.run.path / r.folder / "roles.json").exists()
        if any(wanted(stage) and not (recorded and shop.run.done(stage)) for stage in r.stages):
            shop.run.record_roles(r.folder, {role: shop.resolve(r, role) for role in r.roles})
        for stage in r.stages:
            make = partial(MAKE[stage.name], r=r) if stage.name in MAKE else measure(shop, stage, r.t + 1)
            once(shop, wanted, stage, make)
            if stage.name == "player" and shop.run.done(stage) and not shop.config.keep_states:
                # Only now: a kill between dropping it and the stage's last file would train from the start.
                shop.run.states(stage).drop_state()


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
    make = PARTS.get(stage.name, {}).get(name) or MAKE.get(stage.name) or stages.wins
    given = {"r": r} if stage.name in MAKE else _measured(shop, stage, shop.plan.first if r is None else r.t + 1)
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


def measure(shop: Workshop, stage: Stage, number: int) -> Callable[[Workshop, Path], Counts]:
    """What makes one of the stages that measure a player."""
    kinds: dict[str, Callable[..., Counts]] = {"task": stages.task, "eval": stages.evaluation, "wins": stages.wins}
    return partial(kinds[stage.name], **_measured(shop, stage, number))


def _measured(shop: Workshop, stage: Stage, number: int) -> dict[str, Any]:
    """Which player such a stage measures, and by which task."""
    named = {task.label: task for task in shop.config.evaluate.tasks if stage.name == "task"}
    return {"number": number} | ({"task": named[stage.folder.rpartition("/")[2]]} if named else {})


def once(
    shop: Workshop, wanted: Callable[[Stage], bool], stage: Stage, make: Callable[[Workshop, Path], Counts]
) -> None:
    """Make one stage if it is wanted and not there, and say in a line what it gave."""
    if wanted(stage) and not shop.run.done(stage):
        with shop.progress.stage(stage.folder):
            folder = shop.run.once(stage, partial(made, shop, stage, make))
        if stage.name in MEASURES:
            shop.metrics.sync()
            write_cards(RunView(shop.run.path))
        record = read_json(folder / "stage.json")
        counts = ", ".join(f"{name} {_short(value)}" for name, value in record["counts"].items() if value)
        log.info("%s: %s (%.1f s)", stage.folder, counts or "nothing to do", record["seconds"])


def _short(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)[:12] if isinstance(value, str) else str(value)
