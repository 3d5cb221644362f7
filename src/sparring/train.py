"""Groups and frozen log-probs to the next weights; knows no method.

The objective of a step is sum(weight * loss) / sum(weight) over the optimizer batch, however it is split into
micro-batches. Nothing here is random but the order of groups, which is a function of (seed, epoch): a killed run that
reloads its last state takes the very same steps. A guard, where there is one, measures the learner now and then: past a
limit, training goes back to its last good step and on with a smaller rate, or ends there.
"""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sparring import lowbit
from sparring.config import TrainConfig
from sparring.errors import NonFiniteError
from sparring.gradient import Objective, Setting, gradient
from sparring.sharding import Sharded
from sparring.types import Frozen, Group

log = logging.getLogger("sparring")


class Guard(Protocol):
    """What watches a training."""

    @property
    def checks(self) -> int:
        """Measurements per round."""
        ...

    @property
    def backoff(self) -> float:
        """Share of the rate to go on with after a limit was crossed."""
        ...

    @property
    def backoffs(self) -> int:
        """How often, before training ends at its last good step."""
        ...

    def read(self, model: nn.Module) -> dict[str, float]:
        """The learner's figures."""
        ...

    def crossed(self, reading: Mapping[str, float]) -> str | None:
        """Which limit a reading lies beyond, in words."""
        ...


@dataclass(frozen=True)
class Outcome:
    """How a training ended."""

    steps: int
    """The last step taken that stayed."""
    total: int
    backoffs: int
    """How often a limit was crossed."""


class States(Protocol):
    """Where training keeps what it needs to go on after a kill."""

    def load(self) -> tuple[int, dict[str, Tensor]] | None: ...

    def save(self, step: int, tensors: dict[str, Tensor]) -> None: ...

    def log(self, row: dict[str, float]) -> None: ...

    def keep_batch(self, step: int, groups: Sequence[Group]) -> str: ...


