"""A recipe, the lengths of its texts and a machine to what every stage of the run costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise

from sparring.batching import batches
from sparring.config import Config, PlayConfig, Sampling
from sparring.cost import memory, texts, work
from sparring.cost.hardware import PER_MACHINE, Hardware, Rates, assumed
from sparring.cost.memory import FLOAT, STATES, Pass, Pieces, Where
from sparring.cost.shapes import Shape
from sparring.cost.texts import Texts
from sparring.cost.work import Item, Machine, Work
from sparring.errors import InputError
from sparring.plan import Plan, RoundPlan
from sparring.stages.evaluation import PART
from sparring.stages.pair import PROBED

PLAYED_BYTES, PAIRED_BYTES, FROZEN_BYTES = 14.0, 4.0, 5.0
"""On disk per token: of samples (id, log-prob, text), groups and frozen log-probs, compressed; of 60M's run."""


@dataclass(frozen=True)
class Cost:
    """One stage: what all devices spend together, how long that takes, and what one of them holds."""

    folder: str
    """`round_000/samples`, or `start/eval`."""
    name: str
    flops: float
    moved: float
    """Bytes that are read and written in the devices' memory or between them."""
    tokens: float
    """Computed in forward passes or decoded; a prompt once for its completions."""
    seconds: float
    memory: Pieces
    """What holds memory on one device at the stage's widest moment, to bytes."""
    disk: float
    """Bytes that it leaves."""
    share: float = 1.0
    """Of a device's memory that the stage may take."""

    @property
    def peak(self) -> float:
        """Bytes on one device."""
        return sum(self.memory.values())


@dataclass(frozen=True)
class Estimate:
    """What a run costs."""

    shape: Shape
    hardware: Hardware
    rates: Rates
    texts: Texts
    costs: tuple[Cost, ...]
    passing_disk: float
    """Bytes of training's own state, which is there beside the rest until its round is done."""
    notes: tuple[str, ...]

    @property
    def misfits(self) -> list[Cost]:
        """Stages that one device has no room for."""
        device = self.hardware.device
        return [cost for cost in self.costs if cost.peak > min(device.usable, cost.share * device.memory)]

    @property
    def seconds(self) -> float:
        return sum(cost.seconds for cost in self.costs)

    @property
    def disk(self) -> float:
        return sum(cost.disk for cost in self.costs) + self.passing_disk


def estimate(
    config: Config, plan: Plan, shape: Shape, given: Texts, hardware: Hardware, rates: Rates | None = None
) -> Estimate:
    """What every stage of a plan costs; `rates` None takes what the device is assumed to reach."""
    made = _Estimator(config, plan, shape, given, hardware, rates)
    costs = [made.evaluation()]
    for r in plan.rounds:
        costs += made.round(r)
    return Estimate(shape, hardware, made.rates, given, tuple(costs), made.state, tuple(made.notes()))


def processes(config: Config, count: int) -> list[str]:
    """The settings that a run still needs to have one process per device."""
    alone = ["cluster.launcher=null"] if count == 1 and config.cluster.launcher else []
    return [f"cluster.processes={count}", *alone] if config.cluster.processes != count else []


def uses_bf16(config: Config, hardware: Hardware) -> bool:
    """Whether forward passes are made in bfloat16 there."""
    compute = config.model.compute
    return compute == "bfloat16" or (compute == "auto" and hardware.device.cuda)


@dataclass(frozen=True)
class _Part:
    """Some of a stage's work."""

    spent: Work
    """Of all devices; its seconds are those that they take."""
    held: Pieces
    """On one device."""
    share: float = 1.0
    """Of a device's memory that may be taken."""


