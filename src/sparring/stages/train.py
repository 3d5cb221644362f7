"""The training stage, and the held-out answers by which its guard sees how far it moves."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparring import controls, heap, players
from sparring.batching import batches
from sparring.card import model_card
from sparring.errors import InputError, SparringError
from sparring.plan import RoundPlan
from sparring.play.engines import Engine
from sparring.progress import Progress
from sparring.rundir import Counts
from sparring.rundir.store import Rows, read_json, write_json, write_shard
from sparring.rundir.view import RunView
from sparring.types import Example, Frozen, Group, Player, Rendered, Sample
from sparring.workshop import Workshop

if TYPE_CHECKING:
    from torch import nn

    from sparring.gradient import Setting
    from sparring.sharding import Sharded, Team

log = logging.getLogger("sparring")

ANSWERS = "answers"
"""Folder of the start's answers to held-out prompts."""


def held(shop: Workshop, folder: Path, *, r: RoundPlan) -> Counts:
    """Held-out gold answers and temperature-1 answers of the round's start, with its log-probs: what the guard reads.

    Counted beside them: how far decoding the start at 1/τ lies from it, which an opponent at temperature τ aims at.
    """
    held_played(shop, folder, r=r)
    return held_scored(shop, folder, r=r)


def held_played(shop: Workshop, folder: Path, *, r: RoundPlan) -> None:
    """The start's answers, by the engine of the evaluation."""
    from sparring.play.hf import play

    file = folder / ANSWERS / "00000.parquet"
    if file.exists() or not (rows := _held_out(shop, r)):
        return
    file.parent.mkdir(exist_ok=True)
    start, name = shop.resolve(r, "start"), shop.config.evaluate.engine
    settings = r.settings.play.model_copy(update={"temperature": 1.0, "top_p": 1.0, "top_k": 0, "samples": 1})
    # The seed's sign keeps these answers apart from those that are trained on
    seed = -1 - shop.config.seed
    shop.progress.begin(_readings(rows, r), "answers")
    if name != "hf":
        with Engine(shop, name, folder) as engine:
            answers = engine.play(rows, start, settings, seed=seed, round=r.t, role="opponent", indices=range(1))
    else:
        answers = play(
            shop.model(start), rows, start, settings, shop.renderer, seed=seed, round=r.t, compute=shop.compute,
            on_rows=shop.progress.did,
        )  # fmt: skip
    write_shard(file, Sample, answers)


def held_scored(shop: Workshop, folder: Path, *, r: RoundPlan) -> Counts:
    """Log-probs of the gold answers and of those that are there, at one or two temperatures."""
    from sparring.logps import score

    rows = _held_out(shop, r)
    if not rows:
        return {"prompts": 0}
    start, hot = shop.resolve(r, "start"), max(1.0, r.settings.play.temperature)
    model, answers = shop.model(start), Rows(folder / ANSWERS, Sample)
    shop.progress.begin(_readings(rows, r), "answers")
    shop.progress.reached(len(rows))
    paired = [
        Group(row.example_id, row.prompt, (row.gold, sample.tokens), (1.0, 0.0), 1.0, ("gold", sample.id), r.t)
        for row, sample in zip(rows, answers, strict=True)
    ]
    prompts = [g.prompt for g in paired for _ in g.completions]
    completions = [c for g in paired for c in g.completions]

    def scored(sharpen: float) -> list[tuple[float, ...]]:
        return score(
            model, prompts, completions, batch_size=r.settings.play.batch_size, compute=shop.compute, sharpen=sharpen,
            on_rows=shop.progress.did,
        )  # fmt: skip

    cold = scored(1.0)
    both = list(zip(scored(hot) if hot > 1 else cold, cold, strict=True))
    lines = iter(cold)
    kept = [Frozen(g.sha, "start", start.sha, tuple(next(lines) for _ in g.completions)) for g in paired]
    for name, row_type, table in (("groups", Group, paired), ("frozen", Frozen, kept)) if shop.first else ():
        (folder / name).mkdir(exist_ok=True)
        write_shard(folder / name / "00000.parquet", row_type, table)
    return {
        "prompts": len(paired),
        "hot_displacement": controls.displacement(both[controls.GOLD :: 2]),
        "hot_kl": controls.divergence(both[controls.SAMPLE :: 2]),
    }


def _readings(rows: Sequence[Rendered], r: RoundPlan) -> int:
    """Answers, and the scores of two completions each, at one or two temperatures."""
    return len(rows) * (1 + 2 * (1 + (r.settings.play.temperature > 1)))


