"""Groups and frozen log-probs to the next weights; knows no method.

The objective of a step is sum(weight * loss) / sum(weight) over the optimizer batch, however it is split into
micro-batches. Nothing here is random but the order of groups, which is a function of (seed, epoch): a killed run that
reloads its last state takes the very same steps.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sparring.config import TrainConfig
from sparring.errors import NonFiniteError, SparringError
from sparring.logps import token_logps
from sparring.types import Batch, Frozen, Group, LogProbs

Loss = Callable[[LogProbs, Batch], Tensor]
Metrics = Callable[[LogProbs, Batch], Mapping[str, Tensor]]


class States(Protocol):
    """Where training keeps what it needs to go on after a kill."""

    def load(self) -> tuple[int, dict[str, Tensor]] | None: ...

    def save(self, step: int, tensors: dict[str, Tensor]) -> None: ...

    def log(self, row: dict[str, float]) -> None: ...

    def keep_batch(self, step: int, groups: Sequence[Group]) -> str: ...


@dataclass(frozen=True)
class Gradient:
    """What one optimizer batch gave, its gradient left in the parameters."""

    loss: float
    """sum(weight * loss) / sum(weight)."""
    metrics: dict[str, float]
    """Weighted means."""
    tokens: int
    """Tokens fed forward."""


def collate(
    groups: Sequence[Group],
    frozen: Mapping[str, Sequence[Frozen]],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> Batch:
    """Groups and their frozen log-probs, aligned, to a `Batch`; absent completions and tokens are masked."""
    size_G = max(len(g.completions) for g in groups)
    size_T = max(max(len(c) for c in g.completions) for g in groups)

    def table(rows_BG: Sequence[Sequence[Sequence[Any]]], kind: torch.dtype) -> Tensor:
        padded = [[[*row, *[0] * (size_T - len(row))] for row in group] for group in rows_BG]
        whole = [group + [[0] * size_T] * (size_G - len(group)) for group in padded]
        return torch.tensor(whole, dtype=kind, device=device)

    return Batch(
        tokens_BGT=table([g.completions for g in groups], torch.long),
        mask_BGT=table([[[1] * len(c) for c in g.completions] for g in groups], torch.bool),
        targets_BG=torch.tensor(
            [[*g.targets, *[0.0] * (size_G - len(g.targets))] for g in groups], dtype=dtype, device=device
        ),
        weight_B=torch.tensor([g.weight for g in groups], dtype=dtype, device=device),
        frozen={role: LogProbs(table([row.logps for row in rows], dtype)) for role, rows in frozen.items()},
    )


def policy_logps(model: nn.Module, groups: Sequence[Group], batch: Batch, compute: torch.dtype | None) -> LogProbs:
    """The learner's log-probs of a batch's completions, [B, G, T]."""
    where = [(b, g) for b, group in enumerate(groups) for g in range(len(group.completions))]
    prompts = [groups[b].prompt for b, _ in where]
    completions = [groups[b].completions[g] for b, g in where]
    rows = token_logps(model, prompts, completions, compute=compute)
    index = torch.tensor(where, device=rows.device)
    table = torch.zeros(batch.tokens_BGT.shape, dtype=rows.dtype, device=rows.device)
    return LogProbs(table.index_put((index[:, 0], index[:, 1]), rows))


def gradient(
    model: nn.Module,
    groups: Sequence[Group],
    frozen: Mapping[str, Sequence[Frozen]],
    loss: Loss,
    metrics: Metrics,
    *,
    micro_batch: int,
    compute: torch.dtype | None = None,
) -> Gradient:
    """Accumulate the gradient of one optimizer batch; the split into micro-batches does not change it.

    Micro-batches hold groups of similar length, so that little of them is padding.
    """
    first = next(model.parameters())
    device, dtype = first.device, torch.promote_types(first.dtype, torch.float32)
    total = sum(group.weight for group in groups)
    order = sorted(range(len(groups)), key=lambda i: (_length(groups[i]), i))
    sums: dict[str, Tensor] = {}
    tokens = 0
    for at in range(0, len(order), micro_batch):
        rows = order[at : at + micro_batch]
        part = [groups[i] for i in rows]
        batch = collate(part, {role: [table[i] for i in rows] for role, table in frozen.items()}, device, dtype)
        policy = policy_logps(model, part, batch, compute)
        share_B = batch.weight_B / total
        objective = _total(share_B, loss(policy, batch), "loss")
        objective.backward()  # type: ignore[no-untyped-call]
        for name, value in {"loss": objective.detach(), **_means(share_B, metrics(policy, batch))}.items():
            sums[name] = sums.get(name, torch.zeros((), dtype=value.dtype, device=device)) + value
        tokens += sum(len(g.completions) * len(g.prompt) + sum(map(len, g.completions)) for g in part)
    figures = {name: float(value) for name, value in sums.items()}
    return Gradient(figures.pop("loss"), figures, tokens)


def train(
    model: nn.Module,
    groups: Sequence[Group],
    frozen: Mapping[str, Sequence[Frozen]],
    loss: Loss,
    metrics: Metrics,
    settings: TrainConfig,
    states: States,
    *,
    seed: int,
    compute: torch.dtype | None = None,
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Train `model` in place, from its last saved state if there is one.

    `frozen[role]` is aligned with `groups`. Raises NonFiniteError before a step whose loss or gradient is not finite;
    the batch is kept and the last saved state stays valid.
    """
    optimizer = make_optimizer(model, settings)
    total = total_steps(len(groups), settings)
    first = _restore(model, optimizer, states.load())
    _prepare(model, settings)
    on_step(first, total)
    for step in range(first, total):
        started = time.perf_counter()
        rows = batch_rows(step, len(groups), settings.batch_size, seed)
        chosen = [groups[i] for i in rows]
        held = {role: [table[i] for i in rows] for role, table in frozen.items()}
        optimizer.zero_grad(set_to_none=True)
        got = gradient(model, chosen, held, loss, metrics, micro_batch=settings.micro_batch, compute=compute)
        norm = float(nn.utils.clip_grad_norm_(model.parameters(), settings.clip or math.inf))
        if not (math.isfinite(got.loss) and math.isfinite(norm)):
            kept = states.keep_batch(step, chosen)
            raise NonFiniteError(
                f"step {step + 1}: the loss is {got.loss:g} and its gradient's norm {norm:g}; the step was not taken, "
                f"its batch is kept in {kept}; try a lower train.lr or train.clip"
            )
        lr = settings.lr * lr_factor(step, total, settings)
        for parameters in optimizer.param_groups:
            parameters["lr"] = lr
        optimizer.step()
        done = step + 1
        if done % settings.log_every == 0 or done == total:
            row = {"step": done, "loss": got.loss, "grad_norm": norm, "lr": lr, **got.metrics}
            states.log(row | {"tokens": got.tokens, "seconds": time.perf_counter() - started})
        if done % settings.save_every == 0 and done < total:
            states.save(done, _snapshot(model, optimizer))
        on_step(done, total)
    optimizer.zero_grad(set_to_none=True)
    model.eval()