class _Estimator:
    def __init__(
        self, config: Config, plan: Plan, shape: Shape, given: Texts, hardware: Hardware, rates: Rates | None
    ) -> None:
        self._config, self._plan, self._shape, self._texts, self._hardware = config, plan, shape, given, hardware
        self._bf16 = uses_bf16(config, hardware)
        self.rates = rates or assumed(hardware.device, self._bf16)
        self._base = Where(
            self._bf16, hardware.device.cuda, lora_rank=config.model.lora_rank, quantized=bool(config.model.quantize)
        )
        cut = config.cluster.players == "sharded"
        self._scorer = replace(self._base, devices=hardware.count if cut else 1)
        self._groups: dict[int, list[Item]] = {}
        changed = memory.trained(shape, self._base)
        most = max(STATES[r.settings.train.optimizer] for r in plan.rounds)
        self._player = FLOAT * changed
        self.state = FLOAT * changed * (1 + most)

    def round(self, r: RoundPlan) -> list[Cost]:
        """The stages of a round."""
        own = self._groups[r.t] = texts.groups(r, self._texts)
        earlier = [e for e in reversed(self._plan.rounds) if e.t < r.t and e.method.plays]
        memories = [self._groups[e.t] for _, e in zip(r.method.memory, earlier, strict=False)]
        replayed = [item for items in memories for item in items]
        if not (own or replayed):
            raise InputError(
                f"play.samples: {r.settings.play.samples}: so few answers a prompt give {r.method.name} nothing to train "
                f"on in {r.folder}; raise it"
            )
        costs = []
        if r.has("samples"):
            costs.append(self._samples(r))
        costs.append(self._paired(r, [*own, *replayed]))
        costs.append(self._frozen(r, own, replayed))
        if r.has("held"):
            costs.append(self._held(r))
        costs.append(self._player_stage(r, [*own, *replayed]))
        costs.append(replace(self.evaluation(), folder=f"{r.folder}/eval"))
        return costs

    def notes(self) -> list[str]:
        """What was assumed or left out, a line each."""
        reached = "measured here" if self.rates.measured else "assumed (40 % of the peak), not measured: --calibrate"
        lines = [self._texts.told, f"speed: {reached}"]
        sample = self._texts.sample
        played = f"{sample} tokens" if sample else "as long as gold ones"
        lines.append(f"played answers: {played}, cut at play.max_new_tokens")
        taken = [r.folder for r in self._plan.rounds if self._taken(r)]
        lines += [f"{folder}: {self._texts.generated:.0%} of the prompts came with their answer" for folder in taken]
        count = self._hardware.count
        if self._hardware.device.cuda and (needed := processes(self._config, count)):
            lines.append(f"planned for one process per device: {' '.join(needed)} makes it so")
        whole = sum(memory.weights(self._shape, self._base).values())
        engines = {r.settings.play.engine_kind for r in self._plan.rounds if r.turns}
        engines |= {self._config.evaluate.engine_kind}
        if whole > self._hardware.device.usable and ("hf" in engines or self._scorer.devices == 1):
            lines.append(f"every device that plays or scores holds a whole player: {whole / 1e9:.0f} GB")
        if self._base.quantized:
            lines.append("not counted: the time in which 4 bits are unpacked")
        if "vllm" in engines:
            size, copies = self._engines
            lines.append(f"vllm: {copies} of {size} devices each; what it reaches is assumed, its start is not counted")
        if "server" in engines:
            lines.append("not counted: what a server samples")
        if self._config.cluster.cpu_offload:
            lines.append("not counted: cluster.cpu_offload")
        if self._config.evaluate.tasks:
            lines.append("not counted: evaluate.tasks")
        if any(r.has("scores") for r in self._plan.rounds):
            lines.append("not counted: verifiers and scorers")
        if any(r.method.select for r in self._plan.rounds):
            lines.append("groups that a method drops once it knows log-probs are counted as trained on")
        return lines

    def _machine(self, where: Where | None = None) -> Machine:
        return Machine(self._shape, where or self._base, self.rates)

    def _taken(self, r: RoundPlan) -> float:
        """The share of prompts that come with their answer to a round's first turn."""
        first = next((e for e in self._plan.rounds if e.turns), None)
        return self._texts.generated if r is first and r.method.takes_given else 0.0

    def _plain(self, r: RoundPlan) -> bool:
        return bool(r.method.needs) or r.method.official is not None or self._config.model.logps == "plain"

    def _cost(self, folder: str, tokens: float, disk: float, *parts: _Part) -> Cost:
        """A stage of several parts, one after the other."""
        spent = sum((part.spent for part in parts), Work())
        widest = max(parts, key=lambda part: sum(part.held.values()) / part.share)
        name, seconds = folder.rpartition("/")[2], spent.seconds + disk / self.rates.disk
        return Cost(folder, name, spent.flops, spent.moved, tokens, seconds, widest.held, disk, widest.share)

    def _divided(self, spent: Work, held: Pieces, jobs: float) -> _Part:
        """Work that is divided among the devices, job by job."""
        devices = max(1, min(self._hardware.count, math.ceil(jobs)))
        return _Part(replace(spent, seconds=spent.seconds / devices), held)

    def _scored(self, passes: Sequence[Pass], where: Where, scale: float, jobs: float) -> _Part:
        """Passes that are scored, each standing for `scale`; where devices share a player, by all of them together."""
        machine, n = self._machine(where), where.devices
        spent, held = work.scoring(machine, passes) * scale, memory.scoring(self._shape, where, passes)
        if n == 1:
            return self._divided(spent, held, jobs)
        sent = work.gathering(machine, math.ceil(len(passes) * scale), self._hardware.link)
        return _Part(Work(spent.flops, spent.moved + sent.moved, max(spent.seconds / n, sent.seconds)), held)

    @property
    def _engines(self) -> tuple[int, int]:
        """How many devices a vLLM is spread over, and how many play: on the first machine."""
        engine = self._config.engine
        size = engine.tensor_parallel
        return size, engine.replicas or max(1, min(self._hardware.count, PER_MACHINE) // size)

    def _sampled(
        self, who: Sampling, asked: Sequence[tuple[int, int]], settings: PlayConfig, count: float, repeats: int,
        models: int = 1, jobs: float | None = None,
    ) -> _Part:  # fmt: skip
        """`count` answers by the engine that a section names; `asked` are (prompt, answer) tokens of rows that stand for
        them, `jobs` the parts that the built-in engine's work is divided into."""
        if who.engine_kind == "server":
            return _Part(Work(), {})
        if who.engine_kind == "hf":
            spent, held, chunks = self._answers(asked, settings, count, repeats, models)
            return self._divided(spent, held, chunks if jobs is None else jobs)
        (size, copies), engine, device = self._engines, self._config.engine, self._hardware.device
        room = max(prompt for prompt, _ in asked) + settings.max_new_tokens
        most = engine.gpu_memory * device.memory
        context = _context(engine.arguments, self._shape.context)
        held, width = memory.served(self._shape, self._base, size, room, engine.parallel, context, most)
        rates = self.rates
        faster = {name: getattr(rates, name) * size for name in ("score", "decode", "bandwidth")}
        # Its steps are recorded once and replayed, not launched layer by layer
        machine = Machine(self._shape, self._base, replace(rates, launch=0.0, **faster))
        chunk = texts.spread(asked, max(1, min(settings.chunk * repeats, round(count))))
        done = work.answering(machine, chunk, width, repeats=1, models=models) * (count / len(chunk))
        return _Part(replace(done, seconds=done.seconds / copies), held, engine.gpu_memory)

    def _answers(
        self, asked: Sequence[tuple[int, int]], settings: PlayConfig, count: float, repeats: int, models: int = 1
    ) -> tuple[Work, Pieces, float]:
        """Work, memory and jobs of `count` answers by the built-in engine."""
        rows = min(settings.chunk * repeats, max(1, round(count)))
        chosen = texts.spread(asked, -(-rows // repeats))
        chunk = [row for row in chosen for _ in range(repeats)][:rows]
        done = work.answering(self._machine(), chunk, settings.batch_size, repeats=repeats, models=models)
        width = min(settings.batch_size, rows)
        longest = max(prompt for prompt, _ in asked)
        read = sorted((prompt for prompt, _ in chunk), reverse=True)[: -(-width // repeats)]
        held = memory.playing(
            self._shape, self._base, width, longest + settings.max_new_tokens, _reading(read, self._base), models
        )
        return done * (count / rows), held, count / rows

    def _samples(self, r: RoundPlan) -> Cost:
        settings = r.settings.play
        prompts = min(r.settings.limit or self._texts.train, self._texts.train)
        asked = [(p, self._texts.played(gold, settings.max_new_tokens)) for p, gold in self._texts.rows]
        parts, count = [_Part(Work(), {})], 0.0
        split = sum(turn.split for turn in r.turns)
        for turn in r.turns:
            each = turn.samples or settings.samples
            own = prompts / (split if turn.split else 1)
            taken = own * self._taken(r) if turn is r.turns[0] else 0.0
            wanted = (own - taken) * each
            if taken and settings.engine_kind == "hf":
                passes = _passes([Item(p, (a,)) for p, a in asked], settings.batch_size, self._base)
                parts.append(self._scored(passes, self._base, taken / len(asked), taken / settings.chunk))
            if wanted:
                parts.append(self._sampled(settings, asked, settings, wanted, each, 1 + (turn.mixed_with is not None)))
            count += taken + wanted
        mean = sum(answer for _, answer in asked) / len(asked)
        disk = count * mean * PLAYED_BYTES
        tokens = count * mean + prompts * _mean([prompt for prompt, _ in asked])
        return self._cost(f"{r.folder}/samples", tokens, disk, *parts)

    def _paired(self, r: RoundPlan, groups: Sequence[Item]) -> Cost:
        stored = sum(g.weight * g.padded for g in groups) * PAIRED_BYTES
        return Cost(f"{r.folder}/groups", "groups", 0.0, 0.0, 0.0, stored / self.rates.disk, {}, stored)

    def _frozen(self, r: RoundPlan, own: Sequence[Item], replayed: Sequence[Item]) -> Cost:
        """Every role's log-probs; an opponent that sampled in full precision has given its own answers'."""
        parts, tokens, disk = [_Part(Work(), {})], 0.0, 0.0
        opponents = {r.roles[turn.role] for turn in r.turns if r.settings.play.engine_kind == "hf"}
        exact = not self._bf16 and r.method.official is None and r.method.template is None
        where = replace(self._scorer, plain=self._plain(r) and not r.method.needs)
        rows = 4 * r.settings.train.micro_batch
        for role in r.frozen:
            known = exact and r.roles[role] in opponents and not self._taken(r)
            fresh = [Item(i.prompt, i.given, i.weight) for i in own if i.given] if known else own
            asked = [*fresh, *replayed]
            if asked:
                passes = _passes(asked, rows, where)
                scale = sum(i.weight for i in asked) / len(asked)
                jobs = sum(i.weight for i in (*own, *replayed)) / r.settings.play.chunk
                parts.append(self._scored(passes, where, scale, jobs))
                tokens += scale * sum(p.tokens for p in passes)
            if known and own:
                few = texts.spread(own, min(PROBED, math.ceil(sum(i.weight for i in own))))
                parts.append(self._scored(_passes(few, rows, where), where, 1, 1))
            disk += sum(i.weight * sum(i.completions) for i in (*own, *replayed)) * FROZEN_BYTES
        return self._cost(f"{r.folder}/frozen", tokens, disk, *parts)

    def _held(self, r: RoundPlan) -> Cost:
        """Answers to held-out prompts, scored with the gold ones, at two temperatures where the opponent's is not 1."""
        settings = r.settings.play.model_copy(update={"samples": 1})
        count = min(self._config.controls.prompts, self._texts.heldout)
        if not count:
            return self._cost(f"{r.folder}/held", 0.0, 0.0, _Part(Work(), {}))
        asked = [(p, self._texts.played(gold, settings.max_new_tokens)) for p, gold in self._texts.rows]
        played = self._sampled(self._config.evaluate, asked, settings, count, 1, jobs=1)
        passes = self._reading(r)
        times = 1 + (r.settings.play.temperature > 1)
        tokens = sum(p.tokens for p in passes) * (1 + times)
        return self._cost(f"{r.folder}/held", tokens, 0.0, played, self._scored(passes, self._scorer, times, 1))

    def _reading(self, r: RoundPlan) -> list[Pass]:
        """The passes in which a guard reads its held-out pairs."""
        count = min(self._config.controls.prompts, self._texts.heldout)
        most = r.settings.play.max_new_tokens
        rows = texts.spread(self._texts.rows, count)
        pairs = [Item(p, (gold, self._texts.played(gold, most))) for p, gold in rows]
        return _passes(pairs, 4 * r.settings.train.micro_batch, self._scorer)

    def _player_stage(self, r: RoundPlan, groups: Sequence[Item]) -> Cost:
        """Training: as many optimizer steps as the groups make, of which some stand for all."""
        settings, n = r.settings.train, self._hardware.count
        plain = self._plain(r)
        where = replace(self._base, devices=n, checkpointing=settings.gradient_checkpointing, plain=plain)
        companions = len(r.frozen) if "frozen_logits" in r.method.needs else 0
        total_groups = sum(g.weight for g in groups)
        per_epoch = math.ceil(total_groups / settings.batch_size)
        steps = per_epoch * min(settings.stop_epoch or settings.epochs, settings.epochs)
        steps = min(steps, settings.max_steps) if settings.max_steps else steps
        size = max(1, math.ceil(min(settings.batch_size, total_groups) / n))
        drawn = _drawn(groups, size)
        make = work.alone if plain else work.rows
        micro = [
            [make(part) for part in work.micro_batches(batch, settings.micro_batch, settings.micro_tokens)]
            for batch in drawn
        ]
        machine = self._machine(where)
        each = [work.learning(machine, passes, coupled=r.method.coupled, companions=companions) for passes in micro]
        mean = sum(each, Work()) * (1 / len(each))
        passes = sum(len(passes) for passes in micro) / len(micro)
        sent = work.exchange(machine, round(passes), self._hardware.link)
        step = Work(mean.flops * n, mean.moved * n + sent.moved * n, max(mean.seconds, sent.seconds))
        step += work.update(machine, settings.optimizer)
        spent = step * steps
        reading = self._reading(r) if r.has("held") else []
        # Every so many steps, and at the last one
        checks = math.ceil(steps / max(1, steps // self._config.controls.checks)) if reading else 0
        spent += work.scoring(self._machine(), reading) * (checks / n)
        saves = checks or steps // settings.save_every
        written = self.state * saves + self._player
        tokens = steps * n * sum(p.tokens for passes in micro for p in passes) / len(micro)
        longest = max(groups, key=lambda g: g.padded)
        held = memory.training(
            self._shape, where, settings.optimizer, [make([longest]), *(p for passes in micro for p in passes)],
            reading, steps=steps, accumulates=max(map(len, micro)) > 1, companions=companions,
        )  # fmt: skip
        seconds = spent.seconds + written / self.rates.disk
        kept = self._player + (self.state if self._config.keep_states else 0)
        return Cost(f"{r.folder}/player", "player", spent.flops, spent.moved, tokens, seconds, held, kept)

    @cache  # noqa: B019 -- an estimator lives as long as one estimate
    def evaluation(self) -> Cost:
        """Of the start, and so of any player: held-out gold answers scored, a greedy and some sampled answers each."""
        folder = "start/eval"
        settings, given = self._config.evaluate, self._texts
        count = min(settings.limit, given.heldout)
        if not count:
            return self._cost(folder, 0.0, 0.0, _Part(Work(), {}))
        play = self._config.evaluation_play.model_copy(update={"chunk": PART})
        asked = [(p, given.played(gold, play.max_new_tokens)) for p, gold in given.rows]
        parts = [self._sampled(settings, asked, play, count, 1)]
        if settings.samples:
            parts.append(self._sampled(settings, asked, play, count * settings.samples, settings.samples))
        rows = [Item(p, (gold,)) for p, gold in texts.spread(given.rows, count)]
        passes = _passes(rows, play.batch_size, self._scorer)
        parts.append(self._scored(passes, self._scorer, 1, count / PART))
        tokens = sum(p.tokens for p in passes) + count * (1 + settings.samples) * _mean([a for _, a in asked])
        return self._cost(folder, tokens, 0.0, *parts)


def _context(arguments: Sequence[str], context: int) -> int:
    """How long a sequence vLLM makes room for: its argument, or the model's context."""
    words = [word for argument in arguments for word in argument.split("=", 1)]
    given = dict(pairwise(words)).get("--max-model-len", "")
    return int(given) if given.isdigit() else context


def _mean(values: Sequence[int]) -> float:
    return sum(values) / len(values)


def _reading(prompts: Sequence[int], where: Where) -> Pass:
    """The largest batch in which prompts are read."""
    spans = batches(prompts, [1] * len(prompts), len(prompts), where.most_tokens)
    parts = [[prompts[at] for at in span] for span in spans]
    most = max(parts, key=lambda part: len(part) * max(part))
    return Pass(len(most), max(most), sum(most), len(most))


def _passes(items: Sequence[Item], most_rows: int, where: Where) -> list[Pass]:
    make = work.alone if where.plain else work.rows
    return [make(part) for part in work.scored(items, most_rows, where.most_tokens)]


def _drawn(groups: Sequence[Item], size: int, most: int = 8) -> list[list[Item]]:
    """Some optimizer batches that stand for all: every n-th group, so that each has long and short ones."""
    ordered = sorted(groups, key=lambda g: g.padded, reverse=True)
    wanted = max(1, min(most, len(ordered) // size))
    chosen = texts.spread(ordered, wanted * size)
    return [chosen[i::wanted] for i in range(wanted)]