def _held_out(shop: Workshop, r: RoundPlan) -> Sequence[Rendered]:
    """The prompts that a round's guard reads: like the evaluation, none that is trained on."""
    from sparring.stages.evaluation import untrained

    if not len(Rows(shop.run.path / "data" / "heldout", Example)):
        return []
    rows = shop.rendered("heldout", r.settings.play.max_new_tokens, shop.config.controls.prompts).rows
    return untrained(shop, rows)


def player(shop: Workshop, folder: Path, *, r: RoundPlan) -> Counts:
    """Train this round's learner and save it as the next player."""
    from sparring.gradient import Setting
    from sparring.rundir.shards import ShardedStates
    from sparring.train import train, trained_parameters

    if players.device_of(shop.config.model).type == "cpu":
        heap.keep()
    stored = Rows(shop.run.path / r.folder / "groups", Group)
    scored = {role: Rows(shop.run.path / r.folder / "frozen" / role, Frozen) for role in r.frozen}
    if shop.first:
        _check_aligned(stored, scored)
    paired: Sequence[Group] = stored
    held: Mapping[str, Sequence[Frozen]] = scored
    counts: dict[str, Any] = {}
    if r.method.select is not None:
        paired, held = selected(paired, held, r.method.select)
        counts["selected"] = len(paired)
    # One order of groups per (seed, round); `train` adds the epoch.
    seed = shop.config.seed * 1009 + r.t - shop.plan.first
    start = shop.resolve(r, "start")
    states = shop.run.states(r.stage("player"))
    with _team(shop, r.folder) as team:
        model: Any = shop.learner(start, r.t) if team is None else _shared(shop, team, start, r.t)
        companions = {
            role: shop.beside(shop.resolve(r, role)) for role in r.frozen if "frozen_logits" in r.method.needs
        }
        extras = _extras(r, model, seed)
        setting = Setting(shop.compute, shop.hidden(r), companions, extras, team)
        with ExitStack() as stack:
            if team is None:
                _compile(shop, r, stack, model, paired, held, setting, seed)
            outcome = train(
                model,
                paired,
                held,
                r.method,
                r.settings.train,
                # Where several processes work, the supervisor makes the metrics of the log
                shop.metrics.recorded(states, r.t)
                if team is None
                else ShardedStates(states, team, trained_parameters(model, extras)),
                seed=seed,
                setting=setting,
                guard=_watch(shop, r) if r.has("held") else None,
                on_step=partial(_told, shop.progress),
            )
        if team is None:
            sha = _saved(shop, r, model, folder)
            shop.keep(model, sha)
        else:
            whole = team.gather(model)
            sha = _saved(shop, r, whole, folder) if team.first else ""
            team.wait()
    counts |= {"groups": len(paired), "steps": outcome.steps, "backoffs": outcome.backoffs}
    if outcome.steps < outcome.total:
        counts["ended_early"] = f"{outcome.steps} of {outcome.total} steps"
    return {"sha": sha, **counts}


def _compile(
    shop: Workshop,
    r: RoundPlan,
    stack: ExitStack,
    model: nn.Module,
    paired: Sequence[Group],
    held: Mapping[str, Sequence[Frozen]],
    setting: Setting,
    seed: int,
) -> None:
    """Have the learner's layers compiled until `stack` ends, where that is wanted or was found to pay for this round.

    Raises InputError where they are to be compiled and cannot be.
    """
    from sparring import compiled
    from sparring.gradient import gradient, packed_throughout
    from sparring.train import batch_rows, prepare, total_steps

    wanted, settings = shop.config.model.compile, r.settings.train
    if wanted == "never" or not packed_throughout(model, r.method, setting):
        return
    # The groups of a first pass, the same whenever the round goes on
    rows = batch_rows(0, len(paired), settings.batch_size, seed)
    sizes = [len(paired[i].prompt) + sum(map(len, paired[i].completions)) for i in rows]
    first = batches(sizes, [1] * len(rows), settings.micro_batch, settings.micro_tokens)[0]
    rows, tokens = [rows[i] for i in first], sum(sizes[i] for i in first)
    chosen, beside = [paired[i] for i in rows], {role: [table[i] for i in rows] for role, table in held.items()}

    def once() -> None:
        gradient(
            model, chosen, beside, r.method, micro_batch=len(rows), micro_tokens=1 << 40, setting=setting,
            keys=range(len(rows)),
        )  # fmt: skip
        for module in (model, setting.extras):
            if module is not None:
                module.zero_grad(set_to_none=True)

    prepare(model, settings)
    file = shop.run.path / compiled.FILE
    record = read_json(file) if file.exists() else {}
    if wanted == "auto" and r.folder not in record:
        passes = total_steps(len(paired), settings) * settings.batch_size / len(rows)
        record |= {r.folder: compiled.settled(model, once, passes, tokens)}
        write_json(file, record)
    if wanted == "always" or record[r.folder]["pays"]:
        problem = compiled.begin(stack, model, once)
        if problem and wanted == "always":
            raise InputError(f"model.compile: always, but the layers cannot be compiled ({problem}); say auto or never")
        if problem:
            write_json(file, record | {r.folder: record[r.folder] | {"pays": False, "problem": problem}})


