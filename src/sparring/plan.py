"""A run as a list of stages, each with the hash of everything it depends on; nothing is executed here.

A stage's key covers its own settings and the keys of its inputs, so all keys of a run are known beforehand. Comparing
them with what is on disk tells what is done, what a changed setting touches, and what a fork may share.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparring import methods
from sparring.config import Config, Round
from sparring.errors import InputError
from sparring.plugins import identity
from sparring.types import Method

FORMAT = 1
"""Version of the run directory; a newer one is refused."""


@dataclass(frozen=True)
class Stage:
    """One unit of work that is done once and kept."""

    folder: str
    """Where its result lies, relative to the run, for example `round_000/samples`."""
    name: str
    """`data`, `samples`, `groups`, `frozen`, `player` or `eval`."""
    settings: Mapping[str, Any]
    """What it depends on besides its inputs, by dotted name."""
    inputs: Mapping[str, str]
    """Folder or player to its key."""

    @property
    def key(self) -> str:
        """sha256 (hex) of all it depends on."""
        content = {"name": self.name, "settings": self.settings, "inputs": self.inputs, "format": FORMAT}
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


@dataclass(frozen=True)
class RoundPlan:
    """One round: its number, settings, method, who plays which role, and its stages in order."""

    t: int
    folder: str
    settings: Round
    method: Method
    roles: Mapping[str, int]
    """Role to player number."""
    stages: tuple[Stage, ...]

    def stage(self, name: str) -> Stage:
        """The round's stage of this name."""
        return next(stage for stage in self.stages if stage.name == name)


@dataclass(frozen=True)
class Plan:
    """All stages of a run, in the order in which they are done."""

    data: Stage
    start_eval: Stage
    rounds: tuple[RoundPlan, ...]

    @property
    def stages(self) -> list[Stage]:
        """Every stage of the run."""
        return [self.data, self.start_eval, *(stage for r in self.rounds for stage in r.stages)]

    @property
    def first(self) -> int:
        """Number of the player that the run is given: 0, or −k before k preparation rounds."""
        return self.rounds[0].t


def make_plan(config: Config, data_hashes: Mapping[str, str], start_sha: str) -> Plan:
    """Resolve every round's method, roles and stage keys.

    Leading rounds in which nobody plays (SFT) prepare: they are numbered −k … −1 so that self-play starts from player 0.
    Raises InputError where a method refuses its hyper-parameters or asks for a player that does not exist yet.
    """
    made = [methods.make(r.method, r.hyper) for r in config.rounds]
    first = first_round(made)
    data = Stage("data", "data", _data_settings(config), dict(data_hashes))
    keys = {first: start_sha}
    rounds: list[RoundPlan] = []
    for i, (settings, method) in enumerate(zip(config.rounds, made, strict=True)):
        t = first + i
        plan = _round(config, settings, method, t, first, data, keys, rounds)
        keys[t + 1] = plan.stage("player").key
        rounds.append(plan)
    start_eval = Stage("start/eval", "eval", _eval_settings(config), {"data": data.key, f"player {first}": start_sha})
    return Plan(data, start_eval, tuple(rounds))


def first_round(made: Sequence[Method]) -> int:
    """Number of a run's first round: 0, or −k before k leading rounds in which nobody plays."""
    plays = [method.plays is not None for method in made]
    return -plays.index(True) if any(plays) else 0


def round_folder(t: int, first: int) -> str:
    """`round_000` from where self-play starts; `prep_000` for the rounds before it."""
    return f"round_{t:03d}" if t >= 0 else f"prep_{t - first:03d}"


def _round(
    config: Config,
    settings: Round,
    method: Method,
    t: int,
    first: int,
    data: Stage,
    keys: Mapping[int, str],
    earlier: Sequence[RoundPlan],
) -> RoundPlan:
    folder = round_folder(t, first)
    roles = _roles(method, t, keys)

    def player(role: str) -> dict[str, str]:
        return {f"player {roles[role]} ({role})": keys[roles[role]]}

    name = identity(settings.method)
    shared = {"limit": settings.limit, "play.max_new_tokens": settings.play.max_new_tokens}
    prompts = {"model.chat_template": _template(config)} | shared
    compute = {"model.compute": config.model.compute}
    stages: list[Stage] = []
    if method.plays is not None:
        played = {"seed": config.seed, "round": t} | prompts | compute
        played |= _dotted("play", settings.play.identity())
        inputs = {"data": data.key, **player(method.plays)}
        stages.append(Stage(f"{folder}/samples", "samples", played, inputs))
    depends = settings.hyper if method.pairing is None else method.pairing
    paired = {"method": name, "memory": list(method.memory)} | _dotted(method.name, depends) | prompts
    replayed = [r for r in reversed(earlier) if r.method.plays is not None][: len(method.memory)]
    inputs = {"data": data.key} | {s.folder: s.key for s in stages}
    inputs |= {r.stage("groups").folder: r.stage("groups").key for r in replayed}
    groups = Stage(f"{folder}/groups", "groups", paired, inputs)
    stages.append(groups)
    inputs = {groups.folder: groups.key}
    for role in method.frozen:
        inputs |= player(role)
    frozen = Stage(f"{folder}/frozen", "frozen", compute | {"roles": list(method.frozen)}, inputs)
    stages.append(frozen)
    trained = {"seed": config.seed, "method": name} | compute | _dotted(method.name, settings.hyper)
    trained |= _dotted("train", settings.train.identity())
    made = Stage(
        f"{folder}/player", "player", trained, {groups.folder: groups.key, frozen.folder: frozen.key, **player("start")}
    )
    evaluated = Stage(f"{folder}/eval", "eval", _eval_settings(config), {"data": data.key, made.folder: made.key})
    return RoundPlan(t, folder, settings, method, roles, (*stages, made, evaluated))


def _roles(method: Method, t: int, players: Collection[int]) -> dict[str, int]:
    """Role to player number in round t. Raises InputError where one is missing or its player is not there yet."""
    roles = dict(method.roles(t))
    for role, number in roles.items():
        if number not in players:
            raise InputError(
                f"method `{method.name}`: round {t} wants player {number} as {role}, which is not there yet"
            )
    for role in ("start", *([] if method.plays is None else [method.plays]), *method.frozen):
        if role not in roles:
            found = ", ".join(roles) or "none"
            raise InputError(f"method `{method.name}`: round {t} needs the role `{role}`; its roles are {found}")
    return roles


def _data_settings(config: Config) -> dict[str, Any]:
    content = {k: v for k, v in config.data.identity().items() if k not in ("path", "heldout")}
    return {"seed": config.seed} | _dotted("data", content)


def _eval_settings(config: Config) -> dict[str, Any]:
    verifier = config.evaluate.verifier
    resolved = {"verifier": verifier and identity(verifier), "max_new_tokens": config.evaluation_play.max_new_tokens}
    values = {"seed": config.seed} | _dotted("evaluate", config.evaluate.identity() | resolved)
    return values | {"model.compute": config.model.compute, "model.chat_template": _template(config)}


def _template(config: Config) -> str | None:
    """The chat template setting, by content where it is a file."""
    template = config.model.chat_template
    if template and template != "plain" and Path(template).is_file():
        return hashlib.sha256(Path(template).read_bytes()).hexdigest()[:16]
    return template


def _dotted(section: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{section}.{name}": value for name, value in values.items()}
