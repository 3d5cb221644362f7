"""This machine's speed at a model's shape: real micro-batches, passes and decoding steps of random weights, timed.

A model of the shape is made, with as many layers as 300M weights allow, and does what the stages do. Every figure is
the median of a few repetitions, of which none begins after forty seconds.
"""

from __future__ import annotations

import os
import random
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from sparring.config import Config, ModelConfig
from sparring.cost import work
from sparring.cost.estimate import uses_bf16
from sparring.cost.hardware import GIB, Device, Hardware, Rates
from sparring.cost.memory import Where
from sparring.cost.shapes import Shape
from sparring.cost.texts import Texts
from sparring.cost.work import Item, Machine
from sparring.errors import InputError
from sparring.types import Frozen, Group

if TYPE_CHECKING:
    from torch import nn

_MOST_WEIGHTS = 3e8
_SECONDS, _ALL = 4.0, 40.0
"""Of one figure's repetitions, and after which none is repeated any more."""
_STEPS = 8
_APART = 0.1
"""Share of its memory by which a GPU may differ from the table: what it keeps for itself."""
_WRITTEN = 2**25


def measure(config: Config, shape: Shape, given: Texts, hardware: Hardware) -> Rates:
    """What one device of this machine reaches with a recipe. Raises InputError where `hardware` is not this machine's."""
    import torch

    from sparring import heap
    from sparring.players import device_of

    device = device_of(config.model.model_copy(update={"device": "cuda" if hardware.device.cuda else "cpu"}))
    if hardware.device.cuda:
        here = torch.cuda.get_device_properties(device)
        check(hardware.device, here.name, here.total_memory)
    if isinstance(config.model.threads, int):
        torch.set_num_threads(config.model.threads)
    bf16 = uses_bf16(config, hardware)
    layers = max(1, min(shape.layers, int((_MOST_WEIGHTS - 2 * shape.head) / shape.layer)))
    small = Shape(**{**vars(shape), "layers": layers})
    where = Where(bf16, hardware.device.cuda, lora_rank=config.model.lora_rank)
    machine = Machine(small, where, Rates(1, 1, 1, 1, 1, 0))
    settings = config.rounds[-1]
    items = _items(given, settings.play.max_new_tokens)
    bench = _Bench(_model(small, device), config.model, torch.bfloat16 if bf16 else None, small.vocabulary)
    batch = work.micro_batches(
        items[: settings.train.batch_size], settings.train.micro_batch, settings.train.micro_tokens
    )
    micro = batch[len(batch) // 2]
    passes = work.scored(micro, 4 * settings.train.micro_batch, where.most_tokens)
    scored = work.scoring(machine, [work.rows(part) for part in passes]).flops / bench.score(micro)
    width = max(4, min(settings.play.batch_size, 32))
    prompt = max(1, round(sum(item.prompt for item in items) / len(items)))
    wide, narrow = bench.step(width, prompt), bench.step(width // 4, prompt)
    row = max((wide - narrow) / (width - width // 4), wide / width / 100)
    fixed = max(wide - row * width, wide / 100)
    if device.type == "cpu":
        heap.keep()  # as training does, and nothing before it
    learned = work.learning(machine, [work.rows(micro)], coupled=False, companions=0).flops / bench.learn(micro)
    optimizer = settings.train.optimizer
    updated = work.update(machine, optimizer).moved / bench.update(optimizer)
    own = 2 * (machine.matrices + small.head) + 4 * small.queries * small.layers * (prompt + _STEPS)
    disk = _disk(Path(config.run))
    return Rates(learned, scored, own / row, machine.read / fixed, updated, 0.0, disk, measured=True)


def check(device: Device, name: str, memory: float) -> None:
    """Raises InputError where a GPU, by what it says of itself, is another one than `device`."""
    model = device.name.partition("-")[0]
    alike = re.search(rf"\b{model}\b", name.replace("RTX ", "RTX"))
    if not alike or abs(memory / device.memory - 1) > _APART:
        raise InputError(
            f"--calibrate: this machine's GPU is {name} with {memory / GIB:.0f} GiB, not {device.name}; give it as "
            "--hardware, or leave out --calibrate"
        )


def _items(given: Texts, most: int) -> list[Item]:
    """Pairs of a gold and a played answer, in an order that has nothing to do with their lengths."""
    pairs = [Item(prompt, (gold, given.played(gold, most))) for prompt, gold in given.rows]
    return random.Random(0).choices(pairs, k=256)


def _model(shape: Shape, device: Any) -> nn.Module:
    """Random weights of a shape."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        shape.kind, hidden_size=shape.hidden, num_hidden_layers=shape.layers, num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_heads, head_dim=shape.head_width, intermediate_size=shape.inner,
        vocab_size=shape.vocabulary, max_position_embeddings=shape.context, tie_word_embeddings=shape.tied,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(0)
        made: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    return made


class _Bench:
    """A model that does what stages do, and how many seconds that takes."""

    def __init__(self, model: nn.Module, settings: ModelConfig, compute: Any, vocabulary: int) -> None:
        from sparring import adapters

        self._model, self._compute = model, compute
        base = adapters.Base("", None, "")
        self._learner = adapters.fresh(model, base, settings, 0) if settings.lora_rank else model
        self._random, self._vocabulary = random.Random(0), vocabulary
        self._end = time.monotonic() + _ALL

    def learn(self, items: Sequence[Item]) -> float:
        """Forward and backward pass of one micro-batch, of SPIN's loss."""
        from sparring import methods
        from sparring.gradient import Setting, gradient

        groups = [self._group(item) for item in items]
        frozen = [Frozen(g.sha, "reference", "", tuple((-1.0,) * len(c) for c in g.completions)) for g in groups]
        method = methods.make("spin", {})

        def work() -> None:
            gradient(
                self._learner, groups, {"reference": frozen}, method,
                micro_batch=len(groups), micro_tokens=1 << 40, setting=Setting(self._compute),
            )  # fmt: skip

        return self._median(work)

    def update(self, optimizer: str) -> float:
        """The optimizer's step behind the clipping of gradients."""
        from torch import nn

        from sparring.config import TrainConfig
        from sparring.train import make_optimizer

        parameters = [p for p in self._learner.parameters() if p.requires_grad]
        made = make_optimizer(parameters, TrainConfig(optimizer=optimizer))  # type: ignore[arg-type]

        def work() -> None:
            float(nn.utils.clip_grad_norm_(parameters, 1.0))
            made.step()

        seconds = self._median(work)
        made.zero_grad(set_to_none=True)
        return seconds

    def score(self, items: Sequence[Item]) -> float:
        """Log-probs of which nothing is kept."""
        from sparring.logps import score

        groups = [self._group(item) for item in items]
        prompts = [g.prompt for g in groups for _ in g.completions]
        completions = [c for g in groups for c in g.completions]
        return self._median(
            lambda: score(self._model, prompts, completions, batch_size=len(prompts), compute=self._compute)
        )

    def step(self, width: int, prompt: int) -> float:
        """One decoding step of `width` rows: the difference between long and short answers."""
        from sparring.play.hf import sample

        prompts = [self._ids(prompt) for _ in range(width)]

        def answer(length: int) -> Callable[[], object]:
            return lambda: sample(
                self._model, prompts, list(range(width)),
                temperature=1.0, max_new_tokens=length, stop_ids=[], batch_size=width, compute=self._compute,
            )  # fmt: skip

        return max(1e-9, (self._median(answer(1 + _STEPS)) - self._median(answer(1))) / _STEPS)

    def _median(self, work: Callable[[], object]) -> float:
        work()
        seconds: list[float] = []
        while not seconds or (time.monotonic() < self._end and _wanted(seconds)):
            self._wait()
            started = time.perf_counter()
            work()
            self._wait()
            seconds.append(time.perf_counter() - started)
        return median(seconds)

    def _wait(self) -> None:
        import torch

        if next(self._model.parameters()).is_cuda:
            torch.cuda.synchronize()

    def _ids(self, length: int) -> tuple[int, ...]:
        return tuple(self._random.randrange(self._vocabulary) for _ in range(length))

    def _group(self, item: Item) -> Group:
        completions = tuple(self._ids(length) for length in item.completions)
        return Group("", self._ids(item.prompt), completions, (1.0, 0.0), 1.0, ("gold", ""), 0)


def _wanted(seconds: Sequence[float]) -> bool:
    return len(seconds) < 3 or (sum(seconds) < _SECONDS and len(seconds) < 9)


def _disk(run: Path) -> float:
    """Bytes/s that reach the disk on which a run lies."""
    folder = next(parent for parent in run.absolute().parents if parent.is_dir())
    block = bytes(_WRITTEN)
    try:
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            started = time.perf_counter()
            file.write(block)
            file.flush()
            os.fsync(file.fileno())
            return _WRITTEN / (time.perf_counter() - started)
    except OSError as error:
        raise InputError(f"{folder}: cannot write there ({error.strerror}); give another folder as run=…") from None
