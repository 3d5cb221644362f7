"""What a user calls: start or continue a run, run one stage of it, fork it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from sparring import data, lowbit, methods, players, prompts, sinks
from sparring.config import Config, ModelConfig, TaskConfig, Tree
from sparring.config.recipe import ROLES, load, override, read_recipe, recipe_with_defaults
from sparring.errors import InputError
from sparring.evaluate import tasks
from sparring.judge.score import load_scorer
from sparring.judge.verify import load_verifier
from sparring.plan import NAMED, Plan, RoundPlan, make_plan, outside_paths, task_stage
from sparring.play import engines
from sparring.plugins import is_file_reference
from sparring.provenance import environment
from sparring.rundir import RunDir, Touched
from sparring.rundir.view import RunView, check_format, read_run_recipe
from sparring.types import Player

STAGE_OF_COMMAND = {
    "play": "samples",
    "judge": "scores",
    "pair": "groups",
    "freeze": "frozen",
    "hold": "held",
    "train": "player",
    "eval": "eval",
}


@dataclass(frozen=True)
class Prepared:
    """A checked recipe, resolved against its model and data; nothing is written yet."""

    path: Path
    recipe: Tree
    config: Config
    plan: Plan
    start: Player


def run(
    recipe: Tree | Path | str,
    overrides: Sequence[str] = (),
    *,
    out: Path | str | None = None,
    redo: bool = False,
) -> RunView:
    """Start a run, or continue it from wherever it stopped.

    recipe: a mapping, a YAML file, or an existing run directory. overrides: `section.key=value` strings.
    out: the run's directory, instead of the recipe's `run`. redo: do stages again that changed settings touch, after
    moving the old ones to `superseded/`; without it they are an error. Raises InputError, BusyError, NonFiniteError.
    """
    from sparring.loop import advance
    from sparring.workshop import Workshop

    prepared = prepare(recipe, overrides, out=out)
    sinks.check(prepared.config.track)
    lowbit.check(prepared.config)
    engines.check(prepared.config, prepared.plan, RunDir(prepared.path).done)
    with _opened(prepared, redo) as target:
        advance(Workshop(target, prepared.config, prepared.plan, prepared.start))
        mark_best(target.path)
    return RunView(target.path)


def run_stage(path: Path | str, command: str, t: int) -> RunView:
    """Do one stage of one round of an existing run (`play`, `judge`, `pair`, `freeze`, `hold`, `train` or `eval`).

    Raises InputError where the round does not exist or an earlier stage is missing.
    """
    from sparring.loop import advance
    from sparring.workshop import Workshop

    prepared = prepare(Path(path))
    sinks.check(prepared.config.track)
    found = _round(prepared, t)
    name = STAGE_OF_COMMAND[command]
    stages = [s for s in found.stages if s.name == name]
    # The start's are no round's, so no other call makes what the best is chosen by
    chosen = prepared.plan.first == 0 and "best" in found.roles.values()
    measures = [prepared.plan.start_eval, *prepared.plan.start_tasks] if chosen else []
    measures = [stage for stage in measures if not RunDir(prepared.path).done(stage)]
    if measures or command not in ("judge", "pair"):
        lowbit.check(prepared.config)
        engines.check(prepared.config, prepared.plan, lambda stage: stage not in (*measures, *stages))
    if not stages:
        known = ", ".join(stage.name for stage in found.stages)
        raise InputError(f"{path}: round {t} ({found.method.name}) has no stage {name}; it has {known}")
    with _opened(prepared, redo=False) as target:
        known_stages = {s.folder: s for s in prepared.plan.stages if s.name != "data"}
        missing = [name for name in stages[0].inputs if name in known_stages and not target.done(known_stages[name])]
        if missing:
            raise InputError(f"{path}: {stages[0].folder} needs {missing[-1]}, which is not done; do that stage first")
        wanted = {prepared.plan.data.folder, *(stage.folder for stage in measures), stages[0].folder}
        shop = Workshop(target, prepared.config, prepared.plan, prepared.start)
        advance(shop, wanted)
        if command == "eval":
            mark_best(target.path)
    return RunView(target.path)


def evaluate_tasks(
    path: Path | str,
    names: Sequence[str],
    player: int,
    *,
    verifier: str | None = None,
    samples: int | None = None,
    limit: int | None = None,
    data_dir: str | None = None,
    redo: bool = False,
) -> RunView:
    """Have a player of a run do tasks: those of its recipe by name, JSONL files, or suites; what is done stays.

    verifier, samples, limit, data_dir: of `TaskConfig`, for all of them and over the recipe's. redo: do again what was
    done with other options.
    Raises InputError for a task that is none, a player that is not there, where a task was done with others, for two
    tasks of one name, and for one that is called as one of the recipe's but would be done in another way.
    """
    from sparring import stages
    from sparring.loop import once, telling
    from sparring.workshop import Workshop

    prepared = prepare(Path(path))
    sinks.check(prepared.config.track)
    plan, config = prepared.plan, prepared.config
    numbers = [plan.first, *(r.t + 1 for r in plan.rounds)]
    if player not in numbers:
        raise InputError(f"{path}: there is no player {player}; its players are {numbers[0]} … {numbers[-1]}")
    measured = plan.start_eval if player == plan.first else _round(prepared, player - 1).stage("eval")
    judge = verifier and _reference(verifier)
    options = {"verifier": judge, "samples": samples, "limit": limit, "data_dir": data_dir and _path(data_dir)}
    given = [_named_task(name, config, options) for name in names]
    folder = measured.folder.rpartition("/")[0]
    wanted = [(task, task_stage(config, task, folder, measured.inputs)) for task in given]
    planned = {stage.folder: stage.key for stage in plan.stages}
    labels = [task.label for task in given]
    for task, stage in wanted:
        if labels.count(task.label) > 1:
            raise InputError(f"--tasks: two tasks are called `{task.label}`; rename a file")
        if planned.get(stage.folder, stage.key) != stage.key:
            raise InputError(
                f"--tasks: the recipe says how `{task.label}` is done, and this is another way; leave out the options, or "
                "rename the file"
            )
        tasks.told_by(task, config)  # a bad row must be told before anything is superseded
    with _opened(prepared, redo=False) as target:
        if touched := target.touched([stage for _, stage in wanted]):
            if not redo:
                lines = "; ".join(f"{item.folder} ({'; '.join(item.reasons)})" for item in touched)
                raise InputError(f"{path}: done before in another way: {lines}; --redo does it again")
            target.supersede(touched)
        shop = Workshop(target, config, plan, prepared.start)
        shop.player(player)
        with telling(shop):
            once(shop, lambda _: True, plan.data, stages.data)
            for task, stage in wanted:
                once(shop, lambda _: True, stage, partial(stages.task, number=player, task=task))
    return RunView(target.path)


def _named_task(name: str, config: Config, options: Tree) -> TaskConfig:
    known = {task.label: task for task in config.evaluate.tasks}
    task = known.get(name) or TaskConfig(path=_file(name))
    return task.model_copy(update={key: value for key, value in options.items() if value is not None})


def fork(source: Path | str, new: Path | str, overrides: Sequence[str] = (), *, t: int | None = None) -> list[str]:
    """Make a new run with other settings that shares (hard-links) every stage whose inputs are unchanged.

    t: share nothing from round t on, even where it is unchanged. Returns the shared folders.
    """
    new = Path(new)
    if new.exists():
        raise InputError(f"{new}: exists already; a fork makes a new run")
    prepared = prepare(Path(source), overrides, out=new)
    if t is not None:
        _round(prepared, t)
    late = {stage.folder for r in prepared.plan.rounds if t is not None and r.t >= t for stage in r.stages}
    # A fork that was cut short leaves no run that looks whole: the same command starts over.
    making = new.with_name(f".{new.name}.tmp")
    shutil.rmtree(making, ignore_errors=True)
    old = RunDir(Path(source))
    with _opened(replace(prepared, path=making), redo=False, source=old) as target:
        shared = [s.folder for s in prepared.plan.stages if s.folder not in late and target.adopt(old, s)]
    making.rename(new)
    return shared


def _round(prepared: Prepared, t: int) -> RoundPlan:
    for r in prepared.plan.rounds:
        if r.t == t:
            return r
    known = f"{prepared.plan.rounds[0].t} … {prepared.plan.rounds[-1].t}"
    raise InputError(f"{prepared.path}: there is no round {t}; its rounds are {known}")


def configured(
    recipe: Tree | Path | str, overrides: Sequence[str] = (), *, out: Path | str | None = None
) -> tuple[Tree, Config]:
    """A recipe with overrides, as it was written and checked; nothing that it names is looked at. Raises InputError."""
    tree, where = _read(recipe)
    own = where.parent if where and where.name == "config.yaml" and (where.parent / "env.json").exists() else None
    tree = override(tree, overrides)
    if out is not None or own is not None:
        tree["run"] = str(out if out is not None else own)
    tree = _absolute(tree)
    config = load(tree, methods.signature, where, overrides)
    for key, value in (("model.path", config.model.path), ("data.path", config.data.path)):
        if not value:
            raise InputError(f"{key}: is missing; give it in the recipe, as --{key.split('.')[0]} or as {key}=…")
    if config.cluster.processes > 1 and config.model.device.startswith("cuda:"):
        raise InputError(f"model.device: {config.model.device} is one device for all processes; write cuda or auto")
    if config.cluster.launcher and config.cluster.processes == 1:
        raise InputError(
            "cluster.launcher: starts nothing while cluster.processes is 1; set that, or cluster.launcher=null"
        )
    for key in ("lora_alpha", "lora_targets"):
        default = ModelConfig.model_fields[key].default
        if not config.model.lora_rank and getattr(config.model, key) != default:
            raise InputError(
                f"model.{key}: does nothing while model.lora_rank is 0; raise that, or set model.{key}={default or 'null'}"
            )
    asked = config.evaluate
    if asked.best in ("sampled", "greedy") and not asked.verifier:
        raise InputError(
            f"evaluate.best: {asked.best} is a share of right answers: give evaluate.verifier, or choose by gold_nll or last"
        )
    if asked.best == "sampled" and not asked.samples:
        raise InputError("evaluate.best: sampled, but evaluate.samples is 0: set it to 1 or more, or choose by greedy")
    return tree, config


def prepare(
    recipe: Tree | Path | str,
    overrides: Sequence[str] = (),
    *,
    out: Path | str | None = None,
    known: tuple[str, Mapping[str, str]] | None = None,
) -> Prepared:
    """Read and check a recipe and make its plan. Raises InputError.

    known: content hashes of the model and of the data files, where another process has just taken them.
    """
    tree, config = configured(recipe, overrides, out=out)
    sha, hashes = known or (players.identify(config.model.path, config.model.revision), data.fingerprint(config.data))
    compute = _compute(config)
    tree["model"] = tree["model"] | {"compute": compute}
    config = config.model_copy(update={"model": config.model.model_copy(update={"compute": compute})})
    plan = make_plan(config, hashes, sha, _outside(config))
    for name in (config.evaluate.verifier, *(r.method.verifier for r in plan.rounds)):
        if name:
            load_verifier(name)
    for name in (config.evaluate.scorer, *(r.method.scorer for r in plan.rounds)):
        if name:
            load_scorer(name)
    tasks.check(config)
    start = Player(config.model.path, plan.first, sha)
    return Prepared(Path(config.run), recipe_with_defaults(tree), config, plan, start)


def _outside(config: Config) -> dict[str, str]:
    """Content hash of every model that has a role by its path. Raises InputError, before anything is played, where one
    cannot be read or writes other token ids than the start."""
    hashes: dict[str, str] = {}
    for path in outside_paths(config):
        try:
            hashes[path] = players.identify(path)
            players.model_config(path, config.model.model_copy(update={"revision": None}))
            theirs = prompts.load_tokenizer(path, trust_remote_code=config.model.trust_remote_code)
        except InputError as error:
            raise InputError(
                f"rounds: role `{path}`: {error}; write previous, initial, best or a model's path"
            ) from error
        model = config.model
        ours = prompts.load_tokenizer(model.path, revision=model.revision, trust_remote_code=model.trust_remote_code)
        if theirs.get_vocab() != ours.get_vocab():
            raise InputError(f"rounds: role `{path}`: has another tokenizer than model.path; players must share one")
    return hashes


def _compute(config: Config) -> str:
    """`model.compute` by name: `auto` is what the run was made with, or what this device gives a new run.

    Were it settled anew, a run continued on another kind of device would mix precisions under one name.
    """
    if config.model.compute != "auto":
        return config.model.compute
    run = Path(config.run)
    made = read_run_recipe(run) if (run / "config.yaml").exists() and (run / "env.json").exists() else {}
    recorded: str = (made.get("model") or {}).get("compute", "auto")
    if recorded != "auto":
        return recorded
    bare = config.model.device != "cpu" and players.device_of(ModelConfig()).type == "cpu"
    if config.cluster.launcher and bare:
        raise InputError(
            "model.compute: auto: there is no GPU here to tell it by, and cluster.launcher may start processes that have "
            "one; write bfloat16 or float32"
        )
    return str(players.compute_dtype(config.model)).removeprefix("torch.")


def mark_best(path: Path) -> int | None:
    """Point `best` at the best player; see `controls.best_player`."""
    view = RunView(path)
    best = view.best_player()
    if best is not None:
        RunDir(view.path).mark_best(view.players[best])
    return best


@contextmanager
def _opened(prepared: Prepared, redo: bool, source: RunDir | None = None) -> Iterator[RunDir]:
    """The run, new or as it was left, held until the block ends; `source`: what a new one shares stages with.

    Raises InputError where settings touch what is done, and for data that cannot be told before anything is moved for them.
    """
    target = RunDir(prepared.path)
    before = source or target
    if not before.done(prepared.plan.data) or before.touched([prepared.plan.data]):
        data.locate(prepared.config.data)
    with target.lock():
        check_format(prepared.path)
        touched = target.touched(prepared.plan.stages)
        if touched and not redo:
            raise InputError(_explain(prepared.path, touched))
        if touched:
            target.supersede(touched)
        target.record(prepared.recipe, environment(), prepared.start)
        yield target


def _explain(path: Path, touched: Sequence[Touched]) -> str:
    lines = "\n".join(f"  {item.folder}: {'; '.join(item.reasons)}" for item in touched)
    return (
        f"{path}: the settings changed; these stages would have to be done again (nothing was changed):\n{lines}\n"
        f"make a new run that shares the rest: sparring fork {path} NEW section.key=value\n"
        f"or do them again here (the old ones go to superseded/): --redo"
    )


def _read(recipe: Tree | Path | str) -> tuple[Tree, Path | None]:
    if isinstance(recipe, dict):
        return recipe, None
    path = Path(recipe)
    if path.is_dir():
        return read_run_recipe(path), path / "config.yaml"
    return read_recipe(path), path


def _absolute(tree: Tree) -> Tree:
    """Existing local paths and `./file.py:name` made absolute, so that a run continues from any working directory."""
    sections: dict[str, dict[str, Callable[[str], str]]] = {
        "model": {"path": _path, "chat_template": lambda value: value if value == "plain" else _path(value)},
        "data": {"path": _file, "heldout": _file},
        "evaluate": {"verifier": _reference, "scorer": _reference},
        "engine": {"python": _program},
    }
    result = tree | {name: _changed(tree.get(name), how) for name, how in sections.items() if name in tree}
    given = tree["evaluate"].get("tasks") if isinstance(tree.get("evaluate"), dict) else None
    if given and isinstance(given, (str, dict, list, tuple)):
        result["evaluate"] = result["evaluate"] | {
            "tasks": [_task(task) for task in ([given] if isinstance(given, (str, dict)) else given)]
        }
    if isinstance(tree.get("rounds"), list):
        how = {"method": _reference, "verifier": _reference, "scorer": _reference} | dict.fromkeys(ROLES, _who)
        result["rounds"] = [_changed(entry, how) for entry in tree["rounds"]]
    return result


def _changed(section: Any, how: Mapping[str, Callable[[str], str]]) -> Any:
    if not isinstance(section, dict):
        return section

    def one(key: str, value: Any) -> Any:
        return how[key](value) if isinstance(value, str) and value else value

    # A list has one value per round
    each = {
        k: [one(k, item) for item in v] if isinstance(v, list) else one(k, v) for k, v in section.items() if k in how
    }
    return section | each


def _task(task: Any) -> Any:
    return _changed(
        {"path": task} if isinstance(task, str) else task,
        {"path": _file, "verifier": _reference, "data_dir": _path},
    )


def _path(value: str) -> str:
    path = Path(value).expanduser()
    return str(path.resolve()) if path.exists() else value


def _file(value: str) -> str:
    # What a cache keeps under its hash has its suffix, and the files beside it, where the link is
    path = Path(value).expanduser()
    return str(path.absolute()) if path.exists() and path.resolve().suffix != path.suffix else _path(value)


def _program(value: str) -> str:
    path = Path(value).expanduser()
    return str(path.absolute()) if "/" in value and path.exists() else value


def _who(value: str) -> str:
    return value if value in NAMED else _path(value)


def _reference(value: str) -> str:
    # A method's or verifier's name is never a path, even where a folder is called the same
    prefix = "verifier:" if value.startswith("verifier:") else ""
    file, _, name = value.removeprefix(prefix).rpartition(":")
    return f"{prefix}{_path(file)}:{name}" if is_file_reference(value) else value


__all__ = ["Prepared", "evaluate_tasks", "fork", "mark_best", "prepare", "run", "run_stage"]
