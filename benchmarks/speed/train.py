"""The training of one round, sparring against TRL's DPOTrainer: same pairs, start, order, optimizer, epochs and threads.

    python benchmarks/speed/train.py --out benchmarks/speed/results/train.jsonl          # both models, three shapes
    python benchmarks/speed/train.py --models 8M --shapes ragged --pairs 64 --repeats 5
    python benchmarks/speed/train.py --models 8M --dtype float32 --repeats 1             # the tight check of losses
    python benchmarks/speed/train.py --device cuda --models 1B --epochs 1                # both on one GPU

TRL runs in its best settings: bf16 autocast over float32 weights (as sparring), no checkpointing, reference log-probs
precomputed before the clock starts (so are sparring's frozen ones), the fastest of sdpa and eager attention and of
per-device batch sizes 1, 2 and 4 in a trial of one optimizer step (`--trl` names what an earlier one found). Its
collator right-pads. It has a process of its own, with glibc's defaults or, by `--kept`, one that keeps the memory it
frees, as sparring's does: page faults can be a third of its time (docs/log.md). sparring runs with the faster of `train.micro_tokens` 4096, the default,
and 8192 in such a trial, else in its defaults for trainings of five minutes or more, with compiled layers, for which
compiling (`compiling`: at first, and later from the cache) is done before the clock starts; `--compile never` is what it
does in shorter ones. Both: RMSprop (α 0.99, ε 1e-8), constant rate, gradient norm cut at 1, β 0.1, logistic loss.

The check: `step_loss_gap` is the largest difference of the losses that both logged at the same step; `end_loss` is that
of the trained weights on all pairs, in float32 by one function for both. They must agree within `tolerance`, which
is for bfloat16 what rounding of forward passes gives and for float32 what another order of summation gives.

On a GPU the row has for both sides tokens a second, the most gigabytes that tensors took in a training, the start's
weights among them, and `mfu`: operations that the pairs need (`floor.py`) a second, as a share of the data sheet's peak.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import record

record.quiet()

import floor  # noqa: E402
import shapes  # noqa: E402
import theirs  # noqa: E402
import torch  # noqa: E402

from sparring import compiled, heap  # noqa: E402
from sparring.config import TrainConfig  # noqa: E402
from sparring.cost.hardware import DEVICES  # noqa: E402
from sparring.gradient import Setting, gradient  # noqa: E402
from sparring.logps import score  # noqa: E402
from sparring.methods import make  # noqa: E402
from sparring.train import train  # noqa: E402
from sparring.types import Frozen, Group  # noqa: E402

BETA = 0.1
KEPT = {
    "MALLOC_MMAP_THRESHOLD_": str(2**33),
    "MALLOC_TRIM_THRESHOLD_": str(2**34),
    "MALLOC_TOP_PAD_": str(2**28),
}
"""What has glibc keep memory."""
MICRO_TOKENS = (4096, 8192)
TOLERANCE = {"bfloat16": 2e-2, "float32": 1e-4}


class Memory:
    """Where a training that nobody means to continue keeps its log."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def load(self) -> None:
        return None

    def save(self, step: int, tensors: dict[str, torch.Tensor]) -> None:
        pass

    def log(self, row: dict[str, float]) -> None:
        self.losses.append(row["loss"])

    def keep_batch(self, step: int, groups: Sequence[Group]) -> str:
        return "nowhere"


def logps(model: Any, groups: Sequence[Group], compute: torch.dtype) -> list[tuple[tuple[float, ...], ...]]:
    """Per-token log-probs of both completions of every group."""
    prompts = [g.prompt for g in groups for _ in g.completions]
    lines = iter(score(model, prompts, [c for g in groups for c in g.completions], batch_size=8, compute=compute))
    return [tuple(next(lines) for _ in g.completions) for g in groups]


def end_loss(model: Any, start: Any, groups: Sequence[Group]) -> float:
    """The mean loss of trained weights against their start, in float32."""

    def margins(which: Any) -> torch.Tensor:
        return torch.tensor([sum(a) - sum(b) for a, b in logps(which, groups, torch.float32)])

    return float(torch.nn.functional.softplus(-BETA * (margins(model) - margins(start))).mean())


