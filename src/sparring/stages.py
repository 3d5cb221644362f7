"""The stages: each reads the folders of earlier ones, fills its own, and returns what it counted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparring import pair, players
from sparring.errors import SparringError
from sparring.judge.verify import load_verifier
from sparring.plan import RoundPlan
from sparring.progress import bar
from sparring.rundir import Counts
from sparring.rundir.store import Rows, write_json, write_shard, write_shards
from sparring.types import Example, Frozen, Group, Player, Rendered, Sample
from sparring.workshop import DATE, Workshop

if TYPE_CHECKING:
    from torch import nn

GROUPS_PER_SHARD = 8192


def data(shop: Workshop, folder: Path) -> Counts:
    """The data set, checked, split and shuffled, as examples."""
    from sparring.data import load

    loaded = load(shop.config.data, shop.config.seed)
    for name, examples in (("train", loaded.train), ("heldout", loaded.heldout)):
        (folder / name).mkdir(exist_ok=True)
        write_shard(folder / name / "00000.parquet", Example, examples)
    # Templates may write the date. It is the data's, so that forks, which share their rounds, share their prompts too
    write_json(folder / DATE, datetime.now().isoformat())
    return {"train": len(loaded.train), "heldout": len(loaded.heldout), **loaded.counts}


def samples(shop: Workshop, folder: Path, *, r: RoundPlan) -> Counts:
    """The opponent answers every prompt; in the first round of self-play, answers that came with the data stand in."""
    from sparring.play.hf import play

    assert r.method.plays is not None
    player = shop.player(r.roles[r.method.plays])
    settings = r.settings.play
    rows = shop.rendered("train", settings.max_new_tokens, r.settings.limit).rows
    first = r is next(r for r in shop.plan.rounds if r.method.plays is not None)
    model, seed = shop.model(player), shop.config.seed

    def answer(chunk: Sequence[Rendered]) -> list[Sample]:
        given = [row for row in chunk if first and row.generated is not None]
        asked = [row for row in chunk if not (first and row.generated is not None)]
        played = play(model, asked, player, settings, shop.renderer, seed=seed, round=r.t, compute=shop.compute)
        return played + _given(shop, model, given, settings.batch_size)

    starts = range(0, len(rows), settings.chunk)
    with bar(f"round {r.t} play", len(rows), "prompts") as show:
        chunks = [partial(answer, rows[at : at + settings.chunk]) for at in starts]
        total = write_shards(folder, Sample, chunks, lambda n: show(min(len(rows), (n + 1) * settings.chunk)))
    made = Rows(folder, Sample)
    return {
        "samples": total,
        "truncated": sum(sample.finish == "length" for sample in made),
        "tokens": sum(len(sample.tokens) for sample in made),
        "off_policy": sum(sample.settings_id == "off-policy" for sample in made),
    }


def _given(shop: Workshop, model: nn.Module, rows: Sequence[Rendered], batch_size: int) -> list[Sample]:
    """Answers by an unknown player that came with the data, scored by this round's opponent."""
    from sparring.logps import score

    answers = [row.generated or () for row in rows]
    logps = score(model, [r.prompt for r in rows], answers, batch_size=batch_size, compute=shop.compute)
    return [
        Sample(
            example_id=row.example_id,
            player="unknown",
            index=0,
            seed=shop.config.seed,
            tokens=tokens,
            text=row.generated_text or "",
            finish="length" if "generated" in row.cut else "stop",
            logps=line,
            settings_id="off-policy",
        )
        for row, tokens, line in zip(rows, answers, logps, strict=True)
    ]


def groups(shop: Workshop, folder: Path, *, r: RoundPlan) -> Counts:
    """What the method pairs of this round's samples, and the earlier rounds' own groups that it replays."""
    rendering = shop.rendered("train", r.settings.play.max_new_tokens, r.settings.limit)
    played: Sequence[Sample] = Rows(shop.run.path / r.folder / "samples", Sample) if r.method.plays else []
    made = r.method.groups(rendering.rows, played, r.t)
    whole = list(made.groups)
    earlier = [e for e in reversed(shop.plan.rounds) if e.t < r.t and e.method.plays is not None]
    for weight, before in zip(r.method.memory, earlier, strict=False):
        own = [g for g in Rows(shop.run.path / before.folder / "groups", Group) if g.origin_round == before.t]
        whole += pair.replayed(own, weight)
    if not whole:
        raise SparringError(
            f"{r.folder}/groups: nothing to train on: of {len(played)} samples all were dropped ({made.dropped}); "
            "the opponent already gives the data's answers, or the data has none"
        )
    starts = range(0, len(whole), GROUPS_PER_SHARD)
    write_shards(folder, Group, [partial(lambda at: whole[at : at + GROUPS_PER_SHARD], at) for at in starts])
    counts: dict[str, Any] = {"groups": len(made.groups), "replayed": len(whole) - len(made.groups)}
    return counts | {"dropped": made.dropped, **rendering.counts}


