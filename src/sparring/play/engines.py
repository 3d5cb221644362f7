"""The engine of a stage where it is not the built-in one: a server that is there, or vLLM for as long as it takes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from sparring.config import Config, EngineConfig, PlayConfig
from sparring.errors import InputError, SparringError
from sparring.evaluate.tasks import is_suite
from sparring.plan import Plan, RoundPlan, Stage
from sparring.play import vllm
from sparring.players import is_adapter
from sparring.remote import Remote
from sparring.types import Player, Rendered, Sample

if TYPE_CHECKING:
    from sparring.play.hf import Answer
    from sparring.play.server import Completions
    from sparring.workshop import Workshop

log = logging.getLogger("sparring")

PLAYER = "{player}"
"""In a server's name of its model: the player's number."""
PROBED = 64
"""Samples of each player whose log-probs are compared with ours."""
_NAMED = 5


class Engine:
    """What answers in one stage instead of the built-in engine; weights are served when the first answer is wanted."""

    def __init__(self, shop: Workshop, address: str, folder: Path) -> None:
        """address: `vllm` or a server's. folder: for vllm's logs."""
        self._shop, self._address, self._folder = shop, address, folder
        self._stack = ExitStack()
        self._sha: str | None = None
        self._served: vllm.Served | None = None
        self._completions: Completions | None = None

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def play(
        self, rows: Sequence[Rendered], player: Player, settings: PlayConfig, *, seed: int, round: int, role: str,
        indices: Sequence[int],
    ) -> list[Sample]:  # fmt: skip
        """What `play.hf.play` gives, by this engine."""
        from sparring.play.hf import samples, settings_id

        def ask(prompts: Sequence[Sequence[int]], keys: Sequence[int]) -> list[Answer]:
            return self.sample(player, prompts, keys, settings)

        how = settings_id(settings, engine="vllm" if self._address == "vllm" else "server")
        renderer = self._shop.renderer
        return samples(ask, rows, player, how, renderer, seed=seed, round=round, role=role, indices=indices)

    def sample(
        self, player: Player, prompts: Sequence[Sequence[int]], keys: Sequence[int], settings: PlayConfig
    ) -> list[Answer]:
        """What `play.hf.sample` gives, by this engine."""
        completions = self._of(player)
        try:
            return completions.answers(prompts, keys, settings, self._shop.progress.did)
        except SparringError as error:
            # A server that died says less of it than its log
            if self._served is not None and (problem := self._served.problem(vllm.GRACE)):
                raise SparringError(problem) from error
            raise

    def _of(self, player: Player) -> Completions:
        if self._completions is None or self._sha != player.sha:
            self._stack.close()
            self._served = None
            self._completions, self._sha = self._opened(player), player.sha
        return self._completions

    def _opened(self, player: Player) -> Completions:
        from sparring.play.server import Completions

        shop, config = self._shop, self._shop.config
        if self._address == "vllm":
            shop.free()
            model = shop.settings_of(player)
            self._served = self._stack.enter_context(vllm.serving(player.path, model, config.engine, self._folder))
            name, first, *others = self._served.name, *self._served.urls
            remote = _remote(first, config.engine, None, tuple(others))
        else:
            remote = _remote(self._address, config.engine, config.engine.api_key_env)
            name = _name(remote, config.engine, player)
        return Completions(remote, name, shop.tokenizer, shop.renderer)


def check(config: Config, plan: Plan, done: Callable[[Stage], bool]) -> None:
    """Look, before anything is spent, whether the engines of the stages that are still to be done can do it.

    Raises InputError where a round mixes players or is too hot, where a server has one name for several players or does
    not serve the first, where vllm cannot be started, and where players in shards are to do more than to score;
    SparringError where a server does not answer.
    """
    if config.cluster.sharded:
        _check_sharded(config, plan, done)
    rounds = [r for r in plan.rounds if r.turns and r.settings.play.engine_kind != "hf"]
    served = [r for r in rounds if r.settings.play.engine_kind == "server"]
    measured = [stage for stage in _measures(plan) if not done(stage)] if config.evaluate.engine_kind != "hf" else []
    playing = {str(r.roles[turn.role]) for r in served for turn in r.turns}
    several = len(playing) > 1 or ("best" in playing and len(served) > 1)  # another one as rounds go by
    waiting = [r for r in rounds if not done(r.stage("samples"))]
    for r in waiting:
        if any(turn.mixed_with is not None for turn in r.turns):
            raise InputError(
                f"play.engine: {r.folder} ({r.method.name}) mixes two players' logits, which only hf can; set "
                "play.engine=hf"
            )
        if r.settings.play.engine_kind == "server" and several:
            _check_named(config, "rounds play")
    if measured and config.evaluate.engine_kind == "server":
        _check_named(config, "evaluations measure")
    heated = [("play", r.settings.play.engine_kind, r.settings.play.temperature) for r in waiting]
    heated += [("evaluate", config.evaluate.engine_kind, config.evaluate.temperature)] * bool(measured)
    for section, kind, temperature in heated:
        if kind == "vllm" and temperature > vllm.HOTTEST:
            raise InputError(
                f"{section}.temperature: {temperature:g}: vllm takes 0 … {vllm.HOTTEST:g}; lower it, or set "
                f"{section}.engine=hf"
            )
    addresses = [r.settings.play.engine for r in waiting] + [config.evaluate.engine] * bool(measured)
    if "vllm" in addresses:
        played = any(r.settings.play.engine_kind == "vllm" for r in waiting)
        vllm.check(
            config.model,
            config.engine,
            "play.engine" if played else "evaluate.engine",
            here=config.cluster.launcher is None,
        )
        if config.model.lora_rank:
            _check_bases(config, plan, waiting, measured)
    for address in dict.fromkeys(address for address in addresses if address != "vllm"):
        first = next((r for r in waiting if r.settings.play.engine == address), None)
        hasty = config.engine.model_copy(update={"retries": min(1, config.engine.retries)})
        remote = _remote(address, hasty, hasty.api_key_env)
        if first is not None and first.roles[first.turns[0].role] == plan.first:
            _name(remote, config.engine, Player(config.model.path, plan.first, ""))
        else:
            _names(remote)


def _check_named(config: Config, who: str) -> None:
    if PLAYER not in (config.engine.model or ""):
        raise InputError(
            f"engine.model: {config.engine.model or 'not given'}, but the {who} several players; write a name "
            f"with {PLAYER}, for which the player's number is put in"
        )


def _check_bases(config: Config, plan: Plan, waiting: Sequence[RoundPlan], measured: Sequence[Stage]) -> None:
    """Raises InputError where vllm is to serve an adapter on an adapter, which is merged in memory: it reads folders."""

    def made(who: int | str, t: int) -> bool:
        return who in ("best", *range(plan.first + 1, t + 1))

    held = {r.stage("held").folder: made(r.roles["start"], r.t) for r in plan.rounds if r.has("held")}
    keys = {
        "play.engine": any(
            made(r.roles[turn.role], r.t) for r in waiting if r.settings.play.engine_kind == "vllm" for turn in r.turns
        ),
        "evaluate.engine": config.evaluate.engine_kind == "vllm"
        and any(held.get(stage.folder, not stage.folder.startswith("start/")) for stage in measured),
    }
    starts = [config.model.path, *(str(r.roles["start"]) for r in plan.rounds if r.roles["start"] != "best")]
    for key, path in product((key for key, wanted in keys.items() if wanted), starts):
        if is_adapter(path):
            raise InputError(
                f"{key}: vllm serves an adapter on a whole model, and the base here is an adapter itself ({path}); merge it "
                f"(`sparring.players.export_player(…, merge=True)`) and start from that, or set {key}=hf"
            )


def _check_sharded(config: Config, plan: Plan, done: Callable[[Stage], bool]) -> None:
    """Raises InputError for what needs whole players: the built-in engine, suites, and what stays beside the learner."""
    sharded = "cluster.players: sharded players only score"
    engine = "vllm with engine.tensor_parallel, or a server's address (docs/cluster.md)"
    for r in plan.rounds:
        if r.turns and r.settings.play.engine_kind == "hf" and not done(r.stage("samples")):
            raise InputError(f"{sharded}, and {r.folder} is to be played by hf; set play.engine: {engine}")
        if "frozen_logits" in r.method.needs and not done(r.stage("player")):
            raise InputError(
                f"{sharded}, and {r.method.name} keeps a whole one beside the learner ({r.folder}); set "
                "cluster.players=whole, or take another method"
            )
    suites = [task.label for task in config.evaluate.tasks if is_suite(task)]
    for stage in _measures(plan):
        if stage.folder.rpartition("/")[2] in suites and not done(stage):
            raise InputError(
                f"{sharded}, and the suite `{stage.folder.rpartition('/')[2]}` needs a whole one; leave it out of "
                "evaluate.tasks, or set cluster.players=whole"
            )
        if config.evaluate.engine_kind == "hf" and not done(stage):
            raise InputError(f"{sharded}, and in {stage.folder} hf is to answer; set evaluate.engine: {engine}")


def _measures(plan: Plan) -> list[Stage]:
    """The stages in which the engine of the evaluation samples."""
    return [stage for stage in plan.stages if stage.name in ("held", "eval", "task")]


def health(
    shop: Workshop, players: Sequence[Player], rows: Sequence[Rendered], samples: Iterable[Sample]
) -> dict[str, float]:
    """How far an engine's log-probs are from ours, in nats per token, on a few samples of each of the players.

    `engine_gap`: the mean difference (of the player with the largest), `engine_gap_max`: the largest. Warns beyond
    `engine.max_gap`. Empty where there is nothing to compare.
    """
    from sparring.logps import score

    limit = shop.config.engine.max_gap
    if limit is None:
        return {}
    few: dict[str, list[Sample]] = {player.sha: [] for player in players}
    for sample in samples:
        own = few.get(sample.player)
        if own is not None and len(own) < PROBED and sample.logps:
            own.append(sample)
    wanted = {sample.example_id for own in few.values() for sample in own}
    prompts: dict[str, tuple[int, ...]] = {}
    for row in rows:
        if len(prompts) == len(wanted):
            break
        if row.example_id in wanted:
            prompts[row.example_id] = row.prompt
    means, most = [], 0.0
    for player in {player.sha: player for player in players if few[player.sha]}.values():
        own = few[player.sha]
        ours = score(
            shop.model(player),
            [prompts[sample.example_id] for sample in own],
            [sample.tokens for sample in own],
            batch_size=shop.config.play.batch_size,
            compute=shop.compute,
        )
        gaps = [abs(a - b) for s, line in zip(own, ours, strict=True) for a, b in zip(s.logps, line, strict=True)]
        mean = sum(gaps) / len(gaps)
        means.append(mean)
        most = max(most, *gaps)
        if not mean <= limit:
            log.warning(
                "%s: the engine's log-probs differ from ours by %.3g nats per token on average (engine.max_gap %g): it "
                "serves another model, another precision, or tempered log-probs",
                player.path, mean, limit,
            )  # fmt: skip
    return {"engine_gap": float(f"{max(means):.3g}"), "engine_gap_max": float(f"{most:.3g}")} if means else {}


def _remote(address: str, engine: EngineConfig, key: str | None, replicas: tuple[str, ...] = ()) -> Remote:
    return Remote(
        address,
        api_key_env=key,
        timeout=engine.timeout,
        retries=engine.retries,
        concurrency=engine.parallel,
        replicas=replicas,
    )


def _name(remote: Remote, engine: EngineConfig, player: Player) -> str:
    """What a server calls a player. Raises InputError where it does not serve it."""
    names = _names(remote)
    told = f"{', '.join(names[:_NAMED])}{' …' if len(names) > _NAMED else ''}" if names else "no names"
    if engine.model is None:
        if names is None or len(names) != 1:
            raise InputError(f"engine.model: is missing; {remote.base_url} lists {told}: name the player's")
        return names[0]
    name = engine.model.replace(PLAYER, str(player.path if player.round is None else player.round))
    if names is not None and name not in names:
        raise InputError(
            f"endpoint {remote.base_url}: serves no `{name}`, but {told}; serve {player.path} under that name and give "
            "the same command again"
        )
    return name


def _names(remote: Remote) -> list[str] | None:
    from sparring.play.server import listed

    return listed(remote)
