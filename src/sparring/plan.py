"""A run as a list of stages, each with the hash of everything it depends on; nothing is executed here.

A stage's key covers its own settings and the keys of its inputs, so all keys of a run are known beforehand. Comparing
them with what is on disk tells what is done, what a changed setting touches, and what a fork may share.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparring import adapters, methods
from sparring.config import Config, Round, TaskConfig
from sparring.errors import InputError
from sparring.evaluate import tasks
from sparring.judge import score
from sparring.plugins import identity
from sparring.types import Method, Turn

FORMAT = 2
"""Version of the run directory; a newer one is refused."""


@dataclass(frozen=True)
class Stage:
    """One unit of work that is done once and kept."""

    folder: str
    """Where its result lies, relative to the run, for example `round_000/samples`."""
    name: str
    """`data`, `samples`, `scores`, `groups`, `frozen`, `held`, `player`, `eval`, `task` or `wins`."""
    settings: Mapping[str, Any]
    """What it depends on besides its inputs, by dotted name."""
    inputs: Mapping[str, str]
    """Folder or player to its key."""

    @property
    def key(self) -> str:
        """sha256 (hex) of all it depends on."""
        content = {"name": self.name, "settings": self.settings, "inputs": self.inputs, "format": FORMAT}
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


Who = int | str


@dataclass(frozen=True)
class RoundPlan:
    """One round: its number, settings, method, who plays which role, and its stages in order."""

    t: int
    folder: str
    settings: Round
    method: Method
    roles: Mapping[str, Who]
    """Role to player number, to `best` (of the players that the round finds), or to a model's path."""
    stages: tuple[Stage, ...]

    def stage(self, name: str) -> Stage:
        """The round's stage of this name."""
        return next(stage for stage in self.stages if stage.name == name)

    def has(self, name: str) -> bool:
        """Whether the round has a stage of this name."""
        return any(stage.name == name for stage in self.stages)

    @property
    def turns(self) -> tuple[Turn, ...]:
        """Who answers in this round."""
        return tuple(turn for turn in self.method.plays if turn.role in self.roles)

    @property
    def frozen(self) -> tuple[str, ...]:
        """Whose log-probs are taken in this round."""
        return tuple(role for role in self.method.frozen if role in self.roles)


@dataclass(frozen=True)
class Plan:
    """All stages of a run, in the order in which they are done."""

    data: Stage
    start_eval: Stage
    start_tasks: tuple[Stage, ...]
    rounds: tuple[RoundPlan, ...]

    @property
    def stages(self) -> list[Stage]:
        """Every stage of the run."""
        return [self.data, self.start_eval, *self.start_tasks, *(stage for r in self.rounds for stage in r.stages)]

    @property
    def first(self) -> int:
        """Number of the player that the run is given: 0, or −k before k preparation rounds."""
        return self.rounds[0].t


def make_plan(config: Config, data_hashes: Mapping[str, str], start_sha: str, outside: Mapping[str, str]) -> Plan:
    """Resolve every round's method, roles and stage keys.

    `outside`: content hash of every model that a recipe gives a role by its path (`outside_paths`).
    Leading rounds in which nobody plays (SFT) prepare: they are numbered −k … −1 so that self-play starts from player 0.
    Raises InputError where a method refuses its hyper-parameters or asks for a player that does not exist yet.
    """
    made = [methods.make(r.method, r.hyper) for r in config.rounds]
    first = first_round(made)
    data = Stage("data", "data", _data_settings(config), dict(data_hashes))
    known = _Known({first: start_sha}, {}, {}, outside)
    start_eval = Stage("start/eval", "eval", _eval_settings(config), {"data": data.key, f"player {first}": start_sha})
    start_tasks = _tasks(config, first, start_eval, known)
    known.evals[first] = _judged(config, (start_eval, *start_tasks))
    rounds: list[RoundPlan] = []
    for i, (settings, method) in enumerate(zip(config.rounds, made, strict=True)):
        t = first + i
        plan = _round(config, settings, method, t, first, data, known, rounds)
        known.players[t + 1], known.evals[t + 1] = plan.stage("player").key, _judged(config, plan.stages)
        rounds.append(plan)
    return Plan(data, start_eval, start_tasks, tuple(rounds))


def first_round(made: Sequence[Method]) -> int:
    """Number of a run's first round: 0, or −k before k leading rounds in which nobody plays."""
    plays = [bool(method.plays) for method in made]
    return -plays.index(True) if any(plays) else 0


