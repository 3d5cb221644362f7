"""`sparring plan`: a recipe to its estimate, and where it does not fit to what would make it fit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sparring.config import Config, EngineConfig, Tree
from sparring.cost import texts
from sparring.cost.estimate import Estimate, estimate, processes, uses_bf16
from sparring.cost.hardware import DEVICES, PER_MACHINE, Hardware, parse
from sparring.cost.shapes import shape_of
from sparring.cost.texts import Texts
from sparring.errors import InputError
from sparring.plan import Plan, make_plan, outside_paths

_COUNTS = (2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Remedy:
    """A change with which everything fits."""

    setting: str
    """As it is written on the command line."""
    seconds: float
    """Of the run with it."""
    note: str = ""
    """What else it changes."""


@dataclass(frozen=True)
class Planned:
    """A run's cost, and where it does not fit the single settings with which it does."""

    estimate: Estimate
    remedies: tuple[Remedy, ...]
    together: bool
    """No single setting is enough: each of `remedies` is two."""


def plan(
    recipe: Tree | Path | str, overrides: Sequence[str] = (), *, hardware: str = "cpu", calibrate: bool = False,
    prompts: int | None = None, prompt_tokens: int | None = None, answer_tokens: int | None = None,
    sample_tokens: int | None = None,
) -> Planned:  # fmt: skip
    """What a recipe costs on some hardware, from its model's shape and its texts' lengths.

    Lengths and numbers are the data's where model and data lie on this machine, else assumed: `prompts` examples of
    `prompt_tokens` and `answer_tokens` tokens. `sample_tokens` are those of a played answer; None takes gold answers'.
    `calibrate` measures this machine's speed at the model's shape, a minute at most. Raises InputError.
    """
    from sparring.api import configured

    _, config = configured(recipe, overrides)
    shape, machine = shape_of(config.model), parse(hardware)
    if config.model.quantize and machine.count > 1:
        raise InputError(
            f"model.quantize: {config.model.quantize}: works in one process only; plan for one device, or leave it out"
        )
    if config.model.compute == "float64":
        raise InputError("model.compute: float64: a plan counts float32 and bfloat16 only; plan for one of these")
    if any(s.engine_kind == "vllm" for s in (config.evaluate, *(r.play for r in config.rounds))):
        _check_spread(config.engine, machine)
    given = _texts(config, prompts, prompt_tokens, answer_tokens, sample_tokens)
    rates = None
    if calibrate:
        from sparring.cost.calibrate import measure

        rates = measure(config, shape, given, machine)
    found = estimate(config, stages(config), shape, given, machine, rates)
    return Planned(found, *_remedies(config, found))


def _check_spread(engine: EngineConfig, hardware: Hardware) -> None:
    """Raises InputError where vLLMs would be spread over more devices than a machine has."""
    most, size, copies = min(hardware.count, PER_MACHINE), engine.tensor_parallel, engine.replicas or 1
    if size > most:
        raise InputError(
            f"engine.tensor_parallel: {size}: a machine of {hardware} has {most}; lower it, or plan for more"
        )
    if size * copies > most:
        raise InputError(
            f"engine.replicas: {copies}: a machine of {hardware} has {most} for {copies} of {size} each; lower it, or "
            "plan for more"
        )


def stages(config: Config) -> Plan:
    """A run's stages, whatever its data and models hold."""
    return make_plan(config, {}, "", dict.fromkeys(outside_paths(config), ""))


def _texts(config: Config, prompts: int | None, prompt: int | None, answer: int | None, sample: int | None) -> Texts:
    """The data's own lengths where its files and the tokenizer lie here and nothing else is asked for."""
    local = Path(config.model.path).expanduser().is_dir() and Path(config.data.path).expanduser().exists()
    if not local or prompts or prompt or answer:
        return texts.assumed(config, prompts, prompt, answer, sample)
    from sparring import data, players, preview
    from sparring.prompts import Renderer
    from sparring.workshop import fitted

    loaded = data.load(config.data, config.seed)
    tokenizer = preview.load_tokenizer(config)
    renderer = Renderer(tokenizer, config.model.chat_template, players.stop_ids(config.model.path, config.model))
    longest = max(r.play.max_new_tokens for r in config.rounds)
    model = players.model_config(config.model.path, config.model)
    rendering = fitted(loaded.train, config, model, tokenizer, renderer, longest)
    lengths = [(len(row.prompt), len(row.gold)) for row in rendering.rows]
    generated = loaded.counts["generated"] / len(loaded.train)
    return texts.measured(lengths, len(rendering.rows), len(loaded.heldout), sample, generated)


@dataclass(frozen=True)
class _Change:
    setting: str
    config: Config
    hardware: Hardware
    note: str = ""