def train(
    model: nn.Module,
    groups: Sequence[Group],
    frozen: Mapping[str, Sequence[Frozen]],
    objective: Objective,
    settings: TrainConfig,
    states: States,
    *,
    seed: int,
    setting: Setting = Setting(),
    guard: Guard | None = None,
    on_step: Callable[[int, int, Mapping[str, float]], None] = lambda done, total, row: None,
) -> Outcome:
    """Train `model` in place, from its last saved state if there is one.

    `frozen[role]` is aligned with `groups`. `on_step` is told the step that stands, the last one, and of a step its
    figures and `tokens`, at the start and behind a limit the number of `backoffs`. Raises NonFiniteError before a step
    whose loss or gradient is not finite; the batch is kept and the last saved state stays valid.
    """
    trained = trained_parameters(model, setting.extras)
    # Shards and whole tensors do not go into one kernel
    together = None if setting.team is None or setting.extras is None else False
    optimizer = make_optimizer(trained.values(), settings, foreach=together)
    total, end = total_steps(len(groups), settings), last_step(len(groups), settings)
    every = max(1, end // guard.checks) if guard else end
    step, backoffs = _restore(trained, optimizer, settings, states.load())
    prepare(model, settings)
    if guard and step == 0 and backoffs == 0:
        states.save(0, _snapshot(trained, optimizer, 0))
    on_step(step, end, {"backoffs": backoffs})
    while step < end and (guard is None or backoffs <= guard.backoffs):
        started = time.perf_counter()
        rows = batch_rows(step, len(groups), settings.batch_size, seed)
        chosen = [groups[i] for i in rows]
        held = {role: [table[i] for i in rows] for role, table in frozen.items()}
        keys = [_key(seed, step, i) for i in rows]
        optimizer.zero_grad(set_to_none=True)
        got = gradient(
            model, chosen, held, objective,
            micro_batch=settings.micro_batch, micro_tokens=settings.micro_tokens, setting=setting, keys=keys,
        )  # fmt: skip
        norm = _clipped(trained.values(), settings.clip or math.inf, setting)
        if not (math.isfinite(got.loss) and math.isfinite(norm)):
            kept = states.keep_batch(step, chosen)
            raise NonFiniteError(
                f"step {step + 1}: the loss is {got.loss:g} and its gradient's norm {norm:g}; the step was not taken, "
                f"its batch is kept in {kept}; try a lower train.lr or train.clip"
            )
        lr = settings.lr * lr_factor(step, total, settings) * (guard.backoff**backoffs if guard else 1.0)
        for parameters in optimizer.param_groups:
            parameters["lr"] = lr
        optimizer.step()
        done = step + 1
        row = {"step": done, "loss": got.loss, "grad_norm": norm, "lr": lr, **got.metrics}
        reading = guard.read(model) if guard and (done % every == 0 or done == end) else {}
        beyond = guard.crossed(reading) if guard and reading else None
        if beyond:
            backoffs += 1
            step, _ = _restore(trained, optimizer, settings, states.load())
            log.warning("step %d: %s; back to step %d, backoff %d", done, beyond, step, backoffs)
            states.log({"step": step, "backoff": backoffs, "crossed_at": done, **reading})
            states.save(step, _snapshot(trained, optimizer, backoffs))
            on_step(step, end, {"backoffs": backoffs})
            continue
        if done % settings.log_every == 0 or done == end or reading:
            states.log(row | reading | {"tokens": got.tokens, "seconds": time.perf_counter() - started})
        # A guarded training has states where it was measured only: save_every must not decide where it goes back to
        if done < end and (reading if guard else done % settings.save_every == 0):
            states.save(done, _snapshot(trained, optimizer, backoffs))
        step = done
        on_step(step, end, row | {"tokens": got.tokens})
    optimizer.zero_grad(set_to_none=True)
    model.eval()
    return Outcome(step, end, backoffs)


def _key(seed: int, step: int, row: int) -> int:
    digest = hashlib.blake2b(repr(("train", seed, step, row)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _clipped(parameters: Iterable[nn.Parameter], most: float, setting: Setting) -> float:
    """Scale gradients to a norm of at most `most`; returns the norm before."""
    if setting.team is not None:
        return setting.team.clip(parameters, most)
    return float(nn.utils.clip_grad_norm_(parameters, most))


def trained_parameters(model: nn.Module, extras: nn.Module | None) -> dict[str, nn.Parameter]:
    """Name to parameter, of all that training changes: an adapter's base is left alone."""
    own = model.model if isinstance(model, Sharded) else model
    named = {name: p for name, p in own.named_parameters() if p.requires_grad}
    return named | ({f"extras/{name}": p for name, p in extras.named_parameters()} if extras is not None else {})


def make_optimizer(
    parameters: Iterable[nn.Parameter], settings: TrainConfig, foreach: bool | None = None
) -> torch.optim.Optimizer:
    """RMSprop (α .99, no momentum: vectors V17), AdamW, or one of `lowbit`'s; matrices decay, vectors do not."""
    trained = list(parameters)
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if settings.optimizer == "rmsprop":
        return torch.optim.RMSprop(groups, lr=settings.lr, eps=settings.eps, foreach=foreach)
    if settings.optimizer in lowbit.OPTIMIZERS:
        return lowbit.optimizer(groups, settings)
    # One pass over all numbers of a step instead of a dozen; shards and whole tensors together do not go into it
    fused = True if foreach is None and all(p.device.type in ("cpu", "cuda") for p in trained) else None
    return torch.optim.AdamW(
        groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, foreach=foreach, fused=fused
    )


def total_steps(n_groups: int, settings: TrainConfig) -> int:
    """Optimizer steps of a round: the last batch of an epoch may be smaller."""
    steps = math.ceil(n_groups / settings.batch_size) * settings.epochs
    return min(steps, settings.max_steps) if settings.max_steps else steps


def last_step(n_groups: int, settings: TrainConfig) -> int:
    """The step at which a round ends: that of `stop_epoch`, which the schedule does not know of."""
    total = total_steps(n_groups, settings)
    return min(total, math.ceil(n_groups / settings.batch_size) * settings.stop_epoch) if settings.stop_epoch else total


def lr_factor(step: int, total: int, settings: TrainConfig) -> float:
    """Share of the peak learning rate at optimizer step `step`, counted from 0.

    Warm-up rises from 0 over ceil(warmup * total) steps, so the first step of a warm-up has rate 0; this and the decay
    to `floor` at `total` are the schedule of the published recipes (vectors V17). The last step is never warm-up: a
    round of one step would move nothing.
    """
    warmup = math.ceil(settings.warmup * total) if settings.warmup < 1 else int(settings.warmup)
    warmup = min(warmup, total - 1)
    if step < warmup:
        return step / warmup
    if settings.schedule == "constant":
        return 1.0
    done = (step - warmup) / max(1, total - warmup)
    left = 1 - done if settings.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return settings.floor + (1 - settings.floor) * max(0.0, left)


def batch_rows(step: int, n_groups: int, batch_size: int, seed: int) -> list[int]:
    """Which groups optimizer step `step` takes: consecutive slices of one seeded shuffle per epoch."""
    epoch, at = divmod(step, math.ceil(n_groups / batch_size))
    rows: list[int] = _shuffle(n_groups, seed * 1_000_003 + epoch)[at * batch_size : (at + 1) * batch_size].tolist()
    return rows


@lru_cache(maxsize=1)  # made anew at every step, an epoch's shuffles would take time quadratic in the groups
def _shuffle(size: int, seed: int) -> Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))


def prepare(model: nn.Module, settings: TrainConfig) -> None:
    """Set a learner up for training, dropout off: the frozen log-probs were taken without it, so a round would not start at log 2."""
    model.eval()
    if settings.gradient_checkpointing:
        # transformers recomputes activations only in training mode, so every dropout is set to 0 by hand.
        for module in model.modules():
            for name, value in vars(module).items():
                if "drop" in name and isinstance(value, float):
                    setattr(module, name, 0.0)
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        model.train()
        own: Any = model.model if isinstance(model, Sharded) else model
        own.activation_checkpointing_enable({"use_reentrant": False})


def _snapshot(
    trained: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, backoffs: int
) -> dict[str, Tensor]:
    tensors = {f"model/{name}": parameter.detach() for name, parameter in trained.items()}
    for name, parameter in trained.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if key not in lowbit.TABLES:
                tensors[f"optimizer/{key}/{name}"] = torch.as_tensor(value)
    return tensors | {"backoffs": torch.tensor(backoffs)}


def _restore(
    trained: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    settings: TrainConfig,
    state: tuple[int, dict[str, Tensor]] | None,
) -> tuple[int, int]:
    """Step and backoffs of a saved state, whose tensors are put back; (0, 0) for a fresh start."""
    if state is None:
        return 0, 0
    step, tensors = state
    keys = {path.split("/", 2)[1] for path in tensors if path.startswith("optimizer/")}
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(tensors[f"model/{name}"])
            held = {key: value for key in keys if (value := tensors.get(f"optimizer/{key}/{name}")) is not None}
            if settings.optimizer in lowbit.OPTIMIZERS:
                lowbit.refill(optimizer, parameter, held)
            else:
                # Where one pass takes all numbers, it reads the count of steps on their device; else that stays on the CPU
                stays = () if optimizer.defaults.get("fused") else ("step",)
                optimizer.state[parameter] = {k: v if k in stays else v.to(parameter.device) for k, v in held.items()}
    return step, int(tensors["backoffs"])