def make_optimizer(model: nn.Module, settings: TrainConfig) -> torch.optim.Optimizer:
    """RMSprop (α .99, no momentum: vectors V17) or AdamW; matrices decay, vectors (norms, biases) do not."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if settings.optimizer == "rmsprop":
        return torch.optim.RMSprop(groups, lr=settings.lr, eps=settings.eps)
    return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps)


def total_steps(n_groups: int, settings: TrainConfig) -> int:
    """Optimizer steps of a round: the last batch of an epoch may be smaller."""
    steps = math.ceil(n_groups / settings.batch_size) * settings.epochs
    return min(steps, settings.max_steps) if settings.max_steps else steps


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
    shuffle = torch.randperm(n_groups, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
    rows: list[int] = shuffle[at * batch_size : (at + 1) * batch_size].tolist()
    return rows


def _length(group: Group) -> int:
    return len(group.prompt) + max(map(len, group.completions))


def _total(share_B: Tensor, values_B: Tensor, name: str) -> Tensor:
    """sum(share * value); a [B, 1] value would broadcast to [B, B] and train on a sum of everything with everything."""
    if values_B.shape != share_B.shape:
        raise SparringError(
            f"the method's {name} has shape {list(values_B.shape)}; one number per group, {list(share_B.shape)}, is wanted"
        )
    return (share_B * values_B).sum()


def _means(share_B: Tensor, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: _total(share_B, value, f"metric `{name}`") for name, value in values.items()}


def _prepare(model: nn.Module, settings: TrainConfig) -> None:
    """Dropout off: the frozen log-probs were taken without it, so a round would not start at log 2."""
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
        model.activation_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]


def _snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors = {f"model/{name}": parameter.detach() for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer/{key}/{name}"] = torch.as_tensor(value)
    return tensors


def _restore(model: nn.Module, optimizer: torch.optim.Optimizer, state: tuple[int, dict[str, Tensor]] | None) -> int:
    if state is None:
        return 0
    step, tensors = state
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[f"model/{name}"])
            for key in {path.split("/", 2)[1] for path in tensors if path.startswith("optimizer/")}:
                value = tensors.get(f"optimizer/{key}/{name}")
                if value is not None:
                    optimizer.state[parameter][key] = value if key == "step" else value.to(parameter.device)
    return step