def _remedies(config: Config, found: Estimate) -> tuple[tuple[Remedy, ...], bool]:
    """Of every kind of change the smallest with which everything fits; where none is enough, two together."""
    if not found.misfits:
        return (), False

    def smallest(changes: Iterable[_Change]) -> Iterator[Remedy]:
        for change in changes:
            after = _again(change, found)
            if not after.misfits:
                # Without which the other devices are not used
                uses = change.hardware != found.hardware or change.config.cluster.players != config.cluster.players
                told = [change.setting, *(processes(config, change.hardware.count) if uses else ())]
                yield Remedy(" ".join(told), after.seconds, change.note)
                return

    settings = [list(kind) for kind in _settings(config, found.hardware)]
    machines = [list(kind) for kind in _machines(config, found.hardware)]
    alone = [remedy for kind in (*settings, *machines) for remedy in smallest(kind)]
    if alone:
        return tuple(alone), False
    pairs = (
        [_Change(f"{m.setting} {s[-1].setting}", s[-1].config, m.hardware, s[-1].note) for m in kind]
        for s in settings
        if s
        for kind in machines
    )
    return tuple(remedy for kind in pairs for remedy in smallest(kind)), True


def _again(change: _Change, found: Estimate) -> Estimate:
    rates = found.rates if found.rates.measured and change.hardware == found.hardware else None
    return estimate(change.config, stages(change.config), found.shape, found.texts, change.hardware, rates)


def _settings(config: Config, hardware: Hardware) -> Iterator[Iterator[_Change]]:
    """Kinds of settings, each from the smallest change to the largest; the first four change no result."""

    def change(section: str, key: str, value: object, note: str = "") -> _Change:
        changed = _with(config, section, {key: value})
        return _Change(f"{section}.{key}={str(value).lower()}", changed, hardware, note)

    trains = [r.train for r in config.rounds]
    for section, key in (("train", "micro_tokens"), ("train", "micro_batch"), ("play", "batch_size")):
        largest = max(getattr(getattr(r, section), key) for r in config.rounds)
        smaller = (largest >> by for by in range(1, largest.bit_length()))
        yield (change(section, key, value) for value in smaller)
    if not all(train.gradient_checkpointing for train in trains):
        yield iter([change("train", "gradient_checkpointing", True)])
    if any(train.optimizer != "rmsprop" for train in trains):
        yield iter([change("train", "optimizer", "rmsprop", "another optimizer")])
    if not uses_bf16(config, hardware):
        yield iter([change("model", "compute", "bfloat16", "lower precision")])
    if not config.model.lora_rank:
        yield iter([change("model", "lora_rank", 16, "trains adapters only")])
    if hardware.device.cuda and hardware.count > 1 and config.cluster.players == "whole":
        most = min(hardware.count, PER_MACHINE) // (config.engine.replicas or 1)
        yield (_sharded(config, hardware, size) for size in _COUNTS if size <= most)


def _sharded(config: Config, hardware: Hardware, size: int) -> _Change:
    """Players in shards, and vLLM over `size` devices where the built-in engine would sample from whole ones."""
    settings = [("cluster", "players", "sharded")]
    settings += [("play", "engine", "vllm")] * any(r.play.engine_kind == "hf" for r in config.rounds)
    settings += [("evaluate", "engine", "vllm")] * (config.evaluate.engine_kind == "hf")
    told = [f"{section}.{key}={value}" for section, key, value in settings] + [f"engine.tensor_parallel={size}"]
    changed = _with(config, "engine", {"tensor_parallel": size})
    for section, key, value in settings:
        changed = _with(changed, section, {key: value})
    return _Change(" ".join(told), changed, hardware, "vLLM samples")


def _with(config: Config, section: str, values: dict[str, object]) -> Config:
    """A configuration with other values in a section, in every round as well."""
    own = getattr(config, section).model_copy(update=values)
    rounds = config.rounds
    if section in ("train", "play"):
        rounds = tuple(r.model_copy(update={section: getattr(r, section).model_copy(update=values)}) for r in rounds)
    return config.model_copy(update={section: own, "rounds": rounds})


def _machines(config: Config, hardware: Hardware) -> Iterator[Iterator[_Change]]:
    """More devices of the same kind, and others with more memory."""

    def change(machine: Hardware) -> _Change:
        return _Change(f"--hardware {machine}", config, machine)

    if hardware.device.cuda and not config.model.quantize:
        yield (change(Hardware(count, hardware.device)) for count in _COUNTS if count > hardware.count)
    larger = sorted((d for d in DEVICES.values() if d.memory > hardware.device.memory), key=lambda d: d.memory)
    yield (change(Hardware(hardware.count, device)) for device in larger)