@dataclass(frozen=True)
class World:
    """What both sides start from."""

    start: Any
    groups: list[Group]
    settings: TrainConfig
    compute: torch.dtype


def world(name: str, shape: str, given: Any) -> World:
    start = shapes.model(name).to(given.device)
    groups = [shapes.group(pair) for pair in shapes.pairs(shape, given.pairs, start.config.vocab_size)]
    settings = TrainConfig(lr=given.lr, schedule="constant", warmup=0, epochs=given.epochs, batch_size=given.batch)
    return World(start, groups, settings, getattr(torch, given.dtype))


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds of a training, and the most gigabytes that tensors on a GPU took."""
    cuda = torch.cuda.is_available()

    def whole() -> None:
        work()
        if cuda:
            torch.cuda.synchronize()

    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    seconds, _ = record.clock(whole)
    return seconds, torch.cuda.max_memory_allocated() / 1e9 if cuda else 0.0


def reached(own: World, sides: Mapping[str, tuple[float, float]]) -> dict[str, Any]:
    """What each side's seconds and gigabytes come to on this GPU."""
    size, epochs = own.compute.itemsize, own.settings.epochs
    pairs = [(len(g.prompt), [len(c) for c in g.completions]) for g in own.groups]
    operations = floor.completed(floor.sizes(own.start, size), pairs, learns=True).operations * epochs
    tokens = epochs * sum(prompt + sum(both) for prompt, both in pairs)
    name = torch.cuda.get_device_name()
    known = [d for d in DEVICES.values() if re.search(rf"\b{d.name.split('-')[0].replace('RTX', 'RTX ')}\b", name)]
    peak = (known[0].bf16 if size == 2 else known[0].fp32) if known else None

    def told(seconds: float, gigabytes: float) -> dict[str, float | None]:
        share = None if peak is None else round(operations / seconds / peak, 3)
        return {"tokens_per_second": round(tokens / seconds), "peak_gb": round(gigabytes, 2), "mfu": share}

    return {"gpu": name} | {side: told(*figures) for side, figures in sides.items()}


def usual(given: Any) -> None:
    """TRL's side, in a process of its own."""
    name, shape = record.task()
    own = world(name, shape, given)
    words, bf16 = shapes.tokenizer(own.start.config.vocab_size), given.dtype == "bfloat16"
    choice = theirs.choose(own.start, words, own.groups, own.settings, bf16=bf16, beta=BETA, known=given.trl)

    def work() -> dict[str, Any]:
        gc.collect()
        learner = copy.deepcopy(own.start)
        learner.set_attn_implementation(choice.attention)
        made = theirs.trainer(learner, words, own.groups, own.settings, micro=choice.micro, bf16=bf16, beta=BETA)
        seconds, gigabytes = timed(made.train)
        end = end_loss(learner, own.start, own.groups)
        return {
            "seconds": seconds,
            "gigabytes": gigabytes,
            "losses": theirs.losses(made),
            "end_loss": end,
            "choice": choice.row(),
        }

    record.serve(work)