def round_folder(t: int, first: int) -> str:
    """`round_000` from where self-play starts; `prep_000` for the rounds before it."""
    return f"round_{t:03d}" if t >= 0 else f"prep_{t - first:03d}"


def outside_paths(config: Config) -> list[str]:
    """Models that a recipe gives a role by their path."""
    given = [who for r in config.rounds for who in r.roles.values()]
    return sorted({who for who in given if who not in NAMED})


NAMED = ("previous", "initial", "best")


@dataclass(frozen=True)
class _Known:
    """Keys of the players and evaluations before a round, and hashes of models from elsewhere."""

    players: dict[int, str]
    evals: dict[int, str]
    """Of the stage by whose figure the best player is chosen."""
    heldout: dict[int, str]
    """Of the evaluation on held-out prompts."""
    outside: Mapping[str, str]

    def inputs(self, role: str, who: Who, figure: str) -> dict[str, str]:
        """What a stage depends on that uses `who`."""
        if isinstance(who, int):
            return {f"player {who} ({role})": self.players[who]}
        if who != "best":
            return {f"model ({role})": self.outside[who]}
        numbers = candidates(self.players)
        both = {
            f"{n} {kind}": keys[n] for n in numbers for kind, keys in (("player", self.players), ("eval", self.evals))
        }
        return {f"best of players {numbers[0]} … {numbers[-1]} by {figure} ({role})": _digest(both)}


def candidates(numbers: Iterable[int]) -> list[int]:
    """The players among which the best is sought: those of self-play, or the start while there is none."""
    return sorted(n for n in numbers if n >= 0) or sorted(numbers)[-1:]


def _round(
    config: Config,
    settings: Round,
    method: Method,
    t: int,
    first: int,
    data: Stage,
    known: _Known,
    earlier: Sequence[RoundPlan],
) -> RoundPlan:
    folder = round_folder(t, first)
    roles = _roles(method, settings, t, first, known.players)
    # Token ids are the start's; where it is no input by way of a player, a model in its place would find another's
    words = {f"player {first} (tokens)": known.players[first]}

    def player(*names: str) -> dict[str, str]:
        inputs: dict[str, str] = {}
        for role in names:
            inputs |= known.inputs(role, roles[role], config.evaluate.best)
        return inputs

    draft = RoundPlan(t, folder, settings, method, roles, ())
    if method.coupled and method.needs:
        raise InputError(f"method `{method.name}`: a coupled loss reads log-probs only; drop `needs` or `coupled`")
    name = identity(settings.method)
    shared: dict[str, Any] = {"limit": settings.limit, "play.max_new_tokens": settings.play.max_new_tokens}
    prompts: dict[str, Any] = {"model.chat_template": _template(config)} | shared
    compute = _compute(config)
    hyper = {key: value for key, value in settings.hyper.items() if _LATER.get((method.name, key), ()) != value}
    depends = hyper if method.pairing is None else method.pairing
    stages: list[Stage] = []
    if draft.turns:
        played: dict[str, Any] = {"seed": config.seed, "round": t} | prompts | compute
        played |= _dotted("play", settings.play.identity())
        if settings.play.engine_kind == "vllm":
            played |= _dotted("engine", config.engine.identity())
        played |= {"turns": [repr(turn) for turn in draft.turns], "takes_given": method.takes_given}
        if method.answer_tokens is not None:
            played |= {"method": name} | _dotted(method.name, depends)
        if method.template is not None and "drop" in (config.data.long_prompt, config.data.long_answer):
            played |= {"template": method.template}  # a row goes where its question in the template is too long
        if method.official is not None:
            played |= {"official": True, "bos": method.official.bos}
        players = [role for turn in draft.turns for role in (turn.role, turn.mixed_with) if role is not None]
        by_start = {} if any(roles[name] not in known.outside for name in players) else words
        stages.append(Stage(f"{folder}/samples", "samples", played, {"data": data.key, **player(*players), **by_start}))
    if method.verifier is not None or method.scorer is not None:
        judged = {
            "verifier": method.verifier and identity(method.verifier),
            "scorer": method.scorer and score.identity(method.scorer),
        }
        stages.append(Stage(f"{folder}/scores", "scores", judged, {"data": data.key} | _keys(stages)))
    paired = {"method": name, "round": t, "memory": list(method.memory)} | _dotted(method.name, depends) | prompts
    if method.template is not None:
        paired |= {"template": method.template}
    replayed = _replayed(method, t, earlier)
    recalled = _recalled(method, t, earlier)
    inputs = {"data": data.key} | (_keys(stages) if draft.turns else words | _keys(stages))
    inputs |= _keys([r.stage("groups") for r in replayed]) | _keys([r.stage("samples") for r in recalled])
    groups = Stage(f"{folder}/groups", "groups", paired, inputs)
    frozen_settings = compute | {"roles": list(draft.frozen), "official": method.official is not None}
    if draft.frozen and not draft.turns:
        frozen_settings["play.chunk"] = settings.play.chunk  # cuts these shards too, and is in no samples' key
    frozen = Stage(f"{folder}/frozen", "frozen", frozen_settings, _keys([groups]) | player(*draft.frozen))
    stages += [groups, frozen]
    trained = {"seed": config.seed, "method": name} | compute | _dotted(method.name, hyper)
    trained |= _dotted("train", settings.train.identity()) | _lora(config)
    inputs = _keys([groups, frozen]) | player("start")
    if "frozen_logits" in method.needs:
        inputs |= player(*draft.frozen)
    if method.guarded and config.controls.guards:
        # All held-out prompts are read, so the round's `limit` says nothing here
        reading = {"seed": config.seed, "round": t, "prompts": config.controls.prompts} | compute
        reading |= {k: v for k, v in prompts.items() if k != "limit"} | {"play.temperature": settings.play.temperature}
        reading |= _sampler(config)
        if config.evaluate.trained == "keep":
            reading["evaluate.trained"] = "keep"  # and nothing for the default: runs made before keep their keys
        by_start = words if roles["start"] in known.outside else {}
        held = Stage(f"{folder}/held", "held", reading, {"data": data.key} | player("start") | by_start)
        stages.append(held)
        inputs |= _keys([held])
        trained |= _dotted("controls", config.controls.guard_identity())
    made = Stage(f"{folder}/player", "player", trained, inputs)
    inputs = {"data": data.key, made.folder: made.key}
    evaluated = Stage(f"{folder}/eval", "eval", _eval_settings(config), inputs)
    return RoundPlan(
        t, folder, settings, method, roles, (*stages, made, evaluated, *_tasks(config, t + 1, evaluated, known))
    )


