"""Attention's own arithmetic by torch: sums over the keys that a query may see, and what learning on a CPU needs of them.

That is where it cannot be in C (`spans.py`): rows of up to `batching.SHORT` tokens are computed together (`Whole`); longer ones tile by tile (`Tiles`), each
against the keys that its queries may see.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparring.batching import Tile


def scores(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Attention [B, heads, Q, D] from [B, heads, Q, D], [B, key heads, K, D] and a bias [B, Q, K], 0 or −inf.

    Query heads that share a key head are taken together, so that keys are not copied.
    """
    rows, heads, size, width = query.shape
    shared = heads // key.shape[1]
    wide = (query * scale).reshape(rows, key.shape[1], shared * size, width)
    weights = torch.matmul(wide, key.transpose(-1, -2)).view(rows, key.shape[1], shared, size, -1)
    if softcap is not None:
        weights = torch.tanh(weights / softcap) * softcap
    weights = (weights + bias[:, None, None]).softmax(-1).view(rows, key.shape[1], shared * size, -1)
    return torch.matmul(weights, value).view(rows, heads, size, -1)


class Whole(torch.autograd.Function):
    """`scores` without a cap, for learning on a CPU: all queries of short rows together."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float) -> Tensor:
        rows, heads, size, width = query.shape
        query = (query * scale).reshape(rows, key.shape[1], -1, width)
        key, value = key.contiguous(), value.contiguous()
        weights = torch.matmul(query, key.transpose(-1, -2))
        weights.view(rows, -1, size, size).add_(bias[:, None])
        weights = weights.softmax(-1)
        ctx.save_for_backward(query, key, value, weights)
        ctx.scale = scale
        return torch.matmul(weights, value).view(rows, heads, size, -1)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, weights = ctx.saved_tensors
        grad = grads[0].reshape(*query.shape[:3], -1)
        of_value = torch.matmul(weights.transpose(-1, -2), grad)
        of_weights = torch.matmul(grad, value.transpose(-1, -2))
        of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)
        of_key = torch.matmul(of_scores.transpose(-1, -2), query)
        of_query = torch.matmul(of_scores, key).mul_(ctx.scale)
        return of_query.view(*grads[0].shape[:3], -1), of_key, of_value, None, None


class Seen(NamedTuple):
    """A tile of a row of tokens, and what its queries may see."""

    tile: Tile
    """Places in the whole row of rows."""
    first: int
    """Where its own row begins."""
    bias: Tensor
    """[queries, 1, last keys] with padding, 0 or −inf; all keys before those are seen."""
    keys: int
    """With padding."""

    def shape(self, shared: int) -> tuple[int, int]:
        return len(self.bias) * shared, self.keys

    def of(self, table: Tensor) -> Tensor:
        """Its keys [heads, K, D] of those [heads, N, D] of all, lying together; padding is whatever comes next."""
        (_, _, prompt, rest), first = self.tile, self.first
        if not prompt:
            return table[:, first : first + self.keys].contiguous()
        return torch.cat([table[:, first : first + prompt], table[:, rest : rest + self.keys - prompt]], 1)

    def add(self, table: Tensor, of_keys: Tensor) -> None:
        """The other way round."""
        (_, _, prompt, rest), first = self.tile, self.first
        if prompt:
            table[:, first : first + prompt] += of_keys[:, :prompt]
            table[:, rest : rest + self.keys - prompt] += of_keys[:, prompt:]
        else:
            table[:, first : first + self.keys] += of_keys


class Tiles(torch.autograd.Function):
    """`scores` without a cap, for learning on a CPU: tiles of long rows, one after the other, each in the cache.

    What is wide is written to the same place again and again, but for the weights that are kept for the backward pass;
    where they are not, they are made again. Queries, keys, values and the output are [N, heads, D]; gradients of keys
    and values, to which several tiles add, are summed in float32 or wider.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, seen: Sequence[Seen], scale: float, keep: bool
    ) -> Tensor:
        (tokens, heads, width), groups = query.shape, key.shape[1]
        shared, room = heads // groups, max(max(s.shape(1)) for s in seen)
        query = _apart(query, groups, room).view(groups, -1, width)
        key, value = _apart(key * scale, groups, room), _apart(value, groups, room)  # keys are fewer than queries
        out = value.new_empty(groups, tokens * shared, value.shape[-1])
        place, kept = _place(value, seen, shared), []
        again = place if keep else torch.empty_like(place)
        for s in seen:
            own, (at, end) = slice(s.tile.start * shared, s.tile.end * shared), s.shape(shared)
            weights = value.new_empty(groups, at, end) if keep else again[: groups * at * end].view(groups, at, end)
            _weigh(query, key, s, shared, place, weights)
            kept += [weights] * keep
            out[:, own] = torch.bmm(weights, s.of(value))[:, : own.stop - own.start]
        ctx.save_for_backward(query, key, value, *kept)
        ctx.seen, ctx.scale, ctx.shared = seen, scale, shared
        return _together(out.view(groups, tokens, -1), heads)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *kept = ctx.saved_tensors
        tokens, heads = grads[0].shape[:2]
        groups, shared, seen = len(key), ctx.shared, ctx.seen
        grad = _apart(grads[0], groups, key.shape[1] - tokens).view(groups, -1, value.shape[-1])
        of_query = query.new_empty(groups, tokens * shared, query.shape[-1])
        wide = torch.promote_types(key.dtype, torch.float32)
        of_key, of_value = torch.zeros_like(key, dtype=wide), torch.zeros_like(value, dtype=wide)
        places = [_place(value, seen, shared) for _ in range(2 if kept else 3)]
        for i, s in enumerate(seen):
            start, (at, end) = s.tile.start * shared, s.shape(shared)
            own = slice(start, s.tile.end * shared)
            of_weights, of_scores, *made = (p[: groups * at * end].view(groups, at, end) for p in places)
            weights = kept[i] if kept else _weigh(query, key, s, shared, places[0], made[0])
            queries, upstream = (x[:, start : start + at] for x in (query, grad))
            s.add(of_value, torch.bmm(weights.transpose(-1, -2), upstream))
            torch.bmm(upstream, s.of(value).transpose(-1, -2), out=of_weights)
            torch._softmax_backward_data(of_weights, weights, -1, weights.dtype, grad_input=of_scores)
            s.add(of_key, torch.bmm(of_scores.transpose(-1, -2), queries))
            of_query[:, own] = torch.bmm(of_scores, s.of(key))[:, : own.stop - own.start]
        found = of_query.view(groups, tokens, -1), of_key[:, :tokens].mul_(ctx.scale), of_value[:, :tokens]
        of = (_together(x.to(key.dtype), n) for x, n in zip(found, (heads, groups, groups), strict=True))
        return *of, None, None, None


