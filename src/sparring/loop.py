"""The loop: play → judge → pair → freeze → train → evaluate, round after round.

A stage is a function that fills a folder (`stages/`); `RunDir.once` calls it unless its folder is there. Nothing but
files crosses from one stage to the next, so resuming, forking and running one stage alone are the same code.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from sparring import stages
from sparring.card import write_cards
from sparring.plan import Stage
from sparring.rundir import Counts
from sparring.rundir.store import read_json
from sparring.rundir.view import RunView
from sparring.sharing import made, measured
from sparring.workshop import Workshop

log = logging.getLogger("sparring")

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
        shop.close()


def _advance(shop: Workshop, only: Collection[str] | None) -> None:
    def wanted(stage: Stage) -> bool:
        return only is None or stage.folder in only

    once(shop, wanted, shop.plan.data, stages.data)
    for stage in (shop.plan.start_eval, *shop.plan.start_tasks):
        once(shop, wanted, stage, measure(shop, stage, shop.plan.first))
    for r in shop.plan.rounds:
        begun = only is not None or shop.run.done(r.stage("player"))
        if not begun and (reason := RunView(shop.run.path).stop_reason(r.t)):
            log.info("%s: not begun: %s", r.folder, reason)
            break
        recorded = (shop.run.path / r.folder / "roles.json").exists()
        if any(wanted(stage) and not (recorded and shop.run.done(stage)) for stage in r.stages):
            shop.run.record_roles(r.folder, {role: shop.resolve(r, role) for role in r.roles})
        for stage in r.stages:
            make = partial(stages.MAKE[stage.name], r=r) if stage.name in stages.MAKE else measure(shop, stage, r.t + 1)
            once(shop, wanted, stage, make)
            if stage.name == "player" and shop.run.done(stage) and not shop.config.keep_states:
                # Only now: a kill between dropping it and the stage's last file would train from the start.
                shop.run.states(stage).drop_state()


def measure(shop: Workshop, stage: Stage, number: int) -> Callable[[Workshop, Path], Counts]:
    """What makes one of the stages that measure a player."""
    kinds: dict[str, Callable[..., Counts]] = {"task": stages.task, "eval": stages.evaluation, "wins": stages.wins}
    return partial(kinds[stage.name], **measured(shop, stage, number))


def once(
    shop: Workshop, wanted: Callable[[Stage], bool], stage: Stage, make: Callable[[Workshop, Path], Counts]
) -> None:
    """Make one stage if it is wanted and not there, and say in a line what it gave."""
    if wanted(stage) and not shop.run.done(stage):
        with shop.progress.stage(stage.folder):
            folder = shop.run.once(stage, partial(made, shop, stage, make))
        if stage.name in MEASURES:
            shop.metrics.sync()
            view = RunView(shop.run.path)
            if (best := view.best_player()) is not None:
                shop.run.mark_best(view.players[best])
            write_cards(view)
        record = read_json(folder / "stage.json")
        counts = ", ".join(f"{name} {_short(value)}" for name, value in record["counts"].items() if value)
        log.info("%s: %s (%.1f s)", stage.folder, counts or "nothing to do", record["seconds"])


def _short(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)[:12] if isinstance(value, str) else str(value)