@contextmanager
def _team(shop: Workshop, name: str) -> Iterator[Team | None]:
    """The processes that train together; None where this one does alone."""
    if shop.rank is None or shop.rank.size == 1:
        yield None
        return
    from sparring.sharding import team

    device = players.device_of(shop.config.model)
    with team(shop.rank, shop.run.path, name, device, shop.config.cluster.cpu_offload) as found:
        yield found


def _shared(shop: Workshop, team: Team, start: Player, t: int) -> Sharded:
    """Round t's learner in shards."""
    shop.free()
    with team.turn():
        return team.share(shop.aside().learner(start, t))


def _saved(shop: Workshop, r: RoundPlan, model: nn.Module, folder: Path) -> str:
    """Save the round's player; returns its identity."""
    renderer = shop.renderer
    players.save_player(
        model,
        shop.tokenizer,
        folder,
        model_card(RunView(shop.run.path), r.t + 1),
        template=renderer.template,
        stop_ids=renderer.stop_ids,
    )
    return players.identify(str(folder))


def _told(progress: Progress, done: int, total: int, row: Mapping[str, float]) -> None:
    progress.begin(total, "steps")
    if "tokens" in row:
        progress.did(1, row["tokens"])
    progress.note(margin=row.get("margin"), alarms=int(row["backoffs"]) if "backoffs" in row else None)
    progress.reached(done)


def selected(
    paired: Sequence[Group],
    held: Mapping[str, Sequence[Frozen]],
    select: Callable[[Sequence[Group], Mapping[str, Sequence[Frozen]]], Sequence[Group | None]],
) -> tuple[list[Group], dict[str, list[Frozen]]]:
    """The groups that a method keeps once the frozen log-probs are known. Raises SparringError where it changed a text."""
    chosen = select(paired, held)
    kept = [i for i, group in enumerate(chosen) if group is not None]
    groups = [group for group in chosen if group is not None]
    if not kept or any(paired[i].sha != group.sha for i, group in zip(kept, groups, strict=True)):
        problem = "dropped every group" if not kept else "changed the tokens of a group"
        raise SparringError(
            f"the method's select {problem}; it may give groups other targets and weights, or drop some"
        )
    return groups, {role: [rows[i] for i in kept] for role, rows in held.items()}


def _extras(r: RoundPlan, model: nn.Module, seed: int) -> nn.Module | None:
    """The method's own module, its first weights a function of the seed."""
    import torch

    if r.method.extras is None:
        return None
    config: Any = model.config
    text = config.get_text_config()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made: nn.Module = r.method.extras(text.hidden_size, text.vocab_size)
    first = next(model.parameters())
    return made.to(first.device, first.dtype)


def _watch(shop: Workshop, r: RoundPlan) -> controls.Watch | None:
    """The round's guard; None where there are no held-out prompts to read."""
    stage, settings = shop.run.path / r.folder / "held", shop.config.controls
    counts = read_json(stage / "stage.json")["counts"]
    if not counts["prompts"]:
        log.warning("%s: no held-out prompts, so no control watches this round (data.heldout_size)", r.folder)
        return None
    return controls.Watch(
        Rows(stage / "groups", Group),
        Rows(stage / "frozen", Frozen),
        controls.limits(settings, counts),
        settings.checks,
        settings.backoff,
        settings.backoffs,
        4 * r.settings.train.micro_batch,
        shop.compute,
    )


def _check_aligned(paired: Rows[Group], held: Mapping[str, Rows[Frozen]]) -> None:
    for role, rows in held.items():
        named = zip(rows.column("group"), paired, strict=True)
        if len(rows) != len(paired) or any(name != group.sha for name, group in named):
            raise SparringError(f"the frozen log-probs of `{role}` do not belong to these groups; use --redo")