def _compute(config: Config) -> dict[str, Any]:
    """How forward passes are made: their precision, and that of the base where it is quantised."""
    model = config.model
    return {"model.compute": model.compute} | ({"model.quantize": model.quantize} if model.quantize else {})


def _lora(config: Config) -> dict[str, Any]:
    """What an adapter depends on; nothing where all weights are trained."""
    model = config.model
    if not model.lora_rank:
        return {}
    targets = model.lora_targets if isinstance(model.lora_targets, str) else sorted(model.lora_targets)
    return {
        "model.lora_rank": model.lora_rank,
        "model.lora_alpha": adapters.scale(model),
        "model.lora_targets": targets,
    } | ({"model.use_rslora": True} if model.use_rslora else {})


def _keys(stages: Iterable[Stage]) -> dict[str, str]:
    return {stage.folder: stage.key for stage in stages}


_LATER = {
    ("cringe", "memory"): 0,
    ("pairwise_cringe", "per_prompt"): 10,
    ("pairwise_cringe", "with_gold"): True,
}
"""Hyper-parameters that came later, with their defaults, which are in no key: runs made before keep theirs."""
_GOLD_FIRST = {"spin", "alpha_spin", "fictitious_play", "tpaw"}
"""Methods whose groups are (gold, sample) and nothing else, so that each may train on the others'."""


def _replayed(method: Method, t: int, earlier: Sequence[RoundPlan]) -> list[RoundPlan]:
    """The earlier rounds whose groups a method trains on again. Raises InputError where it would misread them."""
    found = [r for r in reversed(earlier) if r.method.plays][: len(method.memory)]
    for r in found:
        if r.method.name != method.name and not {r.method.name, method.name} <= _GOLD_FIRST:
            raise InputError(
                f"method `{method.name}`: round {t} would train again on the groups of round {r.t}, which "
                f"`{r.method.name}` made in another way; have it replay fewer rounds, or let one method play both"
            )
    return found


def _recalled(method: Method, t: int, earlier: Sequence[RoundPlan]) -> list[RoundPlan]:
    """The earlier rounds whose samples a method reads. Raises InputError where nobody played in one."""
    by_number = {r.t: r for r in earlier}
    found = []
    for number in method.recall(t):
        if number not in by_number or not by_number[number].turns:
            raise InputError(f"method `{method.name}`: round {t} reads the samples of round {number}, which has none")
        found.append(by_number[number])
    return found


