"""The gradient of one optimizer batch: groups to tensors, the learner's log-probs, a method's loss."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sparring.attention import packed
from sparring.errors import SparringError
from sparring.logps import batches, packs_now, token_logps, token_outputs
from sparring.types import Batch, Frozen, Group, LogProbs


class Team(Protocol):
    """What a batch's gradient needs to know of the processes that share it (`sharding.Team`)."""

    @property
    def number(self) -> int: ...

    @property
    def size(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    def sum(self, values: Tensor) -> Tensor: ...

    def clip(self, parameters: Iterable[nn.Parameter], most: float) -> float: ...


class Objective(Protocol):
    """What training needs to know of a method."""

    @property
    def loss(self) -> Callable[[LogProbs, Batch], Tensor]: ...

    @property
    def metrics(self) -> Callable[[LogProbs, Batch], Mapping[str, Tensor]]: ...

    @property
    def coupled(self) -> bool: ...

    @property
    def needs(self) -> tuple[str, ...]: ...


@dataclass(frozen=True)
class Setting:
    """Where and how forward passes are made."""

    compute: torch.dtype | None = None
    """Autocast precision."""
    hide: int | None = None
    """A token hidden from attention (the released SPIN's inner end tokens)."""
    companions: Mapping[str, nn.Module] = field(default_factory=dict)
    """Frozen roles that stay in memory, for methods that need their logits."""
    extras: nn.Module | None = None
    """The method's own module, trained along."""
    team: Team | None = None
    """The processes that share the batch; None: this one has all of it."""


@dataclass(frozen=True)
class Gradient:
    """What one optimizer batch gave, its gradient left in the parameters."""

    loss: float
    """sum(weight * loss) / sum(weight)."""
    metrics: dict[str, float]
    """Weighted means."""
    tokens: int
    """Tokens of the groups, the prompt counted with every completion."""


def gradient(
    model: nn.Module,
    groups: Sequence[Group],
    frozen: Mapping[str, Sequence[Frozen]],
    objective: Objective,
    *,
    micro_batch: int,
    micro_tokens: int = 4096,
    setting: Setting = Setting(),
    keys: Sequence[int] = (),
) -> Gradient:
    """Accumulate the gradient of one optimizer batch; the split into micro-batches does not change it.

    Micro-batches hold groups of similar length, as many as have `micro_tokens` tokens but no more than `micro_batch`. A
    coupled objective is given the whole batch's log-probs, taken without a graph; their gradient is then carried through
    the model by micro-batches, which is exact and costs one more forward pass.
    Where processes share a batch, each is given all of it, takes its part, and makes as many passes as the others.
    """
    team = setting.team
    first = next(model.parameters())
    device, dtype = team.device if team else first.device, torch.promote_types(first.dtype, torch.float32)
    total = sum(group.weight for group in groups)
    order = sorted(range(len(groups)), key=lambda i: (_length(groups[i]), i))
    sizes = [len(group.prompt) + sum(map(len, group.completions)) for group in groups]

    def split(own: Sequence[int]) -> list[list[int]]:
        spans = batches([sizes[i] for i in own], [1] * len(own), micro_batch, micro_tokens)
        return [[own[at] for at in span] for span in spans]

    everyone = [split(own) for own in dealt(order, sizes, team.size if team else 1)]
    parts = everyone[team.number if team else 0]
    # Gathering parameters takes all processes: who has no part left takes a group along that does not count
    idle = [order[:1]] * (max(map(len, everyone)) - len(parts))

    def batch_of(rows: Sequence[int], counts: bool = True) -> tuple[list[Group], Batch]:
        held = {role: [table[i] for i in rows] for role, table in frozen.items()}
        chosen = [groups[i] if counts else replace(groups[i], weight=0.0) for i in rows]
        return chosen, collate(chosen, held, device, dtype, [keys[i] for i in rows] if keys else (), setting.extras)

    logits = "policy_logits" in objective.needs
    # Checkpointed layers are computed again in the backward pass, and must find the same attention then
    fast = packed_throughout(model, objective, setting)
    sums: dict[str, Tensor] = {}

    def account(policy: LogProbs, batch: Batch) -> None:
        share_B = batch.weight_B / total
        value = _total(share_B, objective.loss(policy, batch), "loss")
        value.backward()  # type: ignore[no-untyped-call]
        for name, figure in {"loss": value.detach(), **_means(share_B, objective.metrics(policy, batch))}.items():
            sums[name] = sums.get(name, torch.zeros((), dtype=figure.dtype, device=device)) + figure

    with packed(model) if fast else contextlib.nullcontext():
        if objective.coupled:
            _, batch = batch_of(order)
            place = {i: at for at, i in enumerate(order)}
            with torch.no_grad():
                leaf = torch.zeros(batch.tokens_BGT.shape, dtype=dtype, device=device)
                for rows in parts:
                    part, small = batch_of(rows)
                    got = policy_logps(model, part, small, setting).token_BGT
                    leaf[[place[i] for i in rows], : got.shape[1], : got.shape[2]] = got
                for rows in idle:
                    policy_logps(model, *batch_of(rows), setting)
            if team:
                team.sum(leaf)
            leaf.requires_grad_()
            account(LogProbs(leaf, batch.token_weight_BGT), batch)
            assert leaf.grad is not None
            for rows, counts in [*((rows, 1.0) for rows in parts), *((rows, 0.0) for rows in idle)]:
                part, small = batch_of(rows)
                again = policy_logps(model, part, small, setting).token_BGT
                upstream = leaf.grad[[place[i] for i in rows], : again.shape[1], : again.shape[2]]
                again.backward(upstream * counts)  # type: ignore[no-untyped-call]
        else:
            for rows, counts in [*((rows, True) for rows in parts), *((rows, False) for rows in idle)]:
                part, batch = batch_of(rows, counts)
                policy = policy_logps(model, part, batch, setting, logits=logits)
                if setting.companions:
                    with torch.no_grad():
                        beside = {
                            role: policy_logps(other, part, batch, setting, logits=True, hidden=True)
                            for role, other in setting.companions.items()
                        }
                    batch = replace(batch, frozen={**batch.frozen, **beside})
                account(policy, batch)
    if team and not objective.coupled:
        table = team.sum(torch.stack([value.to(torch.float64) for value in sums.values()]))
        sums = dict(zip(sums, table, strict=True))
        for parameter in setting.extras.parameters() if setting.extras is not None else ():
            if parameter.grad is not None:
                team.sum(parameter.grad)
    figures = {name: float(value) for name, value in sums.items()}
    tokens = sum(len(g.completions) * len(g.prompt) + sum(map(len, g.completions)) for g in groups)
    return Gradient(figures.pop("loss"), figures, tokens)


def packed_throughout(model: nn.Module, objective: Objective, setting: Setting) -> bool:
    """Whether all of a batch's log-probs take the fast path, and nothing else is asked of the model."""
    asked = setting.hide is not None or "policy_logits" in objective.needs or setting.companions
    return not asked and packs_now(model)


def dealt(order: Sequence[int], sizes: Sequence[int], hands: int) -> list[list[int]]:
    """Items to so many hands, the largest first and each to the one that has least, by `sizes`; `order` stays."""
    held, owner = [0] * hands, {}
    for i in sorted(order, key=lambda i: (-sizes[i], i)):
        owner[i] = held.index(min(held))
        held[owner[i]] += sizes[i]
    return [[i for i in order if owner[i] == hand] for hand in range(hands)]


def collate(
    groups: Sequence[Group],
    frozen: Mapping[str, Sequence[Frozen]],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    keys: Sequence[int] = (),
    extras: nn.Module | None = None,
) -> Batch:
    """Groups and their frozen log-probs, aligned, to a `Batch`; absent completions and tokens are masked."""
    size_G = max(len(g.completions) for g in groups)
    lengths = [[len(c) for c in g.completions] + [0] * (size_G - len(g.completions)) for g in groups]
    mask_BGT = torch.arange(max(map(max, lengths))) < torch.tensor(lengths)[..., None]

    def table(rows_BG: Sequence[Sequence[Sequence[Any]]], kind: torch.dtype) -> Tensor:
        # One flat list: torch reads it twice as fast as nested ones
        flat = torch.tensor([x for group in rows_BG for row in group for x in row], dtype=kind)
        return torch.zeros(mask_BGT.shape, dtype=kind).masked_scatter_(mask_BGT, flat).to(device)

    given = any(g.masks for g in groups)
    weights = table([g.masks or [[1.0] * len(c) for c in g.completions] for g in groups], dtype) if given else mask_BGT
    weight_BGT = weights.to(device, dtype)
    return Batch(
        tokens_BGT=table([g.completions for g in groups], torch.long),
        mask_BGT=mask_BGT.to(device),
        targets_BG=torch.tensor(
            [[*g.targets, *[0.0] * (size_G - len(g.targets))] for g in groups], dtype=dtype, device=device
        ),
        weight_B=torch.tensor([g.weight for g in groups], dtype=dtype, device=device),
        frozen={role: LogProbs(table([row.logps for row in rows], dtype), weight_BGT) for role, rows in frozen.items()},
        keys=tuple(keys),
        extras=extras,
        token_weight_BGT=weight_BGT,
    )


def policy_logps(
    model: nn.Module,
    groups: Sequence[Group],
    batch: Batch,
    setting: Setting,
    *,
    logits: bool = False,
    hidden: bool = False,
) -> LogProbs:
    """A model's log-probs of a batch's completions, [B, G, T]; with `logits` and `hidden` what they were made from."""
    where = [(b, g) for b, group in enumerate(groups) for g in range(len(group.completions))]
    prompts = [groups[b].prompt for b, _ in where]
    completions = [groups[b].completions[g] for b, g in where]
    index = torch.tensor(where, device=batch.tokens_BGT.device)

    def spread(rows: Tensor) -> Tensor:
        table = torch.zeros(*batch.tokens_BGT.shape, *rows.shape[2:], dtype=rows.dtype, device=rows.device)
        return table.index_put((index[:, 0], index[:, 1]), rows)

    if not (logits or hidden):
        rows = token_logps(model, prompts, completions, compute=setting.compute, hide=setting.hide)
        return LogProbs(spread(rows), batch.token_weight_BGT)
    out = token_outputs(model, prompts, completions, compute=setting.compute, hide=setting.hide, hidden=hidden)
    last = None if out.hidden is None else spread(out.hidden)
    return LogProbs(spread(out.logps), batch.token_weight_BGT, spread(out.logits), last)


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