def _apart(states: Tensor, groups: int, room: int) -> Tensor:
    """[N, heads, D] to [groups, N + room, heads / groups · D], zero behind N."""
    tokens = len(states)
    out = states.new_empty(groups, tokens + room, states[0].numel() // groups)
    out[:, :tokens] = states.reshape(tokens, groups, -1).transpose(0, 1)
    out[:, tokens:] = 0
    return out


def _together(states: Tensor, heads: int) -> Tensor:
    """[groups, N, heads / groups · D] to [N, heads, D]."""
    return states.transpose(0, 1).reshape(states.shape[1], heads, -1)


def _place(like: Tensor, seen: Sequence[Seen], shared: int) -> Tensor:
    return like.new_empty(max(math.prod(s.shape(shared)) for s in seen) * len(like))


def _weigh(query: Tensor, key: Tensor, seen: Seen, shared: int, place: Tensor, weights: Tensor) -> Tensor:
    """Attention weights of a tile [groups, queries · shared, keys], written to `weights` by way of `place`.

    Queries that are its padding are another tile's: their weights are zero, so that none of theirs is added to a gradient.
    """
    (groups, at, end), start = weights.shape, seen.tile.start * shared
    made = torch.bmm(
        query[:, start : start + at], seen.of(key).transpose(-1, -2), out=place[: weights.numel()].view_as(weights)
    )
    made.view(groups, -1, shared, end)[..., end - seen.bias.shape[-1] :].add_(seen.bias)
    torch.softmax(made, -1, out=weights)
    weights[:, seen.tile.end * shared - start :] = 0
    return weights