def _roles(method: Method, settings: Round, t: int, first: int, players: Collection[int]) -> dict[str, Who]:
    """Role to player in round t, as the method has it or as the recipe says.

    Raises InputError where a role is missing or unknown, or its player is not there yet.
    """
    roles: dict[str, Who] = dict(method.roles(t))
    for role, number in roles.items():
        if number not in players:
            raise InputError(
                f"method `{method.name}`: round {t} wants player {number} as {role}, which is not there yet"
            )
    # Late rounds have every role, so that a name which never comes up is told at once
    late = method.roles(max(t, 1000))
    needed = {
        "start",
        *(role for turn in method.plays for role in (turn.role, turn.mixed_with) if role),
        *method.frozen,
    }
    for role in sorted(needed):
        if role not in late or (role == "start" and role not in roles):
            found = ", ".join(late) or "none"
            raise InputError(f"method `{method.name}`: round {t} needs the role `{role}`; its roles are {found}")
    for role, who in settings.roles.items():
        if role not in roles:
            raise InputError(
                f"rounds: {role}={who}: method `{method.name}` has no role `{role}` in round {t}; it has {', '.join(roles)}"
            )
        roles[role] = {"previous": t, "initial": 0 if t >= 0 else first}.get(who, who)
    return roles


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def _data_settings(config: Config) -> dict[str, Any]:
    content = {k: v for k, v in config.data.identity().items() if k not in ("path", "heldout")}
    return {"seed": config.seed} | _dotted("data", content)


def _eval_settings(config: Config) -> dict[str, Any]:
    verifier = config.evaluate.verifier
    resolved = {"verifier": verifier and identity(verifier), "max_new_tokens": config.evaluation_play.max_new_tokens}
    values = {"seed": config.seed} | _dotted("evaluate", config.evaluate.identity() | resolved)
    return values | _sampler(config) | _compute(config) | {"model.chat_template": _template(config)}


def _sampler(config: Config) -> dict[str, Any]:
    """Who samples what players are measured by, where that is another than the built-in engine."""
    kind = config.evaluate.engine_kind
    told: dict[str, Any] = {} if kind == "hf" else {"evaluate.engine": kind}
    return told | (_dotted("engine", config.engine.identity()) if kind == "vllm" else {})


def task_stage(config: Config, task: TaskConfig, folder: str, inputs: Mapping[str, str]) -> Stage:
    """The stage in which a player does a task; `folder` is its round's, `inputs` are those of its evaluation.

    Raises InputError where the task's file is missing.
    """
    compute = _compute(config) | {"model.chat_template": _template(config)}
    settings = {"seed": config.seed} | compute | _dotted("task", tasks.identity(task, config))
    if "task.verifier" in settings:
        settings |= _sampler(config)
    return Stage(f"{folder}/tasks/{task.label}", "task", settings, inputs)


def _tasks(config: Config, number: int, evaluated: Stage, known: _Known) -> tuple[Stage, ...]:
    """What a player does beside its evaluation: the recipe's tasks, and from player 0 on its wins against that one."""
    folder = evaluated.folder.rpartition("/")[0]
    known.heldout[number] = evaluated.key
    found = [task_stage(config, task, folder, evaluated.inputs) for task in config.evaluate.tasks]
    if config.evaluate.scorer is not None and number >= 0:
        inputs = {evaluated.folder: evaluated.key, "evaluation of player 0": known.heldout[0]}
        scorer = {"evaluate.scorer": score.identity(config.evaluate.scorer)}
        found.append(Stage(f"{folder}/tasks/win_rate", "wins", scorer, inputs))
    return tuple(found)


def _judged(config: Config, stages: Sequence[Stage]) -> str:
    """The key of the stage by whose figure the best player is chosen."""
    task = config.evaluate.best_task
    keys = {stage.folder.partition("/")[2]: stage.key for stage in stages}
    return keys.get(f"tasks/{task}", keys["eval"])


def _template(config: Config) -> str | None:
    """The chat template setting, by content where it is a file."""
    template = config.model.chat_template
    if template and template != "plain" and Path(template).is_file():
        return hashlib.sha256(Path(template).read_bytes()).hexdigest()[:16]
    return template


def _dotted(section: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{section}.{name}": value for name, value in values.items()}