def frozen(shop: Workshop, folder: Path, *, r: RoundPlan) -> Counts:
    """Every frozen role's log-probs of every group, once: a folder per role, its rows in the order of the groups."""
    from sparring.logps import score

    paired = Rows(shop.run.path / r.folder / "groups", Group)
    batch, chunk = 4 * r.settings.train.micro_batch, r.settings.play.chunk

    def rows(role: str, player: Player, at: int) -> list[Frozen]:
        part = paired[at : at + chunk]
        prompts = [g.prompt for g in part for _ in g.completions]
        completions = [c for g in part for c in g.completions]
        lines = iter(score(shop.model(player), prompts, completions, batch_size=batch, compute=shop.compute))
        return [Frozen(g.sha, role, player.sha, tuple(next(lines) for _ in g.completions)) for g in part]

    starts = range(0, len(paired), chunk)
    with bar(f"round {r.t} frozen log-probs", len(r.method.frozen) * len(starts), "chunks") as show:

        def write(before: int, role: str) -> int:
            player = shop.player(r.roles[role])
            (folder / role).mkdir(exist_ok=True)
            work = [partial(rows, role, player, at) for at in starts]
            return write_shards(folder / role, Frozen, work, lambda n: show(before + n + 1))

        return {"rows": sum(write(i * len(starts), role) for i, role in enumerate(r.method.frozen))}


def player(shop: Workshop, folder: Path, *, r: RoundPlan) -> Counts:
    """Train this round's learner and save it as the next player."""
    from sparring.train import train

    paired = Rows(shop.run.path / r.folder / "groups", Group)
    held = {role: Rows(shop.run.path / r.folder / "frozen" / role, Frozen) for role in r.method.frozen}
    _check_aligned(paired, held)
    start = shop.player(r.roles["start"])
    model = shop.learner(start)
    with bar(f"round {r.t} train", 1, "rounds") as show:
        train(
            model,
            paired,
            held,
            r.method.loss,
            r.method.metrics,
            r.settings.train,
            shop.run.states(r.stage("player")),
            # One order of groups per (seed, round); `train` adds the epoch.
            seed=shop.config.seed * 1009 + r.t - shop.plan.first,
            compute=shop.compute,
            on_step=lambda done, total: show(done / total),
        )
    renderer = shop.renderer
    players.save_player(
        model, shop.tokenizer, folder, _card(r, start), template=renderer.template, stop_ids=renderer.stop_ids
    )
    sha = players.identify(str(folder))
    shop.keep(model, sha)
    return {"sha": sha, "groups": len(paired)}


def _card(r: RoundPlan, start: Player) -> str:
    """What a player's README says: where it comes from and how it was trained."""
    settings = {**r.settings.hyper, **r.settings.train.identity()}
    lines = "\n".join(f"- {name}: {value}" for name, value in settings.items())
    roles = ", ".join(f"{role} = player {number}" for role, number in r.roles.items())
    return (
        f"---\nlibrary_name: transformers\ntags: [sparring, {r.method.name}]\n---\n"
        f"# Player {r.t + 1}\n\nMade by round {r.t} of `sparring` with the method `{r.method.name}` "
        f"({r.method.paper}) from player {start.round} (content hash {start.sha[:16]}). Roles: {roles}.\n\n"
        f"Settings:\n{lines}\n"
    )


def _check_aligned(paired: Sequence[Group], held: Mapping[str, Sequence[Frozen]]) -> None:
    for role, rows in held.items():
        if len(rows) != len(paired) or any(row.group != group.sha for row, group in zip(rows, paired, strict=True)):
            raise SparringError(f"the frozen log-probs of `{role}` do not belong to these groups; use --redo")


def evaluation(shop: Workshop, folder: Path, *, number: int) -> Counts:
    """A player's answers to held-out prompts, one row each, and their summary."""
    from sparring.evaluate import Item, evaluate

    settings = shop.config.evaluate
    examples = {example.id: example for example in Rows(shop.run.path / "data" / "heldout", Example)}
    if not examples:
        write_json(folder / "summary.json", {"n": 0})
        return {"n": 0}
    rows = shop.rendered("heldout", shop.config.evaluation_play.max_new_tokens, settings.limit).rows
    tested = shop.player(number)
    result = evaluate(
        shop.model(tested),
        tested,
        [examples[row.example_id] for row in rows],
        rows,
        settings,
        shop.config.evaluation_play,
        shop.renderer,
        load_verifier(settings.verifier) if settings.verifier else None,
        seed=shop.config.seed,
        compute=shop.compute,
    )
    write_shard(folder / "00000.parquet", Item, result.items)
    write_json(folder / "summary.json", result.summary)
    return {k: v["mean"] for k, v in result.summary.items() if isinstance(v, dict) and v.get("mean") is not None}