def compare(name: str, shape: str, given: Any) -> dict[str, Any]:
    """One line: a model and a shape."""
    own = world(name, shape, given)
    start, groups, compute = own.start, own.groups, own.compute
    frozen = {"reference": [Frozen(g.sha, "reference", "start", line) for g, line in zip(groups, logps(start, groups, compute), strict=True)]}  # fmt: skip
    method = make("spin", {"beta": BETA})
    learners: list[Any] = []
    logged: list[float] = []
    held_most: list[float] = []
    compiling: list[float] = []

    def once(learner: Any, held: Mapping[str, Sequence[Frozen]]) -> None:
        gradient(learner, groups[: given.batch], held, method, micro_batch=64, setting=Setting(compute))
        learner.zero_grad(set_to_none=True)

    def ours(part: Sequence[Group], micro: int) -> float:
        gc.collect()
        states, learner = Memory(), copy.deepcopy(start)
        held = {role: rows[: len(part)] for role, rows in frozen.items()}
        settings = own.settings.model_copy(update={"micro_tokens": micro})
        with contextlib.ExitStack() as stack:
            if given.compile == "always":
                first = {role: rows[: given.batch] for role, rows in held.items()}
                compiling.append(record.clock(lambda: compiled.begin(stack, learner, lambda: once(learner, first)))[0])
            seconds, gigabytes = timed(
                lambda: train(learner, part, held, method, settings, states, seed=0, setting=Setting(compute))
            )
        learners[:], logged[:], held_most[:] = [learner], states.losses, [gigabytes]
        return seconds

    if given.device == "cpu":
        heap.keep()
    peer = record.Peer([sys.executable, *sys.argv, "--child", "usual"], **(KEPT if given.kept else {}))
    told = peer.ask([name, shape])

    def trl() -> float:
        nonlocal told
        told = peer.ask()
        return float(told["seconds"])

    ours(groups[: given.batch], MICRO_TOKENS[0])
    trials = {micro: min(ours(groups[: given.batch], micro) for _ in range(theirs.TRIALS)) for micro in MICRO_TOKENS}
    micro = min(trials, key=lambda key: trials[key])
    seconds = record.interleaved(lambda: ours(groups, micro), trl, given.repeats)
    peer.close()
    ends = {"sparring": end_loss(learners[0], start, groups), "trl": told["end_loss"]}
    gap = max(abs(a - b) for a, b in zip(logged, told["losses"], strict=True))
    far = max(gap, abs(ends["sparring"] - ends["trl"]))
    medians = [record.spread(side)["median"] for side in seconds]
    sides = {"sparring": (medians[0], held_most[0]), "trl": (medians[1], told["gigabytes"])}
    return {
        "benchmark": "train",
        "model": name,
        "parameters": start.num_parameters(),
        "shape": shape,
        "pairs": given.pairs,
        "tokens": sum(len(g.prompt) + len(c) for g in groups for c in g.completions),
        "epochs": given.epochs,
        "batch": given.batch,
        "steps": len(logged),
        "dtype": given.dtype,
        "sparring": record.spread(seconds[0])
        | {
            "micro_tokens": {str(micro): round(value, 3) for micro, value in trials.items()},
            "compiling": [round(x, 1) for x in compiling],
        },
        "trl": record.spread(seconds[1]) | told["choice"] | {"kept": given.kept},
        "ratio": record.faster(*seconds),
        "step_losses": {"sparring": logged, "trl": told["losses"]},
        "step_loss_gap": gap,
        "end_loss": ends,
        "tolerance": TOLERANCE[given.dtype],
        "same": far <= TOLERANCE[given.dtype],
    } | ({"on_gpu": reached(own, sides)} if given.device == "cuda" else {})


def parsed(options: argparse.ArgumentParser) -> argparse.Namespace:
    """The options of a benchmark that trains."""
    options.add_argument("--models", nargs="+", default=list(shapes.MODELS), choices=[*shapes.MODELS, *shapes.ON_GPUS])
    options.add_argument("--shapes", nargs="+", default=list(shapes.SHAPES), choices=list(shapes.SHAPES))
    options.add_argument("--pairs", type=int, default=64, help="a multiple of --batch")
    options.add_argument("--batch", type=int, default=16)
    options.add_argument("--epochs", type=int, default=2)
    options.add_argument("--lr", type=float, default=1e-5)
    options.add_argument("--repeats", type=int, default=5)
    known = [f"{attention},{micro}" for attention, micro in product(theirs.ATTENTION, theirs.MICRO)]
    options.add_argument("--trl", choices=known, help="TRL's settings, found by an earlier trial of the same shape")
    given = options.parse_args()
    if given.pairs % given.batch:
        options.error("--pairs must be a multiple of --batch: TRL's batches would not be sparring's")
    return given


def main() -> None:
    options = record.parser(__doc__)
    options.add_argument("--dtype", default="bfloat16", choices=list(TOLERANCE))
    options.add_argument("--compile", default="always", choices=["always", "never"])
    options.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    options.add_argument("--kept", action="store_true", help="TRL's process keeps the memory that it frees")
    given = parsed(options)
    if given.child:
        usual(given)
        return
    for name in given.models:
        for shape in given.shapes:
            record.emit(compare(name, shape, given), given.out)


if __name__ == "__main__":
    main()
