"""Each stage of a round against its floor: what its products and bytes would take at the speeds this machine shows.

    python benchmarks/speed/roofline.py --out benchmarks/speed/results/roofline.jsonl      # both models, ragged, bf16
    python benchmarks/speed/roofline.py --models 60M --shapes short/long long/short --stages training compiled
    python benchmarks/speed/roofline.py --dtype float32 --stages training --repeats 5

`floor.py` counts what the stages need. There are two floors. `rate`: all operations at the best rate found in a product of
two square matrices, or all bytes, weights included, at that of a large copy, whichever takes longer. `products`: the sum of all
matrix products, each in the time that one of its very sizes takes here, and of all other bytes at the copy's rate. A product
is timed warm, alone, operands in rows one after the other (`torch.mm`, `torch.bmm`), the fastest of several calls; for weights that
stay as they are throughout a stage (play, frozen) the faster of that and one with weights laid out beforehand. Products are timed
in each repeat before the stages, in the process and with the threads of the stages. `of_rate` and `of_products` are floor over stage.

Stages: `prefill` and `decode`, the two parts of sampling answers to all prompts in slots; `frozen`, log-probs of both
completions of every pair; `training`, one epoch of `spin` on those with frozen log-probs given, `compiled` with compiled layers
(compiling, 5 to 60 s, is before the clock). What the process frees it keeps, as in a run. `profile`: shares of
a stage's time by torch's profiler (which makes it longer: `slower`). `linear` is layers' products; `attention` and `vocabulary` (with log-softmax
and drawing) are all that they do; `optimizer` includes cutting the gradient; `other` is Python, views, dispatch and autograd's own.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import Any

import record

record.quiet()

import floor  # noqa: E402
import shapes  # noqa: E402
import torch  # noqa: E402
from floor import Need, Product  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402
from train import BETA, Memory, logps  # noqa: E402

from sparring import compiled, heap, packed  # noqa: E402
from sparring.config import TrainConfig  # noqa: E402
from sparring.gradient import Setting, gradient  # noqa: E402
from sparring.logps import packs  # noqa: E402
from sparring.methods import make  # noqa: E402
from sparring.play import hf, slots  # noqa: E402
from sparring.products import multiplies_bfloat16  # noqa: E402
from sparring.train import make_optimizer, train  # noqa: E402
from sparring.tree import Tree  # noqa: E402
from sparring.types import Frozen  # noqa: E402

STAGES = {"play": ("prefill", "decode"), "frozen": ("frozen",), "training": ("training",), "compiled": ("compiled",)}
SQUARES = (1024, 2048, 4096)
COPIED = 2**29
FIXED = {"prefill", "decode", "frozen"}
"""Stages in which weights stay as they are."""
TRIED = 2e-3
"""Seconds for which a product is called again and again."""


def fastest(work: Callable[[], Any]) -> float:
    """Seconds of the fastest of 3 to 30 calls after a first one."""
    work()
    found, until = [], time.perf_counter() + TRIED
    while len(found) < 3 or (len(found) < 30 and time.perf_counter() < until):
        found.append(record.clock(work)[0])
    return min(found)


class Machine:
    """Speeds of products and copies, taken anew after `forget`."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._pools: list[torch.Tensor] = [torch.empty(0, dtype=dtype)] * 3
        self._laid_out: dict[tuple[int, int], Any] = {}
        self._lays_out = dtype == torch.bfloat16 and multiplies_bfloat16()
        self._known: dict[tuple[Product, bool], float] = {}
        self.rates: dict[int, list[float]] = {size: [] for size in SQUARES}
        """Operations a second of square products."""
        self.copies: list[float] = []
        """Bytes read and written a second."""

    def forget(self) -> None:
        self._known.clear()
        for size in SQUARES:
            self.rates[size].append(2 * size**3 / self.product(Product(1, size, size, size)))
        here, there = (torch.ones(COPIED, dtype=torch.uint8) for _ in range(2))
        self.copies.append(2 * COPIED / fastest(lambda: there.copy_(here)))

    def product(self, of: Product, fixed: bool = False) -> float:
        """Seconds of a product; with `fixed` its second factor may be laid out beforehand."""
        if (of, fixed) not in self._known:
            self._known[of, fixed] = self._measured(of, fixed)
        return self._known[of, fixed]

    def _measured(self, of: Product, fixed: bool) -> float:
        batch, rows, inner, columns = of
        left, right, out = (
            self._factor(at, batch, *shape)
            for at, shape in enumerate(((rows, inner), (inner, columns), (rows, columns)))
        )
        if batch > 1:
            return fastest(lambda: torch.bmm(left, right, out=out))
        left, right, out = left[0], right[0], out[0]
        seconds = fastest(lambda: torch.mm(left, right, out=out))
        if not (fixed and self._lays_out):
            return seconds
        if (inner, columns) not in self._laid_out:
            self._laid_out[inner, columns] = torch.ops.mkldnn._reorder_linear_weight(right.view(columns, inner))
        weight, linear = self._laid_out[inner, columns], torch.ops.mkldnn._linear_pointwise
        return min(seconds, fastest(lambda: linear(left, weight, None, "none", [], "")))

    def _factor(self, at: int, *shape: int) -> torch.Tensor:
        size = shape[0] * shape[1] * shape[2]
        if self._pools[at].numel() < size:
            block = torch.rand(min(size, 2**20)).to(self._dtype)
            self._pools[at] = block.repeat(-(-size // block.numel()))
        return self._pools[at][:size].view(shape)

    def by_rate(self, need: Need) -> float:
        best = max(max(found) for found in self.rates.values())
        return max(need.operations / best, (need.weights + need.moved) / max(self.copies))

    def by_products(self, need: Need, fixed: bool) -> dict[str, float]:
        """Seconds of each kind of products, and of `bytes`."""
        found = {"bytes": need.moved / max(self.copies)}
        for (name, product), times in need.products.items():
            found[name] = found.get(name, 0.0) + times * self.product(product, fixed)
        return found


@contextlib.contextmanager
def told(owner: Any, name: str, listener: Callable[..., Callable[[], None] | None]) -> Iterator[None]:
    """Within it `listener` is told what `owner.name` is called with, and what it returns is called after it."""
    original = getattr(owner, name)

    def both(*given: Any, **how: Any) -> Any:
        after = listener(*given, **how)
        try:
            return original(*given, **how)
        finally:
            if after is not None:
                after()

    setattr(owner, name, both)
    try:
        yield
    finally:
        setattr(owner, name, original)


class World:
    """One model and shape of data; all stages of a round on them."""

    def __init__(self, name: str, shape: str, given: Any) -> None:
        self.start, self.compute = shapes.model(name), getattr(torch, given.dtype)
        vocabulary = self.start.config.vocab_size
        pairs = shapes.pairs(shape, max(given.pairs, given.prompts), vocabulary)
        self.of = floor.sizes(self.start, self.compute.itemsize)
        self.groups = [shapes.group(pair) for pair in pairs[: given.pairs]]
        self.prompts = [pair.prompt for pair in pairs[: given.prompts]]
        self.stops = shapes.stop_ids(shape, vocabulary)
        self.settings = TrainConfig(lr=1e-5, schedule="constant", warmup=0, epochs=1, batch_size=given.batch)
        self.method, self.slots = make("spin", {"beta": BETA}), given.slots
        assert slots.decodes(self.start)  # tried now, not in what is timed or recorded
        self.frozen: dict[str, list[Frozen]] = {}
        self.learners: dict[str, Any] = {}

    def play(self) -> dict[str, float]:
        """Seconds of both parts."""
        reading = 0.0

        def clocked(*_: Any) -> Callable[[], None]:
            began = time.perf_counter()

            def after() -> None:
                nonlocal reading
                reading += time.perf_counter() - began

            return after

        with told(slots.Slots, "fill", clocked):
            whole, _ = record.clock(self._sample)
        return {"prefill": reading, "decode": whole - reading}

    def _sample(self) -> None:
        keys = [hf.key(0, 0, str(i), 0) for i in range(len(self.prompts))]
        hf.sample(
            self.start, self.prompts, keys, temperature=1.0, max_new_tokens=shapes.MAX_NEW, stop_ids=self.stops,
            batch_size=self.slots, compute=self.compute,
        )  # fmt: skip

    def score(self) -> None:
        lines = zip(self.groups, logps(self.start, self.groups, self.compute), strict=True)
        self.frozen = {"reference": [Frozen(g.sha, "reference", "start", line) for g, line in lines]}

    def train(self, stage: str) -> int:
        """Steps taken by the stage's own learner."""
        states, setting = Memory(), Setting(self.compute)
        train(self.learners[stage], self.groups, self.frozen, self.method, self.settings, states, seed=0, setting=setting)  # fmt: skip
        return len(states.losses)

    def begin(self, stage: str, stack: contextlib.ExitStack) -> float:
        """Make the stage's learner; seconds of compiling."""
        learner = self.learners[stage] = copy.deepcopy(self.start)
        assert packs(learner)
        if stage != "compiled":
            return 0.0
        size = self.settings.batch_size
        first = {role: rows[:size] for role, rows in self.frozen.items()}

        def once() -> None:
            gradient(learner, self.groups[:size], first, self.method, micro_batch=64, setting=Setting(self.compute))
            learner.zero_grad(set_to_none=True)

        seconds, problem = record.clock(lambda: compiled.begin(stack, learner, once))
        if problem:
            raise SystemExit(f"layers are not compiled: {problem}")
        return seconds

    def seconds(self, stage: str) -> dict[str, float]:
        gc.collect()
        if stage == "play":
            return self.play()
        work = self.score if stage == "frozen" else lambda: self.train(stage)
        return {stage: record.clock(work)[0]}

    def needs(self, stage: str) -> dict[str, Need]:
        """What a stage's parts need, of the passes that it is found to make."""
        of, found = self.of, {part: Need() for part in STAGES[stage]}
        learns = stage in self.learners

        def completed(_: Any, prompts: Any, completions: Any, **__: Any) -> None:
            groups = [(len(p), [len(c) for c in own]) for p, own in zip(prompts, completions, strict=True)]
            found[stage].add(floor.completed(of, groups, learns))

        def read(_: Any, prompts: Any, __: Any) -> None:
            found["prefill"].add(floor.read(of, [len(p) for p in prompts]))

        def step(engine: Any, tokens: Any, _: int) -> None:
            taken = engine._grows[: len(tokens)] > 0
            found["decode"].add(floor.decoded(of, (engine._position[: len(tokens)][taken] + 1).tolist()))

        if stage == "play":
            found["prefill"].moved += of.cast
            with told(slots.Slots, "_read", read), told(slots.Slots, "step", step):
                self._sample()
            return found
        with told(packed, "completion_logps", completed):
            steps = self.train(stage) if learns else self.score()
        if learns:
            for _ in range(steps or 0):
                found[stage].add(floor.stepped(of, self.moments()))
        else:
            found[stage].moved += of.cast
        return found

    def moments(self) -> int:
        """Numbers that the optimizer keeps of each weight."""
        weight = torch.nn.Parameter(torch.ones(2, 2))
        weight.grad = torch.ones(2, 2)
        optimizer = make_optimizer([weight], self.settings)
        optimizer.step()
        return sum(torch.is_tensor(x) and x.shape == weight.shape for x in optimizer.state[weight].values())

    def profile(self, stage: str, usual: float) -> dict[str, float]:
        """Shares of a stage's time."""
        gc.collect()
        with contextlib.ExitStack() as stack:
            for owner, name, label in LABELS:
                stack.enter_context(told(owner, name, labelled(label)))
            found = stack.enter_context(profile(activities=[ProfilerActivity.CPU], record_shapes=True))
            seconds = sum(self.seconds(stage).values())
        assert found.profiler is not None and found.profiler.kineto_results is not None
        parts: Counter[str] = Counter()
        for event in found.profiler.kineto_results.experimental_event_tree():  # `events()` takes as long as the stage
            tally(event, None, self.of.vocabulary, parts)
        parts["other"] += seconds - sum(parts.values())
        shares = {name: round(parts[name] / seconds, 3) for name in KINDS}
        return shares | {"slower": round(seconds / usual, 2)}


def labelled(label: str) -> Callable[..., Callable[[], None]]:
    """For `told`: a call's time is the label's in a profile."""

    def listener(*_: Any, **__: Any) -> Callable[[], None]:
        span = torch.profiler.record_function(label)
        span.__enter__()
        return lambda: span.__exit__(None, None, None)

    return listener


LABELS = ((Tree, "attend", "attention"), (slots._Step, "attend", "attention"), (hf, "draw", "vocabulary"))
KINDS = ("linear", "attention", "vocabulary", "optimizer", "elementwise", "copies", "other")
PRODUCTS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::linear", "mkldnn::_linear_pointwise"}
COPIES = {"aten::copy_", "aten::cat", "aten::index_select", "aten::index", "aten::index_copy_", "aten::fill_"}
VIEWS = {
    *("aten::slice", "aten::as_strided", "aten::view", "aten::transpose", "aten::t", "aten::empty", "aten::to"),
    *("aten::empty_strided", "aten::reshape", "aten::expand", "aten::_unsafe_view", "aten::unsqueeze", "aten::select"),
    *("aten::_to_copy", "aten::clone", "aten::contiguous", "aten::detach", "aten::empty_like", "aten::resize_"),
}
OWN = {
    **dict.fromkeys(("attention", "_AttentionBackward", "TilesBackward", "WholeBackward"), "attention"),
    **dict.fromkeys(("_PadBackward", "_UnpadBackward"), "attention"),
    **dict.fromkeys(("vocabulary", "_InC", "_InCBackward", "_InTorch", "_InTorchBackward"), "vocabulary"),
}
"""Whose time includes that of all that they call."""
LAYERS = ("_Begin", "_End")
"""Of layers in C, without the products that they call."""


def tally(event: Any, whose: str | None, vocabulary: int, parts: Counter[str]) -> None:
    """Add the seconds of an operation, and of those that it calls, to `KINDS`."""
    whose = whose or ("optimizer" if event.name.startswith("Optimizer.step") else OWN.get(event.name))
    within = sum(child.duration_time_ns for child in event.children)
    parts[whose or kind(event, vocabulary)] += (event.duration_time_ns - within) / 1e9
    for child in event.children:
        tally(child, whose, vocabulary, parts)


def kind(event: Any, vocabulary: int) -> str:
    """Which of `KINDS` an operation is, by its name and sizes."""
    name = event.name
    if name.startswith("aten::_foreach"):  # the gradient's norm, and cutting it
        return "optimizer"
    if name in PRODUCTS:
        sizes = (getattr(given, "sizes", ()) for given in event.typed[1].inputs)
        return "vocabulary" if any(vocabulary in shape for shape in sizes) else "linear"
    if name in COPIES:
        return "copies"
    computes = name.startswith(("## Call CompiledFxGraph", *LAYERS)) or (
        name.startswith("aten::") and name not in VIEWS
    )
    return "elementwise" if computes else "other"


def measure(name: str, shape: str, given: Any, machine: Machine) -> dict[str, Any]:
    """One line: a model and a shape."""
    world = World(name, shape, given)
    seconds: dict[str, list[float]] = {}
    floors: dict[str, list[dict[str, float]]] = {}
    with contextlib.ExitStack() as stack:
        world.score()
        compiling = {stage: world.begin(stage, stack) for stage in given.stages if stage in ("training", "compiled")}
        needs = {part: need for stage in given.stages for part, need in world.needs(stage).items()}
        for _ in range(given.repeats):
            machine.forget()
            for part, need in needs.items():
                floors.setdefault(part, []).append(machine.by_products(need, part in FIXED))
            for stage in given.stages:
                for part, took in world.seconds(stage).items():
                    seconds.setdefault(part, []).append(took)
        profiles = {
            stage: world.profile(stage, sum(median(seconds[part]) for part in STAGES[stage])) for stage in given.stages
        }
    found = {}
    for part, need in needs.items():
        by_rate, products = machine.by_rate(need), [sum(parts.values()) for parts in floors[part]]
        found[part] = {
            "seconds": record.spread(seconds[part]),
            "gflop": round(need.operations / 1e9, 1),
            "mb": round(need.moved / 1e6, 1),
            "rate": round(by_rate, 4),
            "products": record.spread(products)
            | {"parts": {kind: round(median(each[kind] for each in floors[part]), 4) for kind in floors[part][0]}},
            "of_rate": round(by_rate / median(seconds[part]), 3),
            "of_products": share(products, seconds[part]),
        }
    return {
        "benchmark": "roofline",
        "model": name,
        "parameters": world.of.parameters,
        "shape": shape,
        "dtype": given.dtype,
        **{option: getattr(given, option) for option in ("pairs", "batch", "prompts", "slots")},
        "gflop_per_second": {size: record.spread([x / 1e9 for x in found]) for size, found in machine.rates.items()},
        "gb_per_second": record.spread([x / 1e9 for x in machine.copies]),
        "stages": found,
        "compiling": round(compiling.get("compiled", 0.0), 1),
        "profile": profiles,
    }


def share(floors: Sequence[float], seconds: Sequence[float]) -> dict[str, float]:
    """Floor over stage: of the medians, and the extremes over repeats."""
    each = [a / b for a, b in zip(floors, seconds, strict=True)]
    whole = median(floors) / median(seconds)
    return {"median": round(whole, 3), "min": round(min(each), 3), "max": round(max(each), 3)}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """What docs/speed.md has of the results."""
    lines = ["| model, data | stage | seconds | floor by products | share of it | floor by rate | share of it |"]
    lines.append("|---|---|---|---|---|---|---|")
    for row in rows:
        for part, x in row["stages"].items():
            of = x["of_products"]
            lines.append(
                f"| {row['model']}, {row['shape']} | {part} | {x['seconds']['median']:.2f} | {x['products']['median']:.2f} "
                f"| {of['median']:.0%} ({of['min']:.0%}–{of['max']:.0%}) | {x['rate']:.2f} | {x['of_rate']:.0%} |"
            )
    lines += ["", f"| model, data | stage | {' | '.join(KINDS)} | (bytes) |", "|---|---|---|" + "---|" * len(KINDS)]
    for row in rows:
        for stage, shares in row["profile"].items():
            parts = [row["stages"][part] for part in STAGES[stage]]
            whole, least = sum(x["seconds"]["median"] for x in parts), Counter[str]()
            for x in parts:
                least.update(x["products"]["parts"])
            floors = {name: f" ({seconds / whole:.0%})" for name, seconds in least.items()}
            cells = " | ".join(f"{shares[name]:.0%}{floors.get(name, '')}" for name in KINDS)
            lines.append(f"| {row['model']}, {row['shape']} | {stage} | {cells} | {floors['bytes'].strip()} |")
    return "\n".join(lines)


def main() -> None:
    options = record.parser(__doc__)
    options.add_argument("--models", nargs="+", default=list(shapes.MODELS), choices=list(shapes.MODELS))
    options.add_argument("--shapes", nargs="+", default=["ragged"], choices=list(shapes.SHAPES))
    options.add_argument("--stages", nargs="+", default=list(STAGES), choices=list(STAGES))
    options.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    options.add_argument("--pairs", type=int, default=32, help="for frozen log-probs and training")
    options.add_argument("--batch", type=int, default=16)
    options.add_argument("--prompts", type=int, default=128, help="to play")
    options.add_argument("--slots", type=int, default=64, help="answers played at a time")
    options.add_argument("--repeats", type=int, default=3)
    given = options.parse_args()
    heap.keep()
    rows = []
    for name in given.models:
        for shape in given.shapes:
            rows.append(measure(name, shape, given, Machine(getattr(torch, given.dtype))))
            record.emit(rows[-1], given.out)
    print("\n" + table(rows))


if __name__ == "__main__":
    main()
