"""The loop: play → pair → freeze → train → evaluate, round after round.

Each stage is a function that fills a folder; `RunDir.once` runs it unless its folder is there. Nothing but files
crosses from one stage to the next, so resuming, forking and running one stage alone are the same code.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparring import data, pair, players, prompts
from sparring.config import Config, PlayConfig
from sparring.errors import InputError, SparringError
from sparring.judge.verify import load_verifier
from sparring.plan import Plan, RoundPlan, Stage
from sparring.progress import bar
from sparring.rundir import Counts, RunDir
from sparring.store import Rows, read_json, write_json, write_shard, write_shards
from sparring.types import Example, Frozen, Group, Player, Rendered, Sample

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger("sparring")


class Loop:
    """One run being worked on: its plan, its players, and the model loaded last."""

    def __init__(self, run: RunDir, config: Config, plan: Plan, start: Player) -> None:
        self.run, self.config, self.plan = run, config, plan
        self._start = start
        self._loaded: tuple[str, nn.Module] | None = None

    def advance(self, wanted: Callable[[Stage], bool] = lambda stage: True) -> None:
        """Do every wanted stage that is not done yet, in order."""
        self._once(self.plan.data, wanted, self._data)
        self._once(self.plan.start_eval, wanted, partial(self._eval, self.plan.first))
        for r in self.plan.rounds:
            recorded = (self.run.path / r.folder / "roles.json").exists()
            if any(wanted(stage) and not (recorded and self.run.done(stage)) for stage in r.stages):
                self.run.record_roles(r.folder, {role: self.player(number) for role, number in r.roles.items()})
            for stage in r.stages:
                make = {
                    "samples": partial(self._samples, r),
                    "groups": partial(self._groups, r),
                    "frozen": partial(self._frozen, r),
                    "player": partial(self._player, r),
                    "eval": partial(self._eval, r.t + 1),
                }[stage.name]
                self._once(stage, wanted, make)
                if stage.name == "player" and self.run.done(stage) and not self.config.keep_states:
                    # Only now: a kill between dropping it and the stage's last file would train from the start.
                    self.run.states(stage).drop_state()

    def _once(self, stage: Stage, wanted: Callable[[Stage], bool], make: Callable[[Path], Counts]) -> None:
        if wanted(stage) and not self.run.done(stage):
            folder = self.run.once(stage, make)
            record = read_json(folder / "stage.json")
            counts = ", ".join(f"{name} {_short(value)}" for name, value in record["counts"].items())
            log.info("%s: %s (%.1f s)", stage.folder, counts, record["seconds"])

    def _data(self, folder: Path) -> Counts:
        loaded = data.load(self.config.data, self.config.seed)
        for name, examples in (("train", loaded.train), ("heldout", loaded.heldout)):
            (folder / name).mkdir(exist_ok=True)
            write_shard(folder / name / "00000.parquet", Example, examples)
        return {"train": len(loaded.train), "heldout": len(loaded.heldout), **loaded.counts}

    def _samples(self, r: RoundPlan, folder: Path) -> Counts:
        """The opponent answers every prompt; in the first round of self-play, answers that came with the data stand in."""
        from sparring.play.hf import play

        assert r.method.plays is not None
        player = self.player(r.roles[r.method.plays])
        rendering = self.rendered("train", r.settings.play.max_new_tokens, r.settings.limit)
        rows, settings = rendering.rows, r.settings.play
        first = r is next(r for r in self.plan.rounds if r.method.plays is not None)
        model = self.model(player)

        def answer(chunk: Sequence[Rendered]) -> list[Sample]:
            given = [row for row in chunk if first and row.generated is not None]
            asked = [row for row in chunk if not (first and row.generated is not None)]
            seed = self.config.seed
            played = play(model, asked, player, settings, self.renderer, seed=seed, round=r.t, compute=self.compute)
            return played + self._given(model, given, settings)

        starts = range(0, len(rows), settings.chunk)
        with bar(f"round {r.t} play", len(rows), "prompts") as show:
            chunks = [partial(answer, rows[at : at + settings.chunk]) for at in starts]
            total = write_shards(folder, Sample, chunks, lambda n: show(min(len(rows), (n + 1) * settings.chunk)))
        samples = Rows(folder, Sample)
        cut = sum(s.finish == "length" for s in samples)
        off = sum(s.player == "unknown" for s in samples)
        tokens = sum(len(s.tokens) for s in samples)
        return {"samples": total, "truncated": cut, "tokens": tokens, **({"off_policy": off} if off else {})}

    def _given(self, model: nn.Module, rows: Sequence[Rendered], settings: PlayConfig) -> list[Sample]:
        """Answers by an unknown player that came with the data, scored by this round's opponent."""
        from sparring.logps import score

        answers = [row.generated or () for row in rows]
        logps = score(model, [r.prompt for r in rows], answers, batch_size=settings.batch_size, compute=self.compute)
        return [
            Sample(
                row.example_id,
                "unknown",
                0,
                self.config.seed,
                tokens,
                row.generated_text or "",
                "length" if "generated" in row.cut else "stop",
                line,
                "off-policy",
            )
            for row, tokens, line in zip(rows, answers, logps, strict=True)
        ]

    def _groups(self, r: RoundPlan, folder: Path) -> Counts:
        rendering = self.rendered("train", r.settings.play.max_new_tokens, r.settings.limit)
        samples: Sequence[Sample] = Rows(self.run.path / r.folder / "samples", Sample) if r.method.plays else []
        made = r.method.groups(rendering.rows, samples, r.t)
        groups = list(made.groups)
        earlier = [e for e in reversed(self.plan.rounds) if e.t < r.t and e.method.plays is not None]
        for weight, before in zip(r.method.memory, earlier, strict=False):
            own = [g for g in Rows(self.run.path / before.folder / "groups", Group) if g.origin_round == before.t]
            groups += pair.replayed(own, weight)
        if not groups:
            raise SparringError(
                f"{r.folder}/groups: nothing to train on: all {len(samples)} samples were dropped ({made.dropped}); "
                "the opponent already gives the data's answers, or the data has none"
            )
        write_shards(
            folder, Group, [partial(lambda at: groups[at : at + 8192], at) for at in range(0, len(groups), 8192)]
        )
        counts: dict[str, Any] = {"groups": len(made.groups), "dropped": made.dropped, **rendering.counts}
        return counts | ({"replayed": len(groups) - len(made.groups)} if r.method.memory else {})

    def _frozen(self, r: RoundPlan, folder: Path) -> Counts:
        """Every frozen role's log-probs of every group, once; rows lie role by role in the order of the groups."""
        from sparring.logps import score

        groups = Rows(self.run.path / r.folder / "groups", Group)
        batch, chunk = 4 * r.settings.train.micro_batch, r.settings.play.chunk

        def rows(role: str, player: Player, at: int) -> list[Frozen]:
            part = groups[at : at + chunk]
            prompts_ = [g.prompt for g in part for _ in g.completions]
            flat = [c for g in part for c in g.completions]
            lines = iter(score(self.model(player), prompts_, flat, batch_size=batch, compute=self.compute))
            return [Frozen(g.sha, role, player.sha, tuple(next(lines) for _ in g.completions)) for g in part]

        work = [
            partial(rows, role, self.player(r.roles[role]), at)
            for role in r.method.frozen
            for at in range(0, len(groups), chunk)
        ]
        with bar(f"round {r.t} frozen log-probs", len(work), "chunks") as show:
            total = write_shards(folder, Frozen, work, lambda n: show(n + 1))
        return {"rows": total}

    def _player(self, r: RoundPlan, folder: Path) -> Counts:
        from sparring.train import train

        groups = Rows(self.run.path / r.folder / "groups", Group)
        rows = Rows(self.run.path / r.folder / "frozen", Frozen)
        frozen = {role: rows[i * len(groups) : (i + 1) * len(groups)] for i, role in enumerate(r.method.frozen)}
        _check_aligned(groups, frozen)
        model, self._loaded = self.model(self.player(r.roles["start"])), None
        states = self.run.states(r.stage("player"))
        with bar(f"round {r.t} train", 1, "steps") as show:
            train(
                model,
                groups,
                frozen,
                r.method.loss,
                r.method.metrics,
                r.settings.train,
                states,
                seed=self.config.seed * 1009 + r.t - self.plan.first,
                compute=self.compute,
                on_step=lambda done, total: show(done / total),
            )
        card = players.model_card(r, self.player(r.roles["start"]))
        players.save_player(model, self.tokenizer, folder, card)
        sha = players.identify(str(folder))
        self._loaded = (sha, model)
        return {"sha": sha, "groups": len(groups)}

    def _eval(self, number: int, folder: Path) -> Counts:
        from sparring.evaluate import Item, evaluate

        settings, player = self.config.evaluate, self.player(number)
        examples = Rows(self.run.path / "data" / "heldout", Example)
        verifier = load_verifier(settings.verifier) if settings.verifier else None
        if not examples:
            write_json(folder / "summary.json", {"n": 0})
            return {"n": 0}
        rows = self.rendered("heldout", self.config.play.max_new_tokens, settings.limit).rows
        kept = {row.example_id for row in rows}
        result = evaluate(
            self.model(player),
            player,
            [example for example in examples if example.id in kept],
            rows,
            settings,
            self.config.play,
            self.renderer,
            verifier,
            seed=self.config.seed,
            compute=self.compute,
        )
        write_shard(folder / "00000.parquet", Item, result.items)
        write_json(folder / "summary.json", result.summary)
        return {k: v["mean"] for k, v in result.summary.items() if isinstance(v, dict) and v.get("mean") is not None}

    def player(self, number: int) -> Player:
        """Player `number`, from its finished stage."""
        if number == self.plan.first:
            return self._start
        stage = next(r for r in self.plan.rounds if r.t + 1 == number).stage("player")
        if not self.run.done(stage):
            raise InputError(
                f"player {number} is not there yet: {stage.folder} is not done; "
                f"continue with `sparring run {self.run.path}`"
            )
        folder = self.run.path / stage.folder
        return Player(str(folder), number, read_json(folder / "stage.json")["counts"]["sha"])

    def model(self, player: Player) -> nn.Module:
        """A player's weights, kept until another player's are asked for. Raises SparringError if they were changed."""
        if self._loaded is None or self._loaded[0] != player.sha:
            self._loaded = None
            if players.identify(player.path, self.config.model.revision) != player.sha:
                raise SparringError(
                    f"{player.path}: its files changed since it was made (another content hash); restore them"
                )
            self._loaded = (player.sha, players.load_model(player.path, self.config.model))
        return self._loaded[1]

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        model = self.config.model
        return prompts.load_tokenizer(
            self._start.path, revision=model.revision, trust_remote_code=model.trust_remote_code
        )

    @cached_property
    def renderer(self) -> prompts.Renderer:
        return prompts.Renderer(self.tokenizer, self.config.model.chat_template, players.stop_ids(self._start.path))

    @cached_property
    def compute(self) -> Any:
        return players.compute_dtype(self.config.model)

    @lru_cache(maxsize=4)  # noqa: B019 -- a Loop lives as long as the run it drives
    def rendered(self, part: str, max_new_tokens: int, limit: int | None) -> prompts.Rendering:
        examples = Rows(self.run.path / "data" / part, Example)
        config = players.model_config(self._start.path, self.config.model)
        context = players.context_length(config, self.tokenizer)
        chosen = list(examples[: limit or len(examples)])
        return prompts.render(chosen, self.renderer, self.config.data, context=context, max_new_tokens=max_new_tokens)


def _check_aligned(groups: Sequence[Group], frozen: dict[str, list[Frozen]]) -> None:
    for role, rows in frozen.items():
        if [row.group for row in rows] != [group.sha for group in groups]:
            raise SparringError(f"the frozen log-probs of `{role}` do not belong to these groups; use --redo")


def _short(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)[:12] if isinstance(value, str) else str(value)
