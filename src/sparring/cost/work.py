"""Floating-point operations, bytes and seconds of passes and of decoding; a product and its sum are two operations.

A token costs 2 operations per weight of the matrices it meets, a backward pass twice its forward pass. Attention is
counted over whole padded rows, masked or not, as a GPU computes it; a CPU computes less. Source: the cost model of docs/plan.md.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

from sparring.batching import batches
from sparring.cost.hardware import Rates
from sparring.cost.memory import FLOAT, STATES, Pass, Where, trained
from sparring.cost.shapes import Shape

_FREE = 8
"""Slots are filled again, or dropped, when one in so many is free (`play/slots.py`)."""


@dataclass(frozen=True)
class Item:
    """One prompt with its completions, in tokens."""

    prompt: int
    completions: tuple[int, ...]
    weight: float = 1.0
    """How many like it there are."""
    given: tuple[int, ...] = ()
    """Those completions that nobody played in this round."""

    @property
    def padded(self) -> int:
        """What it counts in a batch."""
        return self.prompt + sum(self.completions)


@dataclass(frozen=True)
class Work:
    """What is spent on one device, or on all together."""

    flops: float = 0.0
    moved: float = 0.0
    """Bytes."""
    seconds: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.moved + other.moved, self.seconds + other.seconds)

    def __mul__(self, times: float) -> Work:
        return Work(self.flops * times, self.moved * times, self.seconds * times)


@dataclass(frozen=True)
class Machine:
    """One model on one kind of device."""

    shape: Shape
    where: Where
    rates: Rates

    @property
    def matrices(self) -> int:
        """Weights that every token meets."""
        return self.shape.layers * self.shape.layer

    @property
    def read(self) -> float:
        """Bytes of weights that one pass reads."""
        return self.where.size * (self.matrices + self.shape.head)


def rows(items: Sequence[Item]) -> Pass:
    """One pass over items: a prompt once, the last token of a completion not at all; without its filler, about 3 %."""
    sizes = [i.prompt + sum(max(0, c - 1) for c in i.completions) for i in items]
    return Pass(len(items), max(sizes), sum(sizes), sum(sum(i.completions) for i in items))


def alone(items: Sequence[Item]) -> Pass:
    """One pass of the plain path: a padded row for every completion."""
    own = [i.prompt + c for i in items for c in i.completions]
    return Pass(len(own), max(own), max(own) * len(own), max(own) * len(own))


def forward(shape: Shape, p: Pass) -> float:
    """Operations of one forward pass."""
    attention = 4 * shape.queries * p.padded * p.longest * shape.layers
    return 2 * shape.layers * shape.layer * p.tokens + attention + 2 * shape.head * p.scored


def backward(shape: Shape, where: Where, p: Pass) -> float:
    """Operations of its backward pass: for inputs and for weights, which an adapter's base has none of; checkpointed
    layers are computed again first."""
    whole = forward(shape, p)
    frozen = 2 * (shape.layers * shape.layer * p.tokens + shape.head * p.scored) if where.lora_rank else 0.0
    again = whole - 2 * shape.head * p.scored if where.checkpointing else 0.0
    return 2 * whole - frozen + again


def micro_batches(items: Sequence[Item], most_rows: int, most_tokens: int) -> list[list[Item]]:
    """An optimizer batch as the trainer splits it: by length, `gradient.py`."""
    ordered = sorted(items, key=lambda i: i.prompt + max(i.completions))
    spans = batches([i.padded for i in ordered], [1] * len(ordered), most_rows, most_tokens)
    return [[ordered[at] for at in span] for span in spans]


def scored(items: Sequence[Item], most_rows: int, most_tokens: int) -> list[list[Item]]:
    """Rows as `logps.score` batches them."""
    ordered = sorted(items, key=lambda i: i.padded)
    counts = [len(i.completions) for i in ordered]
    return [[ordered[at] for at in s] for s in batches([i.padded for i in ordered], counts, most_rows, most_tokens)]


def scoring(machine: Machine, passes: Sequence[Pass]) -> Work:
    """Forward passes of which nothing is kept."""
    total = Work()
    for p in passes:
        flops = forward(machine.shape, p)
        seconds = max(flops / machine.rates.score, machine.rates.launch * machine.shape.layers)
        total += Work(flops, machine.read, seconds)
    return total


def gathering(machine: Machine, passes: int, link: float) -> Work:
    """What devices that share a player's weights send, all together, to make so many passes."""
    n = machine.where.devices
    rounds, share = -(-passes // n), (n - 1) / n
    moved = share * rounds * FLOAT * machine.shape.parameters
    return Work(0.0, moved * n, moved / link)


def learning(machine: Machine, passes: Sequence[Pass], *, coupled: bool, companions: int) -> Work:
    """Forward and backward passes of one optimizer step; on several devices they wait for weights and gradients."""
    shape, where, rates = machine.shape, machine.where, machine.rates
    total = Work()
    for p in passes:
        once = forward(shape, p)
        flops = once * (1 + coupled + companions) + backward(shape, where, p)
        launches = 3 + coupled + companions + where.checkpointing
        moved = machine.read * launches
        total += Work(flops, moved, max(flops / rates.train, launches * rates.launch * shape.layers))
    return total


def update(machine: Machine, optimizer: str) -> Work:
    """One step of the optimizer: a gradient is read, scaled and read; states and weights are read and written."""
    changed = trained(machine.shape, machine.where) / machine.where.devices
    moved = FLOAT * changed * (4 + 2 * (1 + STATES[optimizer]))
    return Work(0.0, moved, moved / machine.rates.update)


def exchange(machine: Machine, passes: int, link: float) -> Work:
    """What fully sharded devices send in one step: weights for every forward and backward pass, then gradients."""
    n, shape = machine.where.devices, machine.shape
    if n == 1:
        return Work()
    share = (n - 1) / n
    moved = share * passes * FLOAT * (2 * shape.parameters + trained(shape, machine.where))
    return Work(0.0, moved, moved / link)


def answering(machine: Machine, asked: Sequence[tuple[int, int]], width: int, *, repeats: int, models: int) -> Work:
    """Decoding a chunk: (prompt, answer) tokens of its rows, `width` at a time; a prompt is read once for `repeats`."""
    shape, rates = machine.shape, machine.rates
    ordered = sorted(asked, reverse=True)
    read = Work()
    for prompt, times in Counter(prompt for prompt, _ in ordered[::repeats]).items():
        read += scoring(machine, [rows([Item(prompt, ())])]) * times
    mean = sum(p + a / 2 for p, a in ordered) / len(ordered)
    total = Work(read.flops, read.moved, read.flops / rates.score)
    for held, steps in decoding([answer for _, answer in ordered], width):
        own = 2 * (machine.matrices + shape.head) + 4 * shape.queries * shape.layers * mean
        keys = 2 * shape.keys * shape.layers * mean * machine.where.size
        drawn = 0.0 if rates.measured else 8 * FLOAT * shape.vocabulary
        flops, moved = held * own, machine.read + held * (keys + drawn)
        busy = flops / rates.decode + moved / rates.bandwidth + rates.draw * held * shape.vocabulary
        total += Work(flops, moved, max(busy, rates.launch * shape.layers)) * steps
    return total * models


def decoding(lengths: Sequence[int], width: int) -> Iterator[tuple[int, int]]:
    """Slots computed at a time and for how many steps, as `play/slots.py` fills and drops them.

    The first token of an answer comes with its prompt, so that an answer of n tokens takes n − 1 steps.
    """
    waiting, ends, now = deque(n - 1 for n in lengths), list[int](), 0
    width = min(width, len(lengths))
    while waiting or ends:
        free = width - len(ends)
        if free >= max(1, width // _FREE):
            if waiting:
                for _ in range(min(free, len(waiting))):
                    heappush(ends, now + waiting.popleft())
                while ends and ends[0] <= now:
                    heappop(ends)
                continue
            width = len(ends)
        steps = ends[0] - now
        yield width, steps
        now = ends[0]
        while ends and ends[0] <= now:
            heappop(ends)
